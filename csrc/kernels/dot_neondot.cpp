// Dot products of bytes with SDOT, weights kept packed and unpacked in registers.
//
// Weights are packed as kernels/dot.h says, in panels of 4 channels. SDOT takes signed bytes only, so 128 is
// taken from those of the input (by their highest bit), and `start` makes up for it.

#include "kernels/dot.h"

#include <arm_neon.h>

#include <cstring>

namespace mixbits {
namespace {

constexpr int kLanes = 4;
constexpr int kVector = 16;  // bytes
constexpr int kLoad = 4;     // steps of a vector of the input
constexpr Form kForm{.lanes = kLanes, .value_bytes = 1, .widest = {8, 8, 4, 4}, .input_offset = 128};

const char* refuses(const Conv& conv) {
  const Storage storage = storage_of(conv, kForm);
  if (!storage.fits()) return "weight levels are more than a byte holds";
  if (storage.shift != 0 && conv.groups > 1) {
    return "it has no sums of bytes a group, which weight levels outside -128 .. 127 take";
  }
  return nullptr;
}

template <int kBits>
struct Tables {
  static constexpr int kCount = kBits == 8 ? 0 : 4 / kBits;
  int8x16_t of[kCount + 1];

  explicit Tables(const std::uint8_t* tables) {
    for (int j = 0; j < kCount; ++j) of[j] = vreinterpretq_s8_u8(vld1q_u8(tables + 16 * j));
  }

  // Weights of step kStepOf of a vector.
  template <int kStepOf>
  int8x16_t unpack(const std::uint8_t* from) const {
    const uint8x16_t packed = vld1q_u8(from);
    if constexpr (kBits == 8) {
      return vreinterpretq_s8_u8(packed);
    } else {
      const uint8x16_t half = kStepOf < kCount ? vandq_u8(packed, vdupq_n_u8(15)) : vshrq_n_u8(packed, 4);
      return vqtbl1q_s8(of[kStepOf % kCount], half);
    }
  }
};

inline int8x16_t less_128(uint8x16_t bytes) { return vreinterpretq_s8_u8(veorq_u8(bytes, vdupq_n_u8(128))); }

template <int kPanels, int kPixels, int kBits>
struct Sums {
  int32x4_t of[kPanels][kPixels];

  // Step kAt of those at `weights`, which is step kAt % kLoad of `input`.
  template <int kAt>
  void step(const Tables<kBits>& tables, const std::uint8_t* weights, const int8x16_t (&input)[kPixels]) {
    constexpr int kSteps = 8 / kBits;
#pragma GCC unroll 4
    for (int m = 0; m < kPanels; ++m) {
      const int8x16_t weight =
          tables.template unpack<kAt % kSteps>(weights + (kAt / kSteps * kPanels + m) * kVector);
#pragma GCC unroll 8
      for (int n = 0; n < kPixels; ++n) {
        of[m][n] = vdotq_laneq_s32(of[m][n], weight, input[n], kAt % kLoad);
      }
    }
  }

