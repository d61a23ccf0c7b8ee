// Depthwise convolutions: every channel by itself, 16 of them a vector, four rows of the window a step.
//
// The input has the channels of a pixel side by side, but vpdpbusd adds up neighbouring bytes. So four rows
// of the map are first interleaved byte by byte: a word then holds one channel of four pixels that lie below
// each other, and each column of the window is one instruction for 16 channels. The same words serve the
// output row below, with the weights one byte further on, where the window moves down by one of its own rows.
//
//   packed  = | start: int32 [c16] | vectors: 64 bytes each |      c16: channels rounded up to 16
//   start   = a_offset * the sum of the channel's levels
//   vectors [c16 / 16][output row of a pair][kx][quad]
//   vector  = 16 channels x 4 bytes: weights of rows 4 * quad - output row .. + 3 of the window, 0 outside
//
// Sums wrap modulo 2^32, and so are right when the result is.

// GCC 12 takes the operands that intrinsics leave undefined for a mistake of ours (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "kernels/kernel.h"

namespace mixbits {
namespace {

constexpr int kLanes = 16;          // channels of a vector
constexpr int kVector = 64;         // bytes
constexpr int kRows = 4;            // of a quad
constexpr int kScratch = 24 << 10;  // bytes of interleaved input that stay in the first cache
constexpr int kFewest = 8;          // output pixels that share interleaved input

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

const char* refuses(const Conv& conv) {
  if (conv.c != 1 || conv.o != 1) return "it takes one input and one output a group";
  if (conv.w_min < -128 || conv.w_max > 127) return "weight levels are more than a signed byte holds";
  return nullptr;
}

// Output rows that share interleaved input.
int paired(const Conv& conv) { return conv.stride_y == conv.dilation_y ? 2 : 1; }

int quads(const Conv& conv) { return ceil_div(conv.kh + paired(conv) - 1, kRows); }

std::size_t start_bytes(const Conv& conv) {
  return sizeof(std::int32_t) * static_cast<std::size_t>(round_up(conv.groups, kLanes));
}

// Vectors of 16 channels and one output row.
int vectors(const Conv& conv) { return conv.kw * quads(conv); }

std::size_t weight_bytes(const Conv& conv) {
  const std::size_t all = static_cast<std::size_t>(round_up(conv.groups, kLanes) / kLanes) * paired(conv);
  return start_bytes(conv) + all * vectors(conv) * kVector;
}

void pack(const Conv& conv, const std::int16_t* levels, std::uint8_t* packed) {
  auto* start = reinterpret_cast<std::int32_t*>(packed);
  std::uint8_t* weights = packed + start_bytes(conv);
  for (int g = 0; g < conv.groups; ++g) {
    std::int32_t sum = 0;
    for (int ky = 0; ky < conv.kh; ++ky) {
      for (int kx = 0; kx < conv.kw; ++kx) {
        const int level = *levels++;
        sum += level;
        for (int r = 0; r < paired(conv); ++r) {
          const int row = ky + r;
          const std::size_t vector =
              (static_cast<std::size_t>(g / kLanes) * paired(conv) + r) * vectors(conv) + kx * quads(conv) +
              row / kRows;
          weights[vector * kVector + g % kLanes * kRows + row % kRows] = static_cast<std::uint8_t>(level);
        }
      }
    }
    start[g] = conv.a_offset * sum;
  }
}

// Columns of the map that `pixels` outputs reach.
int columns(const Conv& conv, int pixels) {
  return (pixels - 1) * conv.stride_x + (conv.kw - 1) * conv.dilation_x + 1;
}

// What is interleaved at once, so that it stays in the first cache: some channels of the input of some
// outputs.
struct Part {
  int channels;  // all bytes of a pixel, or kVector
  int pixels;    // outputs of a row
};

// Parts of a row, as equal as can be.
Part part_of(const Conv& conv, int channels) {
  const int column = channels * kRows * quads(conv);
  const int fitting = (kScratch / column - columns(conv, 1)) / conv.stride_x + 1;
  return {channels, ceil_div(conv.out_w, ceil_div(conv.out_w, fitting < kFewest ? kFewest : fitting))};
}

// Bytes that are interleaved for a row: more than there are where parts overlap, or have unused channels.
double interleaved(const Conv& conv, Part part) {
  const double parts = ceil_div(conv.groups, part.channels) * ceil_div(conv.out_w, part.pixels);
  return parts * columns(conv, part.pixels) * part.channels * quads(conv);
}

Part part_of(const Conv& conv) {
  const Part some = part_of(conv, kVector), all = part_of(conv, conv.pixel_stride);
  return interleaved(conv, some) <= interleaved(conv, all) ? some : all;
}

// Bytes of a quad of interleaved rows: what they hold, and the last vectors.
std::ptrdiff_t quad_bytes(const Conv& conv, Part part) {
  return kRows * (round_up(columns(conv, part.pixels) * part.channels, kVector) + kVector);
}

std::size_t scratch_bytes(const Conv& conv, int) {
  return static_cast<std::size_t>(quad_bytes(conv, part_of(conv))) * quads(conv);
}

// Interleaves `bytes` bytes of kCount rows, and zeros for those up to four, byte by byte. Reads whole
// vectors.
template <int kCount>
void interleave(const std::uint8_t* input, std::ptrdiff_t row_bytes, std::ptrdiff_t bytes, std::uint8_t* to) {
  // Instructions interleave within 128 bits, word i of each into vector i: so that word has to be there.
  const __m512i spread = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (std::ptrdiff_t at = 0; at < bytes; at += kVector, to += kRows * kVector) {
    __m512i row[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      row[i] = i < kCount ? _mm512_permutexvar_epi32(spread, _mm512_loadu_si512(input + i * row_bytes + at))
                          : _mm512_setzero_si512();
    }
    const __m512i low01 = _mm512_unpacklo_epi8(row[0], row[1]), high01 = _mm512_unpackhi_epi8(row[0], row[1]);
    const __m512i low23 = _mm512_unpacklo_epi8(row[2], row[3]), high23 = _mm512_unpackhi_epi8(row[2], row[3]);
    _mm512_store_si512(to, _mm512_unpacklo_epi16(low01, low23));
    _mm512_store_si512(to + kVector, _mm512_unpackhi_epi16(low01, low23));
    _mm512_store_si512(to + 2 * kVector, _mm512_unpacklo_epi16(high01, high23));
    _mm512_store_si512(to + 3 * kVector, _mm512_unpackhi_epi16(high01, high23));
  }
}

// The input of a part of `pairs` rows, whose first window is at `input`: [quad][column][channel][row].
void interleave_part(const Conv& conv, int pairs, Part part, const std::uint8_t* input, std::uint8_t* to) {
  const std::ptrdiff_t row = static_cast<std::ptrdiff_t>(conv.dilation_y) * conv.row_bytes();
  // Columns that touch are one run of bytes.
  const bool touching = part.channels == conv.pixel_stride;
  const int runs = touching ? 1 : columns(conv, part.pixels);
  const int bytes = touching ? columns(conv, part.pixels) * part.channels : part.channels;
  for (int left = conv.kh + pairs - 1; left > 0; left -= kRows, input += kRows * row) {
    for (int run = 0; run < runs; ++run) {
      const std::uint8_t* from = input + static_cast<std::ptrdiff_t>(run) * conv.pixel_stride;
      std::uint8_t* at = to + static_cast<std::ptrdiff_t>(run) * part.channels * kRows;
      switch (left) {
        case 1: interleave<1>(from, row, bytes, at); break;
        case 2: interleave<2>(from, row, bytes, at); break;
        case 3: interleave<3>(from, row, bytes, at); break;
        default: interleave<4>(from, row, bytes, at);
      }
    }
    to += quad_bytes(conv, part);
  }
}

// 16 channels of some outputs in a row, or in two rows, from interleaved input.
struct Sweep {
  const std::uint8_t* weights;
  const std::uint8_t* input;          // of these channels, at the first window
  std::ptrdiff_t next, across, quad;  // bytes between outputs, columns of the window, quads
  std::int32_t* acc;
  std::ptrdiff_t acc_row, acc_pixel;  // elements between rows and pixels
  int pixels;
  int width, quads;  // of the window
  int scale;
  __m512i start;
};

inline void finish(const Sweep& s, int r, int x, __m512i sum) {
  if (s.scale != 1) sum = _mm512_mullo_epi32(sum, _mm512_set1_epi32(s.scale));
  _mm512_storeu_si512(s.acc + r * s.acc_row + x * s.acc_pixel, _mm512_add_epi32(sum, s.start));
}

// Windows of kWidth columns and kQuads quads: weights in registers.
template <int kPairs, int kWidth, int kQuads>
void sweep(const Sweep& shared) {
  const Sweep s = shared;  // whose fields are not written to through `acc`
  constexpr int kVectors = kWidth * kQuads;
  __m512i weight[kPairs][kVectors];
#pragma GCC unroll 2
  for (int r = 0; r < kPairs; ++r) {
#pragma GCC unroll 10
    for (int i = 0; i < kVectors; ++i) {
      weight[r][i] = _mm512_load_si512(s.weights + (r * kVectors + i) * kVector);
    }
  }
  for (int x = 0; x < s.pixels; ++x) {
    const std::uint8_t* window = s.input + x * s.next;
    __m512i sum[kPairs];
#pragma GCC unroll 2
    for (int r = 0; r < kPairs; ++r) sum[r] = _mm512_setzero_si512();
#pragma GCC unroll 10
    for (int i = 0; i < kVectors; ++i) {
      const __m512i input = _mm512_loadu_si512(window + i / kQuads * s.across + i % kQuads * s.quad);
#pragma GCC unroll 2
      for (int r = 0; r < kPairs; ++r) sum[r] = _mm512_dpbusd_epi32(sum[r], input, weight[r][i]);
    }
#pragma GCC unroll 2
    for (int r = 0; r < kPairs; ++r) finish(s, r, x, sum[r]);
  }
}

// Any window.
template <int kPairs>
void sweep_any(const Sweep& s) {
  for (int x = 0; x < s.pixels; ++x) {
    __m512i sum[kPairs];
    for (int r = 0; r < kPairs; ++r) sum[r] = _mm512_setzero_si512();
    const std::uint8_t* weights = s.weights;
    for (int kx = 0; kx < s.width; ++kx) {
      for (int q = 0; q < s.quads; ++q, weights += kVector) {
        const __m512i input = _mm512_loadu_si512(s.input + x * s.next + kx * s.across + q * s.quad);
        for (int r = 0; r < kPairs; ++r) {
          const __m512i weight = _mm512_load_si512(weights + r * s.width * s.quads * kVector);
          sum[r] = _mm512_dpbusd_epi32(sum[r], input, weight);
        }
      }
    }
    for (int r = 0; r < kPairs; ++r) finish(s, r, x, sum[r]);
  }
}

template <int kPairs>
void sweep(const Sweep& s) {
  if (s.width == 3 && s.quads == 1) return sweep<kPairs, 3, 1>(s);
  if (s.width == 5 && s.quads == 2) return sweep<kPairs, 5, 2>(s);
  sweep_any<kPairs>(s);
}

// A part of `pairs` output rows, from output (y, x) and channel `first`.
void run_part(const Conv& conv, const Job& job, int y, int pairs, int x, int first, Part part) {
  interleave_part(conv, pairs, part,
                  job.input + static_cast<std::ptrdiff_t>(y) * conv.stride_y * conv.row_bytes() +
                      static_cast<std::ptrdiff_t>(x) * conv.stride_x * conv.pixel_stride + first,
                  job.scratch);
  const std::ptrdiff_t of_lanes = static_cast<std::ptrdiff_t>(paired(conv)) * vectors(conv) * kVector;
  const std::ptrdiff_t of_column = static_cast<std::ptrdiff_t>(part.channels) * kRows;
  const std::ptrdiff_t pixel = static_cast<std::ptrdiff_t>(y - job.y0) * conv.out_w + x;
  for (int c = first; c < first + part.channels && c < conv.groups; c += kLanes) {
    const Sweep s{.weights = job.weights + start_bytes(conv) + c / kLanes * of_lanes,
                  .input = job.scratch + (c - first) * kRows,
                  .next = conv.stride_x * of_column,
                  .across = conv.dilation_x * of_column,
                  .quad = quad_bytes(conv, part),
                  .acc = job.acc + pixel * job.ld + c,
                  .acc_row = static_cast<std::ptrdiff_t>(conv.out_w) * job.ld,
                  .acc_pixel = job.ld,
                  .pixels = part.pixels,
                  .width = conv.kw,
                  .quads = quads(conv),
                  .scale = conv.a_scale,
                  .start = _mm512_loadu_si512(reinterpret_cast<const std::int32_t*>(job.weights) + c)};
    pairs == 2 ? sweep<2>(s) : sweep<1>(s);
  }
}

void run(const Conv& conv, const Job& job) {
  const Part whole = part_of(conv);
  for (int y = job.y0, pairs = 0; y < job.y1; y += pairs) {
    pairs = job.y1 - y < paired(conv) ? job.y1 - y : paired(conv);
    for (int x = 0; x < conv.out_w; x += whole.pixels) {
      const int pixels = conv.out_w - x < whole.pixels ? conv.out_w - x : whole.pixels;
      for (int c = 0; c < conv.groups; c += whole.channels) {
        run_part(conv, job, y, pairs, x, c, {whole.channels, pixels});
      }
    }
  }
}

double cycles(const Conv& conv) {
  const Part part = part_of(conv);
  const double lanes = round_up(conv.groups, kLanes) / kLanes, parts = ceil_div(conv.out_w, part.pixels);
  const double products = lanes * conv.out_w * paired(conv) * (vectors(conv) + 1);
  const double of_rows = 15 * interleaved(conv, part) / kVector + products + 12 * lanes * parts;
  return of_rows * conv.out_h / paired(conv);
}

int rows(const Conv& conv) {
  const int of_row = conv.out_w * round_up(conv.groups, kLanes) * 4;
  const int fitting = (64 << 10) / of_row / paired(conv) * paired(conv);
  const int fewest = fitting < paired(conv) ? paired(conv) : fitting;
  return fewest < conv.out_h ? fewest : conv.out_h;
}

const Kernel kernel = {
    .name = "depthwise_avx512vnni",
    .isa = Isa::avx512vnni,
    .refuses = refuses,
    .cycles = cycles,
    .rows = rows,
    .rows_step = 1,
    .weight_bytes = weight_bytes,
    .pack = pack,
    .scratch_bytes = scratch_bytes,
    .run = run,
};
const Registered registered(kernel);

}  // namespace
}  // namespace mixbits
