// Ceilings of kernels with VPOPCNTDQ.

// GCC 12 takes the operands that intrinsics leave undefined for a mistake of ours (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "kernels/ceiling.h"

namespace mixbits {
namespace {

// 512 products of bits.
void counts(std::int64_t rounds) {
  __m512i sums[kCeilingSums] = {};
  __m512i words = _mm512_set1_epi32(1);
  const __m512i others = _mm512_set1_epi32(3);
  for (std::int64_t i = 0; i < rounds; i += kCeilingSums) {
#pragma GCC unroll 16
    for (__m512i& sum : sums) {
      asm volatile("" : "+v"(words));  // so that the AND and the count are made every time
      sum = _mm512_add_epi32(sum, _mm512_popcnt_epi32(_mm512_and_si512(words, others)));
      asm volatile("" : "+v"(sum));
    }
  }
}

const Ceiling of_counts{.name = "vpandd + vpopcntd + vpaddd", .isa = Isa::avx512popcnt, .run = counts};
const RegisteredCeiling registered(of_counts);

}  // namespace
}  // namespace mixbits
