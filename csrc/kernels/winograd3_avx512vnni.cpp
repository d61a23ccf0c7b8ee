// Exact integer Winograd F(3x3, 3x3) on int8 dot products: 25 products for 9 outputs instead of 81, for 2
// bits of weights and 3 of inputs at most. kernels/winograd.h has the terms; here the points are 0, 1, -1, 2
// and infinity, tiles are 5x5 inputs, and
//
//   36 * outputs = A^T [ U * V ] A        U = G g G^T, V = B^T d B
//
// where the rows of G are multiplied by 6 in all, in part here and in part in A. The 9 of 36 is undone by its
// inverse modulo 2^32, the 4 by a shift.
//
// Weights: panels of 16 output channels, a row of positions after the other, in the order of reading:
//
//   [panel][5 rows] { initial sums int32 [5 columns][16] | U int8 [c / 4][5 columns][16][4] }
//
// The initial sums undo the offset of the bytes of V and hold what the offset of input levels adds.

#include <immintrin.h>

// gcc 12 says so of its own intrinsics (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "kernels/window_sums.h"
#include "kernels/winograd.h"

namespace mixbits {
namespace {

constexpr int kG3[5][3] = {{3, 0, 0}, {-1, -1, -1}, {-1, 1, -1}, {1, 2, 4}, {0, 0, 6}};
constexpr int kB3[5][5] = {
    {2, -1, -2, 1, 0}, {0, -2, -1, 1, 0}, {0, 2, -3, 1, 0}, {0, -1, 0, 1, 0}, {0, 2, -1, -2, 1}};
constexpr Positions<5> kU3(kG3), kV3(kB3);

constexpr int kLanes = 16;         // int32 sums of a register: output channels of a panel
constexpr int kVector = 64;        // bytes of a register
constexpr int kRow = 5 * kVector;  // bytes of weights of 5 positions and 4 channels
constexpr int kBlock = 32;         // tiles that are transformed together, at most
constexpr int kStep = 4;           // tiles of one pass over the weights, at most: with 5 positions, 20 sums
constexpr int kAhead = 4096;       // bytes of weights between what is read and what is fetched

// V is stored as bytes from 0 up.
constexpr int offset_of(int a_max, int position) { return -kV3.at[position]({0, a_max}).low; }

constexpr bool inputs_fit(int a_max) {
  for (const Position& position : kV3.at) {
    const Range v = position({0, a_max});
    if (v.high - v.low > 255) return false;
  }
  return true;
}

static_assert(inputs_fit(7) && !inputs_fit(8));
static_assert(weights_fit(kU3, {-2, 2}) && !weights_fit(kU3, {-3, 2}) && !weights_fit(kU3, {-2, 3}));

const char* refuses(const Conv& conv) {
  if (!inputs_fit(conv.a_max))
    return "transformed inputs need more than 8 bits: at most 3 bits of inputs fit";
  const Form form = form_of(conv, kU3);
  if (!weights_fit(kU3, form.q)) return "transformed weights need more than 8 bits: levels may span 4 steps";
  return refuses_winograd(conv, form);
}

constexpr int steps(const Conv& conv) { return (conv.c + 3) / 4; }
constexpr int panels(const Conv& conv) { return (conv.o + kLanes - 1) / kLanes; }

int rows(const Conv& conv) { return rows_of_tiles(conv, 3, kBlock); }

std::size_t row_bytes(const Conv& conv) { return static_cast<std::size_t>(1 + steps(conv)) * kRow; }

std::size_t weight_bytes(const Conv& conv) { return 5 * panels(conv) * row_bytes(conv); }

// Measured on Zen 4: a dot product a cycle, transforms by the tile, weights read once a block.
double cycles(const Conv& conv) {
  const double tiles = round_up(tiles_across<3>(conv) * ((conv.out_h + 2) / 3), kStep);
  const double dots = 25.0 * panels(conv) * steps(conv);
  const double transforms = 30 + 90 * panels(conv) + 12 * steps(conv);
  const double sums = form_of(conv, kU3).middle != 0 ? 72 + 1.8 * conv.c : 0;
  return tiles * (dots + transforms + sums) + tiles / 28 * static_cast<double>(weight_bytes(conv)) / 128;
}

void pack(const Conv& conv, const std::int16_t* levels, std::uint8_t* packed) {
  const Form form = form_of(conv, kU3);
  for (int o = 0; o < conv.o; ++o, levels += 9 * static_cast<std::ptrdiff_t>(conv.c)) {
    const int constant = constant_of(conv, form, levels);
    for (int y = 0; y < 5; ++y) {
      std::uint8_t* row = packed + (o / kLanes * 5 + y) * row_bytes(conv) + o % kLanes * 4;
      for (int x = 0; x < 5; ++x) {
        int sum = 0;
        for (int c = 0; c < conv.c; ++c) {
          const int u = transform_weights(levels + 9 * static_cast<std::ptrdiff_t>(c), form, kG3[y], kG3[x]);
          row[static_cast<std::size_t>(1 + c / 4) * kRow + x * kVector + c % 4] =
              static_cast<std::uint8_t>(u);
          sum += u;
        }
        // The second position goes into all outputs with factor 9, of 36.
        const int initial = (y == 1 && x == 1 ? constant : 0) - offset_of(conv.a_max, 5 * y + x) * sum;
        __builtin_memcpy(row + x * kVector, &initial, sizeof initial);
      }
    }
  }
}

// V of four tiles and one row: [steps, in fours][4 tiles][columns 0 to 3][4 channels], then column 4:
// [steps, in fours][4 tiles][4 channels].
std::size_t main_bytes(const Conv& conv) {
  return static_cast<std::size_t>(round_up(steps(conv), 4)) * kVector;
}
std::size_t quad_bytes(const Conv& conv) { return main_bytes(conv) / 4 * 5; }

// V of a block: [5 rows][quads].
std::size_t v_bytes(const Conv& conv) { return 5 * kBlock / kStep * quad_bytes(conv); }

// Sums of a panel, with A^T applied along rows: int32 [5 rows][tile][3][16].
constexpr std::ptrdiff_t kTileSums = 3 * kLanes;
constexpr std::ptrdiff_t kRowSums = kBlock * kTileSums + kLanes;

std::size_t scratch_bytes(const Conv& conv, int rows) {
  return v_bytes(conv) + 5 * kRowSums * sizeof(std::int32_t) + window_sums_bytes(conv, rows);
}

// 16 channels at one place of four tiles.
__m512i load(const Tile<3>* tiles, int y, int x, int channel) {
  const __m128i* from[4];
#pragma GCC unroll 4
  for (int t = 0; t < 4; ++t) {
    from[t] = reinterpret_cast<const __m128i*>(tiles[t].input + tiles[t].rows_at[y] + tiles[t].columns_at[x] +
                                               channel);
  }
  __m512i all = _mm512_castsi128_si512(_mm_loadu_si128(from[0]));
  all = _mm512_inserti32x4(all, _mm_loadu_si128(from[1]), 1);
  all = _mm512_inserti32x4(all, _mm_loadu_si128(from[2]), 2);
  return _mm512_inserti32x4(all, _mm_loadu_si128(from[3]), 3);
}

// Five registers.
struct Five {
  __m512i at[5];
};

// B^T applied to five vectors.
Five transform(const Five& d) {
  const __m512i d31 = _mm512_sub_epi8(d.at[3], d.at[1]), d02 = _mm512_sub_epi8(d.at[0], d.at[2]);
  const __m512i d32 = _mm512_sub_epi8(d.at[3], d.at[2]), d21 = _mm512_sub_epi8(d.at[2], d.at[1]);
  const __m512i d42 = _mm512_sub_epi8(d.at[4], d.at[2]);
  return {_mm512_add_epi8(_mm512_add_epi8(d02, d02), d31),
          _mm512_sub_epi8(d32, _mm512_add_epi8(d.at[1], d.at[1])),
          _mm512_sub_epi8(d32, _mm512_add_epi8(d21, d21)), d31,
          _mm512_sub_epi8(d42, _mm512_add_epi8(d31, d31))};
}

// V of four tiles and 16 channels from `channel` on, into `v` and, of the last column, `v4`; rows are
// `stride` apart.
void transform_inputs(const Tile<3>* tiles, int channel, const __m512i (&offsets)[25], std::uint8_t* v,
                      std::uint8_t* v4, std::size_t stride) {
  const __m512i across = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  Five columns[5];
#pragma GCC unroll 5
  for (int x = 0; x < 5; ++x) {
    columns[x] =
        transform({load(tiles, 0, x, channel), load(tiles, 1, x, channel), load(tiles, 2, x, channel),
                   load(tiles, 3, x, channel), load(tiles, 4, x, channel)});
  }
#pragma GCC unroll 5
  for (int y = 0; y < 5; ++y, v += stride, v4 += stride) {
    Five row =
        transform({columns[0].at[y], columns[1].at[y], columns[2].at[y], columns[3].at[y], columns[4].at[y]});
#pragma GCC unroll 5
    for (int x = 0; x < 5; ++x) row.at[x] = _mm512_add_epi8(row.at[x], offsets[5 * y + x]);
    const __m512i low01 = _mm512_unpacklo_epi32(row.at[0], row.at[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(row.at[2], row.at[3]);
    const __m512i high01 = _mm512_unpackhi_epi32(row.at[0], row.at[1]);
    const __m512i high23 = _mm512_unpackhi_epi32(row.at[2], row.at[3]);
    _mm512_store_si512(v, _mm512_unpacklo_epi64(low01, low23));
    _mm512_store_si512(v + kVector, _mm512_unpackhi_epi64(low01, low23));
    _mm512_store_si512(v + 2 * kVector, _mm512_unpacklo_epi64(high01, high23));
    _mm512_store_si512(v + 3 * kVector, _mm512_unpackhi_epi64(high01, high23));
    _mm512_store_si512(v4, _mm512_permutexvar_epi32(across, row.at[4]));
  }
}

// `tiles` are in fours, the last repeated if need be. Bytes that are read behind a pixel's last channel
// become V that no weight meets.
void transform_block(const Conv conv, const Tile<3>* tiles, int quads, std::uint8_t* v) {
  const std::size_t each = quad_bytes(conv), main = main_bytes(conv);
  __m512i offsets[25];
  for (int i = 0; i < 25; ++i) offsets[i] = _mm512_set1_epi8(static_cast<char>(offset_of(conv.a_max, i)));
  for (int quad = 0; quad < quads; ++quad, tiles += kStep, v += each) {
    for (int channel = 0; channel < conv.c; channel += 16) {
      transform_inputs(tiles, channel, offsets, v + channel / 4 * kVector, v + main + channel / 16 * kVector,
                       quads * each);
    }
  }
}

// A^T applied to five vectors.
struct Three {
  __m512i at[3];
};
Three untransform(__m512i m0, __m512i m1, __m512i m2, __m512i m3, __m512i m4) {
  const __m512i thrice = _mm512_add_epi32(m1, _mm512_slli_epi32(m1, 1));
  return {_mm512_add_epi32(_mm512_add_epi32(m0, thrice), _mm512_add_epi32(m2, m3)),
          _mm512_add_epi32(_mm512_sub_epi32(thrice, m2), _mm512_slli_epi32(m3, 1)),
          _mm512_add_epi32(_mm512_add_epi32(thrice, m2), _mm512_add_epi32(_mm512_slli_epi32(m3, 2), m4))};
}

// The five positions of a row: sums over channels of U * V of 16 output channels, A^T applied:
// m[tile][3][16].
template <int kTiles>
void multiply(const std::uint8_t* weights, const std::uint8_t* v, const std::uint8_t* v4, int steps,
              std::int32_t* m) {
  __m512i sum[kTiles][5];
#pragma GCC unroll 5
  for (int x = 0; x < 5; ++x) {
#pragma GCC unroll 4
    for (int t = 0; t < kTiles; ++t) sum[t][x] = _mm512_load_si512(weights + x * kVector);
  }
  for (int k = 0; k < steps; ++k, v += kVector, v4 += kVector / 4) {
    weights += kRow;
#pragma GCC unroll 5
    for (int x = 0; x < 5; ++x) {
      const __m512i u = _mm512_load_si512(weights + x * kVector);
      _mm_prefetch(reinterpret_cast<const char*>(weights + x * kVector + kAhead), _MM_HINT_T0);
#pragma GCC unroll 4
      for (int t = 0; t < kTiles; ++t) {
        std::int32_t four;
        __builtin_memcpy(&four, x < 4 ? v + 16 * t + 4 * x : v4 + 4 * t, sizeof four);
        sum[t][x] = _mm512_dpbusd_epi32(sum[t][x], _mm512_set1_epi32(four), u);
      }
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < kTiles; ++t) {
    const Three out = untransform(sum[t][0], sum[t][1], sum[t][2], sum[t][3], sum[t][4]);
#pragma GCC unroll 3
    for (int x = 0; x < 3; ++x) _mm512_store_si512(m + t * kTileSums + x * kLanes, out.at[x]);
  }
}

using Multiply = void (*)(const std::uint8_t*, const std::uint8_t*, const std::uint8_t*, int, std::int32_t*);
constexpr Multiply kMultiply[kStep] = {multiply<1>, multiply<2>, multiply<3>, multiply<4>};

// Outputs of a tile and 16 channels. `sums`: what windows add, [pixel of the job], or null.
void finish(const Tile<3>& tile, const std::int32_t* m, __m128i shift, const std::int32_t* sums, int out_w,
            std::int32_t* acc, int ld) {
  const __m512i ninth = _mm512_set1_epi32(954437177);  // * 9 = 1 modulo 2^32
  static_assert(954437177u * 9u == 1u);
  for (int x = 0; x < tile.columns; ++x, m += kLanes) {
    const Three column = untransform(_mm512_load_si512(m), _mm512_load_si512(m + kRowSums),
                                     _mm512_load_si512(m + 2 * kRowSums), _mm512_load_si512(m + 3 * kRowSums),
                                     _mm512_load_si512(m + 4 * kRowSums));
#pragma GCC unroll 3
    for (int y = 0; y < 3; ++y) {
      if (y >= tile.rows) break;
      const std::ptrdiff_t pixel = tile.pixel + y * out_w + x;
      __m512i out = _mm512_sra_epi32(_mm512_mullo_epi32(column.at[y], ninth), shift);
      if (sums != nullptr) out = _mm512_add_epi32(out, _mm512_set1_epi32(sums[pixel]));
      _mm512_storeu_si512(acc + pixel * ld, out);
    }
  }
}

// All of the job's output channels of a block of tiles.
void block(const Conv conv, const Job job, __m128i shift, const Tile<3>* tiles, int count,
           const std::uint8_t* v, std::int32_t* m, const std::int32_t* sums) {
  for (int o = job.o0; o < job.o1; o += kLanes) {
    const std::uint8_t* weights = job.weights + o / kLanes * 5 * row_bytes(conv);
    const std::uint8_t* quad = v;
    for (int y = 0; y < 5; ++y, weights += row_bytes(conv)) {
      for (int t = 0; t < count; t += kStep, quad += quad_bytes(conv)) {
        const int now = count - t < kStep ? count - t : kStep;
        kMultiply[now - 1](weights, quad, quad + main_bytes(conv), steps(conv),
                           m + y * kRowSums + t * kTileSums);
      }
    }
    for (int t = 0; t < count; ++t) {
      finish(tiles[t], m + t * kTileSums, shift, sums, conv.out_w, job.acc + o - job.o0, job.ld);
    }
  }
}

void run(const Conv& conv, const Job& job) {
  const Form form = form_of(conv, kU3);
  const __m128i shift = _mm_cvtsi32_si128(shift_of(conv, form));
  std::uint8_t* v = job.scratch;
  auto* m = reinterpret_cast<std::int32_t*>(v + v_bytes(conv));
  std::int32_t* sums = nullptr;
  if (form.middle != 0) {
    sums = m + 5 * kRowSums;
    window_sums(conv, job, conv.a_scale * form.middle, sums);
  }
  const int all = (job.y1 - job.y0 + 2) / 3 * tiles_across<3>(conv);
  const int blocks = (all + kBlock - 1) / kBlock;
  const int most = round_up((all + blocks - 1) / blocks, kStep);
  for (int first = 0; first < all; first += most) {
    const int count = all - first < most ? all - first : most;
    const int padded = round_up(count, kStep);
    Tile<3> tiles[kBlock];
    for (int t = 0; t < padded; ++t) tiles[t] = tile_at<3>(conv, job, first + (t < count ? t : count - 1));
    transform_block(conv, tiles, padded / kStep, v);
    block(conv, job, shift, tiles, count, v, m, sums);
  }
}

const Kernel kernel = {
    .name = "winograd3_avx512vnni",
    .isa = Isa::avx512vnni,
    .refuses = refuses,
    .cycles = cycles,
    .rows = rows,
    .rows_step = 3,
    .weight_bytes = weight_bytes,
    .pack = pack,
    .scratch_bytes = scratch_bytes,
    .run = run,
};
const Registered registered(kernel);

}  // namespace
}  // namespace mixbits
