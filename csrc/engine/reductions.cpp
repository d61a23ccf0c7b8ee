#include "engine/reductions.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "engine/loops.h"
#include "engine/vector.h"

namespace mixbits {
namespace {

// Results that are worked on at a time.
constexpr std::int64_t kResults = 128;
// Bytes that a 32-bit sum surely holds; beyond that it moves on to 64 bits.
constexpr std::int64_t kSafeBytes = 1 << 24;
// Independent partial sums of a line: enough to keep an adder busy.
constexpr int kPartials = 8;

// How elements are reduced: `Element` is what they are read as, `State` what a result is gathered in.
struct SumOfFloats {
  using Element = float;
  using State = double;
  static State first() { return 0; }
  static State join(State a, State b) { return a + b; }
};
struct MaxOfFloats {
  using Element = float;
  using State = float;
  static State first() { return -std::numeric_limits<float>::infinity(); }
  static State join(State a, State b) {  // passes NaN on
    const State most = a > b ? a : b;
    return a != a ? a : most;
  }
};
struct SumOfBytes {
  using Element = std::uint8_t;
  using State = std::uint32_t;
  static State first() { return 0; }
  static State join(State a, State b) { return a + b; }
};

// Elements as they are: bytes, or floats, which may have to be read from bytes.
const float* elements_at(const Tensor& tensor, std::int64_t at, std::int64_t stride, std::int64_t count,
                         float* buffer) {
  return floats_at(tensor, at, stride, count, buffer);
}
const std::uint8_t* elements_at(const Tensor& tensor, std::int64_t at, std::int64_t stride,
                                std::int64_t count, std::uint8_t* buffer) {
  if (stride == 1) return tensor.bytes() + at;
  for (std::int64_t i = 0; i < count; ++i) buffer[i] = tensor.bytes()[at + i * stride];
  return buffer;
}

template <class How>
typename How::State reduced_line(const typename How::Element* line, std::int64_t count) {
  typename How::State partial[kPartials];
  std::fill_n(partial, kPartials, How::first());
  std::int64_t i = 0;
  for (; i + kPartials <= count; i += kPartials) {
    for (int k = 0; k < kPartials; ++k) partial[k] = How::join(partial[k], line[i + k]);
  }
  for (; i < count; ++i) partial[0] = How::join(partial[0], line[i]);
  for (int half = kPartials / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) partial[k] = How::join(partial[k], partial[k + half]);
  }
  return partial[0];
}

// Reduces the elements that `over` visits from `at` on, for `count` results that lie `stride` apart: line
// after line of each result, or `across` the results, element after element. Calls `settle(states)` when a
// state can hold no more, and at the end.
template <class How, class Settle>
void gather(const Tensor& input, std::int64_t at, std::int64_t stride, std::int64_t count,
            const Loops<1>& over, bool across, Settle settle) {
  using Element = typename How::Element;
  alignas(64) typename How::State states[kResults];
  alignas(64) Element buffer[kChunk];
  std::fill_n(states, count, How::first());
  std::int64_t gathered = 0;
  const auto gathers = [&](std::int64_t elements) {
    if (gathered + elements > kSafeBytes) {
      settle(states);
      std::fill_n(states, count, How::first());
      gathered = 0;
    }
    gathered += elements;
  };
  const std::int64_t line = over.shape[over.rank - 1], line_stride = over.strides[0][over.rank - 1];
  for_lines(over, [&](const std::int64_t (&start)[1]) {
    if (!across) {
      for (std::int64_t done = 0; done < line; done += kChunk) {
        const std::int64_t length = std::min(kChunk, line - done);
        gathers(length);
        for (std::int64_t i = 0; i < count; ++i) {
          const std::int64_t from = at + i * stride + start[0] + done * line_stride;
          const Element* elements = elements_at(input, from, line_stride, length, buffer);
          states[i] = How::join(states[i], reduced_line<How>(elements, length));
        }
      }
    } else {
      for (std::int64_t k = 0; k < line; ++k) {
        gathers(1);
        const Element* elements = elements_at(input, at + start[0] + k * line_stride, stride, count, buffer);
        for (std::int64_t i = 0; i < count; ++i) states[i] = How::join(states[i], elements[i]);
      }
    }
  });
  settle(states);
}

// Means of levels: float(sum) * float(step / count).
void mean_of_bytes(const Tensor& input, std::int64_t at, std::int64_t stride, std::int64_t count,
                   const Loops<1>& over, bool across, std::int64_t elements, float* results) {
  std::int64_t totals[kResults] = {};
  gather<SumOfBytes>(input, at, stride, count, over, across, [&](const std::uint32_t* sums) {
    for (std::int64_t i = 0; i < count; ++i) totals[i] += sums[i];
  });
  const auto factor = static_cast<float>(static_cast<double>(input.step) / static_cast<double>(elements));
  for (std::int64_t i = 0; i < count; ++i) {
    results[i] = static_cast<float>(input.scale * totals[i] + input.offset * elements) * factor;
  }
}

// A subset of a tensor's dimensions, in row order, as a tensor.
Tensor only(const Tensor& tensor, unsigned dims) {
  Tensor view = tensor;
  view.rank = 0;
  for (int dim = 0; dim < tensor.rank; ++dim) {
    if ((dims >> dim & 1) == 0) continue;
    view.shape[view.rank] = tensor.shape[dim];
    view.strides[view.rank++] = tensor.strides[dim];
  }
  return view;
}

double sum_of(const double* line, std::int64_t count) {
  double partial[kPartials] = {};
  std::int64_t i = 0;
  for (; i + kPartials <= count; i += kPartials) {
    for (int k = 0; k < kPartials; ++k) partial[k] += line[i + k];
  }
  for (; i < count; ++i) partial[0] += line[i];
  for (int half = kPartials / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) partial[k] += partial[k + half];
  }
  return partial[0];
}

