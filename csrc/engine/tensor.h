// Values as the engine's operations see them: strided tensors of floats or of bytes that stand for levels.
//
// A layout is strides and nothing else: maps with channels last, views that a permutation, a slice or an
// expansion (stride 0) makes, maps inside a physical border. Memory belongs to others.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mixbits {

inline constexpr int kMaxRank = 8;  // dimensions, as core/instructions.py has it

// byte: level = scale * byte + offset, value = float(level) * step (runtime/kernels.py, bytes_of).
enum class Type : std::uint8_t { float32, byte };

struct Tensor {
  void* data = nullptr;
  Type type = Type::float32;
  int rank = 0;
  std::int64_t shape[kMaxRank] = {};
  std::int64_t strides[kMaxRank] = {};  // in elements; inputs may have negative ones and 0
  // Of bytes only.
  int scale = 1, offset = 0;
  float step = 1;
  std::uint8_t lowest = 0;  // the byte of the grid's lowest level: what an empty window's maximum is

  const float* floats() const { return static_cast<const float*>(data); }
  const std::uint8_t* bytes() const { return static_cast<const std::uint8_t*>(data); }
  bool is_byte() const { return type == Type::byte; }
  int level(std::uint8_t byte) const { return scale * byte + offset; }
  float value(std::uint8_t byte) const { return static_cast<float>(level(byte)) * step; }
  std::int64_t elements() const {
    std::int64_t count = 1;
    for (int dim = 0; dim < rank; ++dim) count *= shape[dim];
    return count;
  }
};

// A share of the work of an operation. Shares may run at the same time; together they write every element of
// the output once, and what they write does not depend on their number.
struct Part {
  int index = 0, count = 1;

  std::int64_t begin(std::int64_t size) const { return size * index / count; }
  std::int64_t end(std::int64_t size) const { return size * (index + 1) / count; }
};

}  // namespace mixbits
