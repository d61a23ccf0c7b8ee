#include "engine/operations.h"

#include <algorithm>
#include <utility>

#include "engine/elementwise.h"
#include "engine/make.h"

namespace mixbits {

Shape shape_of(const Tensor& tensor) { return {tensor.shape, tensor.shape + tensor.rank}; }

Shape broadcast(const std::vector<Shape>& shapes) {
  std::size_t rank = 0;
  for (const Shape& shape : shapes) rank = std::max(rank, shape.size());
  Shape out(rank, 1);
  for (const Shape& shape : shapes) {
    for (std::size_t dim = 0; dim < shape.size(); ++dim) {
      std::int64_t& size = out[rank - shape.size() + dim];
      need(size == 1 || shape[dim] == 1 || size == shape[dim],
           words(shapes.front()) + " and " + words(shape) + " do not fit each other");
      if (size == 1) size = shape[dim];
    }
  }
  return out;
}

void need_inputs(Inputs inputs, std::size_t count) {
  need(inputs.size() == count,
       "it has " + std::to_string(count) + " inputs, not " + std::to_string(inputs.size()));
}

void need_shape(const Tensor& output, const Shape& wanted) {
  need(shape_of(output) == wanted, "output is " + words(shape_of(output)) + ", wanted is " + words(wanted));
}

void need_floats(const Tensor& output) { need(!output.is_byte(), "its output is floats"); }

void floats_out(const Tensor&, const Tensor& output) { need_floats(output); }

void need_movable(const Tensor& input, const Tensor& output) {
  need(input.is_byte() || !output.is_byte(), "its input is floats, its output is bytes");
}

void need_same_bytes(const Tensor& input, const Tensor& output) {
  const bool same = input.type == output.type &&
                    (!input.is_byte() || (input.scale == output.scale && input.offset == output.offset));
  need(same, "its output is not stored as its input is");
}

void need_dim(std::int64_t dim, const Tensor& tensor) {
  need(dim < tensor.rank,
       "dimension " + std::to_string(dim) + " does not exist in " + words(shape_of(tensor)));
}

Operation make_operation(const std::string& name, const Attributes& attributes) {
  Reader reader(name, attributes);
  Operation operation;
  if (Elements function = unary(name)) {
    operation = pointwise(std::move(function), 1);
  } else if (Elements both = binary(name)) {
    operation = pointwise(std::move(both), 2);
  } else {
    const Maker* found = nullptr;
    for (const auto& makers : {element_makers(), move_makers(), window_makers(), sum_makers()}) {
      for (const Maker& maker : makers) found = maker.name == name ? &maker : found;
    }
    need(found != nullptr, "there is no operation " + name);
    operation = found->make(reader);
  }
  reader.done();
  for (const auto& [key, value] : attributes) {
    if (const auto* constant = std::get_if<Constant>(&value)) {
      operation.constant_bytes += sizeof(float) * constant->values.size();
    }
  }
  return operation;
}

std::vector<std::string> operation_names() {
  std::vector<std::string> names;
  for (const auto& own : {unary_names(), binary_names()}) names.insert(names.end(), own.begin(), own.end());
  for (const auto& makers : {element_makers(), move_makers(), window_makers(), sum_makers()}) {
    for (const Maker& maker : makers) names.emplace_back(maker.name);
  }
  return names;
}

}  // namespace mixbits
