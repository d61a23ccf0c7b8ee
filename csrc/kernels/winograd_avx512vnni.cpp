// Exact integer Winograd on int8 dot products: kernels/winograd.h.
//
// Weights: panels of 16 output channels, a row of positions after the other, in the order of reading:
//
//   [panel][4 rows] { initial sums int32 [4 columns][16] | U int8 [c / 4][4 columns][16][4] }
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

constexpr int kLanes = 16;         // int32 sums of a register: output channels of a panel
constexpr int kVector = 64;        // bytes of a register
constexpr int kRow = 4 * kVector;  // bytes of weights of 4 positions and 4 channels
constexpr int kBlock = 32;         // tiles that are transformed together, at most
constexpr int kStep = 4;           // tiles of one pass over the weights, at most: with 4 positions, 16 sums
constexpr int kByteOffset = 128;

// V is stored plus this: nothing where no input is subtracted, else the middle of a byte.
constexpr int offset_of(int position) { return kV.at[position].minus > 0 ? kByteOffset : 0; }

constexpr bool inputs_fit(int a_max) {
  for (int i = 0; i < 16; ++i) {
    const Range v = kV.at[i]({0, a_max});
    if (v.low + offset_of(i) < 0 || v.high + offset_of(i) > 255) return false;
  }
  return true;
}

static_assert(inputs_fit(63) && !inputs_fit(64));

const char* refuses(const Conv& conv) {
  if (!inputs_fit(conv.a_max))
    return "transformed inputs need more than 8 bits: at most 6 bits of inputs fit";
  const Form form = form_of(conv, kU);
  return weights_fit(kU, form.q) ? refuses_winograd(conv, form) : kWeightsTooWide;
}

constexpr int steps(const Conv& conv) { return (conv.c + 3) / 4; }
constexpr int panels(const Conv& conv) { return (conv.o + kLanes - 1) / kLanes; }

int rows(const Conv& conv) { return rows_of_tiles(conv, 2, kBlock); }

std::size_t row_bytes(const Conv& conv) { return static_cast<std::size_t>(1 + steps(conv)) * kRow; }

std::size_t weight_bytes(const Conv& conv) { return 4 * panels(conv) * row_bytes(conv); }

// Measured on Zen 4: a dot product a cycle, transforms by the tile, weights read once a block.
double cycles(const Conv& conv) {
  const double tiles = round_up(tiles_across<2>(conv) * ((conv.out_h + 1) / 2), kStep);
  const double dots = 16.0 * panels(conv) * steps(conv);
  const double transforms = 15 + 30 * panels(conv) + 5 * steps(conv);
  const double sums = form_of(conv, kU).middle != 0 ? 32 + 0.8 * conv.c : 0;
  return tiles * (dots + transforms + sums) + tiles / 28 * static_cast<double>(weight_bytes(conv)) / 128;
}

void pack(const Conv& conv, const std::int16_t* levels, std::uint8_t* packed) {
  const Form form = form_of(conv, kU);
  for (int o = 0; o < conv.o; ++o, levels += 9 * static_cast<std::ptrdiff_t>(conv.c)) {
    const int constant = constant_of(conv, form, levels);
    for (int y = 0; y < 4; ++y) {
      std::uint8_t* row = packed + (o / kLanes * 4 + y) * row_bytes(conv) + o % kLanes * 4;
      for (int x = 0; x < 4; ++x) {
        int sum = 0;
        for (int c = 0; c < conv.c; ++c) {
          const int u = transform_weights(levels + 9 * static_cast<std::ptrdiff_t>(c), form, kG[y], kG[x]);
          row[static_cast<std::size_t>(1 + c / 4) * kRow + x * kVector + c % 4] =
              static_cast<std::uint8_t>(u);
          sum += u;
        }
        int initial = -offset_of(4 * y + x) * sum;
        if (y == 1 && x == 1) initial += constant;
        __builtin_memcpy(row + x * kVector, &initial, sizeof initial);
      }
    }
  }
}

// V of four tiles and one row: [steps, in fours][4 tiles][4 columns][4 channels].
std::size_t quad_bytes(const Conv& conv) {
  return static_cast<std::size_t>(round_up(steps(conv), 4)) * kVector;
}

// V of a block: [4 rows][quads].
std::size_t v_bytes(const Conv& conv) { return kBlock * quad_bytes(conv); }

// Sums of a panel, with A^T applied along rows: int32 [4 rows][tile][2][16].
constexpr std::ptrdiff_t kTileSums = 2 * kLanes;
constexpr std::ptrdiff_t kRowSums = kBlock * kTileSums + kLanes;

std::size_t scratch_bytes(const Conv& conv, int rows) {
  return v_bytes(conv) + 4 * kRowSums * sizeof(std::int32_t) + window_sums_bytes(conv, rows);
}

// 16 channels at one place of four tiles.
__m512i load(const std::uint8_t* from0, const std::uint8_t* from1, const std::uint8_t* from2,
             const std::uint8_t* from3) {
  __m512i all = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from0)));
  all = _mm512_inserti32x4(all, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from1)), 1);
  all = _mm512_inserti32x4(all, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from2)), 2);
  return _mm512_inserti32x4(all, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from3)), 3);
}

