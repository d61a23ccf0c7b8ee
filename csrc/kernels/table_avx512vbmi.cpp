// Products looked up by vpermb: an index of 6 bits holds 6 to 2 weights of 1 to 3 bits, as many inputs choose
// one of at most 256 tables, and a look-up gives the sums of their products for 64 output channels.
//
//   { tables [tables][64] | what entries lack int32 [panels of 64] | weights [panel][indices][64] }
//
// Lane 2 i is output i of a panel, lane 2 i + 1 output 32 + i: bytes widen into halves in order.

#include <immintrin.h>

// gcc 12 says so of its own intrinsics (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "kernels/product_tables.h"

namespace mixbits {
namespace {

constexpr int kPanel = 64;      // outputs of a register
constexpr int kTableShift = 6;  // from an index to the place of its table
constexpr int kAhead = 2048;    // bytes of weights between what is read and what is fetched

constexpr Plan plan_of(const Conv& conv) { return plan_of(conv, 6, 8, 1); }

const char* refuses(const Conv& conv) { return refuses_plan(conv, plan_of(conv), 1); }

constexpr int panels(const Conv& conv) { return (conv.o + kPanel - 1) / kPanel; }

std::size_t panel_bytes(const Conv& conv, const Plan& plan) {
  return static_cast<std::size_t>(conv.taps()) * plan.groups * kPanel;
}

// Of what comes before the weights.
std::size_t head_bytes(const Conv& conv, const Plan& plan) {
  return static_cast<std::size_t>(kPanel) * (plan.tables() + sizeof(std::int32_t) * panels(conv));
}

std::size_t weight_bytes(const Conv& conv) {
  const Plan plan = plan_of(conv);
  return head_bytes(conv, plan) + panels(conv) * panel_bytes(conv, plan);
}

// Measured on Zen 4. A table that serves one panel alone is bound by its load.
double cycles(const Conv& conv) {
  const Plan plan = plan_of(conv);
  const double pixels = 1.0 * conv.out_h * conv.out_w;
  const double entries = pixels * conv.taps() * plan.groups;
  const int pairs = panels(conv) / 2, single = panels(conv) % 2;
  const double indices = (conv.kh > 1 ? 1.5 : 1) * pixels * (6 + plan.groups / 4.0);
  return entries * (pairs * (2.46 + 3.0 / plan.byte_run()) + single * (1.52 + 1.5 / plan.byte_run())) +
         pixels * panels(conv) * 16 + indices;
}

void pack(const Conv& conv, const std::int16_t* levels, std::uint8_t* packed) {
  const Plan plan = plan_of(conv);
  std::int16_t known[kMostLevels] = {};
  const int count = find_levels(conv, levels, known);
  fill_tables(conv, plan, known, count, kPanel, packed);
  auto* constants = reinterpret_cast<std::int32_t*>(packed + plan.tables() * kPanel);
  std::uint8_t* weights = packed + head_bytes(conv, plan);
  for (int o = 0; o < conv.o; ++o) {
    const int output = o % kPanel;
    const int lane = output < kPanel / 2 ? 2 * output : 2 * (output - kPanel / 2) + 1;
    std::uint8_t* panel = weights + o / kPanel * panel_bytes(conv, plan);
    int sum = 0;
    for (int c = 0; c < conv.c; ++c) {
      for (int tap = 0; tap < conv.taps(); ++tap) {
        const std::int16_t level = *levels++;
        int code = 0;
        while (known[code] != level) ++code;
        const std::size_t index = static_cast<std::size_t>(tap) * plan.groups + c % plan.groups;
        panel[index * kPanel + lane] |=
            static_cast<std::uint8_t>(code << plan.weight_bits * (c / plan.groups));
        sum += level;
      }
    }
    constants[o] = lacking(conv, plan, known, sum);
  }
}

std::size_t scratch_bytes(const Conv& conv, int rows) {
  const Map map(conv, plan_of(conv), rows);
  return map.rows * map.row_bytes + kPanel;  // the last is written in a whole register
}

// 32 indices, from `group` on, of all pixels of the map.
void index_groups(const Conv conv, const Plan plan, const Map map, const std::uint8_t* input, int group,
                  std::uint8_t* indices) {
  __mmask32 channels[kMostCodes];
  __m128i shifts[kMostCodes];
  for (int i = 0; i < plan.codes; ++i) {
    const int left = conv.c - (plan.groups * i + group);
    channels[i] = left >= 32 ? ~__mmask32{0} : left > 0 ? (__mmask32{1} << left) - 1 : 0;
    shifts[i] = _mm_cvtsi32_si128(kTableShift + plan.input_bits * i);
  }
  for (int y = 0; y < map.rows; ++y) {
    const std::uint8_t* pixel =
        input + static_cast<std::ptrdiff_t>(y) * map.take_y * conv.row_bytes() + group;
    std::uint8_t* to = indices + y * map.row_bytes + 2 * static_cast<std::ptrdiff_t>(group);
    for (int x = 0; x < map.columns; ++x, pixel += map.take_x * conv.pixel_stride, to += map.pixel_bytes) {
      __m512i index = _mm512_setzero_si512();
      for (int i = 0; i < plan.codes; ++i) {
        const __m256i codes =
            _mm256_maskz_loadu_epi8(channels[i], pixel + static_cast<std::ptrdiff_t>(plan.groups) * i);
        index = _mm512_or_si512(index, _mm512_sll_epi16(_mm512_cvtepu8_epi16(codes), shifts[i]));
      }
      _mm512_storeu_si512(to, index);
    }
  }
}

// The last indices of a pixel spill into the next pixel's first, so those are written after.
void index_map(const Conv& conv, const Plan& plan, const Map& map, const std::uint8_t* input,
               std::uint8_t* indices) {
  for (int group = (plan.groups - 1) / 32 * 32; group >= 0; group -= 32) {
    index_groups(conv, plan, map, input, group, indices);
  }
}

// acc[64 * kPanels] of each pixel += entries. `pixels`: first indices of their windows.
template <int kPanels, int kPixels>
void look_up(const Pass pass, const std::uint8_t* const* pixels, std::int32_t* const* acc, int outputs) {
  __m512i bytes[kPixels][kPanels], low[kPixels][kPanels], high[kPixels][kPanels];
#pragma GCC unroll 8
  for (int n = 0; n < kPixels; ++n) {
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) bytes[n][p] = low[n][p] = high[n][p] = _mm512_setzero_si512();
  }
  const std::uint8_t* at[kPixels];
#pragma GCC unroll 8
  for (int n = 0; n < kPixels; ++n) at[n] = pixels[n];
  const std::uint8_t* weights = pass.weights + static_cast<std::ptrdiff_t>(pass.first) * kPanel;
  int tap = pass.first / pass.groups, group = pass.first % pass.groups, left = pass.run;
  for (int index = pass.first; index < pass.last;) {
    int now = pass.groups - group;
    now = now < left ? now : left;
    now = now < pass.last - index ? now : pass.last - index;
    std::ptrdiff_t offset = tap / pass.kw * pass.row_bytes + tap % pass.kw * pass.column_bytes +
                            2 * static_cast<std::ptrdiff_t>(group);
    for (const std::uint8_t* end = weights + static_cast<std::ptrdiff_t>(now) * kPanel; weights != end;
         weights += kPanel, offset += 2) {
      __m512i codes[kPanels];
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) {
        codes[p] = _mm512_load_si512(weights + p * pass.panel_bytes);
        if constexpr (kPanels == 2) {  // one panel is bound by its loads, of which this would be another
          _mm_prefetch(reinterpret_cast<const char*>(weights + p * pass.panel_bytes + kAhead), _MM_HINT_T0);
        }
      }
#pragma GCC unroll 8
      for (int n = 0; n < kPixels; ++n) {
        std::uint16_t chosen;
        __builtin_memcpy(&chosen, at[n] + offset, sizeof chosen);
        const __m512i table = _mm512_load_si512(pass.tables + chosen);
#pragma GCC unroll 2
        for (int p = 0; p < kPanels; ++p) {
          bytes[n][p] = _mm512_add_epi8(bytes[n][p], _mm512_permutexvar_epi8(codes[p], table));
        }
      }
    }
    index += now;
    left -= now;
    group += now;
    if (group == pass.groups) {
      group = 0;
      ++tap;
    }
    if (left == 0 || index == pass.last) {  // `low` gets even bytes plus 256 times odd ones, `high` odd ones
      left = pass.run;
#pragma GCC unroll 8
      for (int n = 0; n < kPixels; ++n) {
#pragma GCC unroll 2
        for (int p = 0; p < kPanels; ++p) {
          low[n][p] = _mm512_add_epi16(low[n][p], bytes[n][p]);
          high[n][p] = _mm512_add_epi16(high[n][p], _mm512_srli_epi16(bytes[n][p], 8));
          bytes[n][p] = _mm512_setzero_si512();
        }
      }
    }
  }
  const __m128i shift = _mm_cvtsi32_si128(pass.shift);
#pragma GCC unroll 8
  for (int n = 0; n < kPixels; ++n) {
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) {
      const __m512i odd = high[n][p], even = _mm512_sub_epi16(low[n][p], _mm512_slli_epi16(odd, 8));
      const __m256i quarters[4] = {_mm512_castsi512_si256(even), _mm512_extracti64x4_epi64(even, 1),
                                   _mm512_castsi512_si256(odd), _mm512_extracti64x4_epi64(odd, 1)};
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        const int output = p * kPanel + 16 * q;
        if (output >= outputs) break;
        const std::int32_t* start = pass.start != nullptr ? pass.start : acc[n];
        const __m512i sums = _mm512_sll_epi32(_mm512_cvtepu16_epi32(quarters[q]), shift);
        _mm512_storeu_si512(acc[n] + output, _mm512_add_epi32(_mm512_loadu_si512(start + output), sums));
      }
    }
  }
}

