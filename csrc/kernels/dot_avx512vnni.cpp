// Dot products of bytes: vpdpbusd on the input as it lies, weights kept packed and unpacked in registers.
//
// Weights are packed as kernels/dot.h says, in panels of 16 channels.

// GCC 12 takes the operands that intrinsics leave undefined for a mistake of ours (its bug 105593).
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <cstring>

#include "kernels/dot.h"

namespace mixbits {
namespace {

constexpr int kLanes = 16;
constexpr int kVector = 64;  // bytes
constexpr int kPrefetch = 4096;
constexpr Form kForm{.lanes = kLanes, .value_bytes = 1, .widest = {14, 8, 4, 4}};

const char* refuses(const Conv& conv) {
  const Storage storage = storage_of(conv, kForm);
  if (!storage.fits()) return "weight levels are more than a byte holds";
  if (storage.shift != 0 && conv.groups > 1) {
    return "it has no sums of bytes a group, which weight levels outside -128 .. 127 take";
  }
  return nullptr;
}

template <int kBits>
struct Tables {
  static constexpr int kCount = kBits == 8 ? 0 : 4 / kBits;
  __m512i of[kCount + 1];

  explicit Tables(const std::uint8_t* tables) {
    for (int j = 0; j < kCount; ++j) {
      of[j] = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(tables) + j));
    }
  }
};

inline __m512i broadcast(const std::uint8_t* input) {
  std::int32_t word;
  std::memcpy(&word, input, sizeof(word));
  return _mm512_set1_epi32(word);
}

template <int kPanels, int kPixels>
inline void step(__m512i (&sum)[kPanels][kPixels], const __m512i (&weight)[kPanels],
                 const Windows<kPixels>& windows, const std::uint8_t* input) {
#pragma GCC unroll 16
  for (int n = 0; n < kPixels; ++n) {
    const __m512i bytes = broadcast(input + windows[n]);
#pragma GCC unroll 4
    for (int m = 0; m < kPanels; ++m) sum[m][n] = _mm512_dpbusd_epi32(sum[m][n], bytes, weight[m]);
  }
}

// The steps of one vector of every panel: all of them, or the first `count`.
template <int kPanels, int kPixels, int kBits, bool kAll>
inline void steps_of_vector(__m512i (&sum)[kPanels][kPixels], const std::uint8_t* weights,
                            const Tables<kBits>& tables, const Windows<kPixels>& windows,
                            const std::uint8_t* input, int count) {
  __m512i packed[kPanels];
#pragma GCC unroll 4
  for (int m = 0; m < kPanels; ++m) packed[m] = _mm512_load_si512(weights + m * kVector);
  if constexpr (kBits == 8) {
    step(sum, packed, windows, input);
  } else {
    constexpr int kHalf = Tables<kBits>::kCount;  // steps of half a byte
    const __m512i low = _mm512_set1_epi8(15);
#pragma GCC unroll 8
    for (int i = 0; i < 2 * kHalf; ++i) {
      if (!kAll && i >= count) return;
      __m512i weight[kPanels];
#pragma GCC unroll 4
      for (int m = 0; m < kPanels; ++m) {
        const __m512i half = i < kHalf ? packed[m] : _mm512_srli_epi16(packed[m], 4);
        weight[m] = _mm512_shuffle_epi8(tables.of[i % kHalf], _mm512_and_si512(half, low));
      }
      step(sum, weight, windows, input + i * kStep);
    }
  }
}

// Not inline, or what surrounds it would take registers that addresses need.
template <int kPanels, int kPixels, int kBits>
__attribute__((noinline)) void tile(const Tiles& t, const Tables<kBits>& tables,
                                    const Windows<kPixels>& windows, const std::uint8_t* window,
                                    const std::int32_t* extra, std::int32_t* acc) {
  const Layout& l = t.layout;
  constexpr int kSteps = 8 / kBits;
  __m512i sum[kPanels][kPixels];
#pragma GCC unroll 4
  for (int m = 0; m < kPanels; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < kPixels; ++n) sum[m][n] = _mm512_setzero_si512();
  }
  const std::uint8_t* weights = t.weights;
  for (int y = 0; y < l.segments_y; ++y) {
    for (int x = 0; x < l.segments_x; ++x) {
      const std::uint8_t* input = window + y * l.stride_y + x * l.stride_x;
      for (int whole = l.steps / kSteps; whole > 0; --whole) {
#pragma GCC unroll 4
        for (int m = 0; m < kPanels; ++m) {
          _mm_prefetch(reinterpret_cast<const char*>(weights) + kPrefetch + m * kVector, _MM_HINT_T0);
        }
        steps_of_vector<kPanels, kPixels, kBits, true>(sum, weights, tables, windows, input, kSteps);
        weights += kPanels * kVector;
        input += kSteps * kStep;
      }
      if (const int rest = l.steps % kSteps; rest != 0) {
        steps_of_vector<kPanels, kPixels, kBits, false>(sum, weights, tables, windows, input, rest);
        weights += kPanels * kVector;
      }
    }
  }
  const __m512i scale = _mm512_set1_epi32(t.scale);
  const auto lanes = static_cast<__mmask16>((1 << t.lanes) - 1);
#pragma GCC unroll 4
  for (int m = 0; m < kPanels; ++m) {
    const __m512i start = _mm512_loadu_si512(t.start + m * kLanes);
#pragma GCC unroll 16
    for (int n = 0; n < kPixels; ++n) {
      __m512i result = sum[m][n];
      if (t.scale != 1) result = _mm512_mullo_epi32(result, scale);
      result = _mm512_add_epi32(result, start);
      if (extra != nullptr) result = _mm512_add_epi32(result, _mm512_set1_epi32(extra[n]));
      std::int32_t* to = acc + static_cast<std::ptrdiff_t>(n) * t.ld + m * kLanes;
      if (m + 1 < kPanels) {
        _mm512_storeu_si512(to, result);
      } else {
        _mm512_mask_storeu_epi32(to, lanes, result);
      }
    }
  }
}