// Four registers.
struct Four {
  __m512i at[4];
};

// B^T applied to four vectors.
Four transform(__m512i d0, __m512i d1, __m512i d2, __m512i d3) {
  return {_mm512_sub_epi8(d0, d2), _mm512_add_epi8(d1, d2), _mm512_sub_epi8(d2, d1), _mm512_sub_epi8(d1, d3)};
}

// Rows of 4x4 dwords become columns, in each quarter of the registers.
Four transpose(const Four& x) {
  const __m512i low01 = _mm512_unpacklo_epi32(x.at[0], x.at[1]),
                low23 = _mm512_unpacklo_epi32(x.at[2], x.at[3]);
  const __m512i high01 = _mm512_unpackhi_epi32(x.at[0], x.at[1]),
                high23 = _mm512_unpackhi_epi32(x.at[2], x.at[3]);
  return {_mm512_unpacklo_epi64(low01, low23), _mm512_unpackhi_epi64(low01, low23),
          _mm512_unpacklo_epi64(high01, high23), _mm512_unpackhi_epi64(high01, high23)};
}

// V of four tiles and 16 channels from `channel` on. Rows of V are `stride` bytes apart.
void transform_inputs(const Conv& conv, const Tile<2>* tiles, int channel, std::uint8_t* v,
                      std::size_t stride) {
  const std::ptrdiff_t row = conv.row_bytes(), pixel = conv.pixel_stride;
  const std::uint8_t* at[4];
#pragma GCC unroll 4
  for (int t = 0; t < 4; ++t) at[t] = tiles[t].input + channel;
  Four columns[4];  // B^T d, a column at a time
#pragma GCC unroll 4
  for (int x = 0; x < 4; ++x) {
    const std::uint8_t* from[4];
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) from[t] = at[t] + (x < 3 ? x * pixel : tiles[t].columns_at[3]);
    columns[x] = transform(load(from[0], from[1], from[2], from[3]),
                           load(from[0] + row, from[1] + row, from[2] + row, from[3] + row),
                           load(from[0] + 2 * row, from[1] + 2 * row, from[2] + 2 * row, from[3] + 2 * row),
                           load(from[0] + tiles[0].rows_at[3], from[1] + tiles[1].rows_at[3],
                                from[2] + tiles[2].rows_at[3], from[3] + tiles[3].rows_at[3]));
  }
#pragma GCC unroll 4
  for (int y = 0; y < 4; ++y) {
    Four all = transform(columns[0].at[y], columns[1].at[y], columns[2].at[y], columns[3].at[y]);
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      all.at[x] = _mm512_xor_si512(all.at[x], _mm512_set1_epi8(static_cast<char>(offset_of(4 * y + x))));
    }
    all = transpose(all);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) _mm512_store_si512(v + y * stride + k * kVector, all.at[k]);
  }
}

// `tiles` are in fours, the last repeated if need be. Bytes that are read behind a pixel's last channel
// become V that no weight meets.
void transform_block(const Conv& conv, const Tile<2>* tiles, int quads, std::uint8_t* v) {
  const std::size_t each = quad_bytes(conv);
  for (int quad = 0; quad < quads; ++quad, tiles += kStep, v += each) {
    for (int channel = 0; channel < conv.c; channel += 16) {
      transform_inputs(conv, tiles, channel, v + static_cast<std::size_t>(channel) / 4 * kVector,
                       quads * each);
    }
  }
}

// A^T applied to four vectors.
struct Two {
  __m512i at[2];
};
Two untransform(__m512i m0, __m512i m1, __m512i m2, __m512i m3) {
  return {_mm512_add_epi32(m0, _mm512_add_epi32(m1, m2)), _mm512_sub_epi32(_mm512_sub_epi32(m1, m2), m3)};
}

// Weights to have in the second cache when they are read: `each` bytes of a step.
struct Fetch {
  const std::uint8_t* from;
  std::ptrdiff_t each;
};

// The four positions of a row: sums over channels of U * V of 16 output channels, A^T applied:
// m[tile][2][16].
template <int kTiles>
void multiply(const std::uint8_t* weights, const std::uint8_t* v, int steps, Fetch fetch, std::int32_t* m) {
  __m512i sum[kTiles][4];
#pragma GCC unroll 4
  for (int x = 0; x < 4; ++x) {
#pragma GCC unroll 4
    for (int t = 0; t < kTiles; ++t) sum[t][x] = _mm512_load_si512(weights + x * kVector);
  }
  for (int k = 0; k < steps; ++k, v += kVector, fetch.from += fetch.each) {
    weights += kRow;
    for (std::ptrdiff_t i = 0; i < fetch.each; i += kVector) {
      _mm_prefetch(reinterpret_cast<const char*>(fetch.from + i), _MM_HINT_T1);
    }
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      const __m512i u = _mm512_load_si512(weights + x * kVector);
#pragma GCC unroll 4
      for (int t = 0; t < kTiles; ++t) {
        std::int32_t four;
        __builtin_memcpy(&four, v + 16 * t + 4 * x, sizeof four);
        sum[t][x] = _mm512_dpbusd_epi32(sum[t][x], _mm512_set1_epi32(four), u);
      }
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < kTiles; ++t) {
    const Two out = untransform(sum[t][0], sum[t][1], sum[t][2], sum[t][3]);
    _mm512_store_si512(m + t * kTileSums, out.at[0]);
    _mm512_store_si512(m + t * kTileSums + kLanes, out.at[1]);
  }
}

