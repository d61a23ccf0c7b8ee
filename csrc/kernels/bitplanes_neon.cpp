// Binary decomposition (kernels/bitplanes.h) with Advanced SIMD's count of ones: any pair of widths. Checked
// under an emulator, its speed not measured on hardware.
//
// A lane is an output channel, a word 32 bits of the window, as with AVX-512. Ones are counted a byte, so
// sums of up to 31 words stay bytes and are then widened: an AND, a count and an addition for 128 products of
// bits.

#include <arm_neon.h>

#include "kernels/bitplanes.h"

namespace mixbits {
namespace {

constexpr int kLanes = 4;    // output channels of a vector
constexpr int kVectors = 4;  // vectors of output channels of a tile
constexpr int kTilePixels = 4;
constexpr int kByteSteps = 255 / kBitsOfByte;  // words whose ones a byte can hold the number of
constexpr Blocks kBlocks = {.word_bytes = 4, .channels = kVectors * kLanes, .unit = kVectors * kLanes};

// What tiles of one convolution have in common.
struct Windows {
  const BitPlanes& planes;
  const std::int32_t* offsets;  // [steps]
  int pixel_step;               // bytes from one window to the next
  int factor;                   // of the sum of products of codes
  int ld;
};

// Adds the ones that `steps` words of weights and of windows have in common.
template <int kPixels>
void add_words(uint32x4_t (&sums)[kPixels][kVectors], const std::uint8_t* weight, const std::uint8_t* input,
               const std::int32_t* offsets, int steps, std::ptrdiff_t pixel_step) {
  uint8x16_t ones[kPixels][kVectors];
#pragma GCC unroll 4
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) ones[p][v] = vdupq_n_u8(0);
  }
  for (int step = 0; step < steps; ++step) {
    uint8x16_t of_weight[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v, weight += sizeof(uint8x16_t)) of_weight[v] = vld1q_u8(weight);
#pragma GCC unroll 4
    for (int p = 0; p < kPixels; ++p) {
      std::uint32_t word;
      std::memcpy(&word, input + offsets[step] + p * pixel_step, sizeof(word));
      const uint8x16_t of_input = vreinterpretq_u8_u32(vdupq_n_u32(word));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        ones[p][v] = vaddq_u8(ones[p][v], vcntq_u8(vandq_u8(of_weight[v], of_input)));
      }
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[p][v] = vpadalq_u16(sums[p][v], vpaddlq_u8(ones[p][v]));
  }
}

// acc[pixel][channel] of kPixels windows that follow each other and a block of channels.
template <int kPixels>
void tile(const Windows& windows, const std::uint8_t* weights, const std::uint8_t* pixels,
          const std::int32_t* biases, const std::int32_t* corrections, std::int32_t* acc) {
  const BitPlanes& planes = windows.planes;
  const std::ptrdiff_t step_bytes = kVectors * sizeof(uint8x16_t);
  uint32x4_t sums[kPixels][kVectors];
  for (auto& pixel : sums) {
    for (uint32x4_t& sum : pixel) sum = vdupq_n_u32(0);
  }
  for (int diagonal = planes.w_bits + planes.a_bits - 2; diagonal >= 0; --diagonal) {
    for (auto& pixel : sums) {
      for (uint32x4_t& sum : pixel) sum = vaddq_u32(sum, sum);
    }
    const int last = smaller(diagonal, planes.w_bits - 1);
    for (int plane = larger(0, diagonal - planes.a_bits + 1); plane <= last; ++plane) {
      const std::uint8_t* weight = weights + plane * planes.steps * step_bytes;
      const std::uint8_t* input = pixels + static_cast<std::ptrdiff_t>(diagonal - plane) * planes.plane_bytes;
      for (int step = 0; step < planes.steps; step += kByteSteps) {
        add_words<kPixels>(sums, weight + step * step_bytes, input, windows.offsets + step,
                           smaller(kByteSteps, planes.steps - step), windows.pixel_step);
      }
    }
  }
  for (std::ptrdiff_t p = 0; p < kPixels; ++p) {
    for (int v = 0; v < kVectors; ++v) {
      const int32x4_t bias = vaddq_s32(vld1q_s32(biases + v * kLanes), vdupq_n_s32(corrections[p]));
      vst1q_s32(acc + p * windows.ld + v * kLanes,
                vmlaq_n_s32(bias, vreinterpretq_s32_u32(sums[p][v]), windows.factor));
    }
  }
}

