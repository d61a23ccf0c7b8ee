// Ceilings of kernels with AVX2.

#include <immintrin.h>

#include "kernels/ceiling.h"

namespace mixbits {
namespace {

// 32 products of bytes in sums of 16 bits.
void dots(std::int64_t rounds) {
  __m256i sums[kCeilingSums] = {};
  __m256i bytes = _mm256_set1_epi8(1);
  const __m256i others = _mm256_set1_epi8(1);
  for (std::int64_t i = 0; i < rounds; i += kCeilingSums) {
#pragma GCC unroll 16
    for (__m256i& sum : sums) {
      asm volatile("" : "+x"(bytes));  // so that products are made every time
      sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(bytes, others));
      asm volatile("" : "+x"(sum));
    }
  }
}

// 16 products of int16 in sums of 32 bits.
void wide_dots(std::int64_t rounds) {
  __m256i sums[kCeilingSums] = {};
  __m256i values = _mm256_set1_epi16(1);
  const __m256i others = _mm256_set1_epi16(1);
  for (std::int64_t i = 0; i < rounds; i += kCeilingSums) {
#pragma GCC unroll 16
    for (__m256i& sum : sums) {
      asm volatile("" : "+x"(values));  // so that products are made every time
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(values, others));
      asm volatile("" : "+x"(sum));
    }
  }
}

// 32 entries of a table.
void lookups(std::int64_t rounds) {
  __m256i sums[kCeilingSums] = {};
  __m256i indices = _mm256_set1_epi8(1);
  const __m256i table = _mm256_set1_epi8(3);
  for (std::int64_t i = 0; i < rounds; i += kCeilingSums) {
#pragma GCC unroll 16
    for (__m256i& sum : sums) {
      asm volatile("" : "+x"(indices));  // so that they are looked up every time
      sum = _mm256_add_epi8(sum, _mm256_shuffle_epi8(table, indices));
      asm volatile("" : "+x"(sum));
    }
  }
}

const Ceiling of_dots{.name = "vpmaddubsw + vpaddw", .isa = Isa::avx2, .run = dots};
const Ceiling of_wide_dots{.name = "vpmaddwd + vpaddd", .isa = Isa::avx2, .run = wide_dots};
const Ceiling of_lookups{.name = "vpshufb + vpaddb", .isa = Isa::avx2, .run = lookups};
const RegisteredCeiling registered_dots(of_dots), registered_wide_dots(of_wide_dots),
    registered_lookups(of_lookups);

}  // namespace
}  // namespace mixbits
