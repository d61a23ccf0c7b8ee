// Every instruction but the integer layers (quantize, conv1d, conv2d, linear) as an operation on tensors,
// made once from its attributes and then run any number of times, by any number of threads.
#pragma once

#include <cstddef>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "engine/attributes.h"
#include "engine/tensor.h"

namespace mixbits {

struct Operation {
  // Throws std::invalid_argument unless tensors of these shapes and types are what it computes: to be called
  // once, before it runs on them.
  std::function<void(std::span<const Tensor> inputs, const Tensor& output)> check;
  // Scratch of each part, which is aligned as doubles are.
  std::function<std::size_t(std::span<const Tensor> inputs)> scratch_bytes;
  std::function<void(std::span<const Tensor> inputs, const Tensor& output, std::byte* scratch, Part part)>
      run;
  std::size_t constant_bytes = 0;  // of the constants that it keeps
};

// Throws std::invalid_argument, in words that name the instruction and the attribute.
Operation make_operation(const std::string& name, const Attributes& attributes);

// The instructions that there are operations of.
std::vector<std::string> operation_names();

}  // namespace mixbits
