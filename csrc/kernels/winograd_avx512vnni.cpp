// Exact integer Winograd F(2x2, 3x3) on int8 dot products: 16 products for 4 outputs instead of 36.
//
//   2x2 outputs = A^T [ (G g G^T) * (B^T d B) ] A        g: 3x3 weights, d: 4x4 inputs, *: by element
//
// Lavin and Gray, "Fast algorithms for convolutional neural networks" (2016), eq. (8). With 2 G in place of G
// everything is an integer and the outputs are 4 times what is wanted, which a shift undoes. At low widths
// the transformed numbers still fit a byte, where the sum over channels then runs; `refuses` has the proof.
//
// Weights: panels of 16 output channels, a row of positions after the other, in the order of reading:
//
//   [panel][4 rows] { initial sums int32 [4 columns][16] | U int8 [c / 4][4 columns][16][4] }
//
// The initial sums undo the offset of V's bytes and hold what the offset of the input's levels adds.

#include <immintrin.h>

// gcc 12 says so of its own intrinsics (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "kernels/kernel.h"
#include "kernels/window_sums.h"

namespace mixbits {
namespace {

constexpr int kG[4][3] = {{2, 0, 0}, {1, 1, 1}, {1, -1, 1}, {0, 0, 2}};
constexpr int kB[4][4] = {{1, 0, -1, 0}, {0, 1, 1, 0}, {0, -1, 1, 0}, {0, 1, 0, -1}};
constexpr int kLanes = 16;         // int32 sums of a register: output channels of a panel
constexpr int kVector = 64;        // bytes of a register
constexpr int kRow = 4 * kVector;  // bytes of weights of 4 positions and 4 channels
constexpr int kBlock = 32;         // tiles that are transformed together, at most
constexpr int kStep = 4;           // tiles of one pass over the weights, at most: with 4 positions, 16 sums
constexpr int kAhead = 4096;       // bytes of weights between what is read and what is fetched
constexpr int kByteOffset = 128;

struct Range {
  int low, high;
};

// What a transform can give at a position: `rows` x `columns` are its coefficients, of values low .. high.
template <int kTaps>
constexpr Range transformed(const int (&rows)[kTaps], const int (&columns)[kTaps], Range values) {
  Range range = {0, 0};
  for (const int row : rows) {
    for (const int column : columns) {
      const int by = row * column;
      range.low += by * (by > 0 ? values.low : values.high);
      range.high += by * (by > 0 ? values.high : values.low);
    }
  }
  return range;
}

constexpr bool weights_fit(Range values) {
  for (const auto& rows : kG) {
    for (const auto& columns : kG) {
      const Range u = transformed(rows, columns, values);
      if (u.low < -128 || u.high > 127) return false;
    }
  }
  return true;
}

// V is stored plus this: nothing where no input is subtracted, else the middle of a byte.
constexpr int offset_of(int y, int x) { return transformed(kB[y], kB[x], {0, 1}).low < 0 ? kByteOffset : 0; }

constexpr bool inputs_fit(int a_max) {
  for (int y = 0; y < 4; ++y) {
    for (int x = 0; x < 4; ++x) {
      const Range v = transformed(kB[y], kB[x], {0, a_max});
      if (v.low + offset_of(y, x) < 0 || v.high + offset_of(y, x) > 255) return false;
    }
  }
  return true;
}

static_assert(inputs_fit(63) && !inputs_fit(64));
static_assert(weights_fit({-14, 14}) && !weights_fit({-15, 14}) && !weights_fit({-14, 15}));

// Weights as the transform gets them: level = step * q + middle.
struct Form {
  int step, middle;
  Range q;
};

// Levels as they are where they fit, else counted in steps from the middle one: then `middle` times the
// window's sum of bytes is added to every output.
constexpr Form form_of(const Conv& conv) {
  if (weights_fit({conv.w_min, conv.w_max})) return {1, 0, {conv.w_min, conv.w_max}};
  const int step = conv.w_step == 2 ? 2 : 1;
  const int below = ((conv.w_max - conv.w_min) / step + 1) / 2;
  const int middle = conv.w_min + step * below;
  return {step, middle, {-below, (conv.w_max - middle) / step}};
}

constexpr int largest(int a, int b) {
  return (a < 0 ? -a : a) > (b < 0 ? -b : b) ? (a < 0 ? -a : a) : (b < 0 ? -b : b);
}

// The outputs' factor of 4, less what the steps of weights and inputs take of it; -1 if that is not a shift.
constexpr int shift_of(const Conv& conv) {
  const int factor = form_of(conv).step * conv.a_scale;
  return factor == 1 ? 2 : factor == 2 ? 1 : factor == 4 ? 0 : -1;
}

const char* refuses(const Conv& conv) {
  if (conv.kh != 3 || conv.kw != 3) return "the window is not 3x3";
  if (conv.stride_y != 1 || conv.stride_x != 1) return "the stride is not 1";
  if (conv.dilation_y != 1 || conv.dilation_x != 1) return "the window is dilated";
  if (conv.groups != 1) return "it is grouped";
  if (!inputs_fit(conv.a_max))
    return "transformed inputs need more than 8 bits: at most 6 bits of inputs fit";
  const Form form = form_of(conv);
  if (!weights_fit(form.q)) return "transformed weights need more than 8 bits: levels may span 28 steps";
  const int shift = shift_of(conv);
  if (shift < 0) return "input levels are further apart than 2";
  // Sums wrap, so only what is shifted at the end has to fit 32 bits: the products and the constant.
  const double products = 1.0 * conv.a_scale * form.step * largest(form.q.low, form.q.high) * conv.a_max;
  const double constant = 1.0 * largest(conv.a_offset, 0) * largest(conv.w_min, conv.w_max);
  if ((products + constant) * 9 * conv.c * (1 << shift) >= 2147483648.0) return "sums are too large";
  return nullptr;
}

constexpr int steps(const Conv& conv) { return (conv.c + 3) / 4; }
constexpr int panels(const Conv& conv) { return (conv.o + kLanes - 1) / kLanes; }
constexpr int tiles_x(const Conv& conv) { return (conv.out_w + 1) / 2; }

int rows(const Conv& conv) {
  const int tile_rows = (conv.out_h + 1) / 2;
  const int fit = tiles_x(conv) < kBlock ? kBlock / tiles_x(conv) : 1;
  const int jobs = (tile_rows + fit - 1) / fit;
  return 2 * ((tile_rows + jobs - 1) / jobs);
}

std::size_t row_bytes(const Conv& conv) { return static_cast<std::size_t>(1 + steps(conv)) * kRow; }

std::size_t weight_bytes(const Conv& conv) { return 4 * panels(conv) * row_bytes(conv); }

// Measured on Zen 4: a dot product a cycle, transforms by the tile, weights read once a block.
double cycles(const Conv& conv) {
  const double tiles = round_up(tiles_x(conv) * ((conv.out_h + 1) / 2), kStep);
  const double dots = 16.0 * panels(conv) * steps(conv);
  const double transforms = 30 + 35 * panels(conv) + 6 * steps(conv);
  const double sums = form_of(conv).middle != 0 ? 32 + 0.8 * conv.c : 0;
  return tiles * (dots + transforms + sums) + tiles / 28 * static_cast<double>(weight_bytes(conv)) / 128;
}

// U at row y and column x; `taps` are int16 [3][3].
int transform_weights(const std::int16_t* taps, const Form& form, int y, int x) {
  int u = 0;
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) u += kG[y][i] * kG[x][j] * ((taps[3 * i + j] - form.middle) / form.step);
  }
  return u;
}

