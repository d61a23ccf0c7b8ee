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

// Adds the seconds of its life to a number, if there is one.
class Stopwatch {
 public:
  explicit Stopwatch(double* seconds) : seconds_(seconds) {
    if (seconds_ != nullptr) began_ = Clock::now();
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;
  ~Stopwatch() {
    if (seconds_ != nullptr) *seconds_ += std::chrono::duration<double>(Clock::now() - began_).count();
  }

 private:
  using Clock = std::chrono::steady_clock;
  double* seconds_;
  Clock::time_point began_;
};

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

Allocated Engine::allocated() const {
  Allocated found;
  for (const Worker& worker : workers_) {
    found.arenas += worker.arena.allocated();
    found.scratch += worker.scratch.allocated();
  }
  found.weights = constants_.allocated();
  for (const auto& step : steps_) found.weights += step->kept_bytes();
  return found;
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

// One thread computes a sample.
int Engine::run_alone(const Frame& frame, double* seconds) const {
  for (std::size_t i = 0; i < steps_.size(); ++i) {
    const Stopwatch watch(seconds == nullptr ? nullptr : seconds + i);
    for (const Border& border : steps_[i]->borders) border.fill(frame);
    if (!steps_[i]->run(frame)) return static_cast<int>(i);
  }
  return -1;
}

// All threads compute a sample, step by step.
int Engine::run_shared(const std::uint8_t* input, std::uint8_t* output, std::int64_t sample,
                       double* seconds) {
  for (std::size_t i = 0; i < steps_.size(); ++i) {
    const Stopwatch watch(seconds == nullptr ? nullptr : seconds + i);
    std::atomic<bool> numbers{true};
    threads_.run([&](int part, int thread) {
      const Frame share = frame(thread, input, output, sample, part, threads_.count());
      if (part == 0) {
        for (const Border& border : steps_[i]->borders) border.fill(share);
      }
      if (!steps_[i]->run(share)) numbers = false;
    });
    if (!numbers) return static_cast<int>(i);
  }
  return -1;
}

int Engine::run_samples(const std::uint8_t* input, std::uint8_t* output, std::int64_t samples,
                        double* seconds) {
  const int threads = threads_.count();
  // As many samples as fill all threads go one to a thread; the rest, and small batches, are shared.
  const std::int64_t apart = threads == 1 ? 0 : samples / threads * threads;
  std::atomic<int> stopped{-1};
  if (apart > 0) {
    threads_.run([&](int part, int thread) {
      for (std::int64_t sample = part; sample < apart && stopped < 0; sample += threads) {
        const int at = run_alone(frame(thread, input, output, sample, 0, 1), part == 0 ? seconds : nullptr);
        if (at >= 0) stopped = at;
      }
    });
  }
  for (std::int64_t sample = apart; sample < samples && stopped < 0; ++sample) {
    stopped = run_shared(input, output, sample, seconds);
  }
  return stopped;
}

int Engine::run(const std::uint8_t* input, std::uint8_t* output, std::int64_t samples) {
  const std::scoped_lock lock(running_);
  prepare();
  return run_samples(input, output, samples, nullptr);
}

std::vector<double> Engine::time(const std::uint8_t* input, std::int64_t samples, int repeats) {
  const std::scoped_lock lock(running_);
  prepare();
  std::vector<std::uint8_t> output(sample_out_ * static_cast<std::size_t>(samples));
  std::vector<double> least(steps_.size(), std::numeric_limits<double>::infinity());
  for (int i = 0; i < repeats; ++i) {
    std::vector<double> seconds(steps_.size(), 0.0);
    if (run_samples(input, output.data(), samples, seconds.data()) >= 0) break;
    for (std::size_t step = 0; step < least.size(); ++step)
      least[step] = std::min(least[step], seconds[step]);
  }
  return least;
}

}  // namespace mixbits
