// Binary decomposition (kernels/bitplanes.h) with VPOPCNTDQ: any pair of widths.
//
// A lane is an output channel, a word 32 bits of the window: an input word is broadcast and meets the words
// of 16 channels in one AND, one population count and one addition, 512 products in 1.5 cycles where two
// vector operations start a cycle. Sums are never added across lanes. A tile is 32 channels x up to 8 pixels,
// its sums stay in registers for all pairs of planes.

#include <immintrin.h>

#include "kernels/bitplanes.h"

namespace mixbits {
namespace {

using Vector = __m512i;
constexpr int kLanes = 16;       // output channels of a vector
constexpr int kTilePixels = 8;   // pixels of a tile at most
constexpr int kTileVectors = 2;  // vectors of output channels of a tile at most
constexpr int kAhead = 4096;     // bytes from the weights that are read to those that are fetched
constexpr int kMostPairs = 64;   // of planes, 8 x 8 bits
constexpr Blocks kBlocks = {.word_bytes = 4, .channels = kTileVectors * kLanes, .unit = kLanes};

// A plane of the weights and one of the input.
struct Pair {
  std::int32_t weights, input;  // bytes in front of the planes, of a vector's words and of a pixel
  bool doubled;                 // whether sums are doubled before: a diagonal begins
};

// What tiles of one convolution have in common.
struct Windows {
  const std::int32_t* offsets;  // [steps]
  int steps;
  int pixel_step;  // bytes from one window to the next
  int factor;      // of the sum of products of codes
  int ld;
  int pairs;
  Pair pair[kMostPairs];
};

// Adds the products of one step to the sums, or with kFirst starts them.
template <bool kFirst, int kVectors, int kPixels>
[[gnu::always_inline]] inline void add_step(Vector (&sums)[kPixels][kVectors], const std::uint8_t* weight,
                                            const std::uint8_t* word, std::ptrdiff_t pixel_step) {
  Vector of_weight[kVectors];
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    of_weight[v] = _mm512_load_si512(weight + v * sizeof(Vector));
    _mm_prefetch(weight + v * sizeof(Vector) + kAhead, _MM_HINT_T0);
  }
#pragma GCC unroll 8
  for (int p = 0; p < kPixels; ++p) {
    int of_input;
    std::memcpy(&of_input, word + p * pixel_step, sizeof(int));
    const Vector broadcast = _mm512_set1_epi32(of_input);
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const Vector count = _mm512_popcnt_epi32(_mm512_and_si512(of_weight[v], broadcast));
      sums[p][v] = kFirst ? count : _mm512_add_epi32(sums[p][v], count);
      // Keeps the sum in one register and this order of operations, else gcc 12 copies and spills sums.
      asm volatile("" : "+v"(sums[p][v]));
    }
  }
}

template <int kVectors, int kPixels>
[[gnu::always_inline]] inline void double_all(Vector (&sums)[kPixels][kVectors]) {
#pragma GCC unroll 8
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sums[p][v] = _mm512_add_epi32(sums[p][v], sums[p][v]);
  }
}

// acc[pixel][channel] of kPixels windows that follow each other and kVectors * 16 channels.
template <int kVectors, int kPixels>
void tile(const Windows& windows, const std::uint8_t* weights, const std::uint8_t* pixels,
          const std::int32_t* biases, const std::int32_t* corrections, std::int32_t* acc) {
  constexpr int kStepBytes = kVectors * sizeof(Vector);
  const std::ptrdiff_t pixel_step = windows.pixel_step;
  const std::int32_t* const offsets_end = windows.offsets + windows.steps;
  const Pair* pair = windows.pair;
  const Pair* const pairs_end = pair + windows.pairs;
  const std::int32_t* offset = windows.offsets;
  const std::uint8_t* weight = weights + static_cast<std::ptrdiff_t>(pair->weights) * kVectors;
  Vector sums[kPixels][kVectors];
  add_step<true>(sums, weight, pixels + pair->input + *offset, pixel_step);
  while (true) {
    const std::uint8_t* input = pixels + pair->input;
    while (++offset != offsets_end) {
      weight += kStepBytes;
      add_step<false>(sums, weight, input + *offset, pixel_step);
    }
    if (++pair == pairs_end) break;
    if (pair->doubled) double_all(sums);
    offset = windows.offsets - 1;
    weight = weights + static_cast<std::ptrdiff_t>(pair->weights) * kVectors - kStepBytes;
  }
  if (windows.factor == 2) {
    double_all(sums);
  } else if (windows.factor != 1) {
    const Vector factor = _mm512_set1_epi32(windows.factor);
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[p][v] = _mm512_mullo_epi32(sums[p][v], factor);
    }
  }
  const std::ptrdiff_t ld = windows.ld;
