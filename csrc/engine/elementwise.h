// Operations on single elements: runtime/elementwise.py defines them.
//
// Arithmetic, clamps and piecewise linear functions are float32, every operation rounded by itself, and equal
// the definition bit for bit (but for the sign of a zero that a maximum or minimum chooses). Transcendental
// functions are evaluated in double and rounded once; they differ from the definition only where the math
// libraries differ in the last bits of a double.
#pragma once

#include <functional>
#include <span>
#include <string_view>
#include <vector>

#include "engine/tensor.h"

namespace mixbits {

// Values of `count` elements, at most kChunk: out[i] from in[0][i], in[1][i] and so on. `out` may be one of
// them.
using Elements = std::function<void(std::int64_t count, const float* const* in, float* out)>;

// Functions without attributes, of one and of two inputs; empty if there is none of that name.
Elements unary(std::string_view name);
Elements binary(std::string_view name);
std::vector<std::string_view> unary_names();
std::vector<std::string_view> binary_names();

// With attributes. A limit that is an infinity does nothing.
Elements clamp(float low, float high);
Elements gelu(bool tanh);
Elements elu(double alpha, double scale, double input_scale);
Elements leaky_relu(float slope);
Elements softplus(double beta, double threshold);
Elements prelu();       // of x and slope
Elements batch_norm();  // of x, scale and shift

inline constexpr int kMostInputs = 3;

// Applies a function to one to kMostInputs inputs, which broadcast to the output's shape; the output is
// floats. The output may be an input of the same strides.
void elementwise(const Elements& function, std::span<const Tensor> inputs, const Tensor& output, Part part);

}  // namespace mixbits