void pack(const Conv& conv, const std::int16_t* levels, std::uint8_t* packed) {
  const Form form = form_of(conv);
  for (int o = 0; o < conv.o; ++o, levels += 9 * static_cast<std::ptrdiff_t>(conv.c)) {
    int sum_of_levels = 0;
    for (int i = 0; i < 9 * conv.c; ++i) sum_of_levels += levels[i];
    for (int y = 0; y < 4; ++y) {
      std::uint8_t* row = packed + (o / kLanes * 4 + y) * row_bytes(conv) + o % kLanes * 4;
      for (int x = 0; x < 4; ++x) {
        int sum = 0;
        for (int c = 0; c < conv.c; ++c) {
          const int u = transform_weights(levels + 9 * static_cast<std::ptrdiff_t>(c), form, y, x);
          row[static_cast<std::size_t>(1 + c / 4) * kRow + x * kVector + c % 4] =
              static_cast<std::uint8_t>(u);
          sum += u;
        }
        int initial = -offset_of(y, x) * sum;
        // This position reaches all four outputs with factor 1.
        if (y == 1 && x == 1) initial += conv.a_offset * sum_of_levels * (1 << shift_of(conv));
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

// Where a tile's 4x4 inputs are and its outputs go. An odd size's last tile has no fourth row or column of
// inputs: it reads the third twice, and what comes of it is dropped.
struct Tile {
  const std::uint8_t* input;
  std::ptrdiff_t row3, column3;
  std::ptrdiff_t pixel;  // of its first output, from the job's first
  bool two_rows, two_columns;
};

Tile tile_at(const Conv& conv, const Job& job, int tile) {
  const int y = job.y0 + tile / tiles_x(conv) * 2, x = tile % tiles_x(conv) * 2;
  return {job.input + static_cast<std::ptrdiff_t>(y) * conv.row_bytes() +
              static_cast<std::ptrdiff_t>(x) * conv.pixel_stride,
          static_cast<std::ptrdiff_t>(y + 3 < conv.in_h ? 3 : 2) * conv.row_bytes(),
          static_cast<std::ptrdiff_t>(x + 3 < conv.in_w ? 3 : 2) * conv.pixel_stride,
          static_cast<std::ptrdiff_t>(y - job.y0) * conv.out_w + x,
          y + 1 < job.y1,
          x + 1 < conv.out_w};
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
void transform_inputs(const Conv& conv, const Tile* tiles, int channel, std::uint8_t* v, std::size_t stride) {
  const std::ptrdiff_t row = conv.row_bytes(), pixel = conv.pixel_stride;
  const std::uint8_t* at[4];
#pragma GCC unroll 4
  for (int t = 0; t < 4; ++t) at[t] = tiles[t].input + channel;
  Four columns[4];  // B^T d, a column at a time
#pragma GCC unroll 4
  for (int x = 0; x < 4; ++x) {
    const std::uint8_t* from[4];
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) from[t] = at[t] + (x < 3 ? x * pixel : tiles[t].column3);
    columns[x] = transform(load(from[0], from[1], from[2], from[3]),
                           load(from[0] + row, from[1] + row, from[2] + row, from[3] + row),
                           load(from[0] + 2 * row, from[1] + 2 * row, from[2] + 2 * row, from[3] + 2 * row),
                           load(from[0] + tiles[0].row3, from[1] + tiles[1].row3, from[2] + tiles[2].row3,
                                from[3] + tiles[3].row3));
  }
#pragma GCC unroll 4
  for (int y = 0; y < 4; ++y) {
    Four all = transform(columns[0].at[y], columns[1].at[y], columns[2].at[y], columns[3].at[y]);
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      all.at[x] = _mm512_xor_si512(all.at[x], _mm512_set1_epi8(static_cast<char>(offset_of(y, x))));
    }
    all = transpose(all);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) _mm512_store_si512(v + y * stride + k * kVector, all.at[k]);
  }
}

// `tiles` are in fours, the last repeated if need be. Bytes that are read behind a pixel's last channel
// become V that no weight meets.
void transform_block(const Conv& conv, const Tile* tiles, int quads, std::uint8_t* v) {
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

// The four positions of a row: sums over channels of U * V of 16 output channels, A^T applied:
// m[tile][2][16].
template <int kTiles>
void multiply(const std::uint8_t* weights, const std::uint8_t* v, int steps, std::int32_t* m) {
  __m512i sum[kTiles][4];
#pragma GCC unroll 4
  for (int x = 0; x < 4; ++x) {
#pragma GCC unroll 4
    for (int t = 0; t < kTiles; ++t) sum[t][x] = _mm512_load_si512(weights + x * kVector);
  }
  for (int k = 0; k < steps; ++k, v += kVector) {
    weights += kRow;
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      const __m512i u = _mm512_load_si512(weights + x * kVector);
      _mm_prefetch(reinterpret_cast<const char*>(weights + x * kVector + kAhead), _MM_HINT_T0);
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

using Multiply = void (*)(const std::uint8_t*, const std::uint8_t*, int, std::int32_t*);
constexpr Multiply kMultiply[kStep] = {multiply<1>, multiply<2>, multiply<3>, multiply<4>};

// Outputs of a tile and 16 channels. `sums`: what windows add, [pixel of the job], or null.
void finish(const Tile& tile, const std::int32_t* m, __m128i shift, const std::int32_t* sums, int out_w,
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
    if (y == 1 && !tile.two_rows) break;
#pragma GCC unroll 2
    for (int x = 0; x < 2; ++x) {
      if (x == 1 && !tile.two_columns) break;
      const std::ptrdiff_t pixel = tile.pixel + y * out_w + x;
      __m512i out = _mm512_sra_epi32(columns[x].at[y], shift);
      if (sums != nullptr) out = _mm512_add_epi32(out, _mm512_set1_epi32(sums[pixel]));
      _mm512_storeu_si512(acc + pixel * ld, out);
    }
  }
}

// All of the job's output channels of a block of tiles.
void block(const Conv conv, const Job job, const Tile* tiles, int count, const std::uint8_t* v,
           std::int32_t* m, const std::int32_t* sums) {
  const __m128i shift = _mm_cvtsi32_si128(shift_of(conv));
  for (int o = job.o0; o < job.o1; o += kLanes) {
    const std::uint8_t* weights = job.weights + o / kLanes * 4 * row_bytes(conv);
    const std::uint8_t* quad = v;
    for (int y = 0; y < 4; ++y, weights += row_bytes(conv)) {
      for (int t = 0; t < count; t += kStep, quad += quad_bytes(conv)) {
        const int now = count - t < kStep ? count - t : kStep;
        kMultiply[now - 1](weights, quad, steps(conv), m + y * kRowSums + t * kTileSums);
      }
    }
    for (int t = 0; t < count; ++t) {
      finish(tiles[t], m + t * kTileSums, shift, sums, conv.out_w, job.acc + o - job.o0, job.ld);
    }
  }
}

void run(const Conv& conv, const Job& job) {
  const Form form = form_of(conv);
  std::uint8_t* v = job.scratch;
  auto* m = reinterpret_cast<std::int32_t*>(v + v_bytes(conv));
  std::int32_t* sums = nullptr;
  if (form.middle != 0) {
    sums = m + 4 * kRowSums;
    window_sums(conv, job, conv.a_scale * form.middle, sums);
  }
  const int all = (job.y1 - job.y0 + 1) / 2 * tiles_x(conv);
  const int blocks = (all + kBlock - 1) / kBlock;
  const int most = round_up((all + blocks - 1) / blocks, kStep);
  for (int first = 0; first < all; first += most) {
    const int count = all - first < most ? all - first : most;
    const int padded = round_up(count, kStep);
    Tile tiles[kBlock];
    for (int t = 0; t < padded; ++t) tiles[t] = tile_at(conv, job, first + (t < count ? t : count - 1));
    transform_block(conv, tiles, padded / kStep, v);
    block(conv, job, tiles, count, v, m, sums);
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
