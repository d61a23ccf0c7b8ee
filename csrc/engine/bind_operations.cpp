#include "engine/bind_operations.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "engine/operations.h"

namespace nb = nanobind;

namespace mixbits {
namespace {

using ConstFloats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;

// A NumPy array as a tensor, which keeps the array alive.
struct Held {
  Tensor tensor;
  nb::object array;
  bool writable;
};

template <class Array>
Tensor described(const Array& array, bool bytes) {
  if (array.ndim() > kMaxRank) {
    throw nb::value_error(("a tensor has at most " + std::to_string(kMaxRank) + " dimensions").c_str());
  }
  Tensor tensor{.data = const_cast<void*>(static_cast<const void*>(array.data())),
                .type = bytes ? Type::byte : Type::float32,
                .rank = static_cast<int>(array.ndim())};
  for (int dim = 0; dim < tensor.rank; ++dim) {
    tensor.shape[dim] = static_cast<std::int64_t>(array.shape(dim));
    tensor.strides[dim] = array.stride(dim);
  }
  return tensor;
}

// Whether no two elements share memory, as far as strides show it: ordered, each goes beyond those inside.
bool distinct(const Tensor& tensor) {
  std::array<int, kMaxRank> order{};
  int count = 0;
  for (int dim = 0; dim < tensor.rank; ++dim) {
    if (tensor.shape[dim] == 0) return true;
    if (tensor.shape[dim] == 1) continue;
    int at = count++;
    for (; at > 0 && std::abs(tensor.strides[order[at - 1]]) > std::abs(tensor.strides[dim]); --at) {
      order[at] = order[at - 1];
    }
    order[at] = dim;
  }
  std::int64_t extent = 0;
  for (int k = 0; k < count; ++k) {
    const std::int64_t stride = std::abs(tensor.strides[order[k]]);
    if (stride <= extent) return false;
    extent += stride * (tensor.shape[order[k]] - 1);
  }
  return true;
}

void make_tensor(Held* held, const nb::object& array, int scale, int offset, float step, int lowest) {
  if (scale < 1 || scale > 2 || offset < -255 || offset > 255 || lowest < 0 || lowest > 255) {
    throw nb::value_error("scale is 1 or 2, offset -255 .. 255, lowest 0 .. 255");
  }
  nb::ndarray<nb::ro, nb::device::cpu> any;
  if (!nb::try_cast(array, any)) throw nb::value_error("a tensor is a NumPy array");
  const bool bytes = any.dtype() == nb::dtype<std::uint8_t>();
  if (!bytes && any.dtype() != nb::dtype<float>()) {
    throw nb::value_error("a tensor is of float32 or uint8");
  }
  nb::ndarray<nb::device::cpu> ours;
  new (held) Held{described(any, bytes), array, nb::try_cast(array, ours)};
  held->tensor.scale = scale, held->tensor.offset = offset, held->tensor.step = step;
  held->tensor.lowest = static_cast<std::uint8_t>(lowest);
}

Attribute list_of(const std::string& name, const nb::list& list) {
  if (list.size() > 0 && nb::isinstance<nb::list>(list[0])) {
    std::vector<std::array<std::int64_t, 2>> pairs;
    for (const nb::handle entry : list) {
      std::vector<std::int64_t> pair;
      if (!nb::try_cast(entry, pair) || pair.size() != 2) {
        throw nb::value_error((name + ": it is no list of pairs of integers").c_str());
      }
      pairs.push_back({pair[0], pair[1]});
    }
    return pairs;
  }
  std::vector<std::int64_t> integers;
  for (const nb::handle entry : list) {
    std::string word;
    std::int64_t integer = kBatch;
    const bool batch = nb::isinstance<nb::str>(entry) && nb::cast<std::string>(entry) == "batch";
    if (!batch && (!nb::isinstance<nb::int_>(entry) || !nb::try_cast(entry, integer))) {
      throw nb::value_error((name + ": it is no list of integers").c_str());
    }
    integers.push_back(integer);
  }
  return integers;
}

Attribute attribute_of(const std::string& name, const nb::handle& value) {
  if (value.is_none()) return {};
  if (nb::isinstance<nb::bool_>(value)) return nb::cast<bool>(value);
  if (nb::isinstance<nb::int_>(value)) {
    std::int64_t integer = 0;
    if (!nb::try_cast(value, integer)) throw nb::value_error((name + ": it is too large").c_str());
    return integer;
  }
  if (nb::isinstance<nb::float_>(value)) return nb::cast<double>(value);
  if (nb::isinstance<nb::str>(value)) return nb::cast<std::string>(value);
  if (nb::isinstance<nb::list>(value)) return list_of(name, nb::cast<nb::list>(value));
  ConstFloats array;
  if (!nb::try_cast(value, array)) {
    throw nb::value_error((name + ": it is no number, word, list or contiguous float32 array").c_str());
  }
  Constant constant;
  for (std::size_t dim = 0; dim < array.ndim(); ++dim) {
    constant.shape.push_back(static_cast<std::int64_t>(array.shape(dim)));
  }
  constant.values.assign(array.data(), array.data() + array.size());
  return constant;
}

void make(Operation* operation, const std::string& name, const nb::dict& dict) {
  Attributes attributes;
  for (const auto& [key, value] : dict) {
    const auto own = nb::cast<std::string>(key);
    attributes[own] = attribute_of(name + ": attribute " + own, value);
  }
  new (operation) Operation(make_operation(name, attributes));
}

void run(const Operation& operation, const std::vector<Held>& held, const Held& output, int parts) {
  if (!output.writable || !distinct(output.tensor)) {
    throw nb::value_error("the output cannot be written, or its elements share memory");
  }
  if (parts < 1) throw nb::value_error("there is one part or more");
  std::vector<Tensor> inputs;
  for (const Held& input : held) inputs.push_back(input.tensor);
  operation.check(inputs, output.tensor);
  const nb::gil_scoped_release released;
  const auto scratch = std::make_unique<double[]>(operation.scratch_bytes(inputs) / sizeof(double) + 1);
  for (int part = 0; part < parts; ++part) {
    operation.run(inputs, output.tensor, reinterpret_cast<std::byte*>(scratch.get()), {part, parts});
  }
}

}  // namespace

void bind_operations(nb::module_& module) {
  nb::class_<Held>(module, "Tensor", "An array of float32, or of bytes of levels: csrc/engine/tensor.h.")
      .def("__init__", &make_tensor, nb::arg("array"), nb::kw_only(), nb::arg("scale") = 1,
           nb::arg("offset") = 0, nb::arg("step") = 1.0F, nb::arg("lowest") = 0);
  nb::class_<Operation>(module, "Operation", "An instruction made ready: csrc/engine/operations.h.")
      .def("__init__", &make, nb::arg("name"), nb::arg("attributes"))
      .def("__call__", &run, nb::arg("inputs"), nb::arg("output"), nb::arg("parts") = 1,
           "Compute the output, as `parts` threads would, one after the other.");
  module.def("operation_names", &operation_names, "The instructions that there are operations of.");
}

}  // namespace mixbits
