#include "engine/engine.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <limits>

namespace mixbits {
namespace {

void fill_pixels(std::uint8_t* at, std::int64_t pixels, const Border& border) {
  const auto bytes = static_cast<std::size_t>(pixels * border.pixel);
  if (border.channels == border.pixel || border.value == 0) {
    std::memset(at, border.value, bytes);
    return;
  }
  // The first pixel, then copies of all there is so far.
  if (pixels == 0) return;
  std::memset(at, border.value, static_cast<std::size_t>(border.channels));
  std::memset(at + border.channels, 0, static_cast<std::size_t>(border.pixel - border.channels));
  for (auto done = static_cast<std::size_t>(border.pixel); done < bytes;) {
    const std::size_t more = std::min({done, bytes - done, std::size_t{4096}});
    std::memcpy(at + done, at, more);
    done += more;
  }
}

}  // namespace

void Border::fill(const Frame& frame) const {
  std::uint8_t* image = frame.at(place);
  for (std::int64_t i = 0; i < images; ++i, image += rows * columns * pixel) {
    fill_pixels(image, top * columns, *this);
    fill_pixels(image + (rows - bottom) * columns * pixel, bottom * columns, *this);
    for (std::int64_t y = top; y < rows - bottom; ++y) {
      std::uint8_t* row = image + y * columns * pixel;
      fill_pixels(row, left, *this);
      fill_pixels(row + (columns - right) * pixel, right, *this);
    }
  }
}

Engine::Engine(std::size_t arena_bytes, std::vector<std::uint8_t> constants, std::size_t sample_in,
               std::size_t sample_out, int threads)
    : arena_bytes_(arena_bytes),
      sample_in_(sample_in),
      sample_out_(sample_out),
      constants_(constants.size()),
      threads_(threads) {
  std::copy(constants.begin(), constants.end(), constants_.data());
}

void Engine::prepare() {
  std::size_t scratch = 0;
  for (const auto& step : steps_) scratch = std::max(scratch, step->scratch_bytes());
  while (workers_.size() < static_cast<std::size_t>(threads_.count())) {
    workers_.push_back({Aligned(arena_bytes_), Aligned(scratch)});
  }
}

std::size_t Engine::memory() const {
  std::size_t scratch = 0;
  for (const auto& step : steps_) scratch = std::max(scratch, step->scratch_bytes());
  return (arena_bytes_ + scratch + 2 * kSlack) * static_cast<std::size_t>(threads_.count());
}

Frame Engine::frame(int worker, const std::uint8_t* input, std::uint8_t* output, std::int64_t sample,
                    int part, int parts) const {
  // Threads that share a sample share the first arena.
  const Worker& memory = workers_[static_cast<std::size_t>(parts == 1 ? worker : 0)];
  const auto index = static_cast<std::size_t>(sample);
  return {{memory.arena.data(), const_cast<std::uint8_t*>(input) + index * sample_in_,
           output + index * sample_out_, constants_.data()},
          workers_[static_cast<std::size_t>(worker)].scratch.data(),
          part,
          parts};
}

int Engine::run_sample(const std::uint8_t* input, std::uint8_t* output, std::int64_t sample,
                       double* seconds) {
  for (std::size_t i = 0; i < steps_.size(); ++i) {
    const auto before = std::chrono::steady_clock::now();
    std::atomic<bool> numbers{true};
    threads_.run([&](int part) {
      const Frame share = frame(part, input, output, sample, part, threads_.count());
      if (part == 0) {
        for (const Border& border : steps_[i]->borders) border.fill(share);
      }
      if (!steps_[i]->run(share)) numbers = false;
    });
    if (!numbers) return static_cast<int>(i);
    if (seconds != nullptr) {
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - before;
      seconds[i] = std::min(seconds[i], took.count());
    }
  }
  return -1;
}

int Engine::run(const std::uint8_t* input, std::uint8_t* output, std::int64_t samples) {
  const std::scoped_lock lock(running_);
  prepare();
  const int threads = threads_.count();
  // As many samples as fill all threads go one to a thread; the rest, and small batches, are shared.
  const std::int64_t apart = threads == 1 ? 0 : samples / threads * threads;
  std::atomic<int> stopped{-1};
  if (apart > 0) {
    threads_.run([&](int worker) {
      for (std::int64_t sample = worker; sample < apart; sample += threads) {
        const Frame all = frame(worker, input, output, sample, 0, 1);
        for (std::size_t i = 0; i < steps_.size(); ++i) {
          for (const Border& border : steps_[i]->borders) border.fill(all);
          if (!steps_[i]->run(all)) {
            stopped = static_cast<int>(i);
            return;
          }
        }
      }
    });
  }
  for (std::int64_t sample = apart; sample < samples && stopped < 0; ++sample) {
    const int at = run_sample(input, output, sample, nullptr);
    if (at >= 0) stopped = at;
  }
  return stopped;
}

std::vector<double> Engine::time(const std::uint8_t* input, int repeats) {
  const std::scoped_lock lock(running_);
  prepare();
  std::vector<std::uint8_t> output(sample_out_);
  std::vector<double> seconds(steps_.size(), std::numeric_limits<double>::infinity());
  for (int i = 0; i < repeats; ++i) {
    if (run_sample(input, output.data(), 0, seconds.data()) >= 0) break;
  }
  return seconds;
}

}  // namespace mixbits