#pragma GCC unroll 8
  for (int p = 0; p < kPixels; ++p) {
    const Vector correction = _mm512_set1_epi32(corrections[p]);
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const Vector bias = _mm512_add_epi32(correction, _mm512_load_si512(biases + v * kLanes));
      _mm512_storeu_si512(acc + p * ld + v * kLanes, _mm512_add_epi32(sums[p][v], bias));
    }
  }
}

using Tile = void (*)(const Windows&, const std::uint8_t*, const std::uint8_t*, const std::int32_t*,
                      const std::int32_t*, std::int32_t*);
constexpr Tile kTiles[kTileVectors][kTilePixels] = {
    {tile<1, 1>, tile<1, 2>, tile<1, 3>, tile<1, 4>, tile<1, 5>, tile<1, 6>, tile<1, 7>, tile<1, 8>},
    {tile<2, 1>, tile<2, 2>, tile<2, 3>, tile<2, 4>, tile<2, 5>, tile<2, 6>, tile<2, 7>, tile<2, 8>},
};

// Planes of one row and the sums of its pixels' bytes: a test of 64 bytes gives the bits of 64 channels.
template <int kBits>
void make_row(const Conv& conv, const BitPlanes& planes, const std::uint8_t* row, std::uint8_t* to,
              std::int32_t* sums) {
  const std::ptrdiff_t x_step = planes.x_step, pixel_bytes = planes.pixel_bytes;
  const std::ptrdiff_t plane_bytes = planes.plane_bytes;
  const int width = planes.width, channels = conv.c;
  for (int x = 0; x < width; ++x, row += x_step, to += pixel_bytes) {
    std::uint64_t sum = 0;
    for (int c = 0; c < channels; c += 64) {
      const int left = channels - c;
      const __mmask64 there = left < 64 ? (std::uint64_t{1} << left) - 1 : ~std::uint64_t{0};
      const Vector bytes = _mm512_maskz_loadu_epi8(there, row + c);
#pragma GCC unroll 8
      for (int i = 0; i < kBits; ++i) {
        const std::uint64_t bits = _mm512_test_epi8_mask(bytes, _mm512_set1_epi8(1 << i));
        std::memcpy(to + i * plane_bytes + c / kBitsOfByte, &bits, sizeof(bits));
        sum += static_cast<std::uint64_t>(_mm_popcnt_u64(bits)) << i;
      }
    }
    sums[x] = static_cast<std::int32_t>(sum);
  }
}

// Whether pixels follow each other without gaps and are as many bits as vectors widen to 32.
bool dense(const Conv& conv, const BitPlanes& planes) {
  return planes.x_step == conv.c && (conv.c == 8 || conv.c == 16 || conv.c == 32);
}

// 16 pixels of a plane. The masks are all ones; without them gcc 12 warns of its own headers.
Vector widened(const std::uint8_t* plane, int pixel_bytes) {
  if (pixel_bytes == 1) {
    return _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(plane)));
  }
  if (pixel_bytes == 2) {
    return _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(plane)));
  }
  return _mm512_loadu_si512(plane);
}

// `make_row` where a test covers several pixels.
template <int kBits>
void make_dense_row(const Conv& conv, const BitPlanes& planes, const std::uint8_t* row, std::uint8_t* to,
                    std::int32_t* sums) {
  const std::ptrdiff_t plane_bytes = planes.plane_bytes;
  const int width = planes.width, pixel_bytes = planes.pixel_bytes, channels = width * conv.c;
  for (int c = 0; c < channels; c += 64) {  // what lies behind the row goes into the gap behind the plane
    const Vector bytes = _mm512_loadu_si512(row + c);
#pragma GCC unroll 8
    for (int i = 0; i < kBits; ++i) {
      const std::uint64_t bits = _mm512_test_epi8_mask(bytes, _mm512_set1_epi8(1 << i));
      std::memcpy(to + i * plane_bytes + c / kBitsOfByte, &bits, sizeof(bits));
    }
  }
  for (int x = 0; x < width; x += kLanes) {
    Vector sum = _mm512_setzero_si512();
    for (int i = kBits - 1; i >= 0; --i) {
      const Vector bits =
          widened(to + i * plane_bytes + static_cast<std::ptrdiff_t>(x) * pixel_bytes, pixel_bytes);
      sum = _mm512_add_epi32(_mm512_add_epi32(sum, sum), _mm512_popcnt_epi32(bits));
    }
    const __mmask16 there = width - x < kLanes ? (1 << (width - x)) - 1 : 0xffff;
    _mm512_mask_storeu_epi32(sums + x, there, sum);
  }
}

