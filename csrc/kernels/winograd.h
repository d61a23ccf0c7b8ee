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

constexpr int tiles_x(const Conv& conv) { return (conv.out_w + 1) / 2; }
constexpr int tiles_y(const Conv& conv) { return (conv.out_h + 1) / 2; }

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

// Rows of a job whose tiles are about `block`, the same in all jobs.
int rows_of_tiles(const Conv& conv, int block) {
  const int fit = tiles_x(conv) < block ? block / tiles_x(conv) : 1;
  const int jobs = (tiles_y(conv) + fit - 1) / fit;
  return 2 * ((tiles_y(conv) + jobs - 1) / jobs);
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

// Where a tile's 4x4 inputs are and its outputs go. An odd size's last tile has no fourth row or column of
// inputs: it reads the third twice, and what comes of it is dropped.
struct Tile {
  const std::uint8_t* input;
  std::ptrdiff_t row3, column3;
  std::ptrdiff_t pixel;  // of its first output, from the job's first
  bool two_rows, two_columns;
};

Tile tile_at(const Conv& conv, const Job& job, int tile) {
  const int y = job.y0 + tile / tiles_x(conv) * 2, x = tile % tiles_x(conv) * 2;
  return {job.input + static_cast<std::ptrdiff_t>(y) * conv.row_bytes() +
              static_cast<std::ptrdiff_t>(x) * conv.pixel_stride,
          static_cast<std::ptrdiff_t>(y + 3 < conv.in_h ? 3 : 2) * conv.row_bytes(),
          static_cast<std::ptrdiff_t>(x + 3 < conv.in_w ? 3 : 2) * conv.pixel_stride,
          static_cast<std::ptrdiff_t>(y - job.y0) * conv.out_w + x,
          y + 1 < job.y1,
          x + 1 < conv.out_w};
}

}  // namespace
}  // namespace mixbits
