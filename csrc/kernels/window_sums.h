// Sums of the input's bytes under each window: what a constant added to all weights adds to the outputs.
//
// Every kernel that includes this gets its own copy, compiled for its instruction set.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "kernels/kernel.h"

namespace mixbits {
namespace {

// Rows of the input that `rows` output rows read.
constexpr int rows_read(const Conv& conv, int rows) {
  return (rows - 1) * conv.stride_y + (conv.kh - 1) * conv.dilation_y + 1;
}

// Room for `window_sums` to work in: the results and the sum of each pixel.
constexpr std::size_t window_sums_bytes(const Conv& conv, int rows) {
  return sizeof(std::int32_t) * (static_cast<std::size_t>(rows) * conv.out_w +
                                 static_cast<std::size_t>(rows_read(conv, rows)) * conv.in_w);
}

// Sum of a pixel's bytes.
std::int32_t pixel_sum(const std::uint8_t* pixel, int channels) {
  std::int32_t sum = 0;
  int c = 0;
#if defined(__SSE2__)
  __m128i sums = _mm_setzero_si128();
  for (; c + 16 <= channels; c += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(pixel + c));
    sums = _mm_add_epi64(sums, _mm_sad_epu8(bytes, _mm_setzero_si128()));
  }
  sum = _mm_cvtsi128_si32(_mm_add_epi64(sums, _mm_unpackhi_epi64(sums, sums)));
#endif
  for (; c < channels; ++c) sum += pixel[c];
  return sum;
}

// sums[x] += row[x * stride]
void add_row(const std::int32_t* __restrict row, int stride, int width, std::int32_t* __restrict sums) {
  if (stride == 1) {
    for (int x = 0; x < width; ++x) sums[x] += row[x];
  } else {
    for (int x = 0; x < width; ++x) sums[x] += row[x * stride];
  }
}

// sums[y1 - y0][out_w] = factor * sum over ky, kx, c of the input's bytes; for one group. `conv` is a copy,
// which what is written cannot change.
void window_sums(const Conv conv, const Job& job, std::int32_t factor, std::int32_t* sums) {
  const int rows = job.y1 - job.y0, width = conv.out_w;
  std::int32_t* pixels = sums + static_cast<std::ptrdiff_t>(rows) * width;
  const std::uint8_t* at = job.input + static_cast<std::ptrdiff_t>(job.y0) * conv.stride_y * conv.row_bytes();
  const int count = rows_read(conv, rows) * conv.in_w;
  for (int i = 0; i < count; ++i, at += conv.pixel_stride) pixels[i] = factor * pixel_sum(at, conv.c);
  for (int y = 0; y < rows; ++y, sums += width) {
    for (int x = 0; x < width; ++x) sums[x] = 0;
    for (int ky = 0; ky < conv.kh; ++ky) {
      const std::int32_t* row =
          pixels + static_cast<std::ptrdiff_t>(y * conv.stride_y + ky * conv.dilation_y) * conv.in_w;
      for (int kx = 0; kx < conv.kw; ++kx) add_row(row + kx * conv.dilation_x, conv.stride_x, width, sums);
    }
  }
}

}  // namespace
}  // namespace mixbits
