// Products of matrices, and attention: runtime/reductions.py.
//
// Sums are double, in the order of the summed dimension, and rounded to float32 once: the definition's sums
// go in another order, see reductions.h.
#pragma once

#include <cstddef>

#include "engine/tensor.h"

namespace mixbits {

// [..., m, k] times [..., k, n], leading dimensions broadcast. `scratch`: matmul_scratch bytes.
void matmul(const Tensor& a, const Tensor& b, const Tensor& output, std::byte* scratch, Part part);
std::size_t matmul_scratch(const Tensor& a, const Tensor& b);

// softmax(scale * q k^T) v of queries [..., L, E], keys [..., S, E] and values [..., S, V], leading
// dimensions broadcast; causal: query i sees keys 0 .. i. `scratch`: attention_scratch bytes.
void attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& output, double scale,
               bool causal, std::byte* scratch, Part part);
std::size_t attention_scratch(const Tensor& q, const Tensor& k, const Tensor& v);

}  // namespace mixbits
