// Depthwise convolutions with vpmaddwd: 8 channels a vector, two rows of the window a step, any grid.
//
// Input and weights are arranged as kernels/depthwise.h says, as int16. A product is at most 255 * 255, and
// the two of an instruction fit int32.

#include <immintrin.h>

#include "kernels/depthwise.h"

namespace mixbits {
namespace {

constexpr int kVector = 32;  // bytes
constexpr int kHeld = 12;    // weights that fit the registers
constexpr Form kForm{.lanes = 8, .rows = 2};

const char* refuses(const Conv& conv) {
  return conv.c == 1 && conv.o == 1 ? nullptr : "it takes one input and one output a group";
}

inline __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

void interleave(int rows, const std::uint8_t* input, std::ptrdiff_t row_bytes, int bytes, int runs,
                std::ptrdiff_t between, std::uint8_t* to) {
  const auto some = [](const std::uint8_t* from) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  };
  for (int run = 0; run < runs; ++run, input += between) {
    for (int at = 0; at < bytes; at += 16, to += 2 * kVector) {
      const __m128i above = some(input + at);
      const __m128i below = rows == 1 ? _mm_setzero_si128() : some(input + row_bytes + at);
      auto* words = reinterpret_cast<__m256i*>(to);
      _mm256_store_si256(words, _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(above, below)));
      _mm256_store_si256(words + 1, _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(above, below)));
    }
  }
}

inline void finish(const Sweep& s, __m256i start, int r, int x, __m256i sum) {
  if (s.scale != 1) sum = _mm256_mullo_epi32(sum, _mm256_set1_epi32(s.scale));
  sum = _mm256_add_epi32(sum, start);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(s.acc + r * s.acc_row + x * s.acc_pixel), sum);
}

// Windows of kWidth columns of kSteps.
template <int kPairs, int kWidth, int kSteps>
void sweep(const Sweep& shared) {
  const Sweep s = shared;  // a copy that nothing written through `acc` can change
  constexpr int kVectors = kWidth * kSteps;
  constexpr bool kHolding = kPairs * kVectors <= kHeld;
  __m256i held[kHolding ? kPairs * kVectors : 1];
#pragma GCC unroll 12
  for (int i = 0; kHolding && i < kPairs * kVectors; ++i) held[i] = load(s.weights + i * kVector);
  const __m256i start = load(s.start);
  for (int x = 0; x < s.pixels; ++x) {
    const std::uint8_t* window = s.input + x * s.next;
    __m256i sum[kPairs];
#pragma GCC unroll 2
    for (int r = 0; r < kPairs; ++r) sum[r] = _mm256_setzero_si256();
#pragma GCC unroll 15
    for (int i = 0; i < kVectors; ++i) {
      const __m256i input = load(window + i / kSteps * s.across + i % kSteps * s.step);
#pragma GCC unroll 2
      for (int r = 0; r < kPairs; ++r) {
        const int at = r * kVectors + i;
        const __m256i weight = kHolding ? held[kHolding ? at : 0] : load(s.weights + at * kVector);
        sum[r] = _mm256_add_epi32(sum[r], _mm256_madd_epi16(input, weight));
        // Compilers would add up products first, for which there are not enough registers.
        asm("" : "+x"(sum[r]));
      }
    }
#pragma GCC unroll 2
    for (int r = 0; r < kPairs; ++r) finish(s, start, r, x, sum[r]);
  }
}

// Any window.
template <int kPairs>
void sweep_any(const Sweep& s) {
  const __m256i start = load(s.start);
  for (int x = 0; x < s.pixels; ++x) {
    __m256i sum[kPairs];
    for (int r = 0; r < kPairs; ++r) sum[r] = _mm256_setzero_si256();
    const std::uint8_t* weights = s.weights;
    for (int kx = 0; kx < s.width; ++kx) {
      for (int step = 0; step < s.steps; ++step, weights += kVector) {
        const __m256i input = load(s.input + x * s.next + kx * s.across + step * s.step);
        for (int r = 0; r < kPairs; ++r) {
          const std::uint8_t* at = weights + r * s.width * s.steps * kVector;
          sum[r] = _mm256_add_epi32(sum[r], _mm256_madd_epi16(input, load(at)));
        }
      }
    }
    for (int r = 0; r < kPairs; ++r) finish(s, start, r, x, sum[r]);
  }
}

template <int kPairs>
void sweep(const Sweep& s) {
  if (s.width == 3 && s.steps == 2) return sweep<kPairs, 3, 2>(s);
  if (s.width == 5 && s.steps == 3) return sweep<kPairs, 5, 3>(s);
  sweep_any<kPairs>(s);
}

double cycles(const Conv& conv) {
  const bool held = paired(conv) * conv.kw * steps(conv, kForm) <= kHeld;
  return cycles_of(conv, kForm, 12, held ? 0.65 : 1.1);
}

int rows(const Conv& conv) { return rows_of(conv); }

std::size_t weight_bytes(const Conv& conv) { return weight_bytes_of(conv, kForm); }

void pack(const Conv& conv, const std::int16_t* levels, std::uint8_t* packed) {
  pack_levels(conv, kForm, levels, packed);
}

std::size_t scratch_bytes(const Conv& conv, int) { return scratch_bytes_of(conv, kForm); }

void run(const Conv& conv, const Job& job) { run_parts(conv, job, kForm, interleave, sweep<1>, sweep<2>); }

const Kernel kernel = {
    .name = "depthwise_avx2",
    .isa = Isa::avx2,
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
