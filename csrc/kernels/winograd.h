// Exact integer Winograd F(2x2, 3x3): 16 products for 4 outputs instead of 36.
//
//   2x2 outputs = A^T [ (G g G^T) * (B^T d B) ] A        g: 3x3 weights, d: 4x4 inputs, *: by element
//
// Lavin and Gray, "Fast algorithms for convolutional neural networks" (2016), eq. (8). With 2 G in place of G
// everything is an integer and the outputs are 4 times what is wanted, which a shift undoes. At low widths
// the transformed numbers U = 4 G g G^T and V = B^T d B still fit a byte each, which is proved here from the
// grids.
//
// Every kernel that includes this gets its own copy, compiled for its instruction set.
#pragma once

#include "kernels/kernel.h"

namespace mixbits {
namespace {

constexpr int kG[4][3] = {{2, 0, 0}, {1, 1, 1}, {1, -1, 1}, {0, 0, 2}};
constexpr int kB[4][4] = {{1, 0, -1, 0}, {0, 1, 1, 0}, {0, -1, 1, 0}, {0, 1, 0, -1}};

struct Range {
  int low, high;
};

// Sums of what a position of a transform multiplies with, of each sign: all that its range depends on.
struct Position {
  int plus = 0, minus = 0;
  // Of results, where values are in a range.
  constexpr Range operator()(Range values) const {
    return {plus * values.low - minus * values.high, plus * values.high - minus * values.low};
  }
};

template <int kSize>
struct Positions {
  Position at[kSize * kSize];  // row by row

  template <int kTaps>
  explicit constexpr Positions(const int (&matrix)[kSize][kTaps]) : at{} {
    for (int i = 0; i < kSize * kSize; ++i) {
      for (const int row : matrix[i / kSize]) {
        for (const int column : matrix[i % kSize]) {
          const int by = row * column;
          (by > 0 ? at[i].plus : at[i].minus) += by > 0 ? by : -by;
        }
      }
    }
  }
};

constexpr Positions<4> kU(kG), kV(kB);

// Whether U fits a signed byte.
template <int kSize>
constexpr bool weights_fit(const Positions<kSize>& positions, Range values) {
  for (const Position& position : positions.at) {
    const Range u = position(values);
    if (u.low < -128 || u.high > 127) return false;
  }
  return true;
}

static_assert(weights_fit(kU, {-14, 14}) && !weights_fit(kU, {-15, 14}) && !weights_fit(kU, {-14, 15}));

// Of F(2x2, 3x3).
constexpr const char* kWeightsTooWide = "transformed weights need more than 8 bits: levels may span 28 steps";

// Weights as the transform gets them: level = step * q + middle.
struct Form {
  int step, middle;
  Range q;
};

// Levels as they are where they fit, else counted in steps from the middle one: then `middle` times the
// window's sum of bytes is added to every output.
template <int kSize>
constexpr Form form_of(const Conv& conv, const Positions<kSize>& positions) {
  if (weights_fit(positions, {conv.w_min, conv.w_max})) return {1, 0, {conv.w_min, conv.w_max}};
  const int step = conv.w_step == 2 ? 2 : 1;
  const int below = ((conv.w_max - conv.w_min) / step + 1) / 2;
  const int middle = conv.w_min + step * below;
  return {step, middle, {-below, (conv.w_max - middle) / step}};
}

constexpr int largest(int a, int b) {
  return (a < 0 ? -a : a) > (b < 0 ? -b : b) ? (a < 0 ? -a : a) : (b < 0 ? -b : b);
}

// The outputs' factor of 4, less what the steps of weights and inputs take of it; -1 if that is not a shift.
constexpr int shift_of(const Conv& conv, const Form& form) {
  const int factor = form.step * conv.a_scale;
  return factor == 1 ? 2 : factor == 2 ? 1 : factor == 4 ? 0 : -1;
}

// Why a convolution cannot be done so, but for the range of its inputs; or null.
const char* refuses_winograd(const Conv& conv, const Form& form) {
  if (conv.kh != 3 || conv.kw != 3) return "the window is not 3x3";
  if (conv.stride_y != 1 || conv.stride_x != 1) return "the stride is not 1";
  if (conv.dilation_y != 1 || conv.dilation_x != 1) return "the window is dilated";
  if (conv.groups != 1) return "it is grouped";
  const int shift = shift_of(conv, form);
  if (shift < 0) return "input levels are further apart than 2";
  // Sums wrap, so only what is shifted at the end has to fit 32 bits: the products and the constant.
  const double products = 1.0 * conv.a_scale * form.step * largest(form.q.low, form.q.high) * conv.a_max;
  const double constant = 1.0 * largest(conv.a_offset, 0) * largest(conv.w_min, conv.w_max);
  if ((products + constant) * 9 * conv.c * (1 << shift) >= 2147483648.0) return "sums are too large";
  return nullptr;
}

// Output rows of a job of about `block` tiles of `size` x `size` outputs, the same in all jobs.
int rows_of_tiles(const Conv& conv, int size, int block) {
  const int across = (conv.out_w + size - 1) / size, down = (conv.out_h + size - 1) / size;
  const int fit = across < block ? block / across : 1;
  const int jobs = (down + fit - 1) / fit;
  return size * ((down + jobs - 1) / jobs);
}

// U at a position, from its rows of G; `taps` are int16 [3][3].
int transform_weights(const std::int16_t* taps, const Form& form, const int (&row)[3],
                      const int (&column)[3]) {
  int u = 0;
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) u += row[i] * column[j] * ((taps[3 * i + j] - form.middle) / form.step);
  }
  return u;
}

