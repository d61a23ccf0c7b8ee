// Binary decomposition (kernels/bitplanes.h) in plain C++, the definition of the others: one output at a
// time, words of 64 bits.

#include <bit>

#include "kernels/bitplanes.h"

namespace mixbits {
namespace {

using Word = std::uint64_t;
constexpr Blocks kBlocks = {.word_bytes = sizeof(Word), .channels = 1, .unit = 1};

std::int32_t ones_in_common(const std::uint8_t* weights, const std::uint8_t* input,
                            const std::int32_t* offsets, int steps) {
  std::int32_t ones = 0;
  for (int step = 0; step < steps; ++step) {
    Word weight, bits;
    std::memcpy(&weight, weights + sizeof(Word) * step, sizeof(Word));
    std::memcpy(&bits, input + offsets[step], sizeof(Word));
    ones += std::popcount(weight & bits);
  }
  return ones;
}

// The sum of products of codes of one window and one output channel.
std::int32_t products(const BitPlanes& planes, const std::uint8_t* weights, const std::uint8_t* window,
                      const std::int32_t* offsets) {
  std::int32_t sum = 0;
  for (int diagonal = planes.w_bits + planes.a_bits - 2; diagonal >= 0; --diagonal) {
    sum *= 2;
    const int first = larger(0, diagonal - planes.a_bits + 1), last = smaller(diagonal, planes.w_bits - 1);
    for (int plane = first; plane <= last; ++plane) {
      const std::ptrdiff_t weight_plane = static_cast<std::ptrdiff_t>(plane) * planes.steps * sizeof(Word);
      const std::ptrdiff_t input_plane = static_cast<std::ptrdiff_t>(diagonal - plane) * planes.plane_bytes;
      sum += ones_in_common(weights + weight_plane, window + input_plane, offsets, planes.steps);
    }
  }
  return sum;
}

void make_planes(const Conv& conv, const BitPlanes& planes, const BitScratch& scratch, const Job& job,
                 int group) {
  const std::uint8_t* input =
      job.input + static_cast<std::ptrdiff_t>(job.y0) * conv.stride_y * conv.row_bytes();
  for (std::ptrdiff_t row = 0; row < planes.made_rows(conv, job.y1 - job.y0); ++row) {
    fill_row(conv, planes, input + row * planes.y_step, group * conv.c,
             scratch.planes + row * planes.row_bytes, scratch.pixel_sums + row * planes.width);
  }
  fill_corrections(conv, planes, job.y1 - job.y0, scratch.pixel_sums, scratch.corrections);
}

void run(const Conv& conv, const Job& job) {
  const BitPlanes planes(conv, kBlocks);
  const BitScratch scratch(conv, planes, job.y1 - job.y0, job.scratch);
  fill_offsets(conv, planes, scratch.offsets);
  for (int group = 0; group < conv.groups; ++group) {
    make_planes(conv, planes, scratch, job, group);
    const std::uint8_t* weights = job.weights + group * group_bytes(conv, planes);
    const auto* biases = reinterpret_cast<const std::int32_t*>(weights);
    const int begin = larger(job.o0 - group * conv.o, 0), end = smaller(job.o1 - group * conv.o, conv.o);
    std::int32_t* acc = job.acc + group * conv.o - job.o0;
    const std::int32_t* correction = scratch.corrections;
    for (std::ptrdiff_t y = 0; y < job.y1 - job.y0; ++y) {
      const std::uint8_t* row = scratch.planes + y * planes.stride_y * planes.row_bytes;
      for (std::ptrdiff_t x = 0; x < conv.out_w; ++x, acc += job.ld, ++correction) {
        const std::uint8_t* window = row + x * planes.stride_x * planes.pixel_bytes;
        for (int o = begin; o < end; ++o) {
          const std::uint8_t* words = weights + biases_bytes(conv, planes) + block_offset(planes, o);
          acc[o] = conv.w_step * conv.a_scale * products(planes, words, window, scratch.offsets) +
                   *correction + biases[o];
        }
      }
    }
  }
}

int rows(const Conv& conv) { return smaller(conv.out_h, 8); }

double cycles(const Conv& conv) {
  const BitPlanes planes(conv, kBlocks);
  const double words = 1.0 * conv.groups * conv.o * planes.w_bits * planes.a_bits * planes.steps;
  return words * conv.out_h * conv.out_w *
         10;  // a call that counts the ones of a word, where the CPU has no instruction
}

std::size_t weight_bytes(const Conv& conv) {
  return conv.groups * group_bytes(conv, BitPlanes(conv, kBlocks));
}

void pack(const Conv& conv, const std::int16_t* levels, std::uint8_t* packed) {
  bitplanes_pack(conv, BitPlanes(conv, kBlocks), levels, packed);
}

std::size_t scratch_bytes(const Conv& conv, int rows) {
  return BitScratch(conv, BitPlanes(conv, kBlocks), rows, nullptr).bytes;
}

const Kernel kernel = {
    .name = "bitplanes_portable",
    .isa = Isa::portable,
    .refuses = bitplanes_refuses,
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