  // `count` steps, the first of which is step kAt of those at `weights`. At most kLoad.
  template <int kAt>
  void steps(const Tables<kBits>& tables, const std::uint8_t* weights, const Windows<kPixels>& windows,
             const std::uint8_t* at, int count) {
    int8x16_t input[kPixels];
#pragma GCC unroll 8
    for (int n = 0; n < kPixels; ++n) input[n] = less_128(vld1q_u8(at + windows[n]));
    step<kAt>(tables, weights, input);
    if (count > 1) step<kAt + 1>(tables, weights, input);
    if (count > 2) step<kAt + 2>(tables, weights, input);
    if (count > 3) step<kAt + 3>(tables, weights, input);
  }
};

template <int kPanels, int kPixels, int kBits>
void tile(const Tiles& t, const Tables<kBits>& tables, const Windows<kPixels>& windows,
          const std::uint8_t* window, const std::int32_t* extra, std::int32_t* acc) {
  const Layout& l = t.layout;
  constexpr int kSteps = 8 / kBits;
  constexpr int kRound =
      kSteps < kLoad ? kLoad : kSteps;  // steps at once: whole vectors of weights and input
  Sums<kPanels, kPixels, kBits> sums;
#pragma GCC unroll 4
  for (int m = 0; m < kPanels; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < kPixels; ++n) sums.of[m][n] = vdupq_n_s32(0);
  }
  const std::uint8_t* of_segment = t.weights;
  for (int y = 0; y < l.segments_y; ++y) {
    for (int x = 0; x < l.segments_x; ++x, of_segment += l.vectors * kPanels * kVector) {
      const std::uint8_t* input = window + y * l.stride_y + x * l.stride_x;
      const std::uint8_t* weights = of_segment;
      int left = l.steps;
      for (; left >= kRound; left -= kRound) {
        sums.template steps<0>(tables, weights, windows, input, kLoad);
        if constexpr (kRound > kLoad) {
          sums.template steps<kLoad>(tables, weights, windows, input + kLoad * kStep, kLoad);
        }
        weights += kRound / kSteps * kPanels * kVector;
        input += kRound * kStep;
      }
      if (left > 0) sums.template steps<0>(tables, weights, windows, input, left);
      if constexpr (kRound > kLoad) {
        if (left > kLoad) {
          sums.template steps<kLoad>(tables, weights, windows, input + kLoad * kStep, left - kLoad);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < kPanels; ++m) {
    const int32x4_t start = vld1q_s32(t.start + m * kLanes);
#pragma GCC unroll 8
    for (int n = 0; n < kPixels; ++n) {
      int32x4_t result = vmlaq_n_s32(start, sums.of[m][n], t.scale);
      if (extra != nullptr) result = vaddq_s32(result, vdupq_n_s32(extra[n]));
      std::int32_t* to = acc + static_cast<std::ptrdiff_t>(n) * t.ld + m * kLanes;
      if (m + 1 < kPanels || t.lanes == kLanes) {
        vst1q_s32(to, result);
      } else {
        std::memcpy(to, &result, sizeof(std::int32_t) * t.lanes);
      }
    }
  }
}

template <int kPanels, int kPixels, int kBits>
void tiles(const Tiles& t) {
  const Tables<kBits> tables(t.tables);
  const Windows<kPixels> windows(t.layout.between_x);
  each_tile<kPixels>(t, [&](const std::uint8_t* window, const std::int32_t* extra, std::int32_t* acc) {
    tile<kPanels, kPixels, kBits>(t, tables, windows, window, extra, acc);
  });
}

template <int kBits>
Run tiles_of(int panels, int pixels) {
  static constexpr Run one[] = {tiles<1, 1, kBits>, tiles<1, 2, kBits>, tiles<1, 3, kBits>,
                                tiles<1, 4, kBits>, tiles<1, 5, kBits>, tiles<1, 6, kBits>,
                                tiles<1, 7, kBits>, tiles<1, 8, kBits>};
  static constexpr Run two[] = {tiles<2, 1, kBits>, tiles<2, 2, kBits>, tiles<2, 3, kBits>,
                                tiles<2, 4, kBits>, tiles<2, 5, kBits>, tiles<2, 6, kBits>,
                                tiles<2, 7, kBits>, tiles<2, 8, kBits>};
  static constexpr Run three[] = {tiles<3, 1, kBits>, tiles<3, 2, kBits>, tiles<3, 3, kBits>,
                                  tiles<3, 4, kBits>};
  static constexpr Run four[] = {tiles<4, 1, kBits>, tiles<4, 2, kBits>, tiles<4, 3, kBits>,
                                 tiles<4, 4, kBits>};
  switch (panels) {
    case 1: return one[pixels - 1];
    case 2: return two[pixels - 1];
    case 3: return three[pixels - 1];
    default: return four[pixels - 1];
  }
}

Run tiles_of(int bits, int panels, int pixels) {
  switch (bits) {
    case 1: return tiles_of<1>(panels, pixels);
    case 2: return tiles_of<2>(panels, pixels);
    case 4: return tiles_of<4>(panels, pixels);
    default: return tiles_of<8>(panels, pixels);
  }
}

// Puts the pixels of `rows` rows side by side, four at a time. Reads and writes less than 16 bytes behind a
// row.
void narrow_rows(const Conv& conv, const Layout& l, const std::uint8_t* input, int rows, std::uint8_t* to) {
  std::uint8_t from_byte[16] = {};
  for (int i = 0; i < 4 * conv.c; ++i) {
    from_byte[i] = static_cast<std::uint8_t>(i / conv.c * kStep + i % conv.c);
  }
  const uint8x16_t byte_of = vld1q_u8(from_byte);
  for (int y = 0; y < rows; ++y) {
    const std::uint8_t* from = input + static_cast<std::ptrdiff_t>(y) * conv.row_bytes();
    for (int x = 0; x < conv.in_w; x += 4) {
      vst1q_u8(to + y * l.row + x * conv.c, vqtbl1q_u8(vld1q_u8(from + x * kStep), byte_of));
    }
  }
}

void run(const Conv& conv, const Job& job) {
  const Storage storage = storage_of(conv, kForm);
  const Layout l = layout_of(conv, kForm);
  const int rows = job.y1 - job.y0;
  const std::uint8_t* input =
      job.input + static_cast<std::ptrdiff_t>(job.y0) * conv.stride_y * conv.row_bytes();
  std::int32_t* extra = nullptr;
  if (narrow(conv, kForm)) {
    narrow_rows(conv, l, input, input_rows(conv, rows), job.scratch);
    input = job.scratch;
  } else if (storage.shift != 0) {
    extra = reinterpret_cast<std::int32_t*>(job.scratch);
    byte_sums(conv, l, input, rows, storage.shift * conv.a_scale, extra);
  }
  run_tiles(conv, job, kForm, l, input, extra, 0, tiles_of);
}

// Not measured: two SDOT a cycle.
double cycles(const Conv& conv) { return cycles_of(conv, kForm, 0.5, 0, 1); }

int rows(const Conv& conv) { return rows_of(conv); }

std::size_t weight_bytes(const Conv& conv) { return weight_bytes_of(conv, kForm); }

void pack(const Conv& conv, const std::int16_t* levels, std::uint8_t* packed) {
  pack_levels(conv, kForm, levels, packed);
}

std::size_t scratch_bytes(const Conv& conv, int rows) { return scratch_bytes_of(conv, kForm, rows); }

const Kernel kernel = {
    .name = "dot_neondot",
    .isa = Isa::neondot,
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
