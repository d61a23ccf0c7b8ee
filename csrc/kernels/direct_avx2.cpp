// Products of int16 levels with vpmaddwd: any grid, any window, any groups.
//
// Weights are packed as kernels/dot.h says, in panels of 8 channels and as int16. The rows of the input that
// a call takes are first widened to int16. A product is at most 255 * 255, and the two of an instruction fit
// int32.

#include <immintrin.h>

#include <cstring>

#include "kernels/dot.h"

namespace mixbits {
namespace {

constexpr int kLanes = 8;
constexpr int kVector = 32;  // bytes
constexpr Form kForm{.lanes = kLanes, .value_bytes = 2, .widest = {8, 4, 2, 2}};

const char* refuses(const Conv&) { return nullptr; }

inline __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

inline __m256i broadcast(const std::uint8_t* input) {
  std::int32_t word;
  std::memcpy(&word, input, sizeof(word));
  return _mm256_set1_epi32(word);
}

// Not inline, or what surrounds it would take registers that addresses need.
template <int kPanels, int kPixels>
__attribute__((noinline)) void tile(const Tiles& t, const Windows<kPixels>& windows,
                                    const std::uint8_t* window, std::int32_t* acc) {
  const Layout& l = t.layout;
  __m256i sum[kPanels][kPixels];
#pragma GCC unroll 4
  for (int m = 0; m < kPanels; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < kPixels; ++n) sum[m][n] = _mm256_setzero_si256();
  }
  const std::uint8_t* weights = t.weights;
  for (int y = 0; y < l.segments_y; ++y) {
    for (int x = 0; x < l.segments_x; ++x) {
      const std::uint8_t* input = window + y * l.stride_y + x * l.stride_x;
      for (int i = 0; i < l.steps; ++i, input += kStep, weights += kPanels * kVector) {
        __m256i weight[kPanels];
#pragma GCC unroll 4
        for (int m = 0; m < kPanels; ++m) {
          weight[m] = load(weights + m * kVector);
          asm("" : "+x"(weight[m]));  // or it would be loaded for every pixel
        }
#pragma GCC unroll 8
        for (int n = 0; n < kPixels; ++n) {
          const __m256i values = broadcast(input + windows[n]);
#pragma GCC unroll 4
          for (int m = 0; m < kPanels; ++m) {
            sum[m][n] = _mm256_add_epi32(sum[m][n], _mm256_madd_epi16(values, weight[m]));
            // Or sums would be added up in other registers and copied back.
            asm("" : "+x"(sum[m][n]));
          }
        }
      }
    }
  }
  const __m256i lanes =
      _mm256_cmpgt_epi32(_mm256_set1_epi32(t.lanes), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
#pragma GCC unroll 4
  for (int m = 0; m < kPanels; ++m) {
    const __m256i start = load(t.start + m * kLanes);
#pragma GCC unroll 8
    for (int n = 0; n < kPixels; ++n) {
      __m256i result = sum[m][n];
      if (t.scale != 1) result = _mm256_mullo_epi32(result, _mm256_set1_epi32(t.scale));
      result = _mm256_add_epi32(result, start);
      std::int32_t* to = acc + static_cast<std::ptrdiff_t>(n) * t.ld + m * kLanes;
      if (m + 1 < kPanels || t.lanes == kLanes) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), result);
      } else {
        _mm256_maskstore_epi32(to, lanes, result);
      }
    }
  }
}

template <int kPanels, int kPixels>
void tiles(const Tiles& t) {
  const Windows<kPixels> windows(t.layout.between_x);
  each_tile<kPixels>(t, [&](const std::uint8_t* window, const std::int32_t*, std::int32_t* acc) {
    tile<kPanels, kPixels>(t, windows, window, acc);
  });
}

Run tiles_of(int, int panels, int pixels) {
  static constexpr Run one[] = {tiles<1, 1>, tiles<1, 2>, tiles<1, 3>, tiles<1, 4>,
                                tiles<1, 5>, tiles<1, 6>, tiles<1, 7>, tiles<1, 8>};
  static constexpr Run two[] = {tiles<2, 1>, tiles<2, 2>, tiles<2, 3>, tiles<2, 4>};
  static constexpr Run three[] = {tiles<3, 1>, tiles<3, 2>};
  static constexpr Run four[] = {tiles<4, 1>, tiles<4, 2>};
  switch (panels) {
    case 1: return one[pixels - 1];
    case 2: return two[pixels - 1];
    case 3: return three[pixels - 1];
    default: return four[pixels - 1];
  }
}

// Bytes to int16. Reads and writes whole vectors: less than 16 and 32 bytes behind the last row.
void widen(const std::uint8_t* input, std::ptrdiff_t bytes, std::uint8_t* to) {
  for (std::ptrdiff_t i = 0; i < bytes; i += 16) {
    const __m128i some = _mm_loadu_si128(reinterpret_cast<const __m128i*>(input + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 2 * i), _mm256_cvtepu8_epi16(some));
  }
}

// Bytes to int16, and the pixels of `rows` rows side by side, four at a time. Reads less than 16 bytes behind
// a row, and writes less than 32.
void widen_narrow(const Conv& conv, const Layout& l, const std::uint8_t* input, int rows, std::uint8_t* to) {
  alignas(16) std::uint8_t from_byte[16] = {};
  for (int i = 0; i < 4 * conv.c; ++i) {
    from_byte[i] = static_cast<std::uint8_t>(i / conv.c * kStep + i % conv.c);
  }
  const __m128i byte_of = _mm_load_si128(reinterpret_cast<const __m128i*>(from_byte));
  for (int y = 0; y < rows; ++y, input += conv.row_bytes(), to += l.row) {
    for (int x = 0; x < conv.in_w; x += 4) {
      const __m128i pixels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(input + x * kStep));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + x * l.pixel),
                          _mm256_cvtepu8_epi16(_mm_shuffle_epi8(pixels, byte_of)));
    }
  }
}

void run(const Conv& conv, const Job& job) {
  const Layout l = layout_of(conv, kForm);
  const std::ptrdiff_t row = conv.row_bytes();
  const std::uint8_t* input = job.input + job.y0 * conv.stride_y * row;
  const int rows = input_rows(conv, job.y1 - job.y0);
  if (narrow(conv, kForm)) {
    widen_narrow(conv, l, input, rows, job.scratch);
  } else {
    widen(input, rows * row, job.scratch);
  }
  run_tiles(conv, job, kForm, l, job.scratch, nullptr, 0, tiles_of);
}

double cycles(const Conv& conv) {
  const double again =
      1.0 * input_rows(conv, rows_of(conv)) / rows_of(conv);  // rows widened for an output row
  return cycles_of(conv, kForm, 0.64, 0, 1.5) + conv.out_h * again * conv.row_bytes() / 16.0;
}

int rows(const Conv& conv) { return rows_of(conv); }

std::size_t weight_bytes(const Conv& conv) { return weight_bytes_of(conv, kForm); }

void pack(const Conv& conv, const std::int16_t* levels, std::uint8_t* packed) {
  pack_levels(conv, kForm, levels, packed);
}

// The last vector that widening writes may reach behind the rows.
std::size_t scratch_bytes(const Conv& conv, int rows) {
  return scratch_bytes_of(conv, kForm, rows) + kVector;
}

const Kernel kernel = {
    .name = "direct_avx2",
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
