// Products looked up by vpshufb: an index of 4 bits holds 4 weights of 1 bit or 2 of 2 bits, as many inputs
// choose one of at most 256 tables, and a look-up gives the sums of their products for 32 output channels.
//
//   { tables [tables][16] | what entries lack int32 [panels of 32] | weights [panel][pairs of indices][32] }
//
//   byte = | index of the pair's second group : 4 | first : 4 |
//
// Lane 2 i is output i of a panel, lane 2 i + 1 output 16 + i: bytes widen into halves in order.

#include <immintrin.h>

#include "kernels/product_tables.h"

namespace mixbits {
namespace {

constexpr int kPanel = 32;  // outputs of a register
constexpr int kEntries = 16;
constexpr int kTableShift = 4;  // from an index to the place of its table

// Entries are added two at a time.
constexpr Plan plan_of(const Conv& conv) { return plan_of(conv, 4, 8, 2); }

const char* refuses(const Conv& conv) { return refuses_plan(conv, plan_of(conv), 2); }

constexpr int panels(const Conv& conv) { return (conv.o + kPanel - 1) / kPanel; }

std::size_t panel_bytes(const Conv& conv, const Plan& plan) {
  return static_cast<std::size_t>(conv.taps()) * plan.groups / 2 * kPanel;
}

// Of what comes before the weights.
std::size_t head_bytes(const Conv& conv, const Plan& plan) {
  return static_cast<std::size_t>(plan.tables()) * kEntries + sizeof(std::int32_t) * kPanel * panels(conv);
}

std::size_t weight_bytes(const Conv& conv) {
  const Plan plan = plan_of(conv);
  return head_bytes(conv, plan) + panels(conv) * panel_bytes(conv, plan);
}

// Measured on Zen 4.
double cycles(const Conv& conv) {
  const Plan plan = plan_of(conv);
  const double pixels = 1.0 * conv.out_h * conv.out_w;
  const double entries = pixels * conv.taps() * plan.groups;
  const double indices = (conv.kh > 1 ? 1.5 : 1) * pixels * (6 + plan.groups / 2.0);
  const int single = panels(conv) % 2;  // a table that serves one panel alone is bound by its load
  return panels(conv) * (entries * (0.82 + 2.5 / plan.byte_run()) + pixels * 16) + single * 0.3 * entries +
         indices;
}

void pack(const Conv& conv, const std::int16_t* levels, std::uint8_t* packed) {
  const Plan plan = plan_of(conv);
  std::int16_t known[kMostLevels] = {};
  const int count = find_levels(conv, levels, known);
  fill_tables(conv, plan, known, count, kEntries, packed);
  auto* constants = reinterpret_cast<std::int32_t*>(packed + plan.tables() * kEntries);
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
        panel[index / 2 * kPanel + lane] |=
            static_cast<std::uint8_t>(code << plan.weight_bits * (c / plan.groups) << 4 * (index % 2));
        sum += level;
      }
    }
    constants[o] = lacking(conv, plan, known, sum);
  }
}

std::size_t scratch_bytes(const Conv& conv, int rows) {
  const Map map(conv, plan_of(conv), rows);
  return map.rows * map.row_bytes + 32;  // the last is written in a whole register
}

// A mask of the first `count` bytes.
__m128i first_bytes(int count) {
  const __m128i places = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm_cmplt_epi8(places, _mm_set1_epi8(static_cast<char>(count < 0 ? 0 : count > 16 ? 16 : count)));
}

// 16 indices, from `group` on, of all pixels of the map.
void index_groups(const Conv conv, const Plan plan, const Map map, const std::uint8_t* input, int group,
                  std::uint8_t* indices) {
  __m128i channels[kMostCodes], shifts[kMostCodes];
  for (int i = 0; i < plan.codes; ++i) {
    channels[i] = first_bytes(conv.c - (plan.groups * i + group));
    shifts[i] = _mm_cvtsi32_si128(kTableShift + plan.input_bits * i);
  }
  for (int y = 0; y < map.rows; ++y) {
    const std::uint8_t* pixel =
        input + static_cast<std::ptrdiff_t>(y) * map.take_y * conv.row_bytes() + group;
    std::uint8_t* to = indices + y * map.row_bytes + 2 * static_cast<std::ptrdiff_t>(group);
    for (int x = 0; x < map.columns; ++x, pixel += map.take_x * conv.pixel_stride, to += map.pixel_bytes) {
      __m256i index = _mm256_setzero_si256();
      for (int i = 0; i < plan.codes; ++i) {
        const auto* from =
            reinterpret_cast<const __m128i*>(pixel + static_cast<std::ptrdiff_t>(plan.groups) * i);
        const __m128i codes = _mm_and_si128(_mm_loadu_si128(from), channels[i]);
        index = _mm256_or_si256(index, _mm256_sll_epi16(_mm256_cvtepu8_epi16(codes), shifts[i]));
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), index);
    }
  }
}

// The last indices of a pixel spill into the next pixel's first, so those are written after.
void index_map(const Conv& conv, const Plan& plan, const Map& map, const std::uint8_t* input,
               std::uint8_t* indices) {
  for (int group = (plan.groups - 1) / 16 * 16; group >= 0; group -= 16) {
    index_groups(conv, plan, map, input, group, indices);
  }
}

// The table that index `i` of a pixel chooses, in both halves.
__m256i table_of(const std::uint8_t* tables, const std::uint8_t* indices, std::ptrdiff_t i) {
  std::uint16_t chosen;
  __builtin_memcpy(&chosen, indices + 2 * i, sizeof chosen);
  return _mm256_broadcastsi128_si256(*reinterpret_cast<const __m128i*>(tables + chosen));
}

