// Constant tables of sums of products, which kernels for few bits look up instead of multiplying.
//
// An index is made of a few codes, one of each run of `groups` channels of a pixel:
//
//   index of group g = | .. | code[2 * groups + g] | code[groups + g] | code[g] |
//
// The index of inputs chooses a table, that of weights an entry:
//
//   entry = sum over codes of (weight * (2 * byte - centre) - lowest) / 2
//
// where `lowest` is the lowest that weight * (2 * byte - centre) gets, and `centre` makes entries as small as
// can be, so that many fit the byte that they are added in. What this adds to the sum of weight * byte
// depends on the output channel alone:
//
//   sum of weight * byte = sum of entries + (count * lowest + centre * sum of weights) / 2
//
// Every kernel that includes this gets its own copy, compiled for its instruction set.
#pragma once

#include "kernels/kernel.h"

namespace mixbits {
namespace {

constexpr int kMostCodes = 6;   // of an index
constexpr int kMostLevels = 8;  // of weights

constexpr int least(int a, int b) { return a < b ? a : b; }
constexpr int most(int a, int b) { return a < b ? b : a; }

// The fewest bits that hold codes 0 .. largest.
constexpr int bits_of(int largest) {
  int bits = 1;
  while (largest >> bits != 0) ++bits;
  return bits;
}

struct Plan {
  int codes = 0;        // of an index; 0: there is no such plan
  int weight_bits = 0;  // of a code
  int input_bits = 0;
  int groups = 0;  // indices of a pixel
  int centre = 0;
  int lowest = 0;
  int largest = 1;  // entry
  constexpr int tables() const { return 1 << codes * input_bits; }
  constexpr int byte_run() const { return 255 / largest; }     // entries that a byte has room for
  constexpr int short_run() const { return 65535 / largest; }  // that 16 bits have room for
};

constexpr int weight_levels(const Conv& conv) {
  return conv.w_step > 0 ? (conv.w_max - conv.w_min) / conv.w_step + 1 : 1 << conv.w_bits;
}

// Entries are integers if `centre` is even, or if weights are 2 apart. `group_unit`: what `groups` is a
// multiple of.
constexpr Plan plan_of(const Conv& conv, int weight_index_bits, int input_index_bits, int group_unit) {
  Plan plan;
  plan.input_bits = bits_of(conv.a_max);
  plan.codes =
      least(weight_index_bits / bits_of(weight_levels(conv) - 1), input_index_bits / plan.input_bits);
  if (plan.codes < 2 || weight_levels(conv) > kMostLevels) return {};
  plan.weight_bits = weight_index_bits / plan.codes;
  plan.groups = round_up((conv.c + plan.codes - 1) / plan.codes, group_unit);
  for (int centre = 0; centre <= 2 * conv.a_max; centre += conv.w_step == 2 ? 1 : 2) {
    const int low = -centre, high = 2 * conv.a_max - centre;  // products are extreme where both factors are
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

// Why there is no plan, or null. At least `fewest` entries have to fit a byte's sum.
const char* refuses_plan(const Conv& conv, const Plan& plan, int fewest) {
  if (conv.groups != 1) return "it is grouped";
  if (plan.codes == 0) return "weights or inputs have too many levels";
  if (plan.byte_run() < fewest) return "sums of products span more than a byte";
  if (conv.a_scale != 1 && conv.a_scale != 2) return "input levels are further apart than 2";
  return nullptr;
}

// The levels that weights have; their code is their place. Returns how many.
int find_levels(const Conv& conv, const std::int16_t* levels, std::int16_t (&known)[kMostLevels]) {
  int count = 0;
  if (conv.w_step > 0) {
    for (; count < weight_levels(conv); ++count) {
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

// tables: [plan.tables()][entries]
void fill_tables(const Conv& conv, const Plan& plan, const std::int16_t* known, int count, int entries,
                 std::uint8_t* tables) {
  for (int inputs = 0; inputs < plan.tables(); ++inputs) {
    for (int weights = 0; weights < entries; ++weights) {
      int entry = 0;
      for (int i = 0; i < plan.codes; ++i) {
        const int input = inputs >> plan.input_bits * i & ((1 << plan.input_bits) - 1);
        const int weight = weights >> plan.weight_bits * i & ((1 << plan.weight_bits) - 1);
        if (input > conv.a_max || weight >= count) continue;  // never met
        entry += (known[weight] * (2 * input - plan.centre) - plan.lowest) / 2;
      }
      tables[inputs * entries + weights] = static_cast<std::uint8_t>(entry);
    }
  }
}

// What entries lack of an output's sum of levels. Indices that the last channels do not fill have code 0 of
// weights and inputs.
std::int32_t lacking(const Conv& conv, const Plan& plan, const std::int16_t* known, int sum_of_weights) {
  const int fillers = plan.groups * plan.codes - conv.c;
  const int filler = (known[0] * -plan.centre - plan.lowest) / 2;
  const int products = (conv.taps() * conv.c * plan.lowest + plan.centre * sum_of_weights) / 2;
  return conv.a_scale * (products - conv.taps() * fillers * filler) + conv.a_offset * sum_of_weights;
}

// Where the windows of a job find indices: uint16 [rows][columns][groups], each times the bytes of a table. A
// window of one row or column needs none of those that a stride skips.
struct Map {
  int rows, columns;       // of indices
  int take_y, take_x;      // input rows and columns from one of indices to the next
  int stride_y, stride_x;  // indices from one window to the next
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

// What one pass over the weights of a panel or two takes, for a few pixels.
struct Pass {
  const std::uint8_t* tables;
  const std::uint8_t* weights;
  std::size_t panel_bytes;
  int groups, run;                         // indices that lie side by side, entries that a byte has room for
  int first, last;                         // indices of the window
  int kw;                                  // such pieces of a window's row
  std::ptrdiff_t row_bytes, column_bytes;  // of the map, from one window row and column to the next
  const std::int32_t* start;               // what sums start from, or null: from what they are
  int shift;                               // of sums
};

// Adds entries for one or two panels to the sums of a few pixels, whose windows' first indices are given.
using LookUp = void (*)(Pass, const std::uint8_t* const* pixels, std::int32_t* const* acc, int outputs);

// All pixels of a job, for outputs o .. o + outputs - 1. look_ups[i] takes i + 1 pixels.
template <int kPixels>
void look_up_all(const Conv conv, const Job job, const Map map, const Pass& pass,
                 const LookUp (&look_ups)[kPixels], int o, int outputs) {
  const int all = (job.y1 - job.y0) * conv.out_w;
  const int calls = (all + kPixels - 1) / kPixels;
  int y = 0, x = 0;
  for (int done = 0, i = 0; i < calls; ++i) {
    const std::uint8_t* pixels[kPixels];
    std::int32_t* acc[kPixels];
    const int now = (all - done) / (calls - i);  // as equal as can be
    for (int n = 0; n < now; ++n) {
      pixels[n] = job.scratch + y * map.stride_y * map.row_bytes + x * map.stride_x * map.pixel_bytes;
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

// Jobs of at least this many pixels use up what it takes to make the indices.
constexpr int kJobPixels = 128;

int job_rows(const Conv& conv) {
  const int fit = (kJobPixels + conv.out_w - 1) / conv.out_w;
  const int jobs = (conv.out_h + fit - 1) / fit;
  return (conv.out_h + jobs - 1) / jobs;
}

}  // namespace
}  // namespace mixbits
