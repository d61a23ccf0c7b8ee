#include "engine/threads.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mixbits {
namespace {

constexpr int kSpins = 2000;  // some 30 microseconds

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until `value` is no longer `old`.
void await_change(const std::atomic<std::uint32_t>& value, std::uint32_t old) {
  for (int i = 0; i < kSpins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause();
  }
  value.wait(old, std::memory_order_acquire);
}

}  // namespace

Threads::Threads(int count) {
  for (int thread = 1; thread < count; ++thread) workers_.emplace_back([this, thread] { serve(thread); });
}

Threads::~Threads() {
  ending_ = true;
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Threads::run(const std::function<void(int, int)>& work) {
  if (workers_.empty()) return work(0, 0);
  work_ = &work;
  left_.store(static_cast<std::uint32_t>(count()), std::memory_order_relaxed);
  const std::uint32_t round = round_.load(std::memory_order_relaxed) + 1;
  next_.store(std::uint64_t{round} << 32, std::memory_order_release);
  round_.store(round, std::memory_order_release);
  round_.notify_all();
  take_parts(0);
  for (std::uint32_t left; (left = left_.load(std::memory_order_acquire)) != 0;) await_change(left_, left);
}

void Threads::serve(int thread) {
  for (std::uint32_t seen = 0;;) {
    await_change(round_, seen);
    if (ending_) return;
    seen = round_.load(std::memory_order_acquire);
    take_parts(thread);
  }
}

// A part that was taken keeps its round open, so `work_` is that round's for as long as it is used.
void Threads::take_parts(int thread) {
  std::uint64_t next = next_.load(std::memory_order_acquire);
  while (static_cast<int>(next & 0xFFFFFFFF) < count()) {
    if (!next_.compare_exchange_weak(next, next + 1, std::memory_order_acq_rel)) continue;
    (*work_)(static_cast<int>(next & 0xFFFFFFFF), thread);
    if (left_.fetch_sub(1, std::memory_order_acq_rel) == 1) left_.notify_one();
    next = next_.load(std::memory_order_acquire);
  }
}

}  // namespace mixbits
