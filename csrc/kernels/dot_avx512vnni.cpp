// Dot products of bytes: vpdpbusd on the input as it lies, weights kept packed and unpacked in registers.
//
// A lane is an output channel, and a panel 16 of them. A step is four input bytes (channels that lie side by
// side) times four weights of every lane: one instruction, with the input bytes broadcast. Bytes of a window
// that follow each other in the map are a segment: a whole row of the window where its pixels touch, else a
// pixel. So nothing is copied before it is multiplied.
//
// Weights are stored in 1, 2, 4 or 8 bits. Those of up to 4 bits are indices of a table of 16 levels, so that
// any grid will do; those of 8 bits are the levels themselves. Levels that do not fit a signed byte are kept
// as (level - shift) / factor, and the sum of the window's bytes makes up for it.
//
//   packed = | tables: 64 | start: int32 [groups][o16] | vectors: 64 bytes each |     o16: o rounded up to 16
//   start  = a_offset * the sum of the channel's levels
//   vectors [groups][o16 / 16 / block][segment][ceil(steps * bits / 8)][block panels]
//   vector  = 16 lanes x 4 bytes; bits [bits * i, bits * (i + 1)) of each byte are the weight of step i
//
// The last block of a group may have fewer panels. Sums wrap modulo 2^32, and so are right when the result
// is.

// GCC 12 takes the operands that intrinsics leave undefined for a mistake of ours (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <cstring>

#include "kernels/kernel.h"

namespace mixbits {
namespace {

constexpr int kLanes = 16;
constexpr int kStep = 4;     // bytes of the input
constexpr int kVector = 64;  // bytes
constexpr int kTables = 64;  // bytes
constexpr int kWide = 8;     // pixels of the widest tile of two panels
constexpr int kWidest = 14;  // pixels of the widest tile of one panel
constexpr int kPrefetch = 4096;

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// level = factor * stored + shift, with `stored` a signed byte.
struct Storage {
  int factor, shift;
  bool fits;
};

Storage storage_of(const Conv& conv) {
  if (conv.w_min >= -128 && conv.w_max <= 127) return {1, 0, true};
  if (conv.w_min >= 0 && conv.w_max <= 255) return {1, 128, true};
  if (conv.w_min >= -255 && conv.w_max <= 255 && conv.w_step == 2 && conv.w_min % 2 != 0) return {2, 1, true};
  return {1, 0, false};
}

// Whether the last step of a pixel reaches into the next group, so that weights of 0 must be there. (Bytes
// behind the last group are 0.)
bool needs_zero(const Conv& conv) { return conv.groups > 1 && conv.c % kStep != 0; }

int stored_bits(const Conv& conv) {
  const int levels = conv.w_step == 0 ? 1 << conv.w_bits : (conv.w_max - conv.w_min) / conv.w_step + 1;
  const int entries = levels + needs_zero(conv);
  return entries <= 2 ? 1 : entries <= 4 ? 2 : entries <= 16 ? 4 : 8;
}

struct Layout {
  int bits;
  int segments_y, segments_x;             // segments of a window
  std::ptrdiff_t stride_y, stride_x;      // bytes between them
  int steps;                              // of a segment
  int vectors;                            // of a segment and a panel
  int panels;                             // of a group
  int block;                              // panels of a tile
  std::ptrdiff_t between_y, between_x;    // bytes between the windows of neighbouring outputs
  std::size_t start, weights, panel_end;  // offsets in the packed weights, and bytes of a panel

  int segments() const { return segments_y * segments_x; }
};

Layout layout_of(const Conv& conv) {
  Layout l{};
  l.bits = stored_bits(conv);
  const int channels = round_up(conv.c, kStep);
  const bool touching = conv.groups == 1 && conv.dilation_x == 1 && conv.pixel_stride == channels;
  l.segments_y = conv.kh;
  l.segments_x = touching ? 1 : conv.kw;
  l.stride_y = static_cast<std::ptrdiff_t>(conv.dilation_y) * conv.row_bytes();
  l.stride_x = static_cast<std::ptrdiff_t>(conv.dilation_x) * conv.pixel_stride;
  l.steps = (touching ? conv.kw : 1) * channels / kStep;
  l.vectors = ceil_div(l.steps * l.bits, 8);
  l.panels = ceil_div(conv.o, kLanes);
  l.block = conv.out_w <= kWide / 2 ? 4 : 2;
  l.between_y = static_cast<std::ptrdiff_t>(conv.stride_y) * conv.row_bytes();
  l.between_x = static_cast<std::ptrdiff_t>(conv.stride_x) * conv.pixel_stride;
  l.start = kTables;
  l.weights = l.start + round_up(conv.groups * l.panels * kLanes * 4, kVector);
  l.panel_end = static_cast<std::size_t>(l.segments()) * l.vectors * kVector;
  return l;
}

const char* refuses(const Conv& conv) {
  const Storage storage = storage_of(conv);
  if (!storage.fits) return "weight levels are more than a byte holds";
  if (storage.shift != 0 && conv.groups > 1) {
    return "it has no sums of bytes a group, which weight levels outside -128 .. 127 take";
  }
  return nullptr;
}

std::size_t weight_bytes(const Conv& conv) {
  const Layout l = layout_of(conv);
  return l.weights + conv.groups * l.panels * l.panel_end;
}

// The levels of a grid by index: an arithmetic one's in order, a codebook's in the order of appearance.
struct Levels {
  int count = 0;
  int level[16] = {};

