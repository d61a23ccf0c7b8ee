#include <algorithm>
#include <limits>
#include <memory>
#include <utility>

#include "engine/elementwise.h"
#include "engine/make.h"
#include "engine/moves.h"

namespace mixbits {
namespace {

// A constant [C] (or of one element) as a tensor that broadcasts over dimension 1 of `rank` dimensions.
Tensor per_channel(const Constant& constant, int rank) {
  Tensor tensor{.data = const_cast<float*>(constant.values.data()), .rank = std::max(rank - 1, 1)};
  std::fill_n(tensor.shape, tensor.rank, 1);
  tensor.shape[0] = static_cast<std::int64_t>(constant.values.size());
  tensor.strides[0] = 1;
  return tensor;
}

Tensor tensor_of(const Constant& constant) {
  Tensor tensor{.data = const_cast<float*>(constant.values.data()),
                .rank = static_cast<int>(constant.shape.size())};
  std::int64_t stride = 1;
  for (int dim = tensor.rank - 1; dim >= 0; --dim) {
    tensor.shape[dim] = constant.shape[dim];
    tensor.strides[dim] = stride;
    stride *= constant.shape[dim];
  }
  return tensor;
}

// Of an input and constants of its channels.
Operation channelwise(Elements function, std::vector<Constant> constants, bool one_is_enough) {
  const auto stored = std::make_shared<const std::vector<Constant>>(std::move(constants));
  return {
      .check =
          [stored, one_is_enough](Inputs in, const Tensor& output) {
            need_inputs(in, 1);
            need_floats(output);
            need_shape(output, shape_of(in[0]));
            for (const Constant& constant : *stored) {
              const Shape channels = {in[0].rank >= 2 ? in[0].shape[1] : -1};
              need(constant.shape == channels || (one_is_enough && constant.shape == Shape{1}),
                   "a constant of shape " + words(constant.shape) + " does not fit the channels of " +
                       words(shape_of(in[0])));
            }
          },
      .scratch_bytes = no_scratch,
      .run =
          [function = std::move(function), stored](Inputs in, const Tensor& output, std::byte*, Part part) {
            Tensor all[kMostInputs] = {in[0]};
            std::size_t count = 1;
            for (const Constant& constant : *stored) all[count++] = per_channel(constant, in[0].rank);
            elementwise(function, {all, count}, output, part);
          },
  };
}

Operation stored(Constant constant) {
  return {
      .check =
          [shape = constant.shape](Inputs in, const Tensor& output) {
            need_inputs(in, 0);
            need_floats(output);
            need_shape(output, shape);
          },
      .scratch_bytes = no_scratch,
      .run = [constant = std::make_shared<const Constant>(std::move(constant))](
                 Inputs, const Tensor& output, std::byte*,
                 Part part) { copy(tensor_of(*constant), output, part); },
  };
}

Operation clamp_of(Reader& reader) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  const auto low = static_cast<float>(reader.maybe_number("low").value_or(-infinity));
  const auto high = static_cast<float>(reader.maybe_number("high").value_or(infinity));
  return pointwise(clamp(low, high), 1);
}

Operation gelu_of(Reader& reader) {
  const std::string approximate = reader.choice("approximate");
  reader.need("approximate", approximate == "none" || approximate == "tanh", "there is no " + approximate);
  return pointwise(gelu(approximate == "tanh"), 1);
}

Operation elu_of(Reader& reader) {
  const double alpha = reader.number("alpha"), scale = reader.number("scale");
  return pointwise(elu(alpha, scale, reader.number("input_scale")), 1);
}

Operation softplus_of(Reader& reader) {
  const double beta = reader.positive("beta");
  return pointwise(softplus(beta, reader.number("threshold")), 1);
}

Operation batch_norm_of(Reader& reader) {
  std::vector<Constant> constants = {reader.constant("scale"), reader.constant("shift")};
  return channelwise(batch_norm(), std::move(constants), false);
}

constexpr Maker kMakers[] = {
    {"constant", [](Reader& reader) { return stored(reader.constant("constant")); }},
    {"scalar", [](Reader& reader) { return stored({{}, {static_cast<float>(reader.number("value"))}}); }},
    {"clamp", clamp_of},
    {"gelu", gelu_of},
    {"elu", elu_of},
    {"softplus", softplus_of},
    {"leaky_relu",
     [](Reader& reader) { return pointwise(leaky_relu(static_cast<float>(reader.number("slope"))), 1); }},
    {"prelu", [](Reader& reader) { return channelwise(prelu(), {reader.constant("slope")}, true); }},
    {"batch_norm", batch_norm_of},
};

}  // namespace

std::span<const Maker> element_makers() { return kMakers; }

Operation pointwise(Elements function, std::size_t inputs) {
  return {
      .check =
          [inputs](Inputs in, const Tensor& output) {
            need_inputs(in, inputs);
            need_floats(output);
            std::vector<Shape> shapes;
            for (const Tensor& tensor : in) shapes.push_back(shape_of(tensor));
            need_shape(output, broadcast(shapes));
          },
      .scratch_bytes = no_scratch,
      .run = [function = std::move(function)](Inputs in, const Tensor& output, std::byte*,
                                              Part part) { elementwise(function, in, output, part); },
  };
}

}  // namespace mixbits
