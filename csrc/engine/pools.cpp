#include "engine/pools.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <type_traits>

#include "engine/loops.h"
#include "engine/vector.h"

namespace mixbits {
namespace {

// Lanes (channels) that are worked on at a time.
constexpr int kLanes = 256;
// Bytes that a 32-bit sum surely holds; beyond that it moves on to 64 bits.
constexpr std::int64_t kSafeBytes = 1 << 24;

// A range of input elements first, first + step, ... of `count` in one dimension.
struct Range {
  std::int64_t first, count, step;
};

// The elements of window `index` that lie inside.
Range inside(std::int64_t index, std::int64_t size, std::int64_t kernel, std::int64_t stride,
             std::int64_t padding, std::int64_t dilation) {
  const std::int64_t start = index * stride - padding;
  const std::int64_t skipped = start < 0 ? (-start + dilation - 1) / dilation : 0;
  const std::int64_t first = start + skipped * dilation;
  const std::int64_t room = size > first ? (size - 1 - first) / dilation + 1 : 0;
  return {first, std::max<std::int64_t>(std::min(kernel - skipped, room), 0), dilation};
}

// Window `index` of `count` that cover everything (runtime/moves.py, adaptive_windows).
Range covering(std::int64_t index, std::int64_t size, std::int64_t count) {
  const std::int64_t first = index * size / count;
  return {first, ((index + 1) * size + count - 1) / count - first, 1};
}

// A map of lanes: the two dimensions that windows slide over (the first of size one if there is only one) and
// of the others the one that is innermost in memory, along which `lanes` elements are worked on at a time.
struct Map {
  std::int64_t size[2];
  std::int64_t strides[2];
  std::int64_t lane_stride;
  Tensor others;  // the dimensions that are left
};

Map map_of(const Tensor& tensor, int dims, int lane) {
  Map map{.size = {1, tensor.shape[tensor.rank - 1]},
          .strides = {0, tensor.strides[tensor.rank - 1]},
          .lane_stride = tensor.strides[lane],
          .others = tensor};
  if (dims == 2) {
    map.size[0] = tensor.shape[tensor.rank - 2];
    map.strides[0] = tensor.strides[tensor.rank - 2];
  }
  map.others.rank = tensor.rank - dims;
  map.others.shape[lane] = 1;
  return map;
}

// The dimension whose elements are the lanes: in front of the windows', innermost in memory.
int lane_of(const Tensor& tensor, int dims) {
  int lane = tensor.rank - dims - 1;
  for (int dim = lane; dim >= 0; --dim) {
    if (tensor.shape[dim] > 1 &&
        (tensor.shape[lane] == 1 || std::abs(tensor.strides[dim]) < std::abs(tensor.strides[lane]))) {
      lane = dim;
    }
  }
  return lane;
}

// Calls `pixel(from, to, lanes, y, x)` for every output pixel (y, x) and up to kLanes lanes at a time: `from`
// is the offset of input pixel (0, 0) of the first lane, `to` that of the output pixel.
template <class Pixel>
void for_pixels(const Tensor& input, const Tensor& output, int dims, Part part, Pixel pixel) {
  const int lane = lane_of(input, dims);
  const Map in = map_of(input, dims, lane), out = map_of(output, dims, lane);
  const std::int64_t lanes = input.shape[lane], rows = out.others.elements() * out.size[0];
  const bool by_row = rows >= part.count;  // else threads share the lanes
  const Part row_part = by_row ? part : Part{}, lane_part = by_row ? Part{} : part;
  const std::int64_t last_lane = lane_part.end(lanes);
  for (std::int64_t row = row_part.begin(rows); row < row_part.end(rows); ++row) {
    const std::int64_t y = row % out.size[0], other = row / out.size[0];
    const std::int64_t from = offset_of(in.others, 0, in.others.rank, other);
    const std::int64_t to = offset_of(out.others, 0, out.others.rank, other) + y * out.strides[0];
    for (std::int64_t first = lane_part.begin(lanes); first < last_lane; first += kLanes) {
      const int count = static_cast<int>(std::min<std::int64_t>(kLanes, last_lane - first));
      for (std::int64_t x = 0; x < out.size[1]; ++x) {
        pixel(from + first * in.lane_stride, to + first * out.lane_stride + x * out.strides[1], count, y, x);
      }
    }
  }
}

// Calls `group(lines, count)` with the addresses of the input pixels of a window, up to kLines at a time.
constexpr int kLines = 12;
template <class T, class Group>
void for_window(const T* origin, const Map& map, const Range& ys, const Range& xs, Group group) {
  const T* lines[kLines];
  int count = 0;
  for (std::int64_t y = 0; y < ys.count; ++y) {
    const T* row = origin + (ys.first + y * ys.step) * map.strides[0] + xs.first * map.strides[1];
    for (std::int64_t x = 0; x < xs.count; ++x) {
      lines[count++] = row + x * xs.step * map.strides[1];
      if (count == kLines) {
        group(lines, count);
        count = 0;
      }
    }
  }
  if (count > 0) group(lines, count);
}

float larger(float a, float b) {  // passes NaN on, as NumPy does
  const float most = a > b ? a : b;
  return a != a ? a : most;
}
std::uint8_t larger(std::uint8_t a, std::uint8_t b) { return a > b ? a : b; }

template <class T>
void max_of(const VectorLoops& loops, T* most, const T* const* lines, int count, std::int64_t stride,
            int lanes) {
  if (stride != 1) {
    for (int k = 0; k < count; ++k) {
      for (int i = 0; i < lanes; ++i) most[i] = larger(most[i], lines[k][i * stride]);
    }
  } else if constexpr (std::is_same_v<T, float>) {
    loops.max_floats(lines, count, lanes, most);
  } else {
    loops.max_bytes(lines, count, lanes, most);
  }
}

template <class T, class RangeOf>
void max_windows(const Tensor& input, const Tensor& output, int dims, T lowest, Part part, RangeOf range) {
  const VectorLoops& loops = vector_loops();
  const Map in = map_of(input, dims, lane_of(input, dims)), out = map_of(output, dims, lane_of(input, dims));
  for_pixels(input, output, dims, part,
             [&](std::int64_t from, std::int64_t to, int lanes, std::int64_t y, std::int64_t x) {
               alignas(64) T buffer[kLanes];
               T* target = static_cast<T*>(output.data) + to;
               T* most = out.lane_stride == 1 ? target : buffer;
               std::fill_n(most, lanes, lowest);
               for_window(static_cast<const T*>(input.data) + from, in, range(0, y), range(1, x),
                          [&](const T* const* lines, int count) {
                            max_of(loops, most, lines, count, in.lane_stride, lanes);
                          });
               if (out.lane_stride != 1) write(buffer, target, out.lane_stride, lanes);
             });
}

template <class RangeOf>
void max_of_type(const Tensor& input, const Tensor& output, int dims, Part part, RangeOf range) {
  if (input.is_byte()) {
    max_windows<std::uint8_t>(input, output, dims, input.lowest, part, range);
  } else {
    max_windows<float>(input, output, dims, -std::numeric_limits<float>::infinity(), part, range);
  }
}

template <class T, class Sum>
void add(Sum* sums, const T* const* lines, int count, std::int64_t stride, int lanes) {
  if (stride != 1) {
    for (int k = 0; k < count; ++k) {
      for (int i = 0; i < lanes; ++i) sums[i] += lines[k][i * stride];
    }
    return;
  }
  int k = 0;
  for (; k + 3 <= count; k += 3) {  // three for one load and store of the sums
    const T *a = lines[k], *b = lines[k + 1], *c = lines[k + 2];
    for (int i = 0; i < lanes; ++i) sums[i] = sums[i] + a[i] + b[i] + c[i];
  }
  for (; k < count; ++k) {
    const T* a = lines[k];
    for (int i = 0; i < lanes; ++i) sums[i] += a[i];
  }
}

// Means, float(sum) * float(step / count), of windows whose number of elements `count(y, x)` says.
template <class RangeOf, class Count>
void mean_windows(const Tensor& input, const Tensor& output, int dims, Part part, RangeOf range,
                  Count count_of) {
  const Map in = map_of(input, dims, lane_of(input, dims)), out = map_of(output, dims, lane_of(input, dims));
  for_pixels(
      input, output, dims, part,
      [&](std::int64_t from, std::int64_t to, int lanes, std::int64_t y, std::int64_t x) {
        const Range ys = range(0, y), xs = range(1, x);
        float* target = static_cast<float*>(output.data) + to;
        if (input.is_byte()) {
          alignas(64) std::uint32_t sums[kLanes];
          alignas(64) std::int64_t totals[kLanes];
          std::fill_n(sums, lanes, 0);
          std::fill_n(totals, lanes, 0);
          std::int64_t summed = 0;
          const auto settle = [&] {
            for (int i = 0; i < lanes; ++i) totals[i] += sums[i];
          };
          for_window(input.bytes() + from, in, ys, xs, [&](const std::uint8_t* const* lines, int count) {
            add(sums, lines, count, in.lane_stride, lanes);
            summed += count;
            if (summed >= kSafeBytes) {
              settle();
              std::fill_n(sums, lanes, 0);
              summed = 0;
            }
          });
          settle();
          const auto factor =
              static_cast<float>(static_cast<double>(input.step) / static_cast<double>(count_of(y, x)));
          const std::int64_t offset = input.offset * ys.count * xs.count;
          for (int i = 0; i < lanes; ++i) {
            target[i * out.lane_stride] = static_cast<float>(input.scale * totals[i] + offset) * factor;
          }
        } else {
          alignas(64) double sums[kLanes];
          std::fill_n(sums, lanes, 0);
          for_window(input.floats() + from, in, ys, xs, [&](const float* const* lines, int count) {
            add(sums, lines, count, in.lane_stride, lanes);
          });
          const auto factor = static_cast<float>(1 / static_cast<double>(count_of(y, x)));
          for (int i = 0; i < lanes; ++i) {
            target[i * out.lane_stride] = static_cast<float>(sums[i]) * factor;
          }
        }
      });
}

// Where the windows lie: what max_windows and mean_windows ask for.
auto inside_of(const Windows& windows, const Map& in) {
  // With one dimension the first is a single row, which its window covers.
  return [=](int which, std::int64_t index) -> Range {
    if (windows.dims == 1 && which == 0) return {0, 1, 1};
    const int dim = which - (2 - windows.dims);
    return inside(index, in.size[which], windows.kernel[dim], windows.stride[dim], windows.padding[dim],
                  windows.dilation[dim]);
  };
}

auto covering_of(const Map& in, const Map& out) {
  return [=](int which, std::int64_t index) { return covering(index, in.size[which], out.size[which]); };
}

// The two neighbours of an output position and their shares (runtime/reductions.py, _interpolation).
struct Neighbours {
  std::int64_t low, high;
  double low_share, high_share;
};

Neighbours neighbours(std::int64_t index, std::int64_t size, std::int64_t wanted, bool align_corners) {
  const auto real = static_cast<double>(index);
  double position;
  if (align_corners) {
    position = real * (wanted > 1 ? static_cast<double>(size - 1) / static_cast<double>(wanted - 1) : 0.0);
  } else {
    position = (real + 0.5) * (static_cast<double>(size) / static_cast<double>(wanted)) - 0.5;
    position = position > 0 ? position : 0;
  }
  const auto low = std::min(static_cast<std::int64_t>(position), size - 1);
  const double share = position - static_cast<double>(low);
  if (low + 1 < size) return {low, low + 1, 1 - share, share};
  return {low, low, 1 - share + share, 0};
}

}  // namespace

std::int64_t window_count(std::int64_t size, std::int64_t kernel, std::int64_t stride, std::int64_t padding,
                          std::int64_t dilation, bool ceil) {
  const std::int64_t room = size + 2 * padding - dilation * (kernel - 1) - 1;
  if (room < 0 && (!ceil || -room >= stride)) return 0;
  const std::int64_t count = (ceil ? (room + stride - 1) / stride : room / stride) + 1;
  return ceil && (count - 1) * stride >= size + padding ? count - 1 : count;
}

void max_pool(const Tensor& input, const Tensor& output, const Windows& windows, Part part) {
  const Map in = map_of(input, windows.dims, lane_of(input, windows.dims));
  max_of_type(input, output, windows.dims, part, inside_of(windows, in));
}

void adaptive_max_pool(const Tensor& input, const Tensor& output, int dims, Part part) {
  const int lane = lane_of(input, dims);
  max_of_type(input, output, dims, part, covering_of(map_of(input, dims, lane), map_of(output, dims, lane)));
}

void avg_pool(const Tensor& input, const Tensor& output, const Windows& windows, bool include_pad,
              std::int64_t divisor, Part part) {
  const Map in = map_of(input, windows.dims, lane_of(input, windows.dims));
  const auto elements = [&](int which, std::int64_t index) -> std::int64_t {
    if (windows.dims == 1 && which == 0) return 1;
    const int dim = which - (2 - windows.dims);
    const std::int64_t start = index * windows.stride[dim] - windows.padding[dim];
    const std::int64_t margin = include_pad ? windows.padding[dim] : 0;
    return std::min(start + windows.kernel[dim], in.size[which] + margin) - std::max(start, -margin);
  };
  mean_windows(input, output, windows.dims, part, inside_of(windows, in),
               [&](std::int64_t y, std::int64_t x) {
                 return divisor != 0 ? divisor : std::max<std::int64_t>(elements(0, y) * elements(1, x), 1);
               });
}

void adaptive_avg_pool(const Tensor& input, const Tensor& output, int dims, Part part) {
  const int lane = lane_of(input, dims);
  const auto range = covering_of(map_of(input, dims, lane), map_of(output, dims, lane));
  mean_windows(input, output, dims, part, range,
               [&](std::int64_t y, std::int64_t x) { return range(0, y).count * range(1, x).count; });
}

void upsample_bilinear(const Tensor& input, const Tensor& output, bool align_corners, Part part) {
  const int lane = lane_of(input, 2);
  const Map in = map_of(input, 2, lane), out = map_of(output, 2, lane);
  for_pixels(input, output, 2, part,
             [&](std::int64_t from, std::int64_t to, int lanes, std::int64_t y, std::int64_t x) {
               const Neighbours row = neighbours(y, in.size[0], out.size[0], align_corners);
               const Neighbours column = neighbours(x, in.size[1], out.size[1], align_corners);
               alignas(64) float buffers[4][kLanes];
               const auto pixel = [&](std::int64_t at_y, std::int64_t at_x, float* buffer) {
                 const std::int64_t at = from + at_y * in.strides[0] + at_x * in.strides[1];
                 return floats_at(input, at, in.lane_stride, lanes, buffer);
               };
               const float* a = pixel(row.low, column.low, buffers[0]);
               const float* b = pixel(row.high, column.low, buffers[1]);
               const float* c = pixel(row.low, column.high, buffers[2]);
               const float* d = pixel(row.high, column.high, buffers[3]);
               float* target = static_cast<float*>(output.data) + to;
               for (int i = 0; i < lanes; ++i) {
                 const double left = row.low_share * a[i] + row.high_share * b[i];
                 const double right = row.low_share * c[i] + row.high_share * d[i];
                 target[i * out.lane_stride] =
                     static_cast<float>(left * column.low_share + right * column.high_share);
               }
             });
}

}  // namespace mixbits