using Multiply = void (*)(const std::uint8_t*, const std::uint8_t*, int, Fetch, std::int32_t*);
constexpr Multiply kMultiply[kStep] = {multiply<1>, multiply<2>, multiply<3>, multiply<4>};

// Outputs of a tile and 16 channels. `sums`: what windows add, [pixel of the job], or null.
void finish(const Tile<2>& tile, const std::int32_t* m, __m128i shift, const std::int32_t* sums, int out_w,
            std::int32_t* acc, int ld) {
  Two columns[2];
#pragma GCC unroll 2
  for (int x = 0; x < 2; ++x) {
    const std::int32_t* at = m + x * kLanes;
    columns[x] = untransform(_mm512_load_si512(at), _mm512_load_si512(at + kRowSums),
                             _mm512_load_si512(at + 2 * kRowSums), _mm512_load_si512(at + 3 * kRowSums));
  }
#pragma GCC unroll 2
  for (int y = 0; y < 2; ++y) {
    if (y == 1 && tile.rows == 1) break;
#pragma GCC unroll 2
    for (int x = 0; x < 2; ++x) {
      if (x == 1 && tile.columns == 1) break;
      const std::ptrdiff_t pixel = tile.pixel + y * out_w + x;
      __m512i out = _mm512_sra_epi32(columns[x].at[y], shift);
      if (sums != nullptr) out = _mm512_add_epi32(out, _mm512_set1_epi32(sums[pixel]));
      _mm512_storeu_si512(acc + pixel * ld, out);
    }
  }
}

// All of the job's output channels of a block of tiles. Every row of weights is read once for each quad of
// tiles; meanwhile the next row comes, as evenly as whole lines allow, from where it takes longest.
void block(const Conv conv, const Job job, __m128i shift, const Tile<2>* tiles, int count,
           const std::uint8_t* v, std::int32_t* m, const std::int32_t* sums) {
  const int quads = (count + kStep - 1) / kStep;
  const std::ptrdiff_t each = (kRow / kVector + quads - 1) / quads * kVector;
  for (int o = job.o0; o < job.o1; o += kLanes) {
    const std::uint8_t* weights = job.weights + o / kLanes * 4 * row_bytes(conv);
    const std::uint8_t* quad = v;
    for (int y = 0; y < 4; ++y, weights += row_bytes(conv)) {
      for (int t = 0; t < count; t += kStep, quad += quad_bytes(conv)) {
        const int now = count - t < kStep ? count - t : kStep;
        const Fetch fetch{weights + row_bytes(conv) + t / kStep * steps(conv) * each, each};
        kMultiply[now - 1](weights, quad, steps(conv), fetch, m + y * kRowSums + t * kTileSums);
      }
    }
    for (int t = 0; t < count; ++t) {
      finish(tiles[t], m + t * kTileSums, shift, sums, conv.out_w, job.acc + o - job.o0, job.ld);
    }
  }
}

void run(const Conv& conv, const Job& job) {
  const Form form = form_of(conv, kU);
  const __m128i shift = _mm_cvtsi32_si128(shift_of(conv, form));
  std::uint8_t* v = job.scratch;
  auto* m = reinterpret_cast<std::int32_t*>(v + v_bytes(conv));
  std::int32_t* sums = nullptr;
  if (form.middle != 0) {
    sums = m + 4 * kRowSums;
    window_sums(conv, job, conv.a_scale * form.middle, sums);
  }
  const int all = (job.y1 - job.y0 + 1) / 2 * tiles_across<2>(conv);
  const int blocks = (all + kBlock - 1) / kBlock;
  const int most = round_up((all + blocks - 1) / blocks, kStep);
  for (int first = 0; first < all; first += most) {
    const int count = all - first < most ? all - first : most;
    const int padded = round_up(count, kStep);
    Tile<2> tiles[kBlock];
    for (int t = 0; t < padded; ++t) tiles[t] = tile_at<2>(conv, job, first + (t < count ? t : count - 1));
    transform_block(conv, tiles, padded / kStep, v);
    block(conv, job, shift, tiles, count, v, m, sums);
  }
}

const Kernel kernel = {
    .name = "winograd_avx512vnni",
    .isa = Isa::avx512vnni,
    .refuses = refuses,
    .cycles = cycles,
    .rows = rows,
    .rows_step = 2,
    .weight_bytes = weight_bytes,
    .pack = pack,
    .scratch_bytes = scratch_bytes,
    .run = run,
};
const Registered registered(kernel);

}  // namespace
}  // namespace mixbits