using Tile = void (*)(const Windows&, const std::uint8_t*, const std::uint8_t*, const std::int32_t*,
                      const std::int32_t*, std::int32_t*);
constexpr Tile kTiles[kTilePixels] = {tile<1>, tile<2>, tile<3>, tile<4>};

void make_planes(const Conv& conv, const BitPlanes& planes, const BitScratch& scratch, const Job& job) {
  fill_offsets(conv, planes, scratch.offsets);
  const std::uint8_t* input =
      job.input + static_cast<std::ptrdiff_t>(job.y0) * conv.stride_y * conv.row_bytes();
  for (std::ptrdiff_t row = 0; row < planes.made_rows(conv, job.y1 - job.y0); ++row) {
    fill_row(conv, planes, input + row * planes.y_step, 0, scratch.planes + row * planes.row_bytes,
             scratch.pixel_sums + row * planes.width);
  }
  fill_corrections(conv, planes, job.y1 - job.y0, scratch.pixel_sums, scratch.corrections);
}

// One block of channels at all pixels of a job.
void run_block(const Conv& conv, const BitPlanes& planes, const BitScratch& scratch, const Windows& windows,
               const Job& job, int begin) {
  const std::uint8_t* weights = job.weights + biases_bytes(conv, planes) + block_offset(planes, begin);
  const std::int32_t* biases = reinterpret_cast<const std::int32_t*>(job.weights) + begin;
  const std::int32_t* corrections = scratch.corrections;
  std::int32_t* acc = job.acc + (begin - job.o0);
  for (std::ptrdiff_t y = 0; y < job.y1 - job.y0; ++y) {
    const std::uint8_t* row = scratch.planes + y * planes.stride_y * planes.row_bytes;
    for (std::ptrdiff_t x = 0; x < conv.out_w; x += kTilePixels) {
      const int pixels = smaller(kTilePixels, conv.out_w - static_cast<int>(x));
      kTiles[pixels - 1](windows, weights, row + x * windows.pixel_step, biases, corrections, acc);
      corrections += pixels;
      acc += static_cast<std::ptrdiff_t>(pixels) * job.ld;
    }
  }
}

void run(const Conv& conv, const Job& job) {
  const BitPlanes planes(conv, kBlocks);
  const BitScratch scratch(conv, planes, job.y1 - job.y0, job.scratch);
  make_planes(conv, planes, scratch, job);
  const Windows windows = {
      .planes = planes,
      .offsets = scratch.offsets,
      .pixel_step = planes.stride_x * planes.pixel_bytes,
      .factor = conv.w_step * conv.a_scale,
      .ld = job.ld,
  };
  for (int begin = job.o0; begin < job.o1; begin += kBlocks.channels) {
    run_block(conv, planes, scratch, windows, job, begin);
  }
}

const char* refuses(const Conv& conv) {
  return conv.groups > 1 ? "groups are narrower than its words" : bitplanes_refuses(conv);
}

int rows(const Conv& conv) { return smaller(conv.out_h, 8); }

// Not measured: two vector operations a cycle, and as many more as loads take.
double cycles(const Conv& conv) {
  const BitPlanes planes(conv, kBlocks);
  const double vectors = ceil_div(conv.o, kLanes), pixels = 1.0 * conv.out_h * conv.out_w;
  const double making = 1.5 * planes.width * conv.in_h * conv.c * (planes.a_bits + 1) / kBitsOfByte;
  return making + pixels * vectors * (2.0 * planes.w_bits * planes.a_bits * planes.steps + 6);
}

std::size_t weight_bytes(const Conv& conv) { return group_bytes(conv, BitPlanes(conv, kBlocks)); }

void pack(const Conv& conv, const std::int16_t* levels, std::uint8_t* packed) {
  bitplanes_pack(conv, BitPlanes(conv, kBlocks), levels, packed);
}

std::size_t scratch_bytes(const Conv& conv, int rows) {
  return BitScratch(conv, BitPlanes(conv, kBlocks), rows, nullptr).bytes;
}

const Kernel kernel = {
    .name = "bitplanes_neon",
    .isa = Isa::neon,
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