using MakeRow = void (*)(const Conv&, const BitPlanes&, const std::uint8_t*, std::uint8_t*, std::int32_t*);
constexpr MakeRow kMakeRow[2][kBitsOfByte] = {
    {make_row<1>, make_row<2>, make_row<3>, make_row<4>, make_row<5>, make_row<6>, make_row<7>, make_row<8>},
    {make_dense_row<1>, make_dense_row<2>, make_dense_row<3>, make_dense_row<4>, make_dense_row<5>,
     make_dense_row<6>, make_dense_row<7>, make_dense_row<8>},
};

// `fill_corrections` of kernels/bitplanes.h, 16 windows at a time.
void fill_corrections_of_vectors(const Conv& conv, const BitPlanes& planes, int rows,
                                 const BitScratch& scratch) {
  const int out_w = conv.out_w, stride_x = planes.stride_x;
  const Vector factor = _mm512_set1_epi32(conv.a_scale * conv.w_min);
  const Vector lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const Vector columns = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(stride_x));
  for (std::ptrdiff_t y = 0; y < rows; ++y) {
    for (int x = 0; x < out_w; x += kLanes) {
      const __mmask16 there = out_w - x < kLanes ? (1 << (out_w - x)) - 1 : 0xffff;
      Vector sum = _mm512_setzero_si512();
      for (int ky = 0; ky < conv.kh; ++ky) {
        const std::int32_t* sums =
            scratch.pixel_sums + (y * planes.stride_y + ky * conv.dilation_y) * planes.width + x * stride_x;
        for (int kx = 0; kx < conv.kw; ++kx, sums += conv.dilation_x) {
          const Vector more = stride_x == 1 ? _mm512_maskz_loadu_epi32(there, sums)
                                            : _mm512_mask_i32gather_epi32(sum, there, columns, sums, 4);
          sum = _mm512_add_epi32(sum, more);
        }
      }
      _mm512_mask_storeu_epi32(scratch.corrections + y * out_w + x, there, _mm512_mullo_epi32(sum, factor));
    }
  }
}

void make_planes(const Conv& conv, const BitPlanes& planes, const BitScratch& scratch, const Job& job) {
  fill_offsets(conv, planes, scratch.offsets);
  const MakeRow make = kMakeRow[dense(conv, planes)][planes.a_bits - 1];
  const std::uint8_t* input =
      job.input + static_cast<std::ptrdiff_t>(job.y0) * conv.stride_y * conv.row_bytes();
  for (std::ptrdiff_t row = 0; row < planes.made_rows(conv, job.y1 - job.y0); ++row) {
    make(conv, planes, input + row * planes.y_step, scratch.planes + row * planes.row_bytes,
         scratch.pixel_sums + row * planes.width);
  }
  fill_corrections_of_vectors(conv, planes, job.y1 - job.y0, scratch);
}

// One block of channels at all pixels of a job. A row is cut into as few tiles as can be, of sizes that
// differ by one at most.
void run_block(const Conv& conv, const BitPlanes& planes, const BitScratch& scratch, const Windows& windows,
               const Job& job, int begin) {
  const int vectors = planes.block_channels(conv, begin) / kLanes;
  const std::uint8_t* weights = job.weights + biases_bytes(conv, planes) + block_offset(planes, begin);
  const std::int32_t* biases = reinterpret_cast<const std::int32_t*>(job.weights) + begin;
  const int tiles = ceil_div(conv.out_w, kTilePixels);
  for (int y = 0; y < job.y1 - job.y0; ++y) {
    const std::uint8_t* row =
        scratch.planes + static_cast<std::ptrdiff_t>(y) * planes.stride_y * planes.row_bytes;
    const std::int32_t* corrections = scratch.corrections + static_cast<std::ptrdiff_t>(y) * conv.out_w;
    std::int32_t* acc = job.acc + static_cast<std::ptrdiff_t>(y) * conv.out_w * job.ld + (begin - job.o0);
    for (int part = 0, x = 0; part < tiles; ++part) {
      const int pixels = (conv.out_w - x) / (tiles - part);
      kTiles[vectors - 1][pixels - 1](windows, weights,
                                      row + static_cast<std::ptrdiff_t>(x) * windows.pixel_step, biases,
                                      corrections + x, acc + static_cast<std::ptrdiff_t>(x) * job.ld);
      x += pixels;
    }
  }
}

