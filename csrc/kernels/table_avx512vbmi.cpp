// Products looked up: at 1 to 3 bits, 6 bits hold 2, 3 or 6 weights, and as many inputs choose one of 64
// constant tables that has the sum of their products for each of 64 weights; vpermb looks up 64 output
// channels at once.
//
// An index is made of channels g, n + g, 2 n + g, .. where n is the number of indices a pixel has:
//
//   index = | .. | code[2 n + g] | code[n + g] | code[g] |          6 bits in all
//
// Table entries are unsigned, as small as can be, so that many fit the byte that they are added in:
//
//   entry = sum over channels of (weight * (2 * byte - centre) - lowest) / 2
//
// where `lowest` is the lowest that weight * (2 * byte - centre) gets. What that adds to the sum of weight *
// byte depends on the output channel alone:
//
//   sum of weight * byte = sum of entries + (count * lowest + centre * sum of weights) / 2
//
// Weights:
//
//   { 64 tables [64] | what entries lack int32 [o, in 64s] | [panel of 64][window position][n][64 lanes] }
//
// Lane 2 i is output i of a panel, lane 2 i + 1 output 32 + i: bytes widen into halves in order.

#include <immintrin.h>

// gcc 12 says so of its own intrinsics (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "kernels/kernel.h"

namespace mixbits {
namespace {

constexpr int kPanel = 64;
constexpr int kTables = 64;
constexpr int kTableBytes = kTables * kPanel;
constexpr int kIndexBits = 6;
constexpr int kMostCodes = 6;
constexpr int kCodes[] = {kMostCodes, 3, 2};  // that an index may have
constexpr int kAhead = 2048;                  // bytes of weights between what is read and what is fetched

// How a convolution is done.
struct Plan {
  int codes = 0;                                             // weights, and inputs, of an index
  int bits = 0;                                              // of each
  int centre = 0;                                            // see above
  int lowest = 0;                                            //
  int largest = 0;                                           // entry
  int groups = 0;                                            // indices of a pixel
  constexpr int run() const { return 255 / largest; }        // entries that fit a byte's sum
  constexpr int longest() const { return 65535 / largest; }  // entries that fit 16 bits
};

constexpr int weight_codes(const Conv& conv) {
  return conv.w_step > 0 ? (conv.w_max - conv.w_min) / conv.w_step + 1 : 1 << conv.w_bits;
}

constexpr int least(int a, int b) { return a < b ? a : b; }
constexpr int most(int a, int b) { return a < b ? b : a; }

// Entries are integers if the centre is even, or if weights are 2 apart.
constexpr Plan plan_of(const Conv& conv) {
  Plan plan;
  for (const int codes : kCodes) {
    const int values = 1 << kIndexBits / codes;
    if (plan.codes == 0 && weight_codes(conv) <= values && conv.a_max < values) plan.codes = codes;
  }
  if (plan.codes == 0) return plan;
  plan.bits = kIndexBits / plan.codes;
  plan.groups = (conv.c + plan.codes - 1) / plan.codes;
  for (int centre = 0; centre <= 2 * conv.a_max; centre += conv.w_step == 2 ? 1 : 2) {
    const int low = -centre, high = 2 * conv.a_max - centre;  // products are extreme at the extremes
    const int lowest =
        least(least(conv.w_min * low, conv.w_min * high), least(conv.w_max * low, conv.w_max * high));
    const int highest =
        most(most(conv.w_min * low, conv.w_min * high), most(conv.w_max * low, conv.w_max * high));
    const int largest = most(1, plan.codes * (highest - lowest) / 2);
    if (centre == 0 || largest < plan.largest) {
      plan.centre = centre;
      plan.lowest = lowest;
      plan.largest = largest;
    }
  }
  return plan;
}

const char* refuses(const Conv& conv) {
  if (conv.groups != 1) return "it is grouped";
  const Plan plan = plan_of(conv);
  if (plan.codes == 0) return "weights or inputs have more than 8 levels";
  if (plan.largest > 255) return "products span more than a byte";
  if (conv.a_scale != 1 && conv.a_scale != 2) return "input levels are further apart than 2";
  return nullptr;
}

constexpr int panels(const Conv& conv) { return (conv.o + kPanel - 1) / kPanel; }

std::size_t panel_bytes(const Conv& conv, const Plan& plan) {
  return static_cast<std::size_t>(conv.taps()) * plan.groups * kPanel;
}

std::size_t weight_bytes(const Conv& conv) {
  return kTableBytes + panels(conv) * (sizeof(std::int32_t) * kPanel + panel_bytes(conv, plan_of(conv)));
}

// Measured on Zen 4.
double cycles(const Conv& conv) {
  const Plan plan = plan_of(conv);
  const double pixels = 1.0 * conv.out_h * conv.out_w;
  const double entries = pixels * panels(conv) * conv.taps() * plan.groups;
  return entries * (1.28 + 1.5 / plan.run()) + pixels * panels(conv) * 16;
}

int rows(const Conv& conv) {
  constexpr int kPixels = 128;
  const int fit = conv.out_w < kPixels ? (kPixels + conv.out_w - 1) / conv.out_w : 1;
  const int jobs = (conv.out_h + fit - 1) / fit;
  return (conv.out_h + jobs - 1) / jobs;
}

// The levels that weights have, in the order of their codes; returns how many.
int levels_of(const Conv& conv, const std::int16_t* levels, std::int16_t (&known)[8]) {
  int count = 0;
  if (conv.w_step > 0) {
    for (; count < weight_codes(conv); ++count) {
      known[count] = static_cast<std::int16_t>(conv.w_min + conv.w_step * count);
    }
    return count;
  }
  for (std::ptrdiff_t i = 0; i < static_cast<std::ptrdiff_t>(conv.o) * conv.c * conv.taps(); ++i) {
    int code = 0;
    while (code < count && known[code] != levels[i]) ++code;
    if (code == count) known[count++] = levels[i];
  }
  return count;
}

void fill_tables(const Conv& conv, const Plan& plan, const std::int16_t* known, int count,
                 std::uint8_t* tables) {
  const int mask = (1 << plan.bits) - 1;
  for (int inputs = 0; inputs < kTables; ++inputs) {
    for (int weights = 0; weights < kPanel; ++weights) {
      int entry = 0;
      for (int i = 0; i < plan.codes; ++i) {
        const int input = inputs >> (plan.bits * i) & mask, weight = weights >> (plan.bits * i) & mask;
        if (input > conv.a_max || weight >= count) continue;  // never met
        entry += (known[weight] * (2 * input - plan.centre) - plan.lowest) / 2;
      }
      tables[inputs * kPanel + weights] = static_cast<std::uint8_t>(entry);
    }
  }
}

void pack(const Conv& conv, const std::int16_t* levels, std::uint8_t* packed) {
  const Plan plan = plan_of(conv);
  std::int16_t known[8] = {};
  const int count = levels_of(conv, levels, known);
  fill_tables(conv, plan, known, count, packed);
  auto* lacking = reinterpret_cast<std::int32_t*>(packed + kTableBytes);
  std::uint8_t* weights = packed + kTableBytes + sizeof(std::int32_t) * kPanel * panels(conv);
  // Indices that the last channels do not fill have code 0 of weights and inputs.
  const int fillers = plan.groups * plan.codes - conv.c;
  const int filler = (known[0] * -plan.centre - plan.lowest) / 2;
  for (int o = 0; o < conv.o; ++o) {
    const int output = o % kPanel;
    std::uint8_t* lane =
        weights + o / kPanel * panel_bytes(conv, plan) + (output < 32 ? 2 * output : 2 * output - 63);
    int sum = 0;
    for (int c = 0; c < conv.c; ++c) {
      for (int tap = 0; tap < conv.taps(); ++tap) {
        const std::int16_t level = *levels++;
        int code = 0;
        while (known[code] != level) ++code;
        const std::size_t index = static_cast<std::size_t>(tap) * plan.groups + c % plan.groups;
        lane[index * kPanel] |= static_cast<std::uint8_t>(code << (plan.bits * (c / plan.groups)));
        sum += level;
      }
    }
    const int products = (conv.taps() * conv.c * plan.lowest + plan.centre * sum) / 2;
    lacking[o] = conv.a_scale * (products - conv.taps() * fillers * filler) + conv.a_offset * sum;
  }
}

// Where the windows of a job find indices: int16 [rows][columns][groups], each times the bytes of a table. A
// window of one row or column needs no others, which a stride would skip.
struct Map {
  int rows, columns;       // of indices
  int take_y, take_x;      // input rows and columns from one of indices to the next
  int stride_y, stride_x;  // from one window to the next
  std::ptrdiff_t pixel_bytes, row_bytes;

