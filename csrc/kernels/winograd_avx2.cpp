// Exact integer Winograd (kernels/winograd.h) on products of bytes that are summed in 16 bits for as long as
// these cannot overflow, then in 32.
//
// Weights: panels of 16 output channels, in the order of reading:
//
//   [panel][16 positions] { initial sums int32 [16] | U int8 [c / 4][16][4] }
//
// The initial sums undo the offset of the bytes of V and hold what the offset of input levels adds.

#include <immintrin.h>

#include "kernels/window_sums.h"
#include "kernels/winograd.h"

namespace mixbits {
namespace {

constexpr int kLanes = 8;              // int32 sums of a register
constexpr int kPanel = 2 * kLanes;     // output channels
constexpr int kVector = 32;            // bytes of a register
constexpr int kWeights = 2 * kVector;  // bytes of 4 channels
constexpr int kBlock = 32;             // tiles that are transformed together, at most
constexpr int kStep = 4;               // tiles of one pass over the weights, at most

// V is stored as bytes from 0 up.
constexpr int offset_of(const Conv& conv, int position) { return -kV.at[position]({0, conv.a_max}).low; }

// How many products of 4 channels a sum of 16 bits has room for, where each gives it two products of bytes.
constexpr int run_of(const Conv& conv, const Form& form, int position) {
  const Range v = kV.at[position]({0, conv.a_max}), u = kU.at[position](form.q);
  const int product = (v.high - v.low) * largest(u.low, u.high);
  return product == 0 ? 32767 : 32767 / (2 * product);
}

const char* refuses(const Conv& conv) {
  const Form form = form_of(conv, kU);
  if (!weights_fit(kU, form.q)) return kWeightsTooWide;
  if (const char* why = refuses_winograd(conv, form)) return why;
  for (int i = 0; i < 16; ++i) {
    const Range v = kV.at[i]({0, conv.a_max});
    if (v.high - v.low > 255) return "transformed inputs need more than 8 bits: at most 6 bits of inputs fit";
    if (run_of(conv, form, i) == 0) return "sums of transformed products need more than 16 bits";
  }
  return nullptr;
}

constexpr int steps(const Conv& conv) { return (conv.c + 3) / 4; }
constexpr int panels(const Conv& conv) { return (conv.o + kPanel - 1) / kPanel; }

int rows(const Conv& conv) { return rows_of_tiles(conv, 2, kBlock); }

std::size_t position_bytes(const Conv& conv) { return static_cast<std::size_t>(1 + steps(conv)) * kWeights; }

std::size_t weight_bytes(const Conv& conv) { return 16 * panels(conv) * position_bytes(conv); }

// Measured on Zen 4.
double cycles(const Conv& conv) {
  const Form form = form_of(conv, kU);
  double products = 0;
  for (int i = 0; i < 16; ++i) {
    const int run = run_of(conv, form, i);
    products += steps(conv) * (1.3 + 1.2 / (run < steps(conv) ? run : steps(conv)));
  }
  const double sums = form.middle != 0 ? 32 + 0.8 * conv.c : 0;
  return 1.0 * tiles_across<2>(conv) * ((conv.out_h + 1) / 2) *
         (panels(conv) * (products + 60) + 30 + 4 * steps(conv) + sums);
}

void pack(const Conv& conv, const std::int16_t* levels, std::uint8_t* packed) {
  const Form form = form_of(conv, kU);
  for (int o = 0; o < conv.o; ++o, levels += 9 * static_cast<std::ptrdiff_t>(conv.c)) {
    const std::int32_t constant = constant_of(conv, form, levels);
    std::uint8_t* position = packed + o / kPanel * 16 * position_bytes(conv) + o % kPanel * 4;
    for (int i = 0; i < 16; ++i, position += position_bytes(conv)) {
      std::int32_t sum = 0;
      for (int c = 0; c < conv.c; ++c) {
        const int u =
            transform_weights(levels + 9 * static_cast<std::ptrdiff_t>(c), form, kG[i / 4], kG[i % 4]);
        position[static_cast<std::size_t>(1 + c / 4) * kWeights + c % 4] = static_cast<std::uint8_t>(u);
        sum += u;
      }
      const std::int32_t initial = (i == 5 ? constant : 0) - offset_of(conv, i) * sum;
      __builtin_memcpy(position, &initial, sizeof initial);
    }
  }
}

// Bytes from a position's V to the next: an odd number of cache lines, so that positions do not compete for
// the same ones; and one register more than it holds, because the last tile is written in whole registers.
std::size_t v_stride(const Conv& conv) {
  return 64 * ((static_cast<std::size_t>(kBlock) * 4 * steps(conv) / 64 + 1) | 1);
}

// Sums of a panel: int32 [16 positions][tile][16].
constexpr std::ptrdiff_t kPositionSums = kBlock * kPanel + kPanel;

std::size_t scratch_bytes(const Conv& conv, int rows) {
  return 16 * (v_stride(conv) + kPositionSums * sizeof(std::int32_t)) + window_sums_bytes(conv, rows);
}

__m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
void store(void* to, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(to), value); }

// Four registers.
struct Four {
  __m256i at[4];
};

// B^T applied to four vectors.
Four transform(__m256i d0, __m256i d1, __m256i d2, __m256i d3) {
  return {_mm256_sub_epi8(d0, d2), _mm256_add_epi8(d1, d2), _mm256_sub_epi8(d2, d1), _mm256_sub_epi8(d1, d3)};
}

// V of a tile and 32 channels; v: [16 positions, `stride` bytes each].
void transform_inputs(const Tile<2>& tile, const std::uint8_t* from, std::ptrdiff_t row, std::ptrdiff_t pixel,
                      const __m256i (&offsets)[16], std::uint8_t* v, std::size_t stride) {
  Four rows[4];  // d B, a row at a time
#pragma GCC unroll 4
  for (int y = 0; y < 4; ++y) {
    const std::uint8_t* at = from + (y < 3 ? y * row : tile.rows_at[3]);
    rows[y] = transform(load(at), load(at + pixel), load(at + 2 * pixel), load(at + tile.columns_at[3]));
  }
#pragma GCC unroll 4
  for (int x = 0; x < 4; ++x) {
    const Four column = transform(rows[0].at[x], rows[1].at[x], rows[2].at[x], rows[3].at[x]);
#pragma GCC unroll 4
    for (int y = 0; y < 4; ++y) {
      store(v + (4 * y + x) * stride, _mm256_add_epi8(column.at[y], offsets[4 * y + x]));
    }
  }
}

// V of a block: [16 positions][tile][4 * steps]. What is written behind a tile's channels is written again by
// the next tile.
void transform_block(const Conv conv, const Tile<2>* tiles, int count, std::uint8_t* v) {
  const int bytes = 4 * steps(conv);
  __m256i offsets[16];
  for (int i = 0; i < 16; ++i) offsets[i] = _mm256_set1_epi8(static_cast<char>(offset_of(conv, i)));
  for (int t = 0; t < count; ++t, v += bytes) {
    for (int channel = 0; channel < bytes; channel += kVector) {
      transform_inputs(tiles[t], tiles[t].input + channel, conv.row_bytes(), conv.pixel_stride, offsets,
                       v + channel, v_stride(conv));
    }
  }
}

// gcc 12 copies all sums once more in the innermost loop unless told not to: 14 % of the time.
#if !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("no-tree-coalesce-vars")
#endif

// Products of 4 channels of a tile with U of 16 outputs, in 16 bits: two sums of two an output.
struct Products {
  __m256i low, high;
};
Products products_of(const std::uint8_t* v, __m256i u0, __m256i u1) {
  std::int32_t four;
  __builtin_memcpy(&four, v, sizeof four);
  const __m256i inputs = _mm256_set1_epi32(four);
  return {_mm256_maddubs_epi16(inputs, u0), _mm256_maddubs_epi16(inputs, u1)};
}

// m[tile][16] = initial + sum over channels of U * V, at one position.
template <int kTiles>
[[gnu::noinline]] void multiply(const std::uint8_t* weights, const std::uint8_t* v, int steps, int run,
                                std::int32_t* m) {
  const std::ptrdiff_t bytes = 4 * static_cast<std::ptrdiff_t>(steps);
  const __m256i ones = _mm256_set1_epi16(1);
  const std::uint8_t* before = weights;
  std::ptrdiff_t before_step = 0;
  const std::uint8_t* const end = v + bytes;
  do {
    const std::uint8_t* const last = end - v < 4 * run ? end : v + 4 * run;
    Products sum[kTiles];
    weights += kWeights;
    __m256i u0 = load(weights), u1 = load(weights + kVector);
#pragma GCC unroll 4
    for (int t = 0; t < kTiles; ++t) sum[t] = products_of(v + t * bytes, u0, u1);
    for (v += 4; v != last; v += 4) {
      weights += kWeights;
      u0 = load(weights), u1 = load(weights + kVector);
#pragma GCC unroll 4
      for (int t = 0; t < kTiles; ++t) {
        const Products more = products_of(v + t * bytes, u0, u1);
        sum[t] = {_mm256_add_epi16(sum[t].low, more.low), _mm256_add_epi16(sum[t].high, more.high)};
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < kTiles; ++t) {
      std::int32_t* to = m + t * kPanel;
      const __m256i low = load(before), high = load(before + kVector);
      store(to, _mm256_add_epi32(low, _mm256_madd_epi16(sum[t].low, ones)));
      store(to + kLanes, _mm256_add_epi32(high, _mm256_madd_epi16(sum[t].high, ones)));
      before += before_step;
    }
    before = reinterpret_cast<const std::uint8_t*>(m);
    before_step = kPanel * sizeof(std::int32_t);
  } while (v != end);
}

#if !defined(__clang__)
#pragma GCC pop_options
#endif

// The same for a block. Meanwhile the weights of the next position come to the second cache.
void multiply_block(const std::uint8_t* weights, const std::uint8_t* v, int steps, int run, int tiles,
                    std::int32_t* m) {
  const std::ptrdiff_t next = 4 * kStep * static_cast<std::ptrdiff_t>(steps);
  const std::ptrdiff_t all = static_cast<std::ptrdiff_t>(1 + steps) * kWeights;
  const std::ptrdiff_t each = (all * kStep / tiles + kWeights) / kWeights * kWeights;  // of four tiles
  const std::uint8_t* fetched = weights + all;
  for (; tiles >= kStep; tiles -= kStep, v += next, m += kStep * kPanel) {
    for (const std::uint8_t* end = fetched + each; fetched < end; fetched += kWeights) {
      _mm_prefetch(reinterpret_cast<const char*>(fetched), _MM_HINT_T1);
    }
    multiply<kStep>(weights, v, steps, run, m);
  }
  if (tiles == 1) multiply<1>(weights, v, steps, run, m);
  if (tiles == 2) multiply<2>(weights, v, steps, run, m);
  if (tiles == 3) multiply<3>(weights, v, steps, run, m);
}

// A^T applied to four vectors.
struct Two {
  __m256i at[2];
};
Two untransform(__m256i m0, __m256i m1, __m256i m2, __m256i m3) {
  return {_mm256_add_epi32(m0, _mm256_add_epi32(m1, m2)), _mm256_sub_epi32(_mm256_sub_epi32(m1, m2), m3)};
}

// Outputs of a tile and 8 channels. `sums`: what windows add, [pixel of the job], or null.
void finish(const Tile<2>& tile, const std::int32_t* m, __m128i shift, const std::int32_t* sums, int out_w,
            std::int32_t* acc, int ld) {
  Two columns[4];
#pragma GCC unroll 4
  for (int x = 0; x < 4; ++x) {
    const std::int32_t* at = m + x * kPositionSums;
    columns[x] = untransform(load(at), load(at + 4 * kPositionSums), load(at + 8 * kPositionSums),
                             load(at + 12 * kPositionSums));
  }
#pragma GCC unroll 2
  for (int y = 0; y < 2; ++y) {
    if (y == 1 && tile.rows == 1) break;
    const Two row = untransform(columns[0].at[y], columns[1].at[y], columns[2].at[y], columns[3].at[y]);
#pragma GCC unroll 2
    for (int x = 0; x < 2; ++x) {
      if (x == 1 && tile.columns == 1) break;
      const std::ptrdiff_t pixel = tile.pixel + y * out_w + x;
      __m256i out = _mm256_sra_epi32(row.at[x], shift);
      if (sums != nullptr) out = _mm256_add_epi32(out, _mm256_set1_epi32(sums[pixel]));
      store(acc + pixel * ld, out);
    }
  }
}

// All of the job's output channels of a block of tiles.
void block(const Conv conv, const Job job, const int (&runs)[16], __m128i shift, const Tile<2>* tiles,
           int count, const std::uint8_t* v, std::int32_t* m, const std::int32_t* sums) {
  for (int o = job.o0; o < job.o1; o += kPanel) {
    const std::uint8_t* weights = job.weights + o / kPanel * 16 * position_bytes(conv);
    for (int i = 0; i < 16; ++i, weights += position_bytes(conv)) {
      multiply_block(weights, v + i * v_stride(conv), steps(conv), runs[i], count, m + i * kPositionSums);
    }
    for (int t = 0; t < count; ++t) {
      for (int lane = 0; lane < kPanel; lane += kLanes) {
        finish(tiles[t], m + t * kPanel + lane, shift, sums, conv.out_w, job.acc + o - job.o0 + lane, job.ld);
      }
    }
  }
}

void run(const Conv& conv, const Job& job) {
  const Form form = form_of(conv, kU);
  const __m128i shift = _mm_cvtsi32_si128(shift_of(conv, form));
  int runs[16];
  for (int i = 0; i < 16; ++i) runs[i] = run_of(conv, form, i);
  auto* m = reinterpret_cast<std::int32_t*>(job.scratch + 16 * v_stride(conv));
  std::int32_t* sums = nullptr;
  if (form.middle != 0) {
    sums = m + 16 * kPositionSums;
    window_sums(conv, job, conv.a_scale * form.middle, sums);
  }
  const int all = (job.y1 - job.y0 + 1) / 2 * tiles_across<2>(conv);
  const int blocks = (all + kBlock - 1) / kBlock;
  for (int i = 0, first = 0; i < blocks; ++i) {
    const int count = (all - first) / (blocks - i);  // as equal as can be
    Tile<2> tiles[kBlock];
    for (int t = 0; t < count; ++t) tiles[t] = tile_at<2>(conv, job, first + t);
    transform_block(conv, tiles, count, job.scratch);
    block(conv, job, runs, shift, tiles, count, job.scratch, m, sums);
    first += count;
  }
}

const Kernel kernel = {
    .name = "winograd_avx2",
    .isa = Isa::avx2,
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
