// Memory as kernels want it: aligned, zeroed, with readable bytes behind it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>

#include "kernels/kernel.h"

namespace mixbits {

class Aligned {
 public:
  Aligned() = default;
  explicit Aligned(std::size_t bytes)
      : size_(bytes),
        data_(static_cast<std::uint8_t*>(::operator new(allocated(bytes), std::align_val_t{kAlign}))) {
    std::memset(data_, 0, allocated(bytes));
  }
  Aligned(Aligned&& other) noexcept
      : size_(std::exchange(other.size_, 0)), data_(std::exchange(other.data_, nullptr)) {}
  Aligned& operator=(Aligned&& other) noexcept {
    std::swap(size_, other.size_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~Aligned() { ::operator delete(data_, std::align_val_t{kAlign}); }

  std::uint8_t* data() const { return data_; }
  std::size_t size() const { return size_; }
  // What it takes, with the bytes behind it.
  std::size_t allocated() const { return data_ == nullptr ? 0 : allocated(size_); }
  static constexpr std::size_t allocated(std::size_t bytes) { return bytes + kSlack; }

 private:
  std::size_t size_ = 0;
  std::uint8_t* data_ = nullptr;
};

}  // namespace mixbits