Windows windows_of(const Conv& conv, const BitPlanes& planes, const BitScratch& scratch, int ld) {
  Windows windows;
  windows.offsets = scratch.offsets;
  windows.steps = planes.steps;
  windows.pixel_step = planes.stride_x * planes.pixel_bytes;
  windows.factor = conv.w_step * conv.a_scale;
  windows.ld = ld;
  windows.pairs = 0;
  const int highest = planes.w_bits + planes.a_bits - 2;
  for (int diagonal = highest; diagonal >= 0; --diagonal) {
    const int first = larger(0, diagonal - planes.a_bits + 1);
    for (int plane = first; plane <= smaller(diagonal, planes.w_bits - 1); ++plane) {
      windows.pair[windows.pairs++] = {
          .weights = plane * planes.steps * static_cast<int>(sizeof(Vector)),
          .input = (diagonal - plane) * planes.plane_bytes,
          .doubled = plane == first && diagonal < highest,
      };
    }
  }
  return windows;
}

void run(const Conv& conv, const Job& job) {
  const BitPlanes planes(conv, kBlocks);
  const BitScratch scratch(conv, planes, job.y1 - job.y0, job.scratch);
  make_planes(conv, planes, scratch, job);
  const Windows windows = windows_of(conv, planes, scratch, job.ld);
  for (int begin = job.o0; begin < job.o1; begin += kBlocks.channels) {
    run_block(conv, planes, scratch, windows, job, begin);
  }
}

const char* refuses(const Conv& conv) {
  return conv.groups > 1 ? "groups are narrower than its words" : bitplanes_refuses(conv);
}

// As many as have 64 KiB of sums, and equal ones.
int rows(const Conv& conv) {
  const std::int64_t row_bytes =
      static_cast<std::int64_t>(sizeof(std::int32_t)) * conv.out_w * round_up(conv.o, kLanes);
  const int fit = larger(1, smaller(conv.out_h, static_cast<int>((64 << 10) / row_bytes)));
  return ceil_div(conv.out_h, ceil_div(conv.out_h, fit));
}

// Fitted to measurements on a Zen 4: within 10 % of them for the convolutions of `mixbits bench kernels`,
// within 25 % for linear layers on one vector.
double cycles(const Conv& conv) {
  const BitPlanes planes(conv, kBlocks);
  const double jobs = ceil_div(conv.out_h, rows(conv));
  const double made = planes.width * (planes.made_rows(conv, conv.out_h) + (jobs - 1) * (conv.kh - 1));
  const double tests = dense(conv, planes) ? conv.c / 64.0 : ceil_div(conv.c, 64);
  const double vectors = ceil_div(conv.o, kLanes), pixels = 1.0 * conv.out_h * conv.out_w;
  const double making = made * (1 + tests * (1.5 + 3.3 * planes.a_bits)) + 300 * jobs +
                        pixels * conv.taps() * (planes.stride_x == 1 ? 0.1 : 1.5);
  const int columns = ceil_div(conv.out_w, kTilePixels);
  const double tiles = 1.0 * conv.out_h * columns * ceil_div(static_cast<int>(vectors), kTileVectors);
  // Tiles of one pixel wait for weights from L2.
  const double step = conv.out_w == columns ? 2.4 : 1.53;
  const double products = step * planes.w_bits * planes.a_bits * planes.steps;
  return making + pixels * vectors * (products + 1.5) + 15 * tiles;
}

std::size_t weight_bytes(const Conv& conv) { return group_bytes(conv, BitPlanes(conv, kBlocks)); }

void pack(const Conv& conv, const std::int16_t* levels, std::uint8_t* packed) {
  bitplanes_pack(conv, BitPlanes(conv, kBlocks), levels, packed);
}

std::size_t scratch_bytes(const Conv& conv, int rows) {
  return BitScratch(conv, BitPlanes(conv, kBlocks), rows, nullptr).bytes;
}

const Kernel kernel = {
    .name = "bitplanes_avx512popcnt",
    .isa = Isa::avx512popcnt,
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
