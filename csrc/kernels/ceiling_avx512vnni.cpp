// Ceilings of kernels with VNNI.

// GCC 12 takes the operands that intrinsics leave undefined for a mistake of ours (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "kernels/ceiling.h"

namespace mixbits {
namespace {

// 64 products of bytes.
void dots(std::int64_t rounds) {
  __m512i sums[kCeilingSums] = {};
  const __m512i bytes = _mm512_set1_epi8(1);
  for (std::int64_t i = 0; i < rounds; i += kCeilingSums) {
#pragma GCC unroll 16
    for (__m512i& sum : sums) {
      sum = _mm512_dpbusd_epi32(sum, bytes, bytes);
      asm volatile("" : "+v"(sum));
    }
  }
}

const Ceiling of_dots{.name = "vpdpbusd", .isa = Isa::avx512vnni, .run = dots};
const RegisteredCeiling registered(of_dots);

}  // namespace
}  // namespace mixbits