  int index_of(int wanted) {
    for (int i = 0; i < count; ++i) {
      if (level[i] == wanted) return i;
    }
    level[count] = wanted;
    return count++;
  }
};

void pack(const Conv& conv, const std::int16_t* levels, std::uint8_t* packed) {
  const Layout l = layout_of(conv);
  const Storage storage = storage_of(conv);
  Levels table;
  if (l.bits < 8 && needs_zero(conv)) table.index_of(0);  // as index 0, which zeroed memory holds
  auto* start = reinterpret_cast<std::int32_t*>(packed + l.start);
  const int steps_of_vector = 8 / l.bits;
  for (int o = 0; o < conv.groups * conv.o; ++o) {
    const int panel = o % conv.o / kLanes, lane = o % conv.o % kLanes;
    const int first = panel / l.block * l.block;  // of its block
    const int block = l.panels - first < l.block ? l.panels - first : l.block;
    std::uint8_t* of_block =
        packed + l.weights + (static_cast<std::size_t>(o / conv.o) * l.panels + first) * l.panel_end;
    std::int32_t sum = 0;
    for (int c = 0; c < conv.c; ++c) {
      for (int ky = 0; ky < conv.kh; ++ky) {
        for (int kx = 0; kx < conv.kw; ++kx) {
          const int level = *levels++;
          sum += level;
          const int byte = c + (l.segments_x == 1 ? kx * round_up(conv.c, kStep) : 0);
          const int segment = l.segments_x == 1 ? ky : ky * conv.kw + kx;
          const int step = byte / kStep;
          const std::size_t vector =
              (static_cast<std::size_t>(segment) * l.vectors + step / steps_of_vector) * block + panel -
              first;
          const int stored = (level - storage.shift) / storage.factor;
          const int code = l.bits == 8 ? stored : table.index_of(stored);
          of_block[vector * kVector + lane * kStep + byte % kStep] |=
              static_cast<std::uint8_t>(code << (step % steps_of_vector * l.bits));
        }
      }
    }
    start[o / conv.o * l.panels * kLanes + o % conv.o] = conv.a_offset * sum;
  }
  // Table j takes four bits of codes and gives the level of code j of them.
  for (int i = 0; i < kTables && l.bits < 8; ++i) {
    const int code = (i % 16 >> (i / 16 * l.bits)) & ((1 << l.bits) - 1);
    packed[i] = static_cast<std::uint8_t>(table.level[code]);
  }
}

// What the tiles of a call share.
struct Product {
  Layout layout;
  const std::uint8_t* tables;
  int ld;
  int scale;  // of the sum of products
};

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
                 const std::uint8_t* const (&window)[kPixels], std::ptrdiff_t at) {
#pragma GCC unroll 16
  for (int n = 0; n < kPixels; ++n) {
    const __m512i input = broadcast(window[n] + at);
#pragma GCC unroll 4
    for (int m = 0; m < kPanels; ++m) sum[m][n] = _mm512_dpbusd_epi32(sum[m][n], input, weight[m]);
  }
}

// The steps of one vector of every panel: all of them, or the first `count`.
template <int kPanels, int kPixels, int kBits, bool kAll>
inline void steps_of_vector(__m512i (&sum)[kPanels][kPixels], const std::uint8_t* weights,
                            const Tables<kBits>& tables, const std::uint8_t* const (&window)[kPixels],
                            std::ptrdiff_t at, int count) {
  __m512i packed[kPanels];
#pragma GCC unroll 4
  for (int m = 0; m < kPanels; ++m) packed[m] = _mm512_load_si512(weights + m * kVector);
  if constexpr (kBits == 8) {
    step(sum, packed, window, at);
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
      step(sum, weight, window, at + i * kStep);
    }
  }
}