// Reads dimensions [first, rank) from offset `at` on, in row order.
void read_block(const Tensor& tensor, int first, std::int64_t at, double* block) {
  const int last = tensor.rank - 1;
  const std::int64_t length = tensor.shape[last];
  std::int64_t lines = 1;
  for (int dim = first; dim < last; ++dim) lines *= tensor.shape[dim];
  for (std::int64_t line = 0; line < lines; ++line) {
    read(tensor, at + offset_of(tensor, first, last, line), tensor.strides[last], length,
         block + line * length);
  }
}

void write_block(const double* block, const Tensor& tensor, int first, std::int64_t at) {
  const int last = tensor.rank - 1;
  const std::int64_t length = tensor.shape[last], stride = tensor.strides[last];
  std::int64_t lines = 1;
  for (int dim = first; dim < last; ++dim) lines *= tensor.shape[dim];
  for (std::int64_t line = 0; line < lines; ++line) {
    float* to = static_cast<float*>(tensor.data) + at + offset_of(tensor, first, last, line);
    for (std::int64_t i = 0; i < length; ++i) to[i * stride] = static_cast<float>(block[line * length + i]);
  }
}

// Mean 0 and variance 1.
void normalize(double* block, std::int64_t count, double eps) {
  const auto elements = static_cast<double>(count);
  const double mean = sum_of(block, count) / elements;
  double squares[kPartials] = {};
  for (std::int64_t i = 0; i < count; ++i) block[i] -= mean;
  std::int64_t i = 0;
  for (; i + kPartials <= count; i += kPartials) {
    for (int k = 0; k < kPartials; ++k) squares[k] += block[i + k] * block[i + k];
  }
  for (; i < count; ++i) squares[0] += block[i] * block[i];
  const double deviation = std::sqrt(sum_of(squares, kPartials) / elements + eps);
  for (i = 0; i < count; ++i) block[i] /= deviation;
}

}  // namespace

