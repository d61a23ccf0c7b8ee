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

constexpr int kLanes = 16;    // channels of a vector
constexpr int kBlock = 64;    // channels that are interleaved at once
constexpr int kVector = 64;   // bytes
constexpr int kRows = 4;      // of a quad
constexpr int kLargest = 64;  // rows of a window

const char* refuses(const Conv& conv) {
  if (conv.c != 1 || conv.o != 1) return "it takes one input and one output a group";
  if (conv.w_min < -128 || conv.w_max > 127) return "weight levels are more than a signed byte holds";
  if (conv.kh >= kLargest) return "the window has more than 63 rows";
  return nullptr;
}

// Output rows that share interleaved input.
int paired(const Conv& conv) { return conv.stride_y == conv.dilation_y ? 2 : 1; }

int quads(const Conv& conv) { return (conv.kh + paired(conv) - 1 + kRows - 1) / kRows; }

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

// Columns of the map that windows reach.
int columns(const Conv& conv) {
  return (conv.out_w - 1) * conv.stride_x + (conv.kw - 1) * conv.dilation_x + 1;
}

std::size_t scratch_bytes(const Conv& conv, int) {
  return static_cast<std::size_t>(columns(conv)) * quads(conv) * kRows * kBlock;
}

// 64 channels of four pixels: vector i of `to` has channels 16 * i and on, a word each.
inline void interleave(const std::uint8_t* const (&pixel)[kRows], std::ptrdiff_t at, std::uint8_t* to) {
  // Bytes are interleaved within 128 bits: word i of each goes to vector i, so that channels have to be
  // there.
  const __m512i spread = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i row[kRows];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    row[i] = _mm512_permutexvar_epi32(spread, _mm512_loadu_si512(pixel[i] + at));
  }
  const __m512i low01 = _mm512_unpacklo_epi8(row[0], row[1]), high01 = _mm512_unpackhi_epi8(row[0], row[1]);
  const __m512i low23 = _mm512_unpacklo_epi8(row[2], row[3]), high23 = _mm512_unpackhi_epi8(row[2], row[3]);
  _mm512_store_si512(to, _mm512_unpacklo_epi16(low01, low23));
  _mm512_store_si512(to + kVector, _mm512_unpackhi_epi16(low01, low23));
  _mm512_store_si512(to + 2 * kVector, _mm512_unpacklo_epi16(high01, high23));
  _mm512_store_si512(to + 3 * kVector, _mm512_unpackhi_epi16(high01, high23));
}

// All columns of `pairs` output rows at `input`, 64 channels: [column][quad][4 vectors].
void interleave_rows(const Conv& conv, int pairs, const std::uint8_t* input, std::uint8_t* to) {
  const int rows = conv.kh + pairs - 1;
  for (int q = 0; q < quads(conv); ++q) {
    const std::uint8_t* pixel[kRows];
    for (int i = 0; i < kRows; ++i) {
      const int row = q * kRows + i < rows ? q * kRows + i : 0;  // where weights are 0, any row of the map
      pixel[i] = input + static_cast<std::ptrdiff_t>(row) * conv.dilation_y * conv.row_bytes();
    }
    for (int x = 0; x < columns(conv); ++x) {
      interleave(pixel, static_cast<std::ptrdiff_t>(x) * conv.pixel_stride,
                 to + (static_cast<std::ptrdiff_t>(x) * quads(conv) + q) * kRows * kBlock);
    }
  }
}

// 16 channels of kPairs output rows: sums over kw * quads vectors for each pixel.
struct Sweep {
  const std::uint8_t* weights;  // of the first row
  const std::uint8_t* columns;  // of these 16 channels
  std::int32_t* acc;
  std::ptrdiff_t acc_row, acc_pixel;  // elements between rows and pixels
  __m512i start;
};

// kWidth and kQuads of 0 stand for any.
template <int kPairs, int kWidth, int kQuads>
void sweep(const Conv& conv, const Sweep& s) {
  const int width = kWidth == 0 ? conv.kw : kWidth, high = kQuads == 0 ? quads(conv) : kQuads;
  const std::ptrdiff_t column = static_cast<std::ptrdiff_t>(high) * kRows * kBlock;
  const __m512i scale = _mm512_set1_epi32(conv.a_scale);
  for (int x = 0; x < conv.out_w; ++x) {
    __m512i sum[kPairs];
#pragma GCC unroll 2
    for (int r = 0; r < kPairs; ++r) sum[r] = _mm512_setzero_si512();
    const std::uint8_t* window = s.columns + x * conv.stride_x * column;
#pragma GCC unroll 5
    for (int kx = 0; kx < width; ++kx) {
#pragma GCC unroll 2
      for (int q = 0; q < high; ++q) {
        const __m512i input = _mm512_load_si512(window + kx * conv.dilation_x * column + q * kRows * kBlock);
#pragma GCC unroll 2
        for (int r = 0; r < kPairs; ++r) {
          const __m512i weight = _mm512_load_si512(s.weights + ((r * width + kx) * high + q) * kVector);
          sum[r] = _mm512_dpbusd_epi32(sum[r], input, weight);
        }
      }
    }
#pragma GCC unroll 2
    for (int r = 0; r < kPairs; ++r) {
      if (conv.a_scale != 1) sum[r] = _mm512_mullo_epi32(sum[r], scale);
      _mm512_storeu_si512(s.acc + r * s.acc_row + x * s.acc_pixel, _mm512_add_epi32(sum[r], s.start));
    }
  }
}

template <int kPairs>
void sweep(const Conv& conv, const Sweep& s) {
  if (conv.kw == 3 && quads(conv) == 1) return sweep<kPairs, 3, 1>(conv, s);
  if (conv.kw == 5 && quads(conv) == 2) return sweep<kPairs, 5, 2>(conv, s);
  sweep<kPairs, 0, 0>(conv, s);
}

void run(const Conv& conv, const Job& job) {
  const auto* start = reinterpret_cast<const std::int32_t*>(job.weights);
  const std::ptrdiff_t of_lanes = static_cast<std::ptrdiff_t>(paired(conv)) * vectors(conv) * kVector;
  const std::ptrdiff_t acc_row = static_cast<std::ptrdiff_t>(conv.out_w) * job.ld;
  for (int y = job.y0, pairs = 0; y < job.y1; y += pairs) {
    pairs = job.y1 - y < paired(conv) ? job.y1 - y : paired(conv);
    const std::uint8_t* input = job.input + static_cast<std::ptrdiff_t>(y) * conv.stride_y * conv.row_bytes();
    for (int block = 0; block < conv.groups; block += kBlock) {
      interleave_rows(conv, pairs, input + block, job.scratch);
      for (int c = block; c < block + kBlock && c < conv.groups; c += kLanes) {
        const Sweep s{.weights = job.weights + start_bytes(conv) + c / kLanes * of_lanes,
                      .columns = job.scratch + (c - block) / kLanes * kVector,
                      .acc = job.acc + (y - job.y0) * acc_row + c,
                      .acc_row = acc_row,
                      .acc_pixel = job.ld,
                      .start = _mm512_loadu_si512(start + c)};
        pairs == 2 ? sweep<2>(conv, s) : sweep<1>(conv, s);
      }
    }
  }
}

double cycles(const Conv& conv) {
  const double blocks = (conv.groups + kBlock - 1) / kBlock, lanes = round_up(conv.groups, kLanes) / kLanes;
  const double interleaving = blocks * columns(conv) * quads(conv) * 14;
  const double products = lanes * conv.out_w * paired(conv) * (vectors(conv) + 2);
  return (interleaving + products) * conv.out_h / paired(conv);
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
