// What the kernels of binary decomposition share: the formula, and where bits lie.
//
// Weight codes q and input bytes a are sums of bits times powers of two, so (EBS, Li et al. 2020, arXiv
// 2003.07577)
//
//   sum q * a  =  sum over i, j of  2^(i + j) * popcount(bit i of all q  AND  bit j of all a)
//
// The powers come by Horner's rule: sums of the diagonals i + j = d, from the highest d to 0, are gathered in
// one set of accumulators that is doubled in between. Levels are w_min + w_step * q and a_scale * a +
// a_offset, so
//
//   acc = w_step * a_scale * (sum q * a)  +  a_scale * w_min * (sum a)  +  a_offset * (sum of weight levels)
//
// whose second term is one number a window, the `correction`, and whose third is one number an output
// channel, the `bias`. All of it is arithmetic modulo 2^32: parts may wrap, the sum that is left does not.
//
// Bits of the input: every row is split into planes,
//
//   [row][plane][pixel][channels, a bit each, filled up to whole bytes with 0]
//
// so that the pixels under a row of the window are one run of bits, read as words at any byte: the bits of a
// run's last word that belong to pixels behind it meet 0 in the weights. With dilation a run is one pixel.
// Where the window has one column (row), only the columns (rows) that strides hit are made.
//
// Bits of the weights: [block of output channels][plane][step][channel of the block], a word each, where the
// steps are the words of all runs; they follow the biases.
//
// Everything is in an anonymous namespace: each kernel has its copy, made of the instructions it may use.
#pragma once

#include <cstring>

#include "kernels/kernel.h"

