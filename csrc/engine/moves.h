// Moving elements: runtime/moves.py. Most moves are other strides over the same memory (the functions that
// return tensors); what is left is copied.
#pragma once

#include <optional>
#include <span>

#include "engine/tensor.h"

namespace mixbits {

// Views: the same memory, seen otherwise.
Tensor permuted(const Tensor& tensor, std::span<const std::int64_t> dims);
Tensor sliced(const Tensor& tensor, int dim, std::int64_t start, std::int64_t stop, std::int64_t step = 1);
Tensor selected(const Tensor& tensor, int dim, std::int64_t index);
// Of a shape that the tensor broadcasts to.
Tensor expanded(const Tensor& tensor, std::span<const std::int64_t> shape);
// Of a shape with as many elements, in row order; nothing if strides cannot express it.
std::optional<Tensor> reshaped(const Tensor& tensor, std::span<const std::int64_t> shape);

// Copies an input to an output of its shape: floats, bytes that stand for the same levels in a scale and
// offset of their own, or bytes to the floats they stand for.
void copy(const Tensor& input, const Tensor& output, Part part);

// Copies elements in row order between shapes with as many elements.
void reshape(const Tensor& input, const Tensor& output, Part part);

enum class Padding : std::uint8_t { constant, reflect, edge, wrap };
struct Pads {
  std::int64_t before[kMaxRank], after[kMaxRank];  // negative ones cut (constant only)
};
// `value` is what a constant padding holds; of bytes it is level 0, whatever `value`.
void pad(const Tensor& input, const Tensor& output, const Pads& pads, Padding mode, float value, Part part);

// Along the last `dims` dimensions output element i is input element floor(i * size_in / size_out).
void upsample_nearest(const Tensor& input, const Tensor& output, int dims, Part part);

// Inputs one after the other along a dimension.
void cat(std::span<const Tensor> inputs, const Tensor& output, int dim, Part part);

}  // namespace mixbits
