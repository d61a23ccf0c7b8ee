// Dot products of bytes where widths are low: vpmaddubsw, and sums kept in int16 for as many steps as are
// exact.
//
// Weights are packed as kernels/dot.h says, in panels of 8 channels. A word of a lane is two int16, each the
// sum of two products a step: after `block` steps at most 2 * block * a_max * max |weight|, which is at most
// 32767. So no instruction saturates. Then they are widened and added to int32 sums in memory.

#include <immintrin.h>

#include <cstring>

#include "kernels/dot.h"

namespace mixbits {
namespace {

constexpr int kLanes = 8;
constexpr int kVector = 32;      // bytes
constexpr int kLeast = 4;        // steps of a block: with fewer, int16 weights are as fast
constexpr int kLargest = 32767;  // int16
constexpr Form kForm{.lanes = kLanes, .value_bytes = 1, .widest = {8, 4, 2, 2}};

// Steps whose sums fit int16.
int steps_of_block(const Conv& conv) {
  const Storage s = storage_of(conv, kForm);
  const int weight = s.max > -s.min ? s.max : -s.min;
  const int product = 2 * conv.a_max * weight;
  return product == 0 ? kLargest : kLargest / product;
}

const char* refuses(const Conv& conv) {
  const Storage storage = storage_of(conv, kForm);
  if (!storage.fits()) return "weight levels are more than a byte holds";
  if (storage.shift != 0 && conv.groups > 1) {
    return "it has no sums of bytes a group, which weight levels outside -128 .. 127 take";
  }
  const int per_vector = layout_of(conv, kForm).steps_of_vector;
  if (steps_of_block(conv) < (per_vector > kLeast ? per_vector : kLeast)) {
    return "products are too large to be added up in 16 bits";
  }
  return nullptr;
}

template <int kBits>
struct Tables {
  static constexpr int kCount = kBits == 8 ? 0 : 4 / kBits;
  __m256i of[kCount + 1];

  explicit Tables(const std::uint8_t* tables) {
    for (int j = 0; j < kCount; ++j) {
      of[j] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(tables) + j));
    }
  }
};

inline __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

inline __m256i broadcast(const std::uint8_t* input) {
  std::int32_t word;
  std::memcpy(&word, input, sizeof(word));
  return _mm256_set1_epi32(word);
}

template <int kPanels, int kPixels>
inline void step(__m256i (&sum)[kPanels][kPixels], const __m256i (&weight)[kPanels],
                 const Windows<kPixels>& windows, const std::uint8_t* input) {
#pragma GCC unroll 8
  for (int n = 0; n < kPixels; ++n) {
    const __m256i bytes = broadcast(input + windows[n]);
#pragma GCC unroll 4
    for (int m = 0; m < kPanels; ++m) {
      sum[m][n] = _mm256_add_epi16(sum[m][n], _mm256_maddubs_epi16(bytes, weight[m]));
      // Compilers would add up the products of several steps first, for which there are not enough registers.
      asm("" : "+x"(sum[m][n]));
    }
  }
}

// The steps of one vector of every panel: all of them, or the first `count`.
template <int kPanels, int kPixels, int kBits, bool kAll>
inline void steps_of_vector(__m256i (&sum)[kPanels][kPixels], const std::uint8_t* weights,
                            const Tables<kBits>& tables, const Windows<kPixels>& windows,
                            const std::uint8_t* input, int count) {
  __m256i packed[kPanels];
#pragma GCC unroll 4
  for (int m = 0; m < kPanels; ++m) packed[m] = load(weights + m * kVector);
  if constexpr (kBits == 8) {
    step(sum, packed, windows, input);
  } else {
    constexpr int kHalf = Tables<kBits>::kCount;  // steps of half a byte
    const __m256i low = _mm256_set1_epi8(15);
#pragma GCC unroll 8
    for (int i = 0; i < 2 * kHalf; ++i) {
      if (!kAll && i >= count) return;
      __m256i weight[kPanels];
#pragma GCC unroll 4
      for (int m = 0; m < kPanels; ++m) {
        const __m256i half = i < kHalf ? packed[m] : _mm256_srli_epi16(packed[m], 4);
        weight[m] = _mm256_shuffle_epi8(tables.of[i % kHalf], _mm256_and_si256(half, low));
      }
      step(sum, weight, windows, input + i * kStep);
    }
  }
}

