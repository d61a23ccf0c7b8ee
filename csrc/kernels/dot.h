// What kernels of dot products share, whatever their instructions: how weights are packed, and which tiles
// there are. Everything is in an anonymous namespace, so that every kernel has it in its own instructions.
//
// A lane is an output channel, and a panel as many of them as a vector has words. A step is a word of the
// input (values of four channels that lie side by side, or two where values are int16) times a word of
// weights of every lane. Values of a window that follow each other in the map are a segment: a whole row of
// the window where its pixels touch, else a pixel. So nothing is copied before it is multiplied, but pixels
// of 1 to 3 channels, which are first put side by side without their padding where that takes fewer steps,
// and int16.
//
// Weights of bytes are stored in 1, 2, 4 or 8 bits. Those of up to 4 bits are indices of a table of 16
// levels, so that any grid will do; those of 8 bits are the levels themselves. Levels that do not fit a
// signed byte are kept as (level - shift) / factor, and the sum of the window's bytes makes up for it.
//
//   packed  = | tables: 64 | start: int32 [groups][o'] | vectors |     o': o rounded up to whole panels
//   start   = a_offset * the sum of the channel's levels, and what Form::input_offset leaves out
//   vectors [groups][o' / lanes / block][segment][ceil(steps * bits / 8)][panels of the block]
//   vector  = lanes x 4 bytes; bits [bits * i, bits * (i + 1)) of each byte are the weight of step i
//             (lanes x 2 int16 where values are int16)
//
// The last block of a group may have fewer panels. Sums wrap modulo 2^32: they are right if the result fits.
#pragma once

#include "kernels/kernel.h"

namespace mixbits {
namespace {

constexpr int kStep = 4;     // bytes of the input
constexpr int kTables = 64;  // bytes
constexpr int kMostPanels = 4;

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// What sets the kernels apart.
struct Form {
  int lanes;
  int value_bytes;          // of an input channel as it is multiplied
  int widest[kMostPanels];  // pixels of the widest tile of 1, 2, .. panels; 3 as many as 4
  int input_offset = 0;     // bytes of the input are multiplied less this
};

// level = factor * stored + shift.
struct Storage {
  int factor, shift;
  int min, max;  // of what is stored

