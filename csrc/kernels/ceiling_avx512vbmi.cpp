// Ceilings of kernels with VBMI.

// GCC 12 takes the operands that intrinsics leave undefined for a mistake of ours (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "kernels/ceiling.h"

namespace mixbits {
namespace {

// 64 entries of a table. Two look-ups, then two additions: one by one they take a quarter longer on Zen 4.
void lookups(std::int64_t rounds) {
  __m512i sums[kCeilingSums] = {};
  __m512i indices = _mm512_set1_epi8(1);
  const __m512i table = _mm512_set1_epi8(3);
  for (std::int64_t i = 0; i < rounds; i += kCeilingSums) {
#pragma GCC unroll 16
    for (int k = 0; k < kCeilingSums; k += 2) {
      asm volatile("" : "+v"(indices));  // so that they are looked up every time
      __m512i first = _mm512_permutexvar_epi8(indices, table);
      asm volatile("" : "+v"(indices), "+v"(first));
      __m512i second = _mm512_permutexvar_epi8(indices, table);
      asm volatile("" : "+v"(second));
      sums[k] = _mm512_add_epi8(sums[k], first);
      sums[k + 1] = _mm512_add_epi8(sums[k + 1], second);
      asm volatile("" : "+v"(sums[k]), "+v"(sums[k + 1]));
    }
  }
}

const Ceiling of_lookups{.name = "vpermb + vpaddb", .isa = Isa::avx512vbmi, .run = lookups};
const RegisteredCeiling registered(of_lookups);

}  // namespace
}  // namespace mixbits
