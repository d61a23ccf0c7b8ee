#include "engine/steps.h"

#include <algorithm>
#include <cmath>
#include <ranges>

#include "engine/loops.h"
#include "engine/moves.h"

namespace mixbits {
namespace {

constexpr std::int64_t kAccBytes =
    96 * 1024;                      // of the sums of one job: they are to stay in the nearest caches
constexpr std::int64_t kRun = 512;  // values rounded at a time
constexpr int kPixel = 4;           // bytes of the pixels that are made whole

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace

void LayerStep::use(const Kernel& by, const std::int16_t* levels) {
  kernel = &by;
  weights = Aligned(by.weight_bytes(conv));
  by.pack(conv, levels, weights.data());
  if (border_level != 0) find_excess(levels);
  const auto finite = [this](const Aligned& values) {
    const auto* begin = reinterpret_cast<const float*>(values.data());
    return std::all_of(begin, begin + outputs(), [](float value) { return std::isfinite(value); });
  };
  finite_ = finite(scale) && finite(bias);
}

// Taps of an output's window that meet the border.
std::vector<int> LayerStep::taps_outside(int y, int x) const {
  std::vector<int> outside;
  for (int tap = 0; tap < conv.taps(); ++tap) {
    const int in_y = y * conv.stride_y + tap / conv.kw * conv.dilation_y - pad_y;
    const int in_x = x * conv.stride_x + tap % conv.kw * conv.dilation_x - pad_x;
    if (in_y < 0 || in_y >= size_y || in_x < 0 || in_x >= size_x) outside.push_back(tap);
  }
  return outside;
}

int LayerStep::excess_pixels() const {
  int pixels = 0;
  for (int y = 0; border_level != 0 && y < conv.out_h; ++y) {
    for (int x = 0; x < conv.out_w; ++x) pixels += !taps_outside(y, x).empty();
  }
  return pixels;
}

void LayerStep::find_excess(const std::int16_t* levels) {
  excess_ = Aligned(sizeof(std::int32_t) * static_cast<std::size_t>(excess_pixels()) * (2 + outputs()));
  auto* next = reinterpret_cast<std::int32_t*>(excess_.data());
  for (int y = 0; y < conv.out_h; ++y) {
    for (int x = 0; x < conv.out_w; ++x) {
      const std::vector<int> outside = taps_outside(y, x);
      if (outside.empty()) continue;
      *next++ = y;
      *next++ = x;
      for (int o = 0; o < outputs(); ++o) {
        const std::int16_t* weight = levels + static_cast<std::ptrdiff_t>(o) * conv.c * conv.taps();
        std::int32_t sum = 0;
        for (int c = 0; c < conv.c; ++c) {
          for (const int tap : outside) sum += weight[c * conv.taps() + tap];
        }
        *next++ = border_level * sum;
      }
    }
  }
}

void LayerStep::take_excess(std::int32_t* acc, int ld, int y0, int y1, int o0, int o1) const {
  const std::size_t each = 2 + static_cast<std::size_t>(outputs());
  const auto* all = reinterpret_cast<const std::int32_t*>(excess_.data());
  const auto pixels = std::views::iota(std::size_t{0}, excess_.size() / (each * sizeof(std::int32_t)));
  const auto row = [=](std::size_t pixel) { return all[pixel * each]; };
  for (auto at = std::ranges::lower_bound(pixels, y0, {}, row); at != pixels.end() && row(*at) < y1; ++at) {
    const std::int32_t* excess = all + *at * each;
    std::int32_t* sums = acc + (static_cast<std::ptrdiff_t>(excess[0] - y0) * conv.out_w + excess[1]) * ld;
    for (int o = o0; o < o1; ++o) sums[o - o0] -= excess[2 + o];
  }
}

// As many rows as the kernel likes and as the sums' room allows.
int LayerStep::strip_rows() const {
  const std::int64_t row = sizeof(std::int32_t) * std::int64_t{conv.out_w} * round_up(outputs(), 16);
  const auto most = static_cast<int>(std::clamp<std::int64_t>(kAccBytes / row, 1, conv.out_h));
  const int rows = std::min(kernel->rows(conv), most);
  return std::max(rows / kernel->rows_step, 1) * kernel->rows_step;
}

std::size_t LayerStep::scratch_bytes() const {
  const int rows = strip_rows();
  const std::size_t acc =
      sizeof(std::int32_t) * static_cast<std::size_t>(rows) * conv.out_w * round_up(outputs(), 16);
  return static_cast<std::size_t>(round_up(static_cast<int>(acc), kAlign)) + kSlack +
         kernel->scratch_bytes(conv, rows);
}

std::size_t LayerStep::planned_bytes() const {
  std::size_t bytes =
      Aligned::allocated(kernel->weight_bytes(conv)) + 2 * Aligned::allocated(channel_bytes());
  if (border_level != 0) {
    bytes += Aligned::allocated(sizeof(std::int32_t) * static_cast<std::size_t>(excess_pixels()) *
                                (2 + outputs()));
  }
  return bytes;
}

std::size_t LayerStep::kept_bytes() const {
  return weights.allocated() + scale.allocated() + bias.allocated() + excess_.allocated();
}

bool LayerStep::run(const Frame& frame) const {
  int rows = strip_rows(), channels = outputs();
  const std::int64_t all = images * ceil_div(conv.out_h, rows);
  const bool few = all < frame.parts;
  if (few || ceil_div(all, frame.parts) * rows * frame.parts > images * conv.out_h) {
    // Strips too few for the threads, or shared unevenly. They split the channels where weights are what is
    // read most, and each makes the kernel's preparations itself; else the rows.
    const auto map_bytes = static_cast<std::size_t>(conv.in_h) * conv.row_bytes();
    const int block = frame.parts * kChannelBlock;
    if (conv.groups == 1 && weights.size() > map_bytes &&
        (few ? outputs() >= block : outputs() % block == 0)) {
      channels = round_up(static_cast<int>(ceil_div(outputs(), frame.parts)), kChannelBlock);
    } else if (few) {
      rows = std::min(rows, round_up(static_cast<int>(ceil_div(conv.out_h, frame.parts)), kernel->rows_step));
    }
  }
  const std::int64_t strips = ceil_div(conv.out_h, rows);
  // A row whose sums are too many is cut into channels too, by kernels that have nothing to prepare for it.
  const std::int64_t pixel_room =
      kAccBytes / (static_cast<std::int64_t>(sizeof(std::int32_t)) * rows * conv.out_w);
  if (channels > pixel_room && conv.groups == 1 && kernel->scratch_bytes(conv, rows) == 0) {
    channels = std::max(static_cast<int>(pixel_room) / kChannelBlock, 1) * kChannelBlock;
  }
  const std::int64_t blocks = ceil_div(outputs(), channels);
  bool numbers = true;
  const std::int64_t jobs = images * strips * blocks;
  for (std::int64_t job = frame.begin(jobs); job < frame.end(jobs); ++job) {
    // A thread has the same channels, and so weights, for as long as it can.
    const auto o0 = static_cast<int>(job / strips / images) * channels;
    const auto y0 = static_cast<int>(job % strips) * rows;
    numbers &= run_job(frame, job / strips % images, y0, std::min(y0 + rows, conv.out_h), o0,
                       std::min(o0 + channels, outputs()));
  }
  return numbers;
}

bool LayerStep::run_job(const Frame& frame, std::int64_t image, int y0, int y1, int o0, int o1) const {
  auto* acc = reinterpret_cast<std::int32_t*>(frame.scratch);
  const int ld = round_up(o1 - o0, 16);
  const auto acc_bytes = static_cast<int>(sizeof(std::int32_t)) * (y1 - y0) * conv.out_w * ld;
  std::uint8_t* scratch = frame.scratch + round_up(acc_bytes, kAlign) + kSlack;
  kernel->run(conv,
              {frame.at(input) + image * input_image, weights.data(), scratch, acc, ld, y0, y1, o0, o1});
  if (excess_.size() != 0) take_excess(acc, ld, y0, y1, o0, o1);

  Finish finish;
  finish.scale = reinterpret_cast<const float*>(scale.data());
  finish.bias = reinterpret_cast<const float*>(bias.data());
  finish.residual_kind = residual_kind;
  if (residual_kind != Finish::none) {
    const std::int64_t element = residual_kind == Finish::floats ? sizeof(float) : 1;
    finish.residual = frame.at(residual.place) + image * residual.image;
    finish.residual_row = residual.row / element;
    finish.residual_pixel = residual.pixel / element;
    finish.residual_step = residual_step;
    finish.residual_scale = residual_scale;
    finish.residual_offset = residual_offset;
  }
  finish.always_numbers = finite_ && (residual_kind == Finish::none || finite_residual);
  finish.limited = limited;
  finish.low = low;
  finish.high = high;
  if (gives_floats) {
    finish.floats_out = reinterpret_cast<float*>(frame.at(floats.place) + image * floats.image);
    finish.floats_row = floats.row / static_cast<std::int64_t>(sizeof(float));
    finish.floats_pixel = floats.pixel / static_cast<std::int64_t>(sizeof(float));
  }
  int fill = outputs();
  for (const Bytes& map : bytes) {
    finish.maps[finish.byte_maps++] = {frame.at(map.to.place) + image * map.to.image, map.to.row,
                                       map.to.pixel, map.rounding};
    fill = round_up(outputs(), 4);
  }
  return finisher().finish(finish, {acc, ld, y0, y1, conv.out_w, o0, o1, outputs(), fill});
}

bool RoundStep::run(const Frame& frame) const {
  const Tensor source = from.in(frame), target = to.in(frame);
  if (makes_pixels()) return round_pixels(frame, source, target);
  Loops<2> loops = loops_over({&source, &target});
  confine(loops, {frame.part, frame.parts});
  const int line = loops.rank - 1;
  const std::int64_t from_stride = loops.strides[0][line], to_stride = loops.strides[1][line];
  bool numbers = true;
  float buffer[kRun];
  std::uint8_t rounded[kRun];
  for_lines(loops, [&](const std::int64_t (&at)[2]) {
    for (std::int64_t start = 0; start < loops.shape[line]; start += kRun) {
      const std::int64_t count = std::min(kRun, loops.shape[line] - start);
      const float* values = floats_at(source, at[0] + start * from_stride, from_stride, count, buffer);
      auto* out = static_cast<std::uint8_t*>(target.data) + at[1] + start * to_stride;
      numbers &=
          finisher().round(rounding, values, static_cast<std::size_t>(count), to_stride == 1 ? out : rounded);
      if (to_stride != 1) write(rounded, out, to_stride, count);
    }
  });
  return numbers;
}

bool RoundStep::makes_pixels() const {
  return to.tensor.rank == 4 && to.tensor.shape[1] <= kPixel && to.tensor.strides[1] == 1 &&
         to.tensor.strides[3] == kPixel;
}

bool RoundStep::round_pixels(const Frame& frame, const Tensor& source, const Tensor& target) const {
  const std::int64_t height = source.shape[2], width = source.shape[3];
  bool numbers = true;
  float buffer[kRun];
  std::uint8_t channels[kPixel][kRun] = {};
  for (std::int64_t i = frame.begin(source.shape[0] * height); i < frame.end(source.shape[0] * height); ++i) {
    const std::int64_t image = i / height, y = i % height;
    for (std::int64_t x = 0; x < width; x += kRun) {
      const std::int64_t count = std::min(kRun, width - x);
      for (std::int64_t c = 0; c < source.shape[1]; ++c) {
        const std::int64_t at =
            image * source.strides[0] + c * source.strides[1] + y * source.strides[2] + x * source.strides[3];
        const float* values = floats_at(source, at, source.strides[3], count, buffer);
        numbers &= finisher().round(rounding, values, static_cast<std::size_t>(count), channels[c]);
      }
      auto* out = static_cast<std::uint8_t*>(target.data) + image * target.strides[0] +
                  y * target.strides[2] + x * kPixel;
      for (std::int64_t k = 0; k < count; ++k) {
        for (int c = 0; c < kPixel; ++c) out[k * kPixel + c] = channels[c][k];
      }
    }
  }
  return numbers;
}

std::size_t OperationStep::scratch_bytes() const {
  std::vector<Tensor> tensors;
  for (const Operand& input : inputs) tensors.push_back(input.tensor);
  return operation.scratch_bytes(tensors);
}

bool OperationStep::run(const Frame& frame) const {
  std::vector<Tensor> tensors;
  tensors.reserve(inputs.size());
  for (const Operand& input : inputs) tensors.push_back(input.in(frame));
  auto* scratch = reinterpret_cast<std::byte*>(frame.scratch);
  operation.run(tensors, output.in(frame), scratch, {frame.part, frame.parts});
  return true;
}

bool CopyStep::run(const Frame& frame) const {
  copy(from.in(frame), to.in(frame), {frame.part, frame.parts});
  return true;
}

}  // namespace mixbits