// Adds int16 sums to int32 ones, [panels][pixels][lanes], and begins anew.
template <int kPanels, int kPixels>
inline void widen(__m256i (&sum)[kPanels][kPixels], std::int32_t* total) {
  const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
  for (int m = 0; m < kPanels; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < kPixels; ++n) {
      auto* to = reinterpret_cast<__m256i*>(total + (m * kPixels + n) * kLanes);
      _mm256_store_si256(to, _mm256_add_epi32(_mm256_load_si256(to), _mm256_madd_epi16(sum[m][n], ones)));
      sum[m][n] = _mm256_setzero_si256();
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
  __m256i sum[kPanels][kPixels];
  alignas(kVector) std::int32_t in_memory[kPanels * kPixels * kLanes];
  std::int32_t* total = in_memory;
  asm("" : "+r"(total) : : "memory");  // or compilers would give it the registers that `sum` needs
#pragma GCC unroll 4
  for (int m = 0; m < kPanels; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < kPixels; ++n) sum[m][n] = _mm256_setzero_si256();
  }
  const std::uint8_t* weights = t.weights;
  const int block = t.block / kSteps;  // vectors
  int room = block;
  const bool widened = l.vectors * l.segments() >= block;
  for (int i = 0; widened && i < kPanels * kPixels; ++i) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(total) + i, _mm256_setzero_si256());
  }
  for (int y = 0; y < l.segments_y; ++y) {
    for (int x = 0; x < l.segments_x; ++x) {
      const std::uint8_t* input = window + y * l.stride_y + x * l.stride_x;
      for (int whole = l.steps / kSteps; whole > 0;) {
        const int some = whole < room ? whole : room;
        for (int i = 0; i < some; ++i) {
          steps_of_vector<kPanels, kPixels, kBits, true>(sum, weights, tables, windows, input, kSteps);
          weights += kPanels * kVector;
          input += kSteps * kStep;
        }
        whole -= some;
        room -= some;
        if (room == 0) {
          widen(sum, total);
          room = block;
        }
      }
      if (const int rest = l.steps % kSteps; rest != 0) {
        steps_of_vector<kPanels, kPixels, kBits, false>(sum, weights, tables, windows, input, rest);
        weights += kPanels * kVector;
        if (--room == 0) {
          widen(sum, total);
          room = block;
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
      __m256i result = _mm256_madd_epi16(sum[m][n], _mm256_set1_epi16(1));
      if (widened) result = _mm256_add_epi32(result, load(total + (m * kPixels + n) * kLanes));
      if (t.scale != 1) result = _mm256_mullo_epi32(result, _mm256_set1_epi32(t.scale));
      result = _mm256_add_epi32(result, start);
      if (extra != nullptr) result = _mm256_add_epi32(result, _mm256_set1_epi32(extra[n]));
      std::int32_t* to = acc + static_cast<std::ptrdiff_t>(n) * t.ld + m * kLanes;
      if (m + 1 < kPanels || t.lanes == kLanes) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), result);
      } else {
        _mm256_maskstore_epi32(to, lanes, result);
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
  static constexpr Run one[] = {tiles<1, 1, kBits>, tiles<1, 2, kBits>, tiles<1, 3, kBits>,
                                tiles<1, 4, kBits>, tiles<1, 5, kBits>, tiles<1, 6, kBits>,
                                tiles<1, 7, kBits>, tiles<1, 8, kBits>};
  static constexpr Run two[] = {tiles<2, 1, kBits>, tiles<2, 2, kBits>, tiles<2, 3, kBits>,
                                tiles<2, 4, kBits>};
  static constexpr Run three[] = {tiles<3, 1, kBits>, tiles<3, 2, kBits>};
  static constexpr Run four[] = {tiles<4, 1, kBits>, tiles<4, 2, kBits>};
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

// Puts the pixels of `rows` rows side by side, four at a time. Reads and writes less than 16 bytes behind a
// row.
void narrow_rows(const Conv& conv, const Layout& l, const std::uint8_t* input, int rows, std::uint8_t* to) {
  alignas(16) std::uint8_t from_byte[16] = {};
  for (int i = 0; i < 4 * conv.c; ++i)
    from_byte[i] = static_cast<std::uint8_t>(i / conv.c * kStep + i % conv.c);
  const __m128i byte_of = _mm_load_si128(reinterpret_cast<const __m128i*>(from_byte));
  for (int y = 0; y < rows; ++y) {
    const std::uint8_t* from = input + static_cast<std::ptrdiff_t>(y) * conv.row_bytes();
    for (int x = 0; x < conv.in_w; x += 4) {
      const __m128i pixels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + x * kStep));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + y * l.row + x * conv.c),
                       _mm_shuffle_epi8(pixels, byte_of));
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
  run_tiles(conv, job, kForm, l, input, extra, steps_of_block(conv), tiles_of);
}

double cycles(const Conv& conv) {
  const int bits = stored_bits(conv, kForm);
  const double unpacking = bits == 8 ? 0 : bits == 4 ? 0.56 : bits == 2 ? 0.36 : 0.28;
  return cycles_of(conv, kForm, 0.69 + 1.0 / steps_of_block(conv), unpacking, bits == 8 ? 1.5 : 1.2);
}

int rows(const Conv& conv) { return rows_of(conv); }

std::size_t weight_bytes(const Conv& conv) { return weight_bytes_of(conv, kForm); }

void pack(const Conv& conv, const std::int16_t* levels, std::uint8_t* packed) {
  pack_levels(conv, kForm, levels, packed);
}

std::size_t scratch_bytes(const Conv& conv, int rows) { return scratch_bytes_of(conv, kForm, rows); }

const Kernel kernel = {
    .name = "dot_avx2",
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