// kPixels outputs of a row, 16 channels of each of kPanels panels:
//   acc[n * ld + m * 16 + lane] = scale * sum + start[m * 16 + lane] + extra[n]
// `lanes` of the last panel are written.
template <int kPanels, int kPixels, int kBits>
void tile(const Product& p, const std::uint8_t* weights, const std::uint8_t* input, const std::int32_t* start,
          const std::int32_t* extra, std::int32_t* acc, __mmask16 lanes) {
  const Layout& l = p.layout;
  constexpr int kSteps = 8 / kBits;
  const Tables<kBits> tables(p.tables);
  __m512i sum[kPanels][kPixels];
#pragma GCC unroll 4
  for (int m = 0; m < kPanels; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < kPixels; ++n) sum[m][n] = _mm512_setzero_si512();
  }
  const std::uint8_t* window[kPixels];
  for (int y = 0; y < l.segments_y; ++y) {
    for (int x = 0; x < l.segments_x; ++x) {
#pragma GCC unroll 16
      for (int n = 0; n < kPixels; ++n) {
        window[n] = input + y * l.stride_y + x * l.stride_x + n * l.between_x;
      }
      std::ptrdiff_t at = 0;
      for (const std::ptrdiff_t end = l.steps / kSteps * (kSteps * kStep); at < end; at += kSteps * kStep) {
#pragma GCC unroll 4
        for (int m = 0; m < kPanels; ++m) {
          _mm_prefetch(reinterpret_cast<const char*>(weights) + kPrefetch + m * kVector, _MM_HINT_T0);
        }
        steps_of_vector<kPanels, kPixels, kBits, true>(sum, weights, tables, window, at, kSteps);
        weights += kPanels * kVector;
      }
      if (const int rest = l.steps % kSteps; rest != 0) {
        steps_of_vector<kPanels, kPixels, kBits, false>(sum, weights, tables, window, at, rest);
        weights += kPanels * kVector;
      }
    }
  }
  const __m512i scale = _mm512_set1_epi32(p.scale);
#pragma GCC unroll 4
  for (int m = 0; m < kPanels; ++m) {
    const __m512i begin = _mm512_loadu_si512(start + m * kLanes);
    const __mmask16 mask = m + 1 < kPanels ? __mmask16(-1) : lanes;
#pragma GCC unroll 16
    for (int n = 0; n < kPixels; ++n) {
      __m512i whole = sum[m][n];
      if (p.scale != 1) whole = _mm512_mullo_epi32(whole, scale);
      whole = _mm512_add_epi32(whole, begin);
      if (extra != nullptr) whole = _mm512_add_epi32(whole, _mm512_set1_epi32(extra[n]));
      _mm512_mask_storeu_epi32(acc + static_cast<std::ptrdiff_t>(n) * p.ld + m * kLanes, mask, whole);
    }
  }
}

using Tile = void (*)(const Product&, const std::uint8_t*, const std::uint8_t*, const std::int32_t*,
                      const std::int32_t*, std::int32_t*, __mmask16);

// The widest tile of so many panels.
constexpr int widest(int panels) { return panels == 1 ? kWidest : panels == 2 ? kWide : kWide / 2; }

template <int kBits>
Tile tile_of(int panels, int pixels) {
  static constexpr Tile one[kWidest] = {
      tile<1, 1, kBits>,  tile<1, 2, kBits>,  tile<1, 3, kBits>,  tile<1, 4, kBits>,  tile<1, 5, kBits>,
      tile<1, 6, kBits>,  tile<1, 7, kBits>,  tile<1, 8, kBits>,  tile<1, 9, kBits>,  tile<1, 10, kBits>,
      tile<1, 11, kBits>, tile<1, 12, kBits>, tile<1, 13, kBits>, tile<1, 14, kBits>,
  };
  static constexpr Tile two[kWide] = {tile<2, 1, kBits>, tile<2, 2, kBits>, tile<2, 3, kBits>,
                                      tile<2, 4, kBits>, tile<2, 5, kBits>, tile<2, 6, kBits>,
                                      tile<2, 7, kBits>, tile<2, 8, kBits>};
  static constexpr Tile three[kWide / 2] = {tile<3, 1, kBits>, tile<3, 2, kBits>, tile<3, 3, kBits>,
                                            tile<3, 4, kBits>};
  static constexpr Tile four[kWide / 2] = {tile<4, 1, kBits>, tile<4, 2, kBits>, tile<4, 3, kBits>,
                                           tile<4, 4, kBits>};
  switch (panels) {
    case 1: return one[pixels - 1];
    case 2: return two[pixels - 1];
    case 3: return three[pixels - 1];
    default: return four[pixels - 1];
  }
}

Tile tile_of(int bits, int panels, int pixels) {
  switch (bits) {
    case 1: return tile_of<1>(panels, pixels);
    case 2: return tile_of<2>(panels, pixels);
    case 4: return tile_of<4>(panels, pixels);
    default: return tile_of<8>(panels, pixels);
  }
}

