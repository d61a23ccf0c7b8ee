// What follows a layer's integer sums, in one pass over a strip that is still in cache: scale, bias, a
// residual, limits, and rounding onto the grids that its readers want. Also rounding of floats on their own.
//
//   value = float(acc) * scale[o] + bias[o]  (+ residual)         each operation rounded to float32 by itself
//   value = min(max(value, low), high)
//   byte  = storage of the level nearest to value / step          core/grid.py, quantize
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/isa.h"

namespace mixbits {

// A grid to round onto, and the byte in which each of its codes is stored.
struct Rounding {
  enum Kind : std::uint8_t { even, odd, edges } kind = even;  // every integer, every second one, a codebook
  float step = 1;
  float inverse = 1;  // nearest to 1 / step
  bool finite =
      false;  // infinite values are refused like what is not a number (where floats are rounded alone)
  bool divide = true;  // else value * inverse, corrected once, was shown to give the same codes
  float level_min = 0;
  float low = 0, high = 0;  // the first and the last level: values beyond have their codes
  int last = 0;             // largest code
  int byte_step = 1;        // byte = code * byte_step, or of a codebook:
  std::uint8_t bytes[256] = {};
  float thresholds[255] = {};  // edges of a codebook, in steps
  // Of a uniform grid with few codes: the least values that have code 1, 2, ...
  static constexpr int kFew = 3;
  float reached[kFew] = {};
};

struct ByteMap {
  std::uint8_t* data = nullptr;  // of pixel (0, 0)
  std::ptrdiff_t row = 0, pixel = 0;
  Rounding rounding;
};

inline constexpr int kByteMaps = 4;

struct Finish {
  const float* scale = nullptr;  // [o rounded up to 16], aligned to 64, as is bias
  const float* bias = nullptr;

  enum Residual : std::uint8_t { none, bytes, floats } residual_kind = none;
  const void* residual = nullptr;  // of pixel (0, 0); strides in elements
  std::ptrdiff_t residual_row = 0, residual_pixel = 0;
  float residual_step = 1;  // of bytes: value = float(scale * byte + offset) * step
  int residual_scale = 1, residual_offset = 0;

  bool limited = false;
  float low = 0, high = 0;
  bool always_numbers = false;  // scale, bias and residual are finite: no value can be anything but a number

  float* floats_out = nullptr;  // of pixel (0, 0), or null; strides in elements
  std::ptrdiff_t floats_row = 0, floats_pixel = 0;

  int byte_maps = 0;
  ByteMap maps[kByteMaps];
};

// Rows [y0, y1) of `width` pixels, channels [o0, o1): sums acc[(y - y0) * width + x][o - o0], rows of `ld`.
struct Strip {
  const std::int32_t* acc;
  int ld;
  int y0, y1, width;
  int o0, o1;
  int outputs;  // channels of the layer: behind the last one, bytes up to `fill` are set to 0
  int fill;
};

struct Finisher {
  Isa isa;
  // False if a value that was to be rounded is not a number.
  bool (*finish)(const Finish&, const Strip&);
  bool (*round)(const Rounding&, const float* values, std::size_t count, std::uint8_t* bytes);
};

extern const Finisher kFinishPortable;
#if defined(__x86_64__)
extern const Finisher kFinishAvx512;
extern const Finisher kFinishAvx2;
#endif

// The best that is usable here.
const Finisher& finisher();

}  // namespace mixbits
