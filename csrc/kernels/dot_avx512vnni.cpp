// Dot products of bytes: vpdpbusd on the input as it lies, weights kept packed and unpacked in registers.
//
// A lane is an output channel, and a panel 16 of them. A step is four input bytes (channels that lie side by
// side) times four weights of every lane: one instruction, with the input bytes broadcast. Bytes of a window
// that follow each other in the map are a segment: a whole row of the window where its pixels touch, else a
// pixel. So nothing is copied before it is multiplied, but pixels of 1 to 3 channels, which are first put
// side by side without their padding where that takes fewer steps.
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

// Whether pixels of 1 to 3 channels are put side by side: then a step holds bytes of two or more.
bool narrow(const Conv& conv) {
  const bool fewer = ceil_div(conv.kw * conv.c, kStep) < conv.kw;
  // The last step may reach past the window, where weights must be 0.
  return conv.groups == 1 && conv.pixel_stride == kStep && conv.dilation_x == 1 && fewer &&
         storage_of(conv).shift == 0;
}

// Whether steps reach bytes that are not of the window, so that weights of 0 must be there. (Bytes of a pixel
// behind its channels are 0 themselves.)
bool needs_zero(const Conv& conv) {
  return narrow(conv) ? conv.kw * conv.c % kStep != 0 : conv.groups > 1 && conv.c % kStep != 0;
}

int stored_bits(const Conv& conv) {
  const int levels = conv.w_step == 0 ? 1 << conv.w_bits : (conv.w_max - conv.w_min) / conv.w_step + 1;
  const int entries = levels + needs_zero(conv);
  return entries <= 2 ? 1 : entries <= 4 ? 2 : entries <= 16 ? 4 : 8;
}

struct Layout {
  int bits;
  int pixel;                                // bytes of a pixel
  std::ptrdiff_t row;                       // bytes of a row of pixels
  int segments_y, segments_x;               // segments of a window
  std::ptrdiff_t stride_y, stride_x;        // bytes between them
  int steps;                                // of a segment
  int vectors;                              // of a segment and a panel
  int panels;                               // of a group
  int block;                                // panels of a tile
  std::ptrdiff_t between_y, between_x;      // bytes between the windows of neighbouring outputs
  std::size_t start, weights, panel_bytes;  // offsets in the packed weights, and bytes of a panel

  int segments() const { return segments_y * segments_x; }
};