// The sum of the bytes of one window.
std::int32_t byte_sum(const Layout& l, const std::uint8_t* window) {
  const int bytes = l.steps * kStep;
  __m512i sum = _mm512_setzero_si512();
  for (int y = 0; y < l.segments_y; ++y) {
    for (int x = 0; x < l.segments_x; ++x) {
      const std::uint8_t* segment = window + y * l.stride_y + x * l.stride_x;
      for (int at = 0; at < bytes; at += kVector) {
        const __mmask64 valid = bytes - at >= kVector ? ~__mmask64(0) : (__mmask64(1) << (bytes - at)) - 1;
        const __m512i some = _mm512_maskz_loadu_epi8(valid, segment + at);
        sum = _mm512_add_epi64(sum, _mm512_sad_epu8(some, _mm512_setzero_si512()));
      }
    }
  }
  return static_cast<std::int32_t>(_mm512_reduce_add_epi64(sum));
}

// The tiles of a row of so many panels: as few as possible, of equal widths or one less.
struct Tiling {
  int count, width, wide;  // `wide` of them are one pixel wider
};

Tiling tiling_of(int out_w, int panels) {
  const int count = ceil_div(out_w, widest(panels));
  return {count, out_w / count, out_w % count};
}

void run(const Conv& conv, const Job& job) {
  const Storage storage = storage_of(conv);
  const Product p{layout_of(conv), job.weights, job.ld, storage.factor * conv.a_scale};
  const Layout& l = p.layout;
  const std::uint8_t* input = job.input + job.y0 * l.between_y;
  const int rows = job.y1 - job.y0;
  std::int32_t* extra = nullptr;
  if (storage.shift != 0) {
    extra = reinterpret_cast<std::int32_t*>(job.scratch);
    for (int y = 0; y < rows; ++y) {
      for (int x = 0; x < conv.out_w; ++x) {
        extra[y * conv.out_w + x] =
            storage.shift * conv.a_scale * byte_sum(l, input + y * l.between_y + x * l.between_x);
      }
    }
  }
  const bool grouped = conv.groups > 1;
  const int first = grouped ? 0 : job.o0 / kLanes;
  const int last = grouped ? l.panels : ceil_div(job.o1, kLanes);
  for (int g = 0; g < conv.groups; ++g) {
    for (int panel = first; panel < last; panel += l.block) {
      const int panels = last - panel < l.block ? last - panel : l.block;
      // Within a group of several, lanes behind its channels are another's.
      const int behind = grouped ? (panel + panels) * kLanes - conv.o : 0;
      const auto lanes = static_cast<__mmask16>(0xffff >> (behind > 0 ? behind : 0));
      const std::size_t index = static_cast<std::size_t>(g) * l.panels + panel;
      const std::uint8_t* weights = job.weights + l.weights + index * l.panel_end;
      const auto* start = reinterpret_cast<const std::int32_t*>(job.weights + l.start) + index * kLanes;
      const Tiling tiling = tiling_of(conv.out_w, panels);
      const Tile wide = tile_of(l.bits, panels, tiling.width + (tiling.wide > 0));
      const Tile narrow = tile_of(l.bits, panels, tiling.width);
      for (int y = 0; y < rows; ++y) {
        const std::uint8_t* row = input + y * l.between_y + g * conv.c;
        int x = 0;
        for (int i = 0; i < tiling.count; ++i) {
          const int pixel = y * conv.out_w + x;
          (i < tiling.wide ? wide : narrow)(
              p, weights, row + x * l.between_x, start, extra == nullptr ? nullptr : extra + pixel,
              job.acc + static_cast<std::ptrdiff_t>(pixel) * job.ld + g * conv.o + panel * kLanes - job.o0,
              lanes);
          x += tiling.width + (i < tiling.wide);
        }
      }
    }
  }
}

double cycles(const Conv& conv) {
  const Layout l = layout_of(conv);
  const double steps = static_cast<double>(l.steps) * l.segments();
  double of_row = 0;
  for (int panel = 0; panel < l.panels; panel += l.block) {
    const int panels = l.panels - panel < l.block ? l.panels - panel : l.block;
    const Tiling tiling = tiling_of(conv.out_w, panels);
    of_row += panels * steps * (conv.out_w + 0.2 * tiling.count) + 30 * tiling.count;
  }
  return conv.groups * conv.out_h * of_row;
}

int rows(const Conv& conv) {
  const int of_row = conv.out_w * round_up(conv.groups * conv.o, kLanes) * 4;
  const int fitting = (64 << 10) / of_row;
  return fitting < 1 ? 1 : fitting < conv.out_h ? fitting : conv.out_h;
}

std::size_t scratch_bytes(const Conv& conv, int rows) {
  return storage_of(conv).shift == 0 ? 0 : sizeof(std::int32_t) * rows * conv.out_w;
}

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