namespace mixbits {
namespace {

constexpr int kBitsOfByte = 8;

inline int ceil_div(int value, int unit) { return (value + unit - 1) / unit; }
inline int smaller(int a, int b) { return a < b ? a : b; }
inline int larger(int a, int b) { return a > b ? a : b; }
inline std::size_t aligned(std::size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// Bits of the numbers 0 .. largest, at least one.
inline int bits_of(int largest) {
  int bits = 1;
  while (largest >> bits != 0) ++bits;
  return bits;
}

// How a kernel lays weights out: bytes of a word, output channels of a block, and what their number is
// rounded up to, which divides the block. Only the last block may be smaller.
struct Blocks {
  int word_bytes;
  int channels;
  int unit;
};

struct BitPlanes {
  Blocks blocks;
  int w_bits, a_bits;
  int width;               // pixels made of a row
  int x_step, y_step;      // input bytes from one made pixel, or row, to the next
  int stride_x, stride_y;  // made pixels, or rows, from one window to the next
  int pixel_bytes;         // of a plane
  int plane_bytes, row_bytes;
  int runs, run_pixels, run_words;
  int steps;

  BitPlanes(const Conv& conv, const Blocks& how) : blocks(how) {
    w_bits = bits_of((conv.w_max - conv.w_min) / conv.w_step);
    a_bits = bits_of(conv.a_max);
    width = conv.kw == 1 ? conv.out_w : conv.in_w;
    x_step = conv.kw == 1 ? conv.stride_x * conv.pixel_stride : conv.pixel_stride;
    y_step = conv.kh == 1 ? conv.stride_y * conv.row_bytes() : conv.row_bytes();
    stride_x = conv.kw == 1 ? 1 : conv.stride_x;
    stride_y = conv.kh == 1 ? 1 : conv.stride_y;
    pixel_bytes = ceil_div(conv.c, kBitsOfByte);
    // Planes are written 8 bytes at a time; the last such may go beyond the last pixel.
    plane_bytes = round_up(width * pixel_bytes, 8) + 8;
    row_bytes = a_bits * plane_bytes;
    run_pixels = conv.dilation_x == 1 ? conv.kw : 1;
    runs = conv.taps() / run_pixels;
    run_words = ceil_div(run_pixels * pixel_bytes, blocks.word_bytes);
    steps = runs * run_words;
  }

  // Rows that are made for `rows` rows of output.
  int made_rows(const Conv& conv, int rows) const {
    return (rows - 1) * stride_y + (conv.kh - 1) * conv.dilation_y + 1;
  }
  // Channels of the block that begins at a channel of a group's.
  int block_channels(const Conv& conv, int begin) const {
    return smaller(blocks.channels, round_up(conv.o, blocks.unit) - begin);
  }
};

// Why binary decomposition cannot compute a convolution.
inline const char* bitplanes_refuses(const Conv& conv) {
  return conv.w_step == 0 ? "weight levels are a codebook's, not evenly spaced" : nullptr;
}

// --- Weights ---

inline std::size_t biases_bytes(const Conv& conv, const BitPlanes& planes) {
  return aligned(sizeof(std::int32_t) * round_up(conv.o, planes.blocks.unit));
}

// Bytes in front of a block that begins at channel `begin`, of a group's words.
inline std::size_t block_offset(const BitPlanes& planes, int begin) {
  return static_cast<std::size_t>(begin) * planes.w_bits * planes.steps * planes.blocks.word_bytes;
}

// Of a group: biases, then words.
inline std::size_t group_bytes(const Conv& conv, const BitPlanes& planes) {
  return biases_bytes(conv, planes) + aligned(block_offset(planes, round_up(conv.o, planes.blocks.unit)));
}

// Sets the bits of one code, of output channel `o` of a group, for input channel c under (ky, kx).
inline void pack_code(const Conv& conv, const BitPlanes& planes, int code, int o, int c, int ky, int kx,
                      std::uint8_t* words) {
  const int word_bytes = planes.blocks.word_bytes;
  const int run = ky * (conv.kw / planes.run_pixels) + kx / planes.run_pixels;
  const int byte = kx % planes.run_pixels * planes.pixel_bytes + c / kBitsOfByte;
  const int step = run * planes.run_words + byte / word_bytes;
  const int begin = o / planes.blocks.channels * planes.blocks.channels;
  const int channels = planes.block_channels(conv, begin);
  for (int plane = 0; plane < planes.w_bits; ++plane) {
    const std::size_t word = (static_cast<std::size_t>(plane) * planes.steps + step) * channels + (o - begin);
    words[block_offset(planes, begin) + word * word_bytes + byte % word_bytes] |=
        static_cast<std::uint8_t>((code >> plane & 1) << c % kBitsOfByte);
  }
}

inline void bitplanes_pack(const Conv& conv, const BitPlanes& planes, const std::int16_t* levels,
                           std::uint8_t* packed) {
  for (int group = 0; group < conv.groups; ++group, packed += group_bytes(conv, planes)) {
    std::uint8_t* words = packed + biases_bytes(conv, planes);
    for (int o = 0; o < conv.o; ++o) {
      std::int32_t bias = 0;
      for (int c = 0; c < conv.c; ++c) {
        for (int tap = 0; tap < conv.taps(); ++tap) {
          const int level = *levels++;
          bias += conv.a_offset * level;
          pack_code(conv, planes, (level - conv.w_min) / conv.w_step, o, c, tap / conv.kw, tap % conv.kw,
                    words);
        }
      }
      std::memcpy(packed + sizeof(bias) * o, &bias, sizeof(bias));
    }
  }
}

// --- Scratch ---

struct BitScratch {
  std::int32_t* offsets = nullptr;     // [steps]: bytes from a window's first pixel to the words of its steps
  std::int32_t* pixel_sums = nullptr;  // [made rows][width]: sums of bytes
  std::int32_t* corrections = nullptr;  // [rows][out_w]
  std::uint8_t* planes = nullptr;       // [made rows][a_bits][plane_bytes]
  std::size_t bytes = 0;

  BitScratch(const Conv& conv, const BitPlanes& of, int rows, std::uint8_t* memory) {
    const std::size_t made = of.made_rows(conv, rows);
    const auto take = [&](std::size_t size) {
      const std::size_t begin = bytes;
      bytes += aligned(size);
      return begin;
    };
    const std::size_t at_offsets = take(sizeof(std::int32_t) * of.steps);
    const std::size_t at_sums = take(sizeof(std::int32_t) * made * of.width);
    const std::size_t at_corrections = take(sizeof(std::int32_t) * rows * conv.out_w);
    const std::size_t at_planes = take(made * of.row_bytes);
    if (memory == nullptr) return;
    offsets = reinterpret_cast<std::int32_t*>(memory + at_offsets);
    pixel_sums = reinterpret_cast<std::int32_t*>(memory + at_sums);
    corrections = reinterpret_cast<std::int32_t*>(memory + at_corrections);
    planes = memory + at_planes;
  }
};

inline void fill_offsets(const Conv& conv, const BitPlanes& planes, std::int32_t* offsets) {
  for (int run = 0; run < planes.runs; ++run) {
    const int columns = conv.kw / planes.run_pixels;  // runs of a row of the window
    const int begin = run / columns * conv.dilation_y * planes.row_bytes +
                      run % columns * conv.dilation_x * planes.pixel_bytes;
    for (int word = 0; word < planes.run_words; ++word) {
      *offsets++ = begin + word * planes.blocks.word_bytes;
    }
  }
}

// Whether windows need the sums of their bytes.
inline bool needs_sums(const Conv& conv) { return conv.w_min != 0; }

// a_scale * w_min * (sum of a window's bytes), for every window of `rows` rows of output.
inline void fill_corrections(const Conv& conv, const BitPlanes& planes, int rows,
                             const std::int32_t* pixel_sums, std::int32_t* corrections) {
  const int out_w = conv.out_w, stride_x = planes.stride_x;
  std::memset(corrections, 0, sizeof(std::int32_t) * rows * out_w);
  if (!needs_sums(conv)) return;
  const std::int32_t factor = conv.a_scale * conv.w_min;
  for (int y = 0; y < rows; ++y, corrections += out_w) {
    for (int tap = 0; tap < conv.taps(); ++tap) {
      const int row = y * planes.stride_y + tap / conv.kw * conv.dilation_y;
      const std::int32_t* sums =
          pixel_sums + static_cast<std::ptrdiff_t>(row) * planes.width + tap % conv.kw * conv.dilation_x;
      if (stride_x == 1) {
        for (int x = 0; x < out_w; ++x) corrections[x] += sums[x];
      } else {
        for (int x = 0; x < out_w; ++x) corrections[x] += sums[x * stride_x];
      }
    }
    for (int x = 0; x < out_w; ++x) corrections[x] *= factor;
  }
}

// --- Planes of the input, in plain C++ ---

// Bit `plane` of 8 bytes, the first byte's lowest.
inline std::uint8_t bits_of_bytes(std::uint64_t bytes, int plane) {
  const std::uint64_t ones = bytes >> plane & 0x0101010101010101u;
  // Byte k of the factor moves the bit of byte 7 - k to bit 7 - k of the highest byte.
  return static_cast<std::uint8_t>(ones * 0x0102040810204080u >> 56);
}

inline std::int32_t sum_of_bytes(std::uint64_t bytes) {
  constexpr std::uint64_t kEven = 0x00FF00FF00FF00FFu;
  const std::uint64_t pairs = (bytes & kEven) + (bytes >> kBitsOfByte & kEven);
  return static_cast<std::int32_t>(pairs * 0x0001000100010001u >> 48);
}

// Planes of one row, channels [first, first + c) of its pixels, and the sums of their bytes.
inline void fill_row(const Conv& conv, const BitPlanes& planes, const std::uint8_t* row, int first,
                     std::uint8_t* to, std::int32_t* sums) {
  const std::ptrdiff_t x_step = planes.x_step, pixel_bytes = planes.pixel_bytes;
  const std::ptrdiff_t plane_bytes = planes.plane_bytes;
  const int width = planes.width, channels = conv.c, a_bits = planes.a_bits;
  for (int x = 0; x < width; ++x, row += x_step, to += pixel_bytes) {
    std::int32_t sum = 0;
    for (int c = 0; c < channels; c += kBitsOfByte) {
      std::uint64_t bytes;
      std::memcpy(&bytes, row + first + c, sizeof(bytes));  // may go beyond the pixel, never beyond kSlack
      const int left = channels - c;
      if (left < kBitsOfByte) bytes &= (std::uint64_t{1} << left * kBitsOfByte) - 1;
      for (int plane = 0; plane < a_bits; ++plane) {
        to[plane * plane_bytes + c / kBitsOfByte] = bits_of_bytes(bytes, plane);
      }
      sum += sum_of_bytes(bytes);
    }
    sums[x] = sum;
  }
}

}  // namespace
}  // namespace mixbits
