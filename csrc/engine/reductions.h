// Reductions over dimensions, softmax and norms: runtime/pools.py (mean) and runtime/reductions.py.
//
// Sums of bytes are exact integers. Sums of floats are double and rounded to float32 once; their order
// differs from the definition's, so a result may be the next float32 where the sum lies within the error of a
// double of a tie. A result's order of summation never depends on the parts.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/tensor.h"

namespace mixbits {

enum class Reduction : std::uint8_t { mean, sum, max };

// Over the dimensions whose bits are set in `dims`, which are of size one in the output. Output of floats.
void reduce(Reduction reduction, const Tensor& input, const Tensor& output, unsigned dims, Part part);

// Along one dimension, which is not empty. `scratch`: line_scratch bytes of the dimension's size.
void softmax(const Tensor& input, const Tensor& output, int dim, bool logarithm, std::byte* scratch,
             Part part);

// Mean 0 and variance 1 over the last `dims` dimensions, then times `weight` plus `bias` of their shape, in
// row order; either may be null. `scratch`: line_scratch bytes of their elements.
void layer_norm(const Tensor& input, const Tensor& output, int dims, const float* weight, const float* bias,
                double eps, std::byte* scratch, Part part);

// [n, C, ...] over each of `groups` groups of channels and all that follows; weight and bias [C] or null.
// `scratch`: line_scratch bytes of a group's elements.
void group_norm(const Tensor& input, const Tensor& output, std::int64_t groups, const float* weight,
                const float* bias, double eps, std::byte* scratch, Part part);

inline std::size_t line_scratch(std::int64_t elements) {
  return static_cast<std::size_t>(elements) * sizeof(double);
}

}  // namespace mixbits