// acc[8] = start + (shorts << shift)
void store(__m128i shorts, __m128i shift, const std::int32_t* start, std::int32_t* acc) {
  const __m256i sums = _mm256_sll_epi32(_mm256_cvtepu16_epi32(shorts), shift);
  const __m256i from = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(start));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc), _mm256_add_epi32(from, sums));
}

// acc[32 * kPanels] of each pixel += entries. `pixels`: first indices of their windows.
template <int kPanels, int kPixels>
void look_up(const Pass pass, const std::uint8_t* const* pixels, std::int32_t* const* acc, int outputs) {
  const __m256i nibble = _mm256_set1_epi8(15);
  __m256i bytes[kPixels][kPanels], low[kPixels][kPanels], high[kPixels][kPanels];
#pragma GCC unroll 8
  for (int n = 0; n < kPixels; ++n) {
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) bytes[n][p] = low[n][p] = high[n][p] = _mm256_setzero_si256();
  }
  const std::uint8_t* at[kPixels];
#pragma GCC unroll 8
  for (int n = 0; n < kPixels; ++n) at[n] = pixels[n];
  const std::uint8_t* weights = pass.weights + static_cast<std::ptrdiff_t>(pass.first) / 2 * kPanel;
  int tap = pass.first / pass.groups, group = pass.first % pass.groups, left = pass.run;
  for (int index = pass.first; index < pass.last;) {
    const int now = least(least(pass.groups - group, left), pass.last - index);
    std::ptrdiff_t offset = tap / pass.kw * pass.row_bytes + tap % pass.kw * pass.column_bytes +
                            2 * static_cast<std::ptrdiff_t>(group);
    for (const std::uint8_t* end = weights + static_cast<std::ptrdiff_t>(now) / 2 * kPanel; weights != end;
         weights += kPanel, offset += 4) {
      __m256i first[kPanels], second[kPanels];
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) {
        const auto* from = reinterpret_cast<const __m256i*>(weights + p * pass.panel_bytes);
        const __m256i both = _mm256_load_si256(from);
        first[p] = _mm256_and_si256(both, nibble);
        second[p] = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
      }
#pragma GCC unroll 8
      for (int n = 0; n < kPixels; ++n) {
        const __m256i table0 = table_of(pass.tables, at[n] + offset, 0);
        const __m256i table1 = table_of(pass.tables, at[n] + offset, 1);
#pragma GCC unroll 2
        for (int p = 0; p < kPanels; ++p) {
          const __m256i entries =
              _mm256_add_epi8(_mm256_shuffle_epi8(table0, first[p]), _mm256_shuffle_epi8(table1, second[p]));
          bytes[n][p] = _mm256_add_epi8(bytes[n][p], entries);
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
          low[n][p] = _mm256_add_epi16(low[n][p], bytes[n][p]);
          high[n][p] = _mm256_add_epi16(high[n][p], _mm256_srli_epi16(bytes[n][p], 8));
          bytes[n][p] = _mm256_setzero_si256();
        }
      }
    }
  }
  const __m128i shift = _mm_cvtsi32_si128(pass.shift);
#pragma GCC unroll 8
  for (int n = 0; n < kPixels; ++n) {
    const std::int32_t* start = pass.start != nullptr ? pass.start : acc[n];
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) {
      const __m256i odd = high[n][p], even = _mm256_sub_epi16(low[n][p], _mm256_slli_epi16(odd, 8));
      store(_mm256_castsi256_si128(even), shift, start + p * kPanel, acc[n] + p * kPanel);
      store(_mm256_extracti128_si256(even, 1), shift, start + p * kPanel + 8, acc[n] + p * kPanel + 8);
      if (p * kPanel + 16 >= outputs) break;
      store(_mm256_castsi256_si128(odd), shift, start + p * kPanel + 16, acc[n] + p * kPanel + 16);
      store(_mm256_extracti128_si256(odd, 1), shift, start + p * kPanel + 24, acc[n] + p * kPanel + 24);
    }
  }
}

constexpr LookUp kOnePanel[] = {look_up<1, 1>, look_up<1, 2>, look_up<1, 3>, look_up<1, 4>,
                                look_up<1, 5>, look_up<1, 6>, look_up<1, 7>};
constexpr LookUp kTwoPanels[] = {look_up<2, 1>, look_up<2, 2>, look_up<2, 3>, look_up<2, 4>};

void run(const Conv& conv, const Job& job) {
  const Plan plan = plan_of(conv);
  const Map map(conv, plan, job.y1 - job.y0);
  index_map(conv, plan, map,
            job.input + static_cast<std::ptrdiff_t>(job.y0) * conv.stride_y * conv.row_bytes(), job.scratch);
  const auto* constants = reinterpret_cast<const std::int32_t*>(job.weights + plan.tables() * kEntries);
  const std::uint8_t* weights = job.weights + head_bytes(conv, plan);
  const int side = conv.dilation_x == 1 ? conv.kw : 1;  // columns whose indices lie side by side
  const int window = conv.taps() * plan.groups, longest = plan.short_run() / 2 * 2;
  for (int o = job.o0; o < job.o1; o += 2 * kPanel) {
    const int outputs = least(job.o1 - o, 2 * kPanel);
    for (int first = 0; first < window; first += longest) {
      const Pass pass = {.tables = job.weights,
                         .weights = weights + o / kPanel * panel_bytes(conv, plan),
                         .panel_bytes = panel_bytes(conv, plan),
                         .groups = plan.groups * side,
                         .run = plan.byte_run() / 2 * 2,
                         .first = first,
                         .last = least(window, first + longest),
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
    .name = "table_avx2",
    .isa = Isa::avx2,
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