template <int kPanels, int kPixels, int kBits>
void tiles(const Tiles& t) {
  const Tables<kBits> tables(t.tables);
  const Windows<kPixels> windows(t.layout.between_x);
  each_tile<kPixels>(t, [&](const std::uint8_t* window, const std::int32_t* extra, std::int32_t* acc) {
    tile<kPanels, kPixels, kBits>(t, tables, windows, window, extra, acc);
  });
}

template <int kBits>
Run tiles_of(int panels, int pixels) {
  static constexpr Run one[] = {
      tiles<1, 1, kBits>,  tiles<1, 2, kBits>,  tiles<1, 3, kBits>,  tiles<1, 4, kBits>, tiles<1, 5, kBits>,
      tiles<1, 6, kBits>,  tiles<1, 7, kBits>,  tiles<1, 8, kBits>,  tiles<1, 9, kBits>, tiles<1, 10, kBits>,
      tiles<1, 11, kBits>, tiles<1, 12, kBits>, tiles<1, 13, kBits>, tiles<1, 14, kBits>};
  static constexpr Run two[] = {tiles<2, 1, kBits>, tiles<2, 2, kBits>, tiles<2, 3, kBits>,
                                tiles<2, 4, kBits>, tiles<2, 5, kBits>, tiles<2, 6, kBits>,
                                tiles<2, 7, kBits>, tiles<2, 8, kBits>};
  static constexpr Run three[] = {tiles<3, 1, kBits>, tiles<3, 2, kBits>, tiles<3, 3, kBits>,
                                  tiles<3, 4, kBits>};
  static constexpr Run four[] = {tiles<4, 1, kBits>, tiles<4, 2, kBits>, tiles<4, 3, kBits>,
                                 tiles<4, 4, kBits>};
  switch (panels) {
    case 1: return one[pixels - 1];
    case 2: return two[pixels - 1];
    case 3: return three[pixels - 1];
    default: return four[pixels - 1];
  }
}

Run tiles_of(int bits, int panels, int pixels) {
  switch (bits) {
    case 1: return tiles_of<1>(panels, pixels);
    case 2: return tiles_of<2>(panels, pixels);
    case 4: return tiles_of<4>(panels, pixels);
    default: return tiles_of<8>(panels, pixels);
  }
}

// Puts the pixels of `rows` rows side by side, 16 at a time. Reads and writes at most 60 bytes behind a row.
void narrow_rows(const Conv& conv, const Layout& l, const std::uint8_t* input, int rows, std::uint8_t* to) {
  alignas(kVector) std::uint8_t bytes[kVector] = {};  // of every four pixels, to the front of their lane
  alignas(kVector) std::int32_t words[kLanes] = {};   // of every lane, to the front
  for (int i = 0; i < 4 * conv.c; ++i) {
    for (int lane = 0; lane < 4; ++lane) {
      bytes[lane * 16 + i] = static_cast<std::uint8_t>(i / conv.c * kStep + i % conv.c);
    }
    words[i] = i / conv.c * 4 + i % conv.c;
  }
  const __m512i byte_of = _mm512_load_si512(bytes), word_of = _mm512_load_si512(words);
  for (int y = 0; y < rows; ++y) {
    const std::uint8_t* from = input + static_cast<std::ptrdiff_t>(y) * conv.row_bytes();
    for (int x = 0; x < conv.in_w; x += kLanes) {
      const __m512i pixels = _mm512_loadu_si512(from + x * kStep);
      _mm512_storeu_si512(to + y * l.row + x * conv.c,
                          _mm512_permutexvar_epi32(word_of, _mm512_shuffle_epi8(pixels, byte_of)));
    }
  }
}

void run(const Conv& conv, const Job& job) {
  const Storage storage = storage_of(conv, kForm);
  const Layout l = layout_of(conv, kForm);
  const int rows = job.y1 - job.y0;
  const std::uint8_t* input =
      job.input + static_cast<std::ptrdiff_t>(job.y0) * conv.stride_y * conv.row_bytes();
  std::int32_t* extra = nullptr;
  if (narrow(conv, kForm)) {
    narrow_rows(conv, l, input, input_rows(conv, rows), job.scratch);
    input = job.scratch;
  } else if (storage.shift != 0) {
    extra = reinterpret_cast<std::int32_t*>(job.scratch);
    byte_sums(conv, l, input, rows, storage.shift * conv.a_scale, extra);
  }
  run_tiles(conv, job, kForm, l, input, extra, 0, tiles_of);
}

double cycles(const Conv& conv) {
  // For a pixel or two, unpacking weights or reading them takes longer than the products.
  return cycles_of(conv, kForm, 1, 0, stored_bits(conv, kForm) == 8 ? 2.4 : 1.6);
}

int rows(const Conv& conv) { return rows_of(conv); }

std::size_t weight_bytes(const Conv& conv) { return weight_bytes_of(conv, kForm); }

void pack(const Conv& conv, const std::int16_t* levels, std::uint8_t* packed) {
  pack_levels(conv, kForm, levels, packed);
}

std::size_t scratch_bytes(const Conv& conv, int rows) { return scratch_bytes_of(conv, kForm, rows); }

const Kernel kernel = {
    .name = "dot_avx512vnni",
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