constexpr LookUp kOnePanel[] = {look_up<1, 1>, look_up<1, 2>, look_up<1, 3>, look_up<1, 4>,
                                look_up<1, 5>, look_up<1, 6>, look_up<1, 7>, look_up<1, 8>};
constexpr LookUp kTwoPanels[] = {look_up<2, 1>, look_up<2, 2>, look_up<2, 3>, look_up<2, 4>};

void run(const Conv& conv, const Job& job) {
  const Plan plan = plan_of(conv);
  const Map map(conv, plan, job.y1 - job.y0);
  const std::uint8_t* input =
      job.input + static_cast<std::ptrdiff_t>(job.y0) * conv.stride_y * conv.row_bytes();
  index_map(conv, plan, map, input, job.scratch);
  const auto* constants = reinterpret_cast<const std::int32_t*>(job.weights + plan.tables() * kPanel);
  const std::uint8_t* weights = job.weights + head_bytes(conv, plan);
  const int side = conv.dilation_x == 1 ? conv.kw : 1;  // columns whose indices lie side by side
  const int window = conv.taps() * plan.groups;
  for (int o = job.o0; o < job.o1; o += 2 * kPanel) {
    const int outputs = least(job.o1 - o, 2 * kPanel);
    for (int first = 0; first < window; first += plan.short_run()) {
      const Pass pass = {.tables = job.weights,
                         .weights = weights + o / kPanel * panel_bytes(conv, plan),
                         .panel_bytes = panel_bytes(conv, plan),
                         .groups = plan.groups * side,
                         .run = plan.byte_run(),
                         .first = first,
                         .last = least(window, first + plan.short_run()),
                         .kw = conv.kw / side,
                         .row_bytes = conv.dilation_y * map.row_bytes,
                         .column_bytes = conv.dilation_x * map.pixel_bytes,
                         .start = first == 0 ? constants + o : nullptr,
                         .shift = conv.a_scale - 1};
      if (outputs > kPanel) {
        look_up_all(conv, job, map, pass, kTwoPanels, o, outputs);
      } else {
        look_up_all(conv, job, map, pass, kOnePanel, o, outputs);
      }
    }
  }
}

const Kernel kernel = {
    .name = "table_avx512vbmi",
    .isa = Isa::avx512vbmi,
    .refuses = refuses,
    .cycles = cycles,
    .rows = job_rows,
    .rows_step = 1,
    .weight_bytes = weight_bytes,
    .pack = pack,
    .scratch_bytes = scratch_bytes,
    .run = run,
};
const Registered registered(kernel);

}  // namespace
}  // namespace mixbits