Layout layout_of(const Conv& conv) {
  Layout l{};
  l.bits = stored_bits(conv);
  l.pixel = narrow(conv) ? conv.c : conv.pixel_stride;
  l.row = narrow(conv) ? round_up(conv.in_w, kLanes) * conv.c + kVector : conv.row_bytes();
  const int channels = narrow(conv) ? conv.c : round_up(conv.c, kStep);
  const bool touching = conv.groups == 1 && conv.dilation_x == 1 && l.pixel == channels;
  l.segments_y = conv.kh;
  l.segments_x = touching ? 1 : conv.kw;
  l.stride_y = conv.dilation_y * l.row;
  l.stride_x = static_cast<std::ptrdiff_t>(conv.dilation_x) * l.pixel;
  l.steps = ceil_div((touching ? conv.kw : 1) * channels, kStep);
  l.vectors = ceil_div(l.steps * l.bits, 8);
  l.panels = ceil_div(conv.o, kLanes);
  l.block = conv.out_w <= kWide / 2 ? 4 : 2;
  l.between_y = conv.stride_y * l.row;
  l.between_x = static_cast<std::ptrdiff_t>(conv.stride_x) * l.pixel;
  l.start = kTables;
  l.weights = l.start + round_up(conv.groups * l.panels * kLanes * 4, kVector);
  l.panel_bytes = static_cast<std::size_t>(l.segments()) * l.vectors * kVector;
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
  return l.weights + conv.groups * l.panels * l.panel_bytes;
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
        packed + l.weights + (static_cast<std::size_t>(o / conv.o) * l.panels + first) * l.panel_bytes;
    std::int32_t sum = 0;
    for (int c = 0; c < conv.c; ++c) {
      for (int ky = 0; ky < conv.kh; ++ky) {
        for (int kx = 0; kx < conv.kw; ++kx) {
          const int level = *levels++;
          sum += level;
          const int byte = c + (l.segments_x == 1 ? kx * l.pixel : 0);
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

// Tiles of one size that a call computes, `count` a row: 16 channels of each panel for some neighbouring
// pixels.
//   acc[n * ld + m * 16 + lane] = scale * sum + start[m * 16 + lane] + extra[n]
struct Tiles {
  const Layout& layout;
  const std::uint8_t* tables;
  const std::uint8_t* weights;  // of the first panel
  const std::int32_t* start;    // of the first panel
  const std::uint8_t* input;    // window of the first pixel
  const std::int32_t* extra;    // of the first pixel, or null
  std::int32_t* acc;            // of the first pixel and panel
  int ld, out_w, rows, count;
  int scale;        // of the sum of products
  __mmask16 lanes;  // of the last panel that are written
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

// Addresses of neighbouring windows without a register each: odd multiples of their distance are kept, and
// addressing multiplies them by 2, 4 and 8.
template <int kPixels>
struct Windows {
  std::ptrdiff_t odd[kPixels / 2 + 1];

  explicit Windows(std::ptrdiff_t between) {
#pragma GCC unroll 16
    for (int i = 0; i <= kPixels / 2; ++i) odd[i] = (2 * i + 1) * between;
  }
  std::ptrdiff_t operator[](int n) const {
    if (n == 0) return 0;
    const int twos = __builtin_ctz(n);
    return odd[(n >> twos) / 2] * (1 << twos);
  }
};

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

template <int kPanels, int kPixels, int kBits>
inline void tile(const Tiles& t, const Tables<kBits>& tables, const Windows<kPixels>& windows,
                 const std::uint8_t* window, const std::int32_t* extra, std::int32_t* acc) {
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
        _mm512_mask_storeu_epi32(to, t.lanes, result);
      }
    }
  }
}

template <int kPanels, int kPixels, int kBits>
void tiles(const Tiles& t) {
  const Tables<kBits> tables(t.tables);
  const Windows<kPixels> windows(t.layout.between_x);
  for (int y = 0; y < t.rows; ++y) {
    for (int i = 0; i < t.count; ++i) {
      const int x = i * kPixels;
      tile<kPanels, kPixels, kBits>(t, tables, windows,
                                    t.input + y * t.layout.between_y + x * t.layout.between_x,
                                    t.extra == nullptr ? nullptr : t.extra + y * t.out_w + x,
                                    t.acc + (static_cast<std::ptrdiff_t>(y) * t.out_w + x) * t.ld);
    }
  }
}

// The widest tile of so many panels.
constexpr int widest(int panels) { return panels == 1 ? kWidest : panels == 2 ? kWide : kWide / 2; }

using Run = void (*)(const Tiles&);

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

// The tiles of a row of so many panels: as few as possible, `wide` of them a pixel wider than the others.
struct Tiling {
  int count, width, wide;
};

Tiling tiling_of(int out_w, int panels) {
  const int count = ceil_div(out_w, widest(panels));
  return {count, out_w / count, out_w % count};
}

// Rows of the input that so many rows of the output take.
int input_rows(const Conv& conv, int rows) {
  return (rows - 1) * conv.stride_y + (conv.kh - 1) * conv.dilation_y + 1;
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
  const Storage storage = storage_of(conv);
  const Layout l = layout_of(conv);
  const int rows = job.y1 - job.y0;
  const std::uint8_t* input =
      job.input + static_cast<std::ptrdiff_t>(job.y0) * conv.stride_y * conv.row_bytes();
  std::int32_t* extra = nullptr;
  if (narrow(conv)) {
    narrow_rows(conv, l, input, input_rows(conv, rows), job.scratch);
    input = job.scratch;
  } else if (storage.shift != 0) {
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
      const std::size_t index = static_cast<std::size_t>(g) * l.panels + panel;
      Tiles t{.layout = l,
              .tables = job.weights,
              .weights = job.weights + l.weights + index * l.panel_bytes,
              .start = reinterpret_cast<const std::int32_t*>(job.weights + l.start) + index * kLanes,
              .input = input + g * conv.c,
              .extra = extra,
              .acc = job.acc + g * conv.o + panel * kLanes - job.o0,
              .ld = job.ld,
              .out_w = conv.out_w,
              .rows = rows,
              .count = 0,
              .scale = storage.factor * conv.a_scale,
              .lanes = static_cast<__mmask16>(0xffff >> (behind > 0 ? behind : 0))};
      const Tiling tiling = tiling_of(conv.out_w, panels);
      if (t.count = tiling.wide; t.count > 0) tiles_of(l.bits, panels, tiling.width + 1)(t);
      const int done = tiling.wide * (tiling.width + 1);
      t.count = tiling.count - tiling.wide;
      t.input += done * l.between_x;
      t.acc += static_cast<std::ptrdiff_t>(done) * job.ld;
      if (t.extra != nullptr) t.extra += done;
      tiles_of(l.bits, panels, tiling.width)(t);
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
    // For a pixel or two, unpacking weights or reading them takes longer than the products.
    const double slowest = l.bits == 8 ? 2.4 : 1.6;
    const double pixels = 1.0 * conv.out_w / tiling.count;
    of_row += tiling.count * panels * steps * (pixels < slowest ? slowest : pixels);
    of_row += tiling.count * (16 + 6 * l.segments()) + 2 * panels * conv.out_w;
  }
  return conv.groups * conv.out_h * of_row;
}

int rows(const Conv& conv) {
  const int of_row = conv.out_w * round_up(conv.groups * conv.o, kLanes) * 4;
  const int fitting = (64 << 10) / of_row;
  return fitting < 1 ? 1 : fitting < conv.out_h ? fitting : conv.out_h;
}

std::size_t scratch_bytes(const Conv& conv, int rows) {
  if (narrow(conv)) return static_cast<std::size_t>(layout_of(conv).row) * input_rows(conv, rows);
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
