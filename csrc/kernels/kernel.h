// What a kernel is: exact integer sums of a convolution. A kernel is one file, self_registering, and its
// name's suffix says which instructions it needs (kernels/isa.h).
//
//   acc[y, x, o] = sum over ky, kx, c of  weight_level[o, c, ky, kx] * input_level[y', x', c]
//
// Every kernel gives the same int32, whatever its algorithm, so that any may be chosen for speed alone.
// Scales, biases and all that follows are not its business: see engine/epilogue.h.
//
// Files compiled for a particular instruction set must hold nothing that the linker could share with others:
// no templates or inline functions of the standard library, everything of their own in an anonymous
// namespace. Else a CPU without those instructions could be given the wrong copy.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/isa.h"

namespace mixbits {

// Bytes that may be read (never written) behind the last byte of inputs, packed weights and scratch.
inline constexpr std::size_t kSlack = 64;
// Alignment of packed weights, scratch and accumulators.
inline constexpr std::size_t kAlign = 64;
// Output channels are split between threads at multiples of this.
inline constexpr int kChannelBlock = 64;

// One image's convolution, and how its numbers are stored. A linear layer is a 1x1 convolution of `out_h` = 1
// row and `out_w` = number of vectors.
struct Conv {
  // Shape. Groups are independent: group g reads channels [g * c, g * c + c) and gives [g * o, g * o + o).
  int c = 0;  // input channels of a group
  int o = 0;  // output channels of a group
  int groups = 1;
  int kh = 1, kw = 1;
  int stride_y = 1, stride_x = 1;
  int dilation_y = 1, dilation_x = 1;
  int out_h = 1, out_w = 1;

  // The input is a map of bytes [in_h][in_w][pixel_stride], borders included: the window of output (y, x)
  // starts at input (y * stride_y, x * stride_x) and never leaves the map. Bytes of a pixel behind its
  // channels are 0.
  int in_h = 1, in_w = 1;
  int pixel_stride = 0;  // bytes, a multiple of 4, at least groups * c

  // An input byte `a`, 0 .. a_max, stands for the level a_scale * a + a_offset. Borders hold `a_zero`.
  int a_max = 255;
  int a_scale = 1;
  int a_offset = 0;
  int a_zero = 0;

  // Weight levels lie in w_min .. w_max. If w_step is not 0 they all are w_min + w_step * q with 0 <= q < 1
  // << w_bits, and q is the stored code; if it is 0 they are `w_levels` different ones (a codebook), at most
  // 1 << w_bits.
  int w_bits = 8;
  int w_min = 0, w_max = 0;
  int w_step = 1;

  constexpr int taps() const { return kh * kw; }
  constexpr int row_bytes() const { return in_w * pixel_stride; }
};

// What one call computes: output rows [y0, y1) and output channels [o0, o1), which are all of them (of all
// groups) or, where groups == 1, a range that starts at a multiple of kChannelBlock.
struct Job {
  const std::uint8_t* input;    // the whole map of one image
  const std::uint8_t* weights;  // as `pack` wrote them
  std::uint8_t* scratch;        // `scratch_bytes`, contents undefined
  std::int32_t*
      acc;  // [y1 - y0][out_w][ld]: channel o at o - o0; what lies behind o1 - o0 may be overwritten
  int ld;   // (o1 - o0) rounded up to 16 at least
  int y0, y1;
  int o0, o1;
};

struct Kernel {
  const char* name;  // family_isa, the file's name
  Isa isa;
  // Null if it can compute this exactly, else why not, in words that follow "kernel NAME: ".
  const char* (*refuses)(const Conv&);
  // Estimated cycles of a whole image on one core, weights and input in cache: what choices start from.
  double (*cycles)(const Conv&);
  // Output rows of a call that suit it (a multiple of `rows_step`); any multiple of rows_step, or the last
  // rows, must be right.
  int (*rows)(const Conv&);
  int rows_step;
  std::size_t (*weight_bytes)(const Conv&);
  // levels: int16 [groups * o][c][kh][kw]. `packed` is zeroed, kAlign-aligned, weight_bytes + kSlack long.
  void (*pack)(const Conv&, const std::int16_t* levels, std::uint8_t* packed);
  // Scratch of a call that computes `rows` output rows and all channels.
  std::size_t (*scratch_bytes)(const Conv&, int rows);
  void (*run)(const Conv&, const Job&);
};

// Defining one at namespace scope makes a kernel known.
struct Registered {
  explicit Registered(const Kernel& kernel);
};

constexpr int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }

}  // namespace mixbits
