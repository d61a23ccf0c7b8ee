// The loops that are worth wider registers than every CPU has: compiled once for each instruction set, from
// one source (vector_loops.h), of which the widest that this CPU has is taken. All give the same bits: no
// operation is fused or reordered.
#pragma once

#include <cstdint>

namespace mixbits {

// Columns of a packed panel, and rows of a tile, of `product`.
inline constexpr int kPanelColumns = 8, kPanelRows = 4;

struct VectorLoops {
  // y[i] from x[i], float32 in and out, computed in double and rounded once. `y` may be `x`.
  using Function = void (*)(std::int64_t count, const float* x, float* y);
  Function exp, mish, sigmoid, silu, tanh, gelu_erf, gelu_tanh;

  // Of a line of `count` > 0 doubles: x[i] becomes exp(x[i] - m) over the sum of all of them, with m the
  // largest x[i].
  void (*softmax)(std::int64_t count, double* x);
  // That sum; x[i] becomes x[i] - m.
  double (*softmax_sum)(std::int64_t count, double* x);

  // out[r * ld + j] = sum over i, in order, of a[i][r] * b[i][j]: `a` is [depth][kPanelRows], `b` panels
  // [columns / kPanelColumns][depth][kPanelColumns].
  void (*product)(const double* a, const double* b, std::int64_t depth, std::int64_t columns, double* out,
                  std::int64_t ld);

  // most[i] = max(most[i], lines[0][i], ..., lines[count - 1][i]); NaN goes on.
  void (*max_bytes)(const std::uint8_t* const* lines, int count, std::int64_t lanes, std::uint8_t* most);
  void (*max_floats)(const float* const* lines, int count, std::int64_t lanes, float* most);
};

const VectorLoops& vector_loops();

}  // namespace mixbits
