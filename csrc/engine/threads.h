// Threads that wait for work: they spin for some microseconds, then sleep, so that an idle engine costs
// nothing.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace mixbits {

class Threads {
 public:
  // The calling thread is one of `count`.
  explicit Threads(int count);
  ~Threads();
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

  int count() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls work(part, thread) for each part 0 .. count() - 1 and returns when all have returned. Whoever is
  // there takes the next part: a thread whose core was taken away holds nobody up, unless it was taken away
  // within a part. `work` must not throw. Not for two callers at a time.
  void run(const std::function<void(int part, int thread)>& work);

 private:
  void serve(int thread);
  void take_parts(int thread);

  std::vector<std::thread> workers_;
  const std::function<void(int, int)>* work_ = nullptr;
  std::atomic<std::uint64_t> next_{0};  // round in the upper half, next part in the lower
  std::atomic<std::uint32_t> round_{0};
  std::atomic<std::uint32_t> left_{0};  // parts that have not returned
  std::atomic<bool> ending_{false};
};

}  // namespace mixbits
