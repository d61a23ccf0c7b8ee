// Threads that wait for work: they spin for some microseconds, then sleep, so that an idle engine costs
// nothing and a core that is taken away does not stall the others for long.
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

  // Calls work(part) for each part 0 .. count - 1, on as many threads, and returns when all have returned.
  // `work` must not throw. Not for two callers at a time.
  void run(const std::function<void(int)>& work);

 private:
  void serve(int part);

  std::vector<std::thread> workers_;
  const std::function<void(int)>* work_ = nullptr;
  std::atomic<std::uint32_t> round_{0};  // raised by one: there is work
  std::atomic<std::uint32_t> busy_{0};   // workers that have not finished it
  std::atomic<bool> ending_{false};
};

}  // namespace mixbits
