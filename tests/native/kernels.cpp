// Every kernel of a build against `direct_portable`, on random convolutions: for machines that Python is not
// on.
//
//   kernels [LAYERS [SEED [MACS]]]
//
// Every kernel computes so many layers that it accepts, of at most so many multiplications each.
//
// Memory is handed out as kernel.h promises it and no larger, and what may be read but means nothing is
// filled with 0xA5, so that a sanitizer, or a wrong sum, shows what a kernel takes for granted. Exits with 1
// if a sum differs or a kernel accepts too few layers.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <vector>

#include "kernels/registry.h"

namespace {

using mixbits::Conv;
using mixbits::Job;
using mixbits::Kernel;

struct Free {
  void operator()(std::uint8_t* memory) const {
    ::operator delete(memory, std::align_val_t{mixbits::kAlign});
  }
};
using Memory = std::unique_ptr<std::uint8_t, Free>;

Memory memory_of(std::size_t bytes, std::uint8_t fill) {
  Memory memory(static_cast<std::uint8_t*>(::operator new(bytes, std::align_val_t{mixbits::kAlign})));
  std::memset(memory.get(), fill, bytes);
  return memory;
}

constexpr int kDraws = 2000;  // at most, for each layer that a kernel is to compute: some accept few

class Random {
 public:
  explicit Random(unsigned seed) : generator_(seed) {}
  int upto(int last) { return std::uniform_int_distribution<int>(0, last)(generator_); }
  int one_of(std::initializer_list<int> values) {
    return *(values.begin() + upto(static_cast<int>(values.size()) - 1));
  }
  bool chance(double probability) { return std::bernoulli_distribution(probability)(generator_); }

 private:
  std::mt19937 generator_;
};

struct Layer {
  Conv conv;
  std::vector<int> weight_levels;     // those of the grid
  std::vector<std::int16_t> weights;  // levels [groups * o][c][kh][kw]
  Memory input;
};

void draw_shape(Random& random, Conv& conv) {
  if (random.chance(0.15)) {  // depthwise
    conv.groups = random.one_of({1, 3, 8, 16, 17, 24, 33, 64, 70});
    conv.c = 1;
    conv.o = random.one_of({1, 1, 2});
  } else {
    conv.groups = random.one_of({1, 1, 1, 1, 2, 3});
    conv.c = random.one_of({1, 3, 4, 7, 8, 16, 20, 24, 31, 32, 33, 48, 63, 64, 65, 66, 96, 128, 130});
    conv.o = random.one_of({1, 3, 15, 16, 17, 32, 33, 48, 63, 64, 65, 80, 130});
  }
  conv.kh = random.one_of({1, 1, 2, 3, 3, 3, 5, 7});
  conv.kw = random.chance(0.8) ? conv.kh : random.one_of({1, 2, 3, 4, 5});
  conv.stride_y = random.one_of({1, 1, 1, 2, 3});
  conv.stride_x = random.chance(0.9) ? conv.stride_y : random.one_of({1, 2, 3});
  conv.dilation_y = random.one_of({1, 1, 1, 1, 2});
  conv.dilation_x = random.chance(0.9) ? conv.dilation_y : random.one_of({1, 2, 3});
  conv.out_h = 1 + random.upto(8);
  conv.out_w = 1 + random.upto(18);
  conv.in_h = (conv.out_h - 1) * conv.stride_y + (conv.kh - 1) * conv.dilation_y + 1;
  conv.in_w = (conv.out_w - 1) * conv.stride_x + (conv.kw - 1) * conv.dilation_x + 1;
  conv.in_h += random.upto(conv.stride_y - 1);  // rows and columns that no window reaches
  conv.in_w += random.upto(conv.stride_x - 1);
  conv.pixel_stride = mixbits::round_up(conv.groups * conv.c, 4);
}

void draw_input_grid(Random& random, Conv& conv) {
  const int bits = 1 + random.upto(7);
  conv.a_max = (1 << bits) - 1 - (random.chance(0.2) && bits > 1 ? 1 : 0);  // 2^b - 2: a narrow grid's
  conv.a_scale = random.one_of({1, 1, 2});
  conv.a_offset = random.one_of({0, 0, -conv.a_scale * (conv.a_max / 2), -conv.a_max, -128, 3});
  conv.a_zero = random.upto(conv.a_max);
}

void draw_weight_grid(Random& random, Conv& conv, std::vector<int>& levels) {
  conv.w_bits = 1 + random.upto(7);
  const int count = 1 << conv.w_bits;
  levels.clear();
  if (random.chance(0.15)) {  // a codebook
    conv.w_step = 0;
    while (static_cast<int>(levels.size()) < std::min(count, 20)) {
      const int level = random.upto(255) - 128;
      if (std::find(levels.begin(), levels.end(), level) == levels.end()) levels.push_back(level);
    }
    std::sort(levels.begin(), levels.end());
  } else {
    const int form = random.upto(3);  // unsigned, full, narrow, bipolar
    conv.w_step = form == 3 ? 2 : 1;
    const int low = form == 0 ? 0 : form == 1 ? -count / 2 : form == 2 ? 1 - count / 2 : 1 - count;
    const int number = form == 2 && conv.w_bits > 1 ? count - 1 : count;
    for (int code = 0; code < number; ++code) levels.push_back(low + conv.w_step * code);
  }
  conv.w_min = levels.front();
  conv.w_max = levels.back();
}

std::int64_t macs_of(const Conv& conv) {
  return std::int64_t{conv.groups} * conv.o * conv.c * conv.taps() * conv.out_h * conv.out_w;
}

Layer draw_layer(Random& random, std::int64_t most_macs) {
  Layer layer;
  Conv& conv = layer.conv;
  do draw_shape(random, conv);
  while (macs_of(conv) > most_macs);
  draw_input_grid(random, conv);
  draw_weight_grid(random, conv, layer.weight_levels);
  return layer;
}

void draw_values(Random& random, Layer& layer) {
  const Conv& conv = layer.conv;
  const bool extreme = random.chance(0.2);
  layer.weights.resize(static_cast<std::size_t>(conv.groups) * conv.o * conv.c * conv.taps());
  const int last = static_cast<int>(layer.weight_levels.size()) - 1;
  for (std::int16_t& weight : layer.weights) {
    weight =
        static_cast<std::int16_t>(layer.weight_levels[extreme ? last * random.upto(1) : random.upto(last)]);
  }
  const std::size_t bytes = static_cast<std::size_t>(conv.in_h) * conv.row_bytes();
  layer.input = memory_of(bytes + mixbits::kSlack, 0xA5);
  std::memset(layer.input.get(), 0, bytes);
  for (int pixel = 0; pixel < conv.in_h * conv.in_w; ++pixel) {
    for (int c = 0; c < conv.groups * conv.c; ++c) {
      layer.input.get()[pixel * conv.pixel_stride + c] =
          static_cast<std::uint8_t>(extreme ? conv.a_max * random.upto(1) : random.upto(conv.a_max));
    }
  }
}

// Sums [out_h][out_w][groups * o], in jobs of `rows` rows and `channels` channels.
std::vector<std::int32_t> sums_of(const Kernel& kernel, const Layer& layer, int rows, int channels) {
  const Conv& conv = layer.conv;
  const int all = conv.groups * conv.o, block = conv.groups == 1 ? std::min(channels, all) : all;
  const int ld = mixbits::round_up(block, 16);
  const std::size_t weight_bytes = kernel.weight_bytes(conv);
  const Memory weights = memory_of(weight_bytes + mixbits::kSlack, 0xA5);
  std::memset(weights.get(), 0, weight_bytes);
  kernel.pack(conv, layer.weights.data(), weights.get());
  const Memory scratch = memory_of(kernel.scratch_bytes(conv, rows) + mixbits::kSlack, 0xA5);
  const Memory acc = memory_of(sizeof(std::int32_t) * rows * conv.out_w * ld, 0xA5);
  auto* tile = reinterpret_cast<std::int32_t*>(acc.get());
  std::vector<std::int32_t> sums(static_cast<std::size_t>(conv.out_h) * conv.out_w * all);
  for (int y = 0; y < conv.out_h; y += rows) {
    for (int o = 0; o < all; o += block) {
      const int y1 = std::min(y + rows, conv.out_h), o1 = std::min(o + block, all);
      kernel.run(conv, {layer.input.get(), weights.get(), scratch.get(), tile, ld, y, y1, o, o1});
      for (int pixel = 0; pixel < (y1 - y) * conv.out_w; ++pixel) {
        std::copy_n(tile + static_cast<std::ptrdiff_t>(pixel) * ld, o1 - o,
                    sums.begin() + (static_cast<std::ptrdiff_t>(y) * conv.out_w + pixel) * all + o);
      }
    }
  }
  return sums;
}

void describe(const Conv& c) {
  std::printf(
      "  c %d o %d groups %d window %dx%d stride %d %d dilation %d %d out %dx%d, input 0..%d scale %d offset "
      "%d, "
      "weights %d bits %d..%d step %d\n",
      c.c, c.o, c.groups, c.kh, c.kw, c.stride_y, c.stride_x, c.dilation_y, c.dilation_x, c.out_h, c.out_w,
      c.a_max, c.a_scale, c.a_offset, c.w_bits, c.w_min, c.w_max, c.w_step);
}

}  // namespace

