#include "engine/elementwise.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "engine/loops.h"
#include "engine/vector.h"

namespace mixbits {
namespace {

// Comparisons with NaN are false: these pass it on, as NumPy's do.
float maximum(float x, float y) {
  const float most = x > y ? x : y;
  return x != x ? x : most;
}
float minimum(float x, float y) {
  const float least = x < y ? x : y;
  return x != x ? x : least;
}
float clamped(float x, float low, float high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

// log(1 + exp(x)) without overflow.
double log1p_exp(double x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }

template <class Function>
Elements of_one(Function function) {
  return [function](std::int64_t count, const float* const* in, float* out) {
    const float* x = in[0];
    for (std::int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(function(x[i]));
  };
}

template <class Function>
Elements of_two(Function function) {
  return [function](std::int64_t count, const float* const* in, float* out) {
    const float *x = in[0], *y = in[1];
    for (std::int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(function(x[i], y[i]));
  };
}

// One of the loops that exist for several instruction sets.
Elements of_loops(VectorLoops::Function VectorLoops::* function) {
  return [function](std::int64_t count, const float* const* in, float* out) {
    (vector_loops().*function)(count, in[0], out);
  };
}

// In float32.
const std::pair<std::string_view, Elements> kArithmetic[] = {
    {"abs", of_one([](float x) { return std::fabs(x); })},
    {"neg", of_one([](float x) { return -x; })},
    {"reciprocal", of_one([](float x) { return 1 / x; })},
    {"relu", of_one([](float x) { return x <= 0 ? 0.0F : x; })},
    {"sqrt", of_one([](float x) { return std::sqrt(x); })},
    {"square", of_one([](float x) { return x * x; })},
    {"hardsigmoid", of_one([](float x) { return clamped(x + 3, 0, 6) / 6; })},
    {"hardswish", of_one([](float x) { return x * clamped(x + 3, 0, 6) / 6; })},
};

// In double, rounded once.
const std::pair<std::string_view, Elements> kTranscendental[] = {
    {"cos", of_one([](double x) { return std::cos(x); })},
    {"exp", of_loops(&VectorLoops::exp)},
    {"log", of_one([](double x) { return std::log(x); })},
    {"mish", of_loops(&VectorLoops::mish)},
    {"rsqrt", of_one([](double x) { return 1 / std::sqrt(x); })},
    {"sigmoid", of_loops(&VectorLoops::sigmoid)},
    {"silu", of_loops(&VectorLoops::silu)},
    {"sin", of_one([](double x) { return std::sin(x); })},
    {"tanh", of_loops(&VectorLoops::tanh)},
};

const std::pair<std::string_view, Elements> kBinary[] = {
    {"add", of_two([](float x, float y) { return x + y; })},
    {"sub", of_two([](float x, float y) { return x - y; })},
    {"mul", of_two([](float x, float y) { return x * y; })},
    {"div", of_two([](float x, float y) { return x / y; })},
    {"maximum", of_two(maximum)},
    {"minimum", of_two(minimum)},
    {"pow", of_two([](double x, double y) { return std::pow(x, y); })},
};

template <std::size_t count>
Elements named(const std::pair<std::string_view, Elements> (&functions)[count], std::string_view name) {
  for (const auto& [own, function] : functions) {
    if (own == name) return function;
  }
  return {};
}

// A function of bytes has 256 values: they are computed once and looked up.
void by_table(const Elements& function, const Tensor& in, const Tensor& out, const Loops<2>& loops) {
  float table[256];
  for (int byte = 0; byte < 256; ++byte) table[byte] = in.value(static_cast<std::uint8_t>(byte));
  const float* values = table;
  function(256, &values, table);
  const std::int64_t count = loops.shape[loops.rank - 1];
  const std::int64_t from = loops.strides[0][loops.rank - 1], to = loops.strides[1][loops.rank - 1];
  for_lines(loops, [&](const std::int64_t (&at)[2]) {
    const std::uint8_t* x = in.bytes() + at[0];
    float* y = static_cast<float*>(out.data) + at[1];
    for (std::int64_t i = 0; i < count; ++i) y[i * to] = table[x[i * from]];
  });
}

template <int N>
void on_lines(const Elements& function, std::span<const Tensor> inputs, const Tensor& output, Part part) {
  const Tensor* tensors[N + 1];
  for (int k = 0; k < N; ++k) tensors[k] = &inputs[k];
  tensors[N] = &output;
  auto loops = loops_over(tensors);
  confine(loops, part);
  if constexpr (N == 1) {
    if (inputs[0].is_byte() && output.elements() / part.count >= 1024) {
      return by_table(function, inputs[0], output, loops);
    }
  }
  const int line = loops.rank - 1;
  const std::int64_t to = loops.strides[N][line];
  for_lines(loops, [&](const std::int64_t (&at)[N + 1]) {
    alignas(64) float buffers[N + 1][kChunk];
    for (std::int64_t done = 0; done < loops.shape[line]; done += kChunk) {
      const std::int64_t count = std::min(kChunk, loops.shape[line] - done);
      const float* in[N];
      for (int k = 0; k < N; ++k) {
        const std::int64_t stride = loops.strides[k][line];
        in[k] = floats_at(inputs[k], at[k] + done * stride, stride, count, buffers[k]);
      }
      float* out = static_cast<float*>(output.data) + at[N] + done * to;
      function(count, in, to == 1 ? out : buffers[N]);
      if (to != 1) write(buffers[N], out, to, count);
    }
  });
}

}  // namespace

Elements unary(std::string_view name) {
  Elements function = named(kArithmetic, name);
  return function ? function : named(kTranscendental, name);
}

Elements binary(std::string_view name) { return named(kBinary, name); }

std::vector<std::string_view> unary_names() {
  std::vector<std::string_view> names;
  for (const auto& [name, function] : kArithmetic) names.push_back(name);
  for (const auto& [name, function] : kTranscendental) names.push_back(name);
  return names;
}

std::vector<std::string_view> binary_names() {
  std::vector<std::string_view> names;
  for (const auto& [name, function] : kBinary) names.push_back(name);
  return names;
}

Elements clamp(float low, float high) {
  return of_one([low, high](float x) { return clamped(x, low, high); });
}

Elements gelu(bool tanh) { return of_loops(tanh ? &VectorLoops::gelu_tanh : &VectorLoops::gelu_erf); }

Elements elu(double alpha, double scale, double input_scale) {
  return of_one([scale, input_scale, below = scale * alpha](double x) {
    if (x > 0) return x * scale;
    const double inner = x * input_scale;
    return below * std::expm1(inner > 0 ? 0 : inner);
  });
}

Elements leaky_relu(float slope) {
  return of_one([slope](float x) { return x > 0 ? x : x * slope; });
}

Elements softplus(double beta, double threshold) {
  return of_one([=](double x) { return x * beta > threshold ? x : log1p_exp(x * beta) / beta; });
}

Elements prelu() {
  return of_two([](float x, float slope) { return x > 0 ? x : x * slope; });
}

Elements batch_norm() {
  return [](std::int64_t count, const float* const* in, float* out) {
    const float *x = in[0], *scale = in[1], *shift = in[2];
    for (std::int64_t i = 0; i < count; ++i) out[i] = x[i] * scale[i] + shift[i];
  };
}

void elementwise(const Elements& function, std::span<const Tensor> inputs, const Tensor& output, Part part) {
  switch (inputs.size()) {
    case 1: return on_lines<1>(function, inputs, output, part);
    case 2: return on_lines<2>(function, inputs, output, part);
    default: return on_lines<3>(function, inputs, output, part);
  }
}

}  // namespace mixbits
