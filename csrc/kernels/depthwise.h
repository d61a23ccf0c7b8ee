// What kernels of depthwise convolutions share: every channel by itself, several rows of the window a step.
// Everything is in an anonymous namespace, so that every kernel has it in its own instructions.
//
// The input has the channels of a pixel side by side, but instructions add up neighbouring products. So some
// rows of the map are first interleaved: a word of a vector then holds one channel of four bytes, or two
// int16, that lie below each other in the map. A column of the window is then a product for every such step
// of rows. The same words serve the output row below, with weights further on, where the window moves down by
// a row of its own.
//
//   packed  = | start: int32 [c'] | vectors |      c': channels rounded up to whole vectors
//   start   = a_offset * the sum of the channel's levels
//   vectors [c' / lanes][output row of a pair][kx][step]
//   vector  = lanes words: weights of rows `step * rows - output row` and on of the window, 0 outside
//
// Sums wrap modulo 2^32: they are right if the result fits.
#pragma once

#include "kernels/kernel.h"

namespace mixbits {
namespace {

constexpr int kWord = 4;            // bytes
constexpr int kScratch = 24 << 10;  // bytes of interleaved input that stay in the first cache
constexpr int kFewest = 8;          // output pixels that share interleaved input
constexpr int kBlock = 64;          // channels

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// What sets the kernels apart.
struct Form {
  int lanes;  // channels of a vector
  int rows;   // of a step: 4 of bytes, 2 of int16