  bool fits() const { return min >= -128 && max <= 127; }
};

inline Storage storage_of(const Conv& conv, const Form& form) {
  const bool odd = conv.w_step == 2 && conv.w_min % 2 != 0;
  Storage s{1, 0, conv.w_min, conv.w_max};
  if (s.fits() || form.value_bytes == 2) return s;
  if (conv.w_min >= 0) s.shift = 128;
  if (odd) s = {2, 1, 0, 0};
  s.min = (conv.w_min - s.shift) / s.factor;
  s.max = (conv.w_max - s.shift) / s.factor;
  return s;
}

// Whether pixels of 1 to 3 channels are put side by side: then a step holds values of two or more.
inline bool narrow(const Conv& conv, const Form& form) {
  const bool fewer = ceil_div(conv.kw * conv.c * form.value_bytes, kStep) < conv.kw * form.value_bytes;
  // The last step may reach past the window, where weights must be 0, as zeroed memory is without a shift.
  return conv.groups == 1 && conv.pixel_stride == kStep && conv.dilation_x == 1 && fewer &&
         storage_of(conv, form).shift == 0;
}

// Whether steps reach bytes that are not of the window, so that weights of 0 must be there. (Bytes of a pixel
// behind its channels are 0 themselves.)
inline bool needs_zero(const Conv& conv, const Form& form) {
  return narrow(conv, form) ? conv.kw * conv.c % kStep != 0 : conv.groups > 1 && conv.c % kStep != 0;
}

inline int stored_bits(const Conv& conv, const Form& form) {
  if (form.value_bytes == 2) return 16;
  const int levels = conv.w_step == 0 ? 1 << conv.w_bits : (conv.w_max - conv.w_min) / conv.w_step + 1;
  const int entries = levels + needs_zero(conv, form);
  return entries <= 2 ? 1 : entries <= 4 ? 2 : entries <= 16 ? 4 : 8;
}

struct Layout {
  int bits;
  int steps_of_vector;
  int pixel;                                // bytes of a pixel as it is multiplied
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

inline Layout layout_of(const Conv& conv, const Form& form) {
  Layout l{};
  const bool beside = narrow(conv, form);
  const int channels = beside ? conv.c : round_up(conv.c, kStep);  // of a pixel that touches the next
  const int values = beside ? conv.c : conv.pixel_stride;          // of a pixel
  const bool touching = conv.groups == 1 && conv.dilation_x == 1 && values == channels;
  l.bits = stored_bits(conv, form);
  l.steps_of_vector = l.bits < 8 ? 8 / l.bits : 1;
  l.pixel = values * form.value_bytes;
  l.row = static_cast<std::ptrdiff_t>(l.pixel) * conv.in_w;
  if (beside) l.row = round_up(static_cast<int>(l.row), 16) + 64;  // which copying may write
  l.segments_y = conv.kh;
  l.segments_x = touching ? 1 : conv.kw;
  l.stride_y = conv.dilation_y * l.row;
  l.stride_x = static_cast<std::ptrdiff_t>(conv.dilation_x) * l.pixel;
  l.steps = ceil_div((touching ? conv.kw * channels : conv.c) * form.value_bytes, kStep);
  l.vectors = ceil_div(l.steps, l.steps_of_vector);
  l.panels = ceil_div(conv.o, form.lanes);
  l.block = conv.out_w <= form.widest[kMostPanels - 1] ? kMostPanels : 2;
  l.between_y = conv.stride_y * l.row;
  l.between_x = static_cast<std::ptrdiff_t>(conv.stride_x) * l.pixel;
  l.start = kTables;
  l.weights = l.start + round_up(conv.groups * l.panels * form.lanes * 4, static_cast<int>(kAlign));
  l.panel_bytes = static_cast<std::size_t>(l.segments()) * l.vectors * form.lanes * 4;
  return l;
}

inline std::size_t weight_bytes_of(const Conv& conv, const Form& form) {
  const Layout l = layout_of(conv, form);
  return l.weights + conv.groups * l.panels * l.panel_bytes;
}

// Levels by index, in the order of their appearance.
struct Table {
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

inline void pack_levels(const Conv& conv, const Form& form, const std::int16_t* levels,
                        std::uint8_t* packed) {
  const Layout l = layout_of(conv, form);
  const Storage storage = storage_of(conv, form);
  const int values_of_step = kStep / form.value_bytes;
  Table table;
  if (l.bits < 8 && needs_zero(conv, form)) table.index_of(0);  // as index 0, which zeroed memory holds
  auto* start = reinterpret_cast<std::int32_t*>(packed + l.start);
  for (int o = 0; o < conv.groups * conv.o; ++o) {
    const int panel = o % conv.o / form.lanes, lane = o % conv.o % form.lanes;
    const int first = panel / l.block * l.block;  // of its block
    const int block = l.panels - first < l.block ? l.panels - first : l.block;
    std::uint8_t* of_block =
        packed + l.weights + (static_cast<std::size_t>(o / conv.o) * l.panels + first) * l.panel_bytes;
    std::int32_t sum = 0, stored_sum = 0;
    for (int c = 0; c < conv.c; ++c) {
      for (int ky = 0; ky < conv.kh; ++ky) {
        for (int kx = 0; kx < conv.kw; ++kx) {
          const int level = *levels++;
          sum += level;
          const int value = c + (l.segments_x == 1 ? kx * (l.pixel / form.value_bytes) : 0);
          const int segment = l.segments_x == 1 ? ky : ky * conv.kw + kx;
          const int step = value / values_of_step;
          const std::size_t vector =
              (static_cast<std::size_t>(segment) * l.vectors + step / l.steps_of_vector) * block + panel -
              first;
          std::uint8_t* at =
              of_block + (vector * form.lanes + lane) * 4 + value % values_of_step * form.value_bytes;
          const int stored = (level - storage.shift) / storage.factor;
          stored_sum += stored;
          const int code =
              l.bits < 8 ? table.index_of(stored) << (step % l.steps_of_vector * l.bits) : stored;
          at[0] |= static_cast<std::uint8_t>(code);
          if (form.value_bytes == 2) at[1] = static_cast<std::uint8_t>(code >> 8);
        }
      }
    }
    // Weights that steps have beyond the window's are zeroed memory too: index 0 of the table.
    const int beyond = l.segments() * l.steps * values_of_step - conv.taps() * conv.c;
    stored_sum += beyond * (l.bits < 8 ? table.level[0] : 0);
    start[o / conv.o * l.panels * form.lanes + o % conv.o] =
        conv.a_offset * sum + storage.factor * conv.a_scale * form.input_offset * stored_sum;
  }
  // Table j takes four bits of codes and gives the level of code j of them.
  for (int i = 0; i < kTables && l.bits < 8; ++i) {
    const int code = (i % 16 >> (i / 16 * l.bits)) & ((1 << l.bits) - 1);
    packed[i] = static_cast<std::uint8_t>(table.level[code]);
  }
}

// Rows of the input that so many rows of the output take.
inline int input_rows(const Conv& conv, int rows) {
  return (rows - 1) * conv.stride_y + (conv.kh - 1) * conv.dilation_y + 1;
}

// Bytes of a copy of the input, if there is one, or of the sums that a shift takes.
inline std::size_t scratch_bytes_of(const Conv& conv, const Form& form, int rows) {
  if (form.value_bytes == 2 || narrow(conv, form)) {
    return static_cast<std::size_t>(layout_of(conv, form).row) * input_rows(conv, rows);
  }
  return storage_of(conv, form).shift == 0 ? 0 : sizeof(std::int32_t) * rows * conv.out_w;
}

inline int rows_of(const Conv& conv) {
  const int of_row = conv.out_w * round_up(conv.groups * conv.o, 16) * 4;
  const int fitting = (64 << 10) / of_row;
  return fitting < 1 ? 1 : fitting < conv.out_h ? fitting : conv.out_h;
}

// Tiles of one size, `count` side by side in every row: the channels of some panels for some pixels.
//   acc[n * ld + m * lanes + lane] = scale * sum + start[m * lanes + lane] + extra[n]
struct Tiles {
  const Layout& layout;
  const std::uint8_t* tables;
  const std::uint8_t* weights;  // of the first panel
  const std::int32_t* start;    // of the first panel
  const std::uint8_t* input;    // window of the first pixel
  const std::int32_t* extra;    // of the first pixel, or null
  std::int32_t* acc;            // of the first pixel and panel
  int ld, out_w, rows, count;
  int scale;  // of the sum of products
  int lanes;  // of the last panel that are written
  int block;  // most steps whose sums may be added up in int16, where they are
};

using Run = void (*)(const Tiles&);
using Choose = Run (*)(int bits, int panels, int pixels);

// The tiles of a row of so many panels: as few as possible, `wide` of them a pixel wider than the others.
struct Tiling {
  int count, width, wide;
};

inline Tiling tiling_of(const Form& form, int out_w, int panels) {
  const int count = ceil_div(out_w, form.widest[panels - 1]);
  return {count, out_w / count, out_w % count};
}

// The sums of all windows' bytes, times `scale`: [rows][out_w].
inline void byte_sums(const Conv& conv, const Layout& l, const std::uint8_t* input, int rows, int scale,
                      std::int32_t* sums) {
  for (int y = 0; y < rows; ++y) {
    for (int x = 0; x < conv.out_w; ++x) {
      std::int32_t sum = 0;
      for (int segment = 0; segment < l.segments(); ++segment) {
        const std::uint8_t* bytes = input + y * l.between_y + x * l.between_x +
                                    segment / l.segments_x * l.stride_y + segment % l.segments_x * l.stride_x;
        for (int i = 0; i < l.steps * kStep; ++i) sum += bytes[i];
      }
      *sums++ = scale * sum;
    }
  }
}

// A whole job, by tiles that `choose` gives. `input` is that of the first output, `extra` null or a sum for
// every output.
inline void run_tiles(const Conv& conv, const Job& job, const Form& form, const Layout& l,
                      const std::uint8_t* input, const std::int32_t* extra, int block, Choose choose) {
  const bool grouped = conv.groups > 1;
  const int first = grouped ? 0 : job.o0 / form.lanes;
  const int last = grouped ? l.panels : ceil_div(job.o1, form.lanes);
  for (int g = 0; g < conv.groups; ++g) {
    for (int panel = first; panel < last; panel += l.block) {
      const int panels = last - panel < l.block ? last - panel : l.block;
      // Lanes behind the channels of one group of several are the next group's.
      const int behind = grouped ? (panel + panels) * form.lanes - conv.o : 0;
      const std::size_t index = static_cast<std::size_t>(g) * l.panels + panel;
      Tiles t{.layout = l,
              .tables = job.weights,
              .weights = job.weights + l.weights + index * l.panel_bytes,
              .start = reinterpret_cast<const std::int32_t*>(job.weights + l.start) + index * form.lanes,
              .input = input + static_cast<std::ptrdiff_t>(g) * conv.c * form.value_bytes,
              .extra = extra,
              .acc = job.acc + g * conv.o + panel * form.lanes - job.o0,
              .ld = job.ld,
              .out_w = conv.out_w,
              .rows = job.y1 - job.y0,
              .count = 0,
              .scale = storage_of(conv, form).factor * conv.a_scale,
              .lanes = form.lanes - (behind > 0 ? behind : 0),
              .block = block};
      const Tiling tiling = tiling_of(form, conv.out_w, panels);
      if (t.count = tiling.wide; t.count > 0) choose(l.bits, panels, tiling.width + 1)(t);
      const int done = tiling.wide * (tiling.width + 1);
      t.count = tiling.count - tiling.wide;
      t.input += done * l.between_x;
      t.acc += static_cast<std::ptrdiff_t>(done) * job.ld;
      if (t.extra != nullptr) t.extra += done;
      choose(l.bits, panels, tiling.width)(t);
    }
  }
}

// Calls `tile` for the first window, sum and outputs of every tile.
template <int kPixels, class Tile>
inline void each_tile(const Tiles& t, Tile tile) {
  for (int y = 0; y < t.rows; ++y) {
    for (int i = 0; i < t.count; ++i) {
      const int x = i * kPixels;
      tile(t.input + y * t.layout.between_y + x * t.layout.between_x,
           t.extra == nullptr ? nullptr : t.extra + y * t.out_w + x,
           t.acc + (static_cast<std::ptrdiff_t>(y) * t.out_w + x) * t.ld);
    }
  }
}

// Cycles of an image whose steps take, for every panel, `of_product` a pixel and `of_weight` once, but not
// less than `least` (which is what reading or unpacking weights takes).
inline double cycles_of(const Conv& conv, const Form& form, double of_product, double of_weight,
                        double least) {
  const Layout l = layout_of(conv, form);
  const double steps = static_cast<double>(l.steps) * l.segments();
  double of_row = 0;
  for (int panel = 0; panel < l.panels; panel += l.block) {
    const int panels = l.panels - panel < l.block ? l.panels - panel : l.block;
    const int tiles = tiling_of(form, conv.out_w, panels).count;
    const double of_step = of_product * conv.out_w / tiles + of_weight;
    of_row += tiles * panels * steps * (of_step < least ? least : of_step);
    of_row += tiles * (16 + 6 * l.segments()) + 2 * panels * conv.out_w;
  }
  return conv.groups * conv.out_h * of_row;
}

// Addresses of neighbouring windows without a register each: odd multiples of their distance are kept, and
// addressing multiplies them by 2, 4 and 8.
template <int kPixels>
struct Windows {
  std::ptrdiff_t odd[kPixels / 2 + 1];  // the last is never used: there are no arrays of none

  explicit Windows(std::ptrdiff_t between) {
    for (int i = 0; i < kPixels / 2; ++i) odd[i] = (2 * i + 1) * between;
  }
  std::ptrdiff_t operator[](int n) const {
    if (n == 0) return 0;
    const int twos = __builtin_ctz(n);
    return odd[(n >> twos) / 2] * (1 << twos);
  }
};

}  // namespace
}  // namespace mixbits