void reduce(Reduction reduction, const Tensor& input, const Tensor& output, unsigned dims, Part part) {
  const Tensor reduced = only(input, dims), kept = only(input, ~dims), results = only(output, ~dims);
  const auto over = loops_over<1>({&reduced});
  auto loops = loops_over<2>({&kept, &results}, 0, 0, kept.rank);
  const int line = loops.rank - 1;
  const std::int64_t stride = loops.strides[0][line], to = loops.strides[1][line];
  // In the order of memory. It decides the order of summation, so it is not to depend on the part.
  const bool across = loops.shape[line] > 1 && std::abs(stride) <= std::abs(over.strides[0][over.rank - 1]);
  confine(loops, part);
  const std::int64_t elements = reduced.elements();
  for_lines(loops, [&](const std::int64_t (&at)[2]) {
    for (std::int64_t done = 0; done < loops.shape[line]; done += kResults) {
      const std::int64_t count = std::min(kResults, loops.shape[line] - done);
      const std::int64_t from = at[0] + done * stride;
      float values[kResults];
      if (reduction == Reduction::max) {
        std::fill_n(values, count, MaxOfFloats::first());
        gather<MaxOfFloats>(input, from, stride, count, over, across, [&](const float* states) {
          for (std::int64_t i = 0; i < count; ++i) values[i] = MaxOfFloats::join(values[i], states[i]);
        });
      } else if (reduction == Reduction::mean && input.is_byte()) {
        mean_of_bytes(input, from, stride, count, over, across, elements, values);
      } else {
        const auto factor =
            reduction == Reduction::mean ? static_cast<float>(1 / static_cast<double>(elements)) : 1;
        double totals[kResults] = {};
        gather<SumOfFloats>(input, from, stride, count, over, across, [&](const double* sums) {
          for (std::int64_t i = 0; i < count; ++i) totals[i] += sums[i];
        });
        for (std::int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(totals[i]) * factor;
      }
      write(values, static_cast<float*>(output.data) + at[1] + done * to, to, count);
    }
  });
}

void softmax(const Tensor& input, const Tensor& output, int dim, bool logarithm, std::byte* scratch,
             Part part) {
  const Tensor from = only(input, ~(1U << dim)), to = only(output, ~(1U << dim));
  auto loops = loops_over<2>({&from, &to});
  confine(loops, part);
  const std::int64_t length = input.shape[dim];
  auto* line = reinterpret_cast<double*>(scratch);
  const VectorLoops& wide = vector_loops();
  const auto one = [&](std::int64_t at, std::int64_t target) {
    read(input, at, input.strides[dim], length, line);
    float* out = static_cast<float*>(output.data) + target;
    const std::int64_t stride = output.strides[dim];
    if (logarithm) {
      const double log_sum = std::log(wide.softmax_sum(length, line));
      for (std::int64_t i = 0; i < length; ++i) out[i * stride] = static_cast<float>(line[i] - log_sum);
    } else {
      wide.softmax(length, line);
      for (std::int64_t i = 0; i < length; ++i) out[i * stride] = static_cast<float>(line[i]);
    }
  };
  const int last = loops.rank - 1;
  for_lines(loops, [&](const std::int64_t (&at)[2]) {
    for (std::int64_t i = 0; i < loops.shape[last]; ++i) {
      one(at[0] + i * loops.strides[0][last], at[1] + i * loops.strides[1][last]);
    }
  });
}

void layer_norm(const Tensor& input, const Tensor& output, int dims, const float* weight, const float* bias,
                double eps, std::byte* scratch, Part part) {
  const int first = input.rank - dims;
  std::int64_t blocks = 1, length = 1;
  for (int dim = 0; dim < input.rank; ++dim) (dim < first ? blocks : length) *= input.shape[dim];
  auto* block = reinterpret_cast<double*>(scratch);
  for (std::int64_t b = part.begin(blocks); b < part.end(blocks); ++b) {
    read_block(input, first, offset_of(input, 0, first, b), block);
    normalize(block, length, eps);
    if (weight != nullptr) {
      for (std::int64_t i = 0; i < length; ++i) block[i] *= weight[i];
    }
    if (bias != nullptr) {
      for (std::int64_t i = 0; i < length; ++i) block[i] += bias[i];
    }
    write_block(block, output, first, offset_of(output, 0, first, b));
  }
}

void group_norm(const Tensor& input, const Tensor& output, std::int64_t groups, const float* weight,
                const float* bias, double eps, std::byte* scratch, Part part) {
  const std::int64_t channels = input.shape[1] / groups, blocks = input.shape[0] * groups;
  std::int64_t each = 1;  // elements of a channel
  for (int dim = 2; dim < input.rank; ++dim) each *= input.shape[dim];
  auto* block = reinterpret_cast<double*>(scratch);
  Tensor from = input, to = output;
  from.shape[1] = to.shape[1] = channels;
  for (std::int64_t b = part.begin(blocks); b < part.end(blocks); ++b) {
    const std::int64_t image = b / groups, channel = b % groups * channels;
    read_block(from, 1, image * input.strides[0] + channel * input.strides[1], block);
    normalize(block, channels * each, eps);
    for (std::int64_t c = 0; c < channels; ++c) {
      double* values = block + c * each;
      if (weight != nullptr) {
        for (std::int64_t i = 0; i < each; ++i) values[i] *= weight[channel + c];
      }
      if (bias != nullptr) {
        for (std::int64_t i = 0; i < each; ++i) values[i] += bias[channel + c];
      }
    }
    write_block(block, to, 1, image * output.strides[0] + channel * output.strides[1]);
  }
}

}  // namespace mixbits