  int vector() const { return lanes * kWord; }  // bytes
};

// Output rows that share interleaved input.
inline int paired(const Conv& conv) { return conv.stride_y == conv.dilation_y ? 2 : 1; }

// Of a column of the windows of paired rows.
inline int steps(const Conv& conv, const Form& form) {
  return ceil_div(conv.kh + paired(conv) - 1, form.rows);
}

inline std::size_t start_bytes(const Conv& conv) {
  return sizeof(std::int32_t) * static_cast<std::size_t>(round_up(conv.groups, 16));
}

// Bytes of the weights of a vector of channels and one output row.
inline std::ptrdiff_t row_weights(const Conv& conv, const Form& form) {
  return static_cast<std::ptrdiff_t>(conv.kw) * steps(conv, form) * form.vector();
}

inline std::size_t weight_bytes_of(const Conv& conv, const Form& form) {
  return start_bytes(conv) + ceil_div(conv.groups, form.lanes) * paired(conv) * row_weights(conv, form);
}

inline void pack_levels(const Conv& conv, const Form& form, const std::int16_t* levels,
                        std::uint8_t* packed) {
  auto* start = reinterpret_cast<std::int32_t*>(packed);
  for (int g = 0; g < conv.groups; ++g) {
    std::int32_t sum = 0;
    for (int ky = 0; ky < conv.kh; ++ky) {
      for (int kx = 0; kx < conv.kw; ++kx) {
        const int level = *levels++;
        sum += level;
        for (int r = 0; r < paired(conv); ++r) {
          const int row = ky + r, value_bytes = kWord / form.rows;
          std::uint8_t* at = packed + start_bytes(conv) +
                             (g / form.lanes * paired(conv) + r) * row_weights(conv, form) +
                             (kx * steps(conv, form) + row / form.rows) * form.vector() +
                             g % form.lanes * kWord + row % form.rows * value_bytes;
          at[0] = static_cast<std::uint8_t>(level);
          if (value_bytes == 2) at[1] = static_cast<std::uint8_t>(level >> 8);
        }
      }
    }
    start[g] = conv.a_offset * sum;
  }
}

// Columns of the map that `pixels` outputs reach.
inline int columns(const Conv& conv, int pixels) {
  return (pixels - 1) * conv.stride_x + (conv.kw - 1) * conv.dilation_x + 1;
}

// What is interleaved at once, so that it stays in the first cache: some channels of the input of some
// outputs.
struct Part {
  int channels;  // kBlock, or all bytes of a pixel
  int pixels;    // outputs of a row
};

// Parts of a row, as equal as can be.
inline Part part_of(const Conv& conv, const Form& form, int channels) {
  const int column = channels * kWord * steps(conv, form);
  const int fitting = (kScratch / column - columns(conv, 1)) / conv.stride_x + 1;
  return {channels, ceil_div(conv.out_w, ceil_div(conv.out_w, fitting < kFewest ? kFewest : fitting))};
}

// Bytes of the input of a row of outputs: more than there are where parts overlap, or have unused channels.
inline double read_bytes(const Conv& conv, Part part) {
  const double parts = ceil_div(conv.groups, part.channels) * ceil_div(conv.out_w, part.pixels);
  return parts * columns(conv, part.pixels) * part.channels;
}

inline Part part_of(const Conv& conv, const Form& form) {
  const Part some = part_of(conv, form, kBlock), all = part_of(conv, form, conv.pixel_stride);
  return read_bytes(conv, some) <= read_bytes(conv, all) ? some : all;
}

// Bytes of an interleaved step: what it holds, and the last vectors.
inline std::ptrdiff_t step_bytes(const Conv& conv, Part part) {
  return kWord * (round_up(columns(conv, part.pixels) * part.channels, kBlock) + kBlock);
}

inline std::size_t scratch_bytes_of(const Conv& conv, const Form& form) {
  return static_cast<std::size_t>(step_bytes(conv, part_of(conv, form))) * steps(conv, form);
}

// Interleaves `bytes` bytes of `rows` rows, and zeros for those that a step has more, and that `runs` times,
// with `between` bytes between them. Reads and writes vectors of up to kBlock bytes of a row.
using Interleave = void (*)(int rows, const std::uint8_t* input, std::ptrdiff_t row_bytes, int bytes,
                            int runs, std::ptrdiff_t between, std::uint8_t* to);

// The input of a part of `pairs` rows, whose first window is at `input`: [step][column][channel], words.
inline void interleave_part(const Conv& conv, const Form& form, int pairs, Part part,
                            const std::uint8_t* input, std::uint8_t* to, Interleave interleave) {
  const std::ptrdiff_t row = static_cast<std::ptrdiff_t>(conv.dilation_y) * conv.row_bytes();
  // Columns that touch are one run of bytes.
  const bool touching = part.channels == conv.pixel_stride;
  const int runs = touching ? 1 : columns(conv, part.pixels);
  const int bytes = touching ? columns(conv, part.pixels) * part.channels : kBlock;
  for (int left = conv.kh + pairs - 1; left > 0; left -= form.rows, input += form.rows * row) {
    interleave(left < form.rows ? left : form.rows, input, row, bytes, runs, conv.pixel_stride, to);
    to += step_bytes(conv, part);
  }
}

// A vector of channels for some outputs of a row, or of two rows, from interleaved input.
//   acc[r * acc_row + x * acc_pixel + lane] = scale * sum + start[lane]
struct Sweep {
  const std::uint8_t* weights;
  const std::uint8_t* input;          // of these channels, at the first window
  std::ptrdiff_t next, across, step;  // bytes between outputs, columns of the window, steps
  const std::int32_t* start;
  std::int32_t* acc;
  std::ptrdiff_t acc_row, acc_pixel;
  int pixels;
  int width, steps;  // of the window
  int scale;
};

using Run = void (*)(const Sweep&);

// A part of `pairs` output rows, from output (y, x) and channel `first`.
inline void run_part(const Conv& conv, const Job& job, const Form& form, int y, int pairs, int x, int first,
                     Part part, Interleave interleave, Run sweep) {
  interleave_part(conv, form, pairs, part,
                  job.input + static_cast<std::ptrdiff_t>(y) * conv.stride_y * conv.row_bytes() +
                      static_cast<std::ptrdiff_t>(x) * conv.stride_x * conv.pixel_stride + first,
                  job.scratch, interleave);
  const std::ptrdiff_t column = static_cast<std::ptrdiff_t>(part.channels) * kWord;
  const std::ptrdiff_t pixel = static_cast<std::ptrdiff_t>(y - job.y0) * conv.out_w + x;
  for (int c = first; c < first + part.channels && c < conv.groups; c += form.lanes) {
    sweep(
        {.weights = job.weights + start_bytes(conv) + c / form.lanes * paired(conv) * row_weights(conv, form),
         .input = job.scratch + (c - first) * kWord,
         .next = conv.stride_x * column,
         .across = conv.dilation_x * column,
         .step = step_bytes(conv, part),
         .start = reinterpret_cast<const std::int32_t*>(job.weights) + c,
         .acc = job.acc + pixel * job.ld + c,
         .acc_row = static_cast<std::ptrdiff_t>(conv.out_w) * job.ld,
         .acc_pixel = job.ld,
         .pixels = part.pixels,
         .width = conv.kw,
         .steps = steps(conv, form),
         .scale = conv.a_scale});
  }
}

// A whole job, by the functions for one and for two rows.
inline void run_parts(const Conv& conv, const Job& job, const Form& form, Interleave interleave, Run one,
                      Run two) {
  const Part whole = part_of(conv, form);
  for (int y = job.y0, pairs = 0; y < job.y1; y += pairs) {
    pairs = job.y1 - y < paired(conv) ? job.y1 - y : paired(conv);
    for (int x = 0; x < conv.out_w; x += whole.pixels) {
      const int pixels = conv.out_w - x < whole.pixels ? conv.out_w - x : whole.pixels;
      for (int c = 0; c < conv.groups; c += whole.channels) {
        run_part(conv, job, form, y, pairs, x, c, {whole.channels, pixels}, interleave,
                 pairs == 2 ? two : one);
      }
    }
  }
}

// Cycles of an image if interleaving 64 bytes of a step and a product take so many.
inline double cycles_of(const Conv& conv, const Form& form, double interleaving, double product) {
  const Part part = part_of(conv, form);
  const double lanes = ceil_div(conv.groups, form.lanes), parts = ceil_div(conv.out_w, part.pixels);
  const double products = lanes * conv.out_w * paired(conv) * (conv.kw * steps(conv, form) * product + 1);
  const double of_rows = interleaving * read_bytes(conv, part) * steps(conv, form) / kBlock + products;
  return (of_rows + 12 * lanes * parts) * conv.out_h / paired(conv);
}

inline int rows_of(const Conv& conv) {
  const int of_row = conv.out_w * round_up(conv.groups, 16) * 4;
  const int fitting = (64 << 10) / of_row / paired(conv) * paired(conv);
  const int fewest = fitting < paired(conv) ? paired(conv) : fitting;
  return fewest < conv.out_h ? fewest : conv.out_h;
}

}  // namespace
}  // namespace mixbits