// What the offset of the input's levels adds to an output, before the shift. Added to the product at row 1
// and column 1, which alone goes into all four outputs with factor 1, it is there. levels: int16 [c][3][3]
std::int32_t constant_of(const Conv& conv, const Form& form, const std::int16_t* levels) {
  std::int32_t sum = 0;
  for (int i = 0; i < 9 * conv.c; ++i) sum += levels[i];
  return conv.a_offset * sum * (1 << shift_of(conv, form));
}

// Where the inputs of a tile of kSize x kSize outputs are, and where its outputs go. A last tile of fewer
// outputs reads its last input row or column again in place of those that the map does not have, and what
// comes of it is dropped.
template <int kSize>
struct Tile {
  const std::uint8_t* input;
  std::ptrdiff_t rows_at[kSize + 2], columns_at[kSize + 2];  // bytes from the first
  std::ptrdiff_t pixel;                                      // of its first output, from the job's first
  int rows, columns;                                         // of outputs
};

template <int kSize>
constexpr int tiles_across(const Conv& conv) {
  return (conv.out_w + kSize - 1) / kSize;
}

template <int kSize>
Tile<kSize> tile_at(const Conv& conv, const Job& job, int number) {
  const int across = tiles_across<kSize>(conv);
  const int y = job.y0 + number / across * kSize, x = number % across * kSize;
  Tile<kSize> tile;
  tile.input = job.input + static_cast<std::ptrdiff_t>(y) * conv.row_bytes() +
               static_cast<std::ptrdiff_t>(x) * conv.pixel_stride;
  tile.pixel = static_cast<std::ptrdiff_t>(y - job.y0) * conv.out_w + x;
  tile.rows = job.y1 - y < kSize ? job.y1 - y : kSize;
  tile.columns = conv.out_w - x < kSize ? conv.out_w - x : kSize;
  for (int i = 0; i < kSize + 2; ++i) {
    const int row = i < tile.rows + 2 ? i : tile.rows + 1,
              column = i < tile.columns + 2 ? i : tile.columns + 1;
    tile.rows_at[i] = static_cast<std::ptrdiff_t>(row) * conv.row_bytes();
    tile.columns_at[i] = static_cast<std::ptrdiff_t>(column) * conv.pixel_stride;
  }
  return tile;
}

}  // namespace
}  // namespace mixbits
