// How operations are made: what the families in make_*.cpp share.
#pragma once

#include <span>
#include <string_view>
#include <vector>

#include "engine/attributes.h"
#include "engine/elementwise.h"
#include "engine/operations.h"

namespace mixbits {

using Inputs = std::span<const Tensor>;

struct Maker {
  std::string_view name;
  Operation (*make)(Reader& reader);
};
std::span<const Maker> element_makers();  // but for those of elementwise.h without attributes
std::span<const Maker> move_makers();
std::span<const Maker> window_makers();
std::span<const Maker> sum_makers();

// An operation that applies a function to each element of `inputs` tensors.
Operation pointwise(Elements function, std::size_t inputs);

// What checks are made of.
Shape shape_of(const Tensor& tensor);
Shape broadcast(const std::vector<Shape>& shapes);
void need_inputs(Inputs inputs, std::size_t count);
void need_shape(const Tensor& output, const Shape& wanted);
void need_floats(const Tensor& output);
void need_dim(std::int64_t dim, const Tensor& tensor);
// Of an input and an output: floats from anything; bytes from bytes; or stored alike.
void floats_out(const Tensor& input, const Tensor& output);
void need_movable(const Tensor& input, const Tensor& output);
void need_same_bytes(const Tensor& input, const Tensor& output);

inline std::size_t no_scratch(Inputs) { return 0; }

// An operation of one input, without scratch: `rule(input, output)` is the output's shape, `types` checks
// what both are stored as.
template <class Rule, class Types, class Run>
Operation of_one(Rule rule, Types types, Run run) {
  return {
      .check =
          [rule, types](Inputs in, const Tensor& output) {
            need_inputs(in, 1);
            types(in[0], output);
            need_shape(output, rule(in[0], output));
          },
      .scratch_bytes = no_scratch,
      .run = [run](Inputs in, const Tensor& output, std::byte*, Part part) { run(in[0], output, part); },
  };
}

}  // namespace mixbits