  Map(const Conv& conv, const Plan& plan, int job_rows)
      : rows(conv.kh == 1 ? job_rows : (job_rows - 1) * conv.stride_y + (conv.kh - 1) * conv.dilation_y + 1),
        columns(conv.kw == 1 ? conv.out_w : conv.in_w),
        take_y(conv.kh == 1 ? conv.stride_y : 1),
        take_x(conv.kw == 1 ? conv.stride_x : 1),
        stride_y(conv.kh == 1 ? 1 : conv.stride_y),
        stride_x(conv.kw == 1 ? 1 : conv.stride_x),
        pixel_bytes(2 * static_cast<std::ptrdiff_t>(plan.groups)),
        row_bytes(columns * pixel_bytes) {}
};

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
    shifts[i] = _mm_cvtsi32_si128(kIndexBits + plan.bits * i);
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

// What a pass over the weights of one or two panels needs, for a few pixels.
struct Pass {
  const std::uint8_t* tables;
  const std::uint8_t* weights;
  std::size_t panel_bytes;
  int groups, run;
  int first, last;  // indices of the window that it takes
  int kw;
  std::ptrdiff_t row_bytes, column_bytes;  // of the map, from one window row and column to the next
  const std::int32_t* start;               // what sums start from, or null: from what they are
  int shift;                               // of sums
};

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
        _mm_prefetch(reinterpret_cast<const char*>(weights + p * pass.panel_bytes + kAhead), _MM_HINT_T0);
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

using LookUp = void (*)(Pass, const std::uint8_t* const*, std::int32_t* const*, int);
constexpr LookUp kOnePanel[8] = {look_up<1, 1>, look_up<1, 2>, look_up<1, 3>, look_up<1, 4>,
                                 look_up<1, 5>, look_up<1, 6>, look_up<1, 7>, look_up<1, 8>};
constexpr LookUp kTwoPanels[4] = {look_up<2, 1>, look_up<2, 2>, look_up<2, 3>, look_up<2, 4>};

// All pixels of a job, for one panel or two.
void all_pixels(const Conv conv, const Job job, const Map map, const std::uint8_t* indices, Pass pass, int o,
                int outputs) {
  const int at_once = outputs > kPanel ? 4 : 8;
  const LookUp* look_ups = outputs > kPanel ? kTwoPanels : kOnePanel;
  const int all = (job.y1 - job.y0) * conv.out_w;
  const int groups = (all + at_once - 1) / at_once;
  int y = 0, x = 0;
  for (int done = 0, i = 0; i < groups; ++i) {
    const std::uint8_t* pixels[8];
    std::int32_t* acc[8];
    const int now = (all - done) / (groups - i);  // as equal as can be
    for (int n = 0; n < now; ++n) {
      pixels[n] = indices + y * map.stride_y * map.row_bytes + x * map.stride_x * map.pixel_bytes;
      acc[n] = job.acc + static_cast<std::ptrdiff_t>(done + n) * job.ld + o - job.o0;
      if (++x == conv.out_w) {
        x = 0;
        ++y;
      }
    }
    look_ups[now - 1](pass, pixels, acc, outputs);
    done += now;
  }
}

void run(const Conv& conv, const Job& job) {
  const Plan plan = plan_of(conv);
  const Map map(conv, plan, job.y1 - job.y0);
  const std::uint8_t* input =
      job.input + static_cast<std::ptrdiff_t>(job.y0) * conv.stride_y * conv.row_bytes();
  index_map(conv, plan, map, input, job.scratch);
  const auto* lacking = reinterpret_cast<const std::int32_t*>(job.weights + kTableBytes);
  const std::uint8_t* weights = job.weights + kTableBytes + sizeof(std::int32_t) * kPanel * panels(conv);
  const int window = conv.taps() * plan.groups;
  for (int o = job.o0; o < job.o1; o += 2 * kPanel) {
    const int outputs = least(job.o1 - o, 2 * kPanel);
    for (int first = 0; first < window; first += plan.longest()) {
      const Pass pass = {.tables = job.weights,
                         .weights = weights + o / kPanel * panel_bytes(conv, plan),
                         .panel_bytes = panel_bytes(conv, plan),
                         .groups = plan.groups,
                         .run = plan.run(),
                         .first = first,
                         .last = least(window, first + plan.longest()),
                         .kw = conv.kw,
                         .row_bytes = conv.dilation_y * map.row_bytes,
                         .column_bytes = conv.dilation_x * map.pixel_bytes,
                         .start = first == 0 ? lacking + o : nullptr,
                         .shift = conv.a_scale - 1};
      all_pixels(conv, job, map, job.scratch, pass, o, outputs);
    }
  }
}

const Kernel kernel = {
    .name = "table_avx512vbmi",
    .isa = Isa::avx512vbmi,
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
