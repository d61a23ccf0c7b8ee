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
  for (int part = 1; part < count; ++part) workers_.emplace_back([this, part] { serve(part); });
}

Threads::~Threads() {
  ending_ = true;
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Threads::run(const std::function<void(int)>& work) {
  if (workers_.empty()) return work(0);
  work_ = &work;
  busy_.store(static_cast<std::uint32_t>(workers_.size()), std::memory_order_relaxed);
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  work(0);
  for (std::uint32_t left; (left = busy_.load(std::memory_order_acquire)) != 0;) await_change(busy_, left);
}

void Threads::serve(int part) {
  for (std::uint32_t seen = 0;; ++seen) {
    await_change(round_, seen);
    if (ending_) return;
    (*work_)(part);
    if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) busy_.notify_one();
  }
}

}  // namespace mixbits
