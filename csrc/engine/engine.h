// The engine: a program as a list of steps over one block of memory, run in one call.
//
// The planner (runtime/plan.py) decides what the steps are and where every value lies. A run computes one
// sample after the other; with several threads and fewer samples than threads, the threads share each step's
// work, else each takes samples of its own. Results do not depend on any of that.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engine/memory.h"
#include "engine/threads.h"

namespace mixbits {

// Where a value lies: `offset` bytes into one of the blocks of a run.
enum class Block : std::uint8_t { arena, input, output, constants };
inline constexpr int kBlocks = 4;

struct Place {
  Block block = Block::arena;
  std::int64_t offset = 0;
};

// What a step works on: the blocks, and its thread's share.
struct Frame {
  std::uint8_t* blocks[kBlocks];
  std::uint8_t* scratch;  // of this thread
  int part, parts;

  std::uint8_t* at(Place place) const { return blocks[static_cast<int>(place.block)] + place.offset; }
  // This thread's share of `count` pieces of work.
  std::int64_t begin(std::int64_t count) const { return count * part / parts; }
  std::int64_t end(std::int64_t count) const { return count * (part + 1) / parts; }
};

// A map of bytes [images][rows][columns][pixel] whose borders hold one value.
struct Border {
  Place place;  // of the first byte, borders included
  std::int64_t images = 1, rows = 0, columns = 0, pixel = 0;
  std::int64_t top = 0, bottom = 0, left = 0, right = 0;
  std::uint8_t value = 0;
  std::int64_t channels = 0;  // bytes of a pixel that get the value; the rest are 0

  void fill(const Frame& frame) const;
};

class Step {
 public:
  virtual ~Step() = default;
  // False if a value that is to be rounded is not a number.
  virtual bool run(const Frame& frame) const = 0;
  virtual std::size_t scratch_bytes() const { return 0; }
  // Of weights and constants that it keeps.
  virtual std::size_t kept_bytes() const { return 0; }

  std::vector<Border> borders;  // of what it writes
};

// Bytes that an engine holds: the values of a sample and the scratch of a step, of all threads, and what
// steps keep.
struct Allocated {
  std::size_t arenas = 0, scratch = 0, weights = 0;
};

class Engine {
 public:
  Engine(std::size_t arena_bytes, std::vector<std::uint8_t> constants, std::size_t sample_in,
         std::size_t sample_out, int threads);

  void add(std::unique_ptr<Step> step) { steps_.push_back(std::move(step)); }
  std::size_t size() const { return steps_.size(); }

  // `samples` inputs to outputs. The index of a step that met what is not a number, or -1. One caller at a
  // time goes on, others wait.
  int run(const std::uint8_t* input, std::uint8_t* output, std::int64_t samples);

  // Least seconds of each step over `repeats` runs of `samples` inputs, those of all samples together. Where
  // threads take samples of their own, the first thread's.
  std::vector<double> time(const std::uint8_t* input, std::int64_t samples, int repeats);

  // Counted where they are; there are no arenas and no scratch before the first run.
  Allocated allocated() const;

 private:
  struct Worker {
    Aligned arena, scratch;
  };

  void prepare();
  Frame frame(int worker, const std::uint8_t* input, std::uint8_t* output, std::int64_t sample, int part,
              int parts) const;
  // These add to the `seconds` of each step, unless null.
  int run_samples(const std::uint8_t* input, std::uint8_t* output, std::int64_t samples, double* seconds);
  int run_alone(const Frame& frame, double* seconds) const;
  int run_shared(const std::uint8_t* input, std::uint8_t* output, std::int64_t sample, double* seconds);

  std::size_t arena_bytes_, sample_in_, sample_out_;
  Aligned constants_;
  std::vector<std::unique_ptr<Step>> steps_;
  std::vector<Worker> workers_;
  Threads threads_;
  std::mutex running_;
};

}  // namespace mixbits
