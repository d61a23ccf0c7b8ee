// Walking strided tensors: lines of elements along the dimension that is innermost in memory.
#pragma once

#include <cstdlib>
#include <utility>

#include "engine/tensor.h"

namespace mixbits {

// Elements that are worked on at a time: what is read is made contiguous floats in buffers of this size,
// which stay in the first cache.
inline constexpr std::int64_t kChunk = 512;

// The positions of N tensors of one shape: dimensions of size one are gone, the others ordered and merged so
// that the last one is the line.
template <int N>
struct Loops {
  int rank = 0;  // at least 1
  std::int64_t shape[kMaxRank];
  std::int64_t strides[N][kMaxRank];
  std::int64_t start[N] = {};  // offset of the first element
};

// The loops over dimensions [first, last) of tensors of one shape but for sizes of one, which repeat (shapes
// are aligned at their last dimension, ranks may differ from that of the last tensor, which has the full
// shape). Dimensions are ordered by the strides of tensor `by`.
template <int N>
Loops<N> loops_over(const Tensor* const (&tensors)[N], int by, int first, int last) {
  const Tensor& whole = *tensors[N - 1];
  Loops<N> loops;
  for (int dim = first; dim < last; ++dim) {
    if (whole.shape[dim] == 1) continue;
    std::int64_t strides[N];
    for (int k = 0; k < N; ++k) {
      const int own = dim - whole.rank + tensors[k]->rank;
      strides[k] = own < 0 || tensors[k]->shape[own] == 1 ? 0 : tensors[k]->strides[own];
    }
    int at = loops.rank++;
    for (; at > 0 && std::abs(loops.strides[by][at - 1]) < std::abs(strides[by]); --at) {
      loops.shape[at] = loops.shape[at - 1];
      for (int k = 0; k < N; ++k) loops.strides[k][at] = loops.strides[k][at - 1];
    }
    loops.shape[at] = whole.shape[dim];
    for (int k = 0; k < N; ++k) loops.strides[k][at] = strides[k];
  }
  if (loops.rank == 0) {
    loops.rank = 1;
    loops.shape[0] = 1;
    for (int k = 0; k < N; ++k) loops.strides[k][0] = 1;
  }
  int kept = 0;  // the dimension that later ones are merged into
  for (int dim = 1; dim < loops.rank; ++dim) {
    bool merges = true;
    for (int k = 0; k < N; ++k) {
      merges &= loops.strides[k][kept] == loops.strides[k][dim] * loops.shape[dim];
    }
    if (merges) {
      loops.shape[kept] *= loops.shape[dim];
    } else {
      loops.shape[++kept] = loops.shape[dim];
    }
    for (int k = 0; k < N; ++k) loops.strides[k][kept] = loops.strides[k][dim];
  }
  loops.rank = kept + 1;
  return loops;
}

// The loops over whole tensors, in the order of the last one.
template <int N>
Loops<N> loops_over(const Tensor* const (&tensors)[N]) {
  return loops_over(tensors, N - 1, 0, tensors[N - 1]->rank);
}

// Confines loops to a part: a range of the outermost dimension that has enough for all, else of the largest.
template <int N>
void confine(Loops<N>& loops, Part part) {
  int dim = 0;
  while (dim < loops.rank && loops.shape[dim] < 8 * part.count) ++dim;
  if (dim == loops.rank) {
    dim = 0;
    for (int other = 1; other < loops.rank; ++other) {
      if (loops.shape[other] > loops.shape[dim]) dim = other;
    }
  }
  const std::int64_t begin = part.begin(loops.shape[dim]), end = part.end(loops.shape[dim]);
  loops.shape[dim] = end - begin;
  for (int k = 0; k < N; ++k) loops.start[k] += begin * loops.strides[k][dim];
}

template <int N>
bool empty(const Loops<N>& loops) {
  for (int dim = 0; dim < loops.rank; ++dim) {
    if (loops.shape[dim] == 0) return true;
  }
  return false;
}

// Calls `line(at)` with the offsets of the first elements of every line.
template <int N, class Line>
void for_lines(const Loops<N>& loops, Line&& line) {
  if (empty(loops)) return;
  std::int64_t index[kMaxRank] = {}, at[N];
  for (int k = 0; k < N; ++k) at[k] = loops.start[k];
  for (;;) {
    line(std::as_const(at));
    int dim = loops.rank - 2;
    for (; dim >= 0; --dim) {
      if (++index[dim] < loops.shape[dim]) {
        for (int k = 0; k < N; ++k) at[k] += loops.strides[k][dim];
        break;
      }
      for (int k = 0; k < N; ++k) at[k] -= loops.strides[k][dim] * (loops.shape[dim] - 1);
      index[dim] = 0;
    }
    if (dim < 0) return;
  }
}

// Offset of element `index` of dimensions [first, last), counted in row order.
inline std::int64_t offset_of(const Tensor& tensor, int first, int last, std::int64_t index) {
  std::int64_t at = 0;
  for (int dim = last - 1; dim >= first; --dim) {
    at += index % tensor.shape[dim] * tensor.strides[dim];
    index /= tensor.shape[dim];
  }
  return at;
}

// The values of `count` elements from offset `at` on, as contiguous numbers: in `buffer`.
template <class Number>
void read(const Tensor& tensor, std::int64_t at, std::int64_t stride, std::int64_t count, Number* buffer) {
  if (tensor.is_byte()) {
    const std::uint8_t* from = tensor.bytes() + at;
    const int scale = tensor.scale, offset = tensor.offset;
    const float step = tensor.step;
    if (stride == 1) {
      for (std::int64_t i = 0; i < count; ++i) {
        buffer[i] = static_cast<float>(scale * from[i] + offset) * step;
      }
    } else {
      for (std::int64_t i = 0; i < count; ++i) {
        buffer[i] = static_cast<float>(scale * from[i * stride] + offset) * step;
      }
    }
    return;
  }
  const float* from = tensor.floats() + at;
  if (stride == 1) {
    for (std::int64_t i = 0; i < count; ++i) buffer[i] = from[i];
  } else if (stride == 0) {
    for (std::int64_t i = 0; i < count; ++i) buffer[i] = *from;
  } else {
    for (std::int64_t i = 0; i < count; ++i) buffer[i] = from[i * stride];
  }
}

// The same, without a copy where the elements are contiguous floats already.
inline const float* floats_at(const Tensor& tensor, std::int64_t at, std::int64_t stride, std::int64_t count,
                              float* buffer) {
  if (!tensor.is_byte() && stride == 1) return tensor.floats() + at;
  read(tensor, at, stride, count, buffer);
  return buffer;
}

// Writes `count` contiguous elements to a line that starts at `to`.
template <class T>
void write(const T* from, T* to, std::int64_t stride, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) to[i * stride] = from[i];
}

}  // namespace mixbits
