// Windows over the last one or two dimensions: runtime/moves.py and runtime/pools.py define them; and
// bilinear interpolation (runtime/reductions.py), which goes over the same pixels.
//
// Maxima of bytes are taken as bytes: levels increase with them. Sums of bytes are exact integers; sums of
// floats are double, in the definition's order except where said.
#pragma once

#include "engine/tensor.h"

namespace mixbits {

struct Windows {
  int dims = 2;  // one or two
  std::int64_t kernel[2] = {}, stride[2] = {}, padding[2] = {}, dilation[2] = {};
};

// How many windows fit a dimension of `size` (core/infer.py, window_count).
std::int64_t window_count(std::int64_t size, std::int64_t kernel, std::int64_t stride, std::int64_t padding,
                          std::int64_t dilation, bool ceil);

// Largest element; nothing but padding gives minus infinity, or the lowest level. Output of the input's type.
void max_pool(const Tensor& input, const Tensor& output, const Windows& windows, Part part);
void adaptive_max_pool(const Tensor& input, const Tensor& output, int dims, Part part);

// Mean; `divisor` 0 stands for the elements of each window, with padding or without. Output of floats.
void avg_pool(const Tensor& input, const Tensor& output, const Windows& windows, bool include_pad,
              std::int64_t divisor, Part part);
// Sums go row after row; the definition sums columns first, which may differ in the last bit of a double.
void adaptive_avg_pool(const Tensor& input, const Tensor& output, int dims, Part part);

// Interpolation over the last two dimensions, with weights in double. Output of floats.
void upsample_bilinear(const Tensor& input, const Tensor& output, bool align_corners, Part part);

}  // namespace mixbits
