// Depthwise convolutions with vpdpbusd: 16 channels a vector, four rows of the window a step.
//
// Input and weights are arranged as kernels/depthwise.h says.

// GCC 12 takes the operands that intrinsics leave undefined for a mistake of ours (its bug 105593).
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "kernels/depthwise.h"

namespace mixbits {
namespace {

constexpr int kVector = 64;  // bytes
constexpr int kRows = 4;
constexpr Form kForm{.lanes = 16, .rows = kRows};

const char* refuses(const Conv& conv) {
  if (conv.c != 1 || conv.o != 1) return "it takes one input and one output a group";
  if (conv.w_min < -128 || conv.w_max > 127) return "weight levels are more than a signed byte holds";
  return nullptr;
}

// 64 bytes of every row.
template <int kCount>
inline void interleave(const std::uint8_t* input, std::ptrdiff_t row_bytes, std::uint8_t* to) {
  // Instructions interleave within 128 bits, word i of each into vector i: so that word has to be there.
  const __m512i spread = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i row[kRows];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    row[i] = i < kCount ? _mm512_permutexvar_epi32(spread, _mm512_loadu_si512(input + i * row_bytes))
                        : _mm512_setzero_si512();
  }
  const __m512i low01 = _mm512_unpacklo_epi8(row[0], row[1]), high01 = _mm512_unpackhi_epi8(row[0], row[1]);
  const __m512i low23 = _mm512_unpacklo_epi8(row[2], row[3]), high23 = _mm512_unpackhi_epi8(row[2], row[3]);
  _mm512_store_si512(to, _mm512_unpacklo_epi16(low01, low23));
  _mm512_store_si512(to + kVector, _mm512_unpackhi_epi16(low01, low23));
  _mm512_store_si512(to + 2 * kVector, _mm512_unpacklo_epi16(high01, high23));
  _mm512_store_si512(to + 3 * kVector, _mm512_unpackhi_epi16(high01, high23));
}

template <int kCount>
void interleave(const std::uint8_t* input, std::ptrdiff_t row_bytes, int bytes, int runs,
                std::ptrdiff_t between, std::uint8_t* to) {
  for (int run = 0; run < runs; ++run, input += between) {
    for (int at = 0; at < bytes; at += kVector, to += kRows * kVector) {
      interleave<kCount>(input + at, row_bytes, to);
    }
  }
}

void interleave(int rows, const std::uint8_t* input, std::ptrdiff_t row_bytes, int bytes, int runs,
                std::ptrdiff_t between, std::uint8_t* to) {
  switch (rows) {
    case 1: return interleave<1>(input, row_bytes, bytes, runs, between, to);
    case 2: return interleave<2>(input, row_bytes, bytes, runs, between, to);
    case 3: return interleave<3>(input, row_bytes, bytes, runs, between, to);
    default: return interleave<4>(input, row_bytes, bytes, runs, between, to);
  }
}

inline void finish(const Sweep& s, __m512i start, int r, int x, __m512i sum) {
  if (s.scale != 1) sum = _mm512_mullo_epi32(sum, _mm512_set1_epi32(s.scale));
  sum = _mm512_add_epi32(sum, start);
  _mm512_storeu_si512(s.acc + r * s.acc_row + x * s.acc_pixel, sum);
}

// Windows of kWidth columns of kSteps: weights in registers.
template <int kPairs, int kWidth, int kSteps>
void sweep(const Sweep& shared) {
  const Sweep s = shared;  // a copy that nothing written through `acc` can change
  constexpr int kVectors = kWidth * kSteps;
  __m512i weight[kPairs][kVectors];
#pragma GCC unroll 2
  for (int r = 0; r < kPairs; ++r) {
#pragma GCC unroll 10
    for (int i = 0; i < kVectors; ++i) {
      weight[r][i] = _mm512_load_si512(s.weights + (r * kVectors + i) * kVector);
    }
  }
  const __m512i start = _mm512_loadu_si512(s.start);
  for (int x = 0; x < s.pixels; ++x) {
    const std::uint8_t* window = s.input + x * s.next;
    __m512i sum[kPairs];
#pragma GCC unroll 2
    for (int r = 0; r < kPairs; ++r) sum[r] = _mm512_setzero_si512();
#pragma GCC unroll 10
    for (int i = 0; i < kVectors; ++i) {
      const __m512i input = _mm512_loadu_si512(window + i / kSteps * s.across + i % kSteps * s.step);
#pragma GCC unroll 2
      for (int r = 0; r < kPairs; ++r) sum[r] = _mm512_dpbusd_epi32(sum[r], input, weight[r][i]);
    }
#pragma GCC unroll 2
    for (int r = 0; r < kPairs; ++r) finish(s, start, r, x, sum[r]);
  }
}

// Any window.
template <int kPairs>
void sweep_any(const Sweep& s) {
  const __m512i start = _mm512_loadu_si512(s.start);
  for (int x = 0; x < s.pixels; ++x) {
    __m512i sum[kPairs];
    for (int r = 0; r < kPairs; ++r) sum[r] = _mm512_setzero_si512();
    const std::uint8_t* weights = s.weights;
    for (int kx = 0; kx < s.width; ++kx) {
      for (int step = 0; step < s.steps; ++step, weights += kVector) {
        const __m512i input = _mm512_loadu_si512(s.input + x * s.next + kx * s.across + step * s.step);
        for (int r = 0; r < kPairs; ++r) {
          const std::uint8_t* at = weights + r * s.width * s.steps * kVector;
          sum[r] = _mm512_dpbusd_epi32(sum[r], input, _mm512_load_si512(at));
        }
      }
    }
    for (int r = 0; r < kPairs; ++r) finish(s, start, r, x, sum[r]);
  }
}

template <int kPairs>
void sweep(const Sweep& s) {
  if (s.width == 3 && s.steps == 1) return sweep<kPairs, 3, 1>(s);
  if (s.width == 5 && s.steps == 2) return sweep<kPairs, 5, 2>(s);
  sweep_any<kPairs>(s);
}

double cycles(const Conv& conv) { return cycles_of(conv, kForm, 15, 1); }

int rows(const Conv& conv) { return rows_of(conv); }

std::size_t weight_bytes(const Conv& conv) { return weight_bytes_of(conv, kForm); }

void pack(const Conv& conv, const std::int16_t* levels, std::uint8_t* packed) {
  pack_levels(conv, kForm, levels, packed);
}

std::size_t scratch_bytes(const Conv& conv, int) { return scratch_bytes_of(conv, kForm); }

void run(const Conv& conv, const Job& job) { run_parts(conv, job, kForm, interleave, sweep<1>, sweep<2>); }

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
