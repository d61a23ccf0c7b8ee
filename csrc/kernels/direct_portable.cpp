// The kernel that can do everything: any grid, any window, int16 levels times bytes, in plain C++.
//
// Weights are kept as levels, int16 [groups * o][ky][kx][c].

#include <cstring>

#include "kernels/kernel.h"

namespace mixbits {
namespace {

const char* refuses(const Conv&) { return nullptr; }

double cycles(const Conv& conv) {
  return 1.0 * conv.groups * conv.o * conv.c * conv.taps() * conv.out_h * conv.out_w;
}

int rows(const Conv&) { return 1; }

std::size_t weight_bytes(const Conv& conv) {
  return sizeof(std::int16_t) * conv.groups * conv.o * conv.c * conv.taps();
}

void pack(const Conv& conv, const std::int16_t* levels, std::uint8_t* packed) {
  for (int o = 0; o < conv.groups * conv.o; ++o) {
    for (int c = 0; c < conv.c; ++c) {
      for (int tap = 0; tap < conv.taps(); ++tap) {
        const std::size_t to = (static_cast<std::size_t>(o) * conv.taps() + tap) * conv.c + c;
        std::memcpy(packed + sizeof(std::int16_t) * to, levels++, sizeof(std::int16_t));
      }
    }
  }
}

std::size_t scratch_bytes(const Conv&, int) { return 0; }

std::int32_t sum(const Conv& conv, const std::int16_t* weight, const std::uint8_t* window) {
  std::int32_t products = 0;  // of level and byte
  std::int32_t levels = 0;    // of levels alone: what the offset of the bytes is multiplied with
  for (int ky = 0; ky < conv.kh; ++ky) {
    for (int kx = 0; kx < conv.kw; ++kx) {
      const std::uint8_t* pixel = window +
                                  static_cast<std::ptrdiff_t>(ky) * conv.dilation_y * conv.row_bytes() +
                                  static_cast<std::ptrdiff_t>(kx) * conv.dilation_x * conv.pixel_stride;
      for (int c = 0; c < conv.c; ++c, ++weight) {
        products += *weight * pixel[c];
        levels += *weight;
      }
    }
  }
  return conv.a_scale * products + conv.a_offset * levels;
}

void run(const Conv& conv, const Job& job) {
  const auto* weights = reinterpret_cast<const std::int16_t*>(job.weights);
  const std::size_t each = static_cast<std::size_t>(conv.taps()) * conv.c;
  std::int32_t* acc = job.acc;
  for (int y = job.y0; y < job.y1; ++y) {
    for (int x = 0; x < conv.out_w; ++x, acc += job.ld) {
      const std::uint8_t* window = job.input +
                                   static_cast<std::ptrdiff_t>(y) * conv.stride_y * conv.row_bytes() +
                                   static_cast<std::ptrdiff_t>(x) * conv.stride_x * conv.pixel_stride;
      for (int o = job.o0; o < job.o1; ++o) {
        acc[o - job.o0] =
            sum(conv, weights + each * o, window + static_cast<std::ptrdiff_t>(o / conv.o) * conv.c);
      }
    }
  }
}

const Kernel kernel = {
    .name = "direct_portable",
    .isa = Isa::portable,
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