int main(int count, char** arguments) {
  const int layers = count > 1 ? std::atoi(arguments[1]) : 200;
  Random random(count > 2 ? static_cast<unsigned>(std::atoi(arguments[2])) : 1);
  const std::int64_t most_macs = count > 3 ? std::atoll(arguments[3]) : std::int64_t{1} << 40;
  const Kernel* reference = mixbits::kernel_named("direct_portable");
  if (reference == nullptr) {
    std::puts("direct_portable, which the others are compared with, is not in this build");
    return 1;
  }
  struct Tally {
    const Kernel* kernel;
    int accepted = 0, wrong = 0;
  };
  std::vector<Tally> tallies;
  for (const Kernel* kernel : mixbits::all_kernels()) {
    if (kernel != reference && mixbits::usable(kernel->isa)) tallies.push_back({kernel});
  }
  for (int draw = 0; draw < kDraws * layers; ++draw) {
    Layer layer = draw_layer(random, most_macs);
    std::vector<std::int32_t> expected;
    for (Tally& tally : tallies) {
      const Kernel& kernel = *tally.kernel;
      if (tally.accepted == layers || kernel.refuses(layer.conv) != nullptr) continue;
      if (expected.empty()) {
        draw_values(random, layer);
        expected = sums_of(*reference, layer, 1, 1 << 20);
      }
      ++tally.accepted;
      const int rows = random.chance(0.5) ? kernel.rows(layer.conv) : kernel.rows_step * (1 + random.upto(4));
      if (sums_of(kernel, layer, rows, random.one_of({64, 128, 1 << 20})) == expected) continue;
      if (tally.wrong++ < 3) {
        std::printf("%s, jobs of %d rows: sums differ\n", kernel.name, rows);
        describe(layer.conv);
      }
    }
  }
  bool right = true;
  for (const Tally& tally : tallies) {
    std::printf("%-28s %d layers, %d wrong\n", tally.kernel->name, tally.accepted, tally.wrong);
    right = right && tally.accepted == layers && tally.wrong == 0;
  }
  return right ? 0 : 1;
}
