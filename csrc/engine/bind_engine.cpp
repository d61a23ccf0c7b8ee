#include "engine/bind_engine.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "engine/rounding.h"
#include "engine/steps.h"
#include "kernels/registry.h"

namespace nb = nanobind;

namespace mixbits {
namespace {

using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using OutFloats = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using Levels = nb::ndarray<const std::int16_t, nb::ndim<4>, nb::c_contig, nb::device::cpu>;

// A vector with zeros behind it up to so many bytes.
Aligned padded(const Floats& values, std::size_t size, std::size_t bytes, const char* name) {
  if (values.size() != size) {
    throw nb::value_error((std::string(name) + " has " + std::to_string(values.size()) + " entries, not " +
                           std::to_string(size))
                              .c_str());
  }
  Aligned copy(bytes);
  std::memcpy(copy.data(), values.data(), sizeof(float) * size);
  return copy;
}

// The kernel of a name, if it can compute a step's convolution.
const Kernel& accepting(const LayerStep& step, const std::string& name) {
  const Kernel* kernel = kernel_named(name.c_str());
  if (kernel == nullptr || !usable(kernel->isa))
    throw nb::value_error(("kernel " + name + " cannot run here").c_str());
  if (const char* why = kernel->refuses(step.conv))
    throw nb::value_error(("kernel " + name + ": " + why).c_str());
  return *kernel;
}

// Bytes of weights, scale, bias and tables, and of scratch, that a step will take with a kernel.
std::pair<std::size_t, std::size_t> needs(LayerStep& step, const std::string& name) {
  step.kernel = &accepting(step, name);
  return {step.planned_bytes(), step.scratch_bytes()};
}

void use(LayerStep& step, const std::string& name, const Levels& levels, const Floats& scale,
         const Floats& bias) {
  const Kernel& kernel = accepting(step, name);
  const auto outputs = static_cast<std::size_t>(step.conv.groups) * step.conv.o;
  if (levels.shape(0) != outputs || levels.shape(1) != std::size_t(step.conv.c) ||
      levels.shape(2) != std::size_t(step.conv.kh) || levels.shape(3) != std::size_t(step.conv.kw)) {
    throw nb::value_error("the weight's levels do not fit the convolution");
  }
  step.scale = padded(scale, outputs, step.channel_bytes(), "scale");
  step.bias = padded(bias, outputs, step.channel_bytes(), "bias");
  step.use(kernel, levels.data());
}

template <class T>
std::vector<T> list_of(const nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>& array) {
  return {array.data(), array.data() + array.size()};
}

Rounding codebook(float step,
                  const nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>& thresholds,
                  const Bytes& bytes) {
  if (thresholds.size() < 1 || thresholds.size() > 255 || bytes.size() != thresholds.size() + 1) {
    throw nb::value_error("a codebook has 1 to 255 thresholds and one byte more");
  }
  return codebook_rounding(step, list_of(thresholds), list_of(bytes));
}

template <class T>
void add(Engine& engine, T& step) {
  engine.add(std::make_unique<T>(std::move(step)));
}

int run(Engine& engine, const Floats& input, const OutFloats& output, std::int64_t samples) {
  const nb::gil_scoped_release released;
  return engine.run(reinterpret_cast<const std::uint8_t*>(input.data()),
                    reinterpret_cast<std::uint8_t*>(output.data()), samples);
}

std::vector<double> time(Engine& engine, const Floats& input, std::int64_t samples, int repeats) {
  const nb::gil_scoped_release released;
  return engine.time(reinterpret_cast<const std::uint8_t*>(input.data()), samples, repeats);
}

}  // namespace

void bind_engine(nb::module_& module) {
  nb::enum_<Block>(module, "Block", "Where a value of a run lies.")
      .value("arena", Block::arena)
      .value("input", Block::input)
      .value("output", Block::output)
      .value("constants", Block::constants);
  nb::class_<Place>(module, "Place")
      .def("__init__", [](Place* self, Block block, std::int64_t offset) { new (self) Place{block, offset}; })
      .def_ro("block", &Place::block)
      .def_ro("offset", &Place::offset);
  nb::class_<PixelPlace>(module, "PixelPlace")
      .def("__init__", [](PixelPlace* self, const Place& place, std::int64_t image, std::int64_t row,
                          std::int64_t pixel) { new (self) PixelPlace{place, image, row, pixel}; });
  nb::class_<Border>(module, "Border")
      .def(nb::init<>())
      .def_rw("place", &Border::place)
      .def_rw("images", &Border::images)
      .def_rw("rows", &Border::rows)
      .def_rw("columns", &Border::columns)
      .def_rw("pixel", &Border::pixel)
      .def_rw("top", &Border::top)
      .def_rw("bottom", &Border::bottom)
      .def_rw("left", &Border::left)
      .def_rw("right", &Border::right)
      .def_rw("value", &Border::value)
      .def_rw("channels", &Border::channels);
  nb::class_<Rounding>(module, "Rounding")
      .def_ro("divide", &Rounding::divide)
      .def_rw("finite", &Rounding::finite);
  module.def("uniform_rounding", &uniform_rounding, nb::arg("step"), nb::arg("level_min"), nb::arg("spacing"),
             nb::arg("last"), nb::arg("byte_step"));
  module.def("codebook_rounding", &codebook, nb::arg("step"), nb::arg("thresholds"), nb::arg("bytes"));
  nb::class_<Step>(module, "Step").def_rw("borders", &Step::borders);
  nb::class_<LayerStep, Step>(module, "LayerStep")
      .def(nb::init<>())
      .def_rw("conv", &LayerStep::conv)
      .def_rw("images", &LayerStep::images)
      .def_rw("input", &LayerStep::input)
      .def_rw("input_image", &LayerStep::input_image)
      .def(
          "pad",
          [](LayerStep& step, int border_level, int pad_y, int pad_x, int size_y, int size_x) {
            step.border_level = border_level;
            step.pad_y = pad_y;
            step.pad_x = pad_x;
            step.size_y = size_y;
            step.size_x = size_x;
          },
          nb::arg("border_level"), nb::arg("pad_y"), nb::arg("pad_x"), nb::arg("size_y"), nb::arg("size_x"))
      .def("add_bytes",
           [](LayerStep& step, const PixelPlace& to, int levels_scale, int levels_offset, float value_step) {
             step.residual_kind = Finish::bytes;
             step.residual = to;
             step.residual_scale = levels_scale;
             step.residual_offset = levels_offset;
             step.residual_step = value_step;
             step.finite_residual = std::isfinite(value_step);
           })
      .def("add_floats",
           [](LayerStep& step, const PixelPlace& to, bool finite) {
             step.residual_kind = Finish::floats;
             step.residual = to;
             step.finite_residual = finite;
           })
      .def("limit",
           [](LayerStep& step, float low, float high) {
             step.limited = true;
             step.low = low;
             step.high = high;
           })
      .def("give_floats",
           [](LayerStep& step, const PixelPlace& to) {
             step.gives_floats = true;
             step.floats = to;
           })
      .def("give_bytes",
           [](LayerStep& step, const PixelPlace& to, const Rounding& rounding) {
             if (step.bytes.size() == kByteMaps)
               throw nb::value_error("a layer gives at most four maps of bytes");
             step.bytes.push_back({to, rounding});
           })
      .def("needs", &needs, nb::arg("kernel"),
           "Bytes that the step will keep and of its scratch, with a kernel: before weights or places are "
           "known.")
      .def("use", &use, nb::arg("kernel"), nb::arg("levels").noconvert(), nb::arg("scale").noconvert(),
           nb::arg("bias").noconvert());
  nb::class_<Operand>(module, "Operand", "A value of a run.")
      .def(
          "__init__",
          [](Operand* self, const Place& place, bool bytes, const std::vector<std::int64_t>& shape,
             const std::vector<std::int64_t>& strides, int scale, int offset, float step, int lowest) {
            if (shape.size() > kMaxRank || shape.size() != strides.size()) {
              throw nb::value_error("a value has at most 8 dimensions, and a stride for each");
            }
            new (self) Operand{
                {.type = bytes ? Type::byte : Type::float32, .rank = static_cast<int>(shape.size())}, place};
            std::copy(shape.begin(), shape.end(), self->tensor.shape);
            std::copy(strides.begin(), strides.end(), self->tensor.strides);
            self->tensor.scale = scale;
            self->tensor.offset = offset;
            self->tensor.step = step;
            self->tensor.lowest = static_cast<std::uint8_t>(lowest);
          },
          nb::arg("place"), nb::arg("bytes"), nb::arg("shape"), nb::arg("strides"), nb::arg("scale"),
          nb::arg("offset"), nb::arg("step"), nb::arg("lowest"));
  nb::class_<RoundStep, Step>(module, "RoundStep")
      .def("__init__", [](RoundStep* self, const Operand& from, const Operand& to, const Rounding& rounding) {
        new (self) RoundStep;
        self->from = from;
        self->to = to;
        self->rounding = rounding;
      });
  nb::class_<CopyStep, Step>(module, "CopyStep")
      .def("__init__", [](CopyStep* self, const Operand& from, const Operand& to) {
        new (self) CopyStep;
        self->from = from;
        self->to = to;
      });
  nb::class_<FillStep, Step>(module, "FillStep").def(nb::init<>());
  nb::class_<OperationStep, Step>(module, "OperationStep")
      .def("__init__",
           [](OperationStep* self, const Operation& operation, const std::vector<Operand>& inputs,
              const Operand& output) {
             std::vector<Tensor> tensors;
             for (const Operand& input : inputs) tensors.push_back(input.tensor);
             operation.check(tensors, output.tensor);
             new (self) OperationStep;
             self->operation = operation;
             self->inputs = inputs;
             self->output = output;
           })
      .def(
          "needs",
          [](const OperationStep& step) { return std::pair(step.kept_bytes(), step.scratch_bytes()); },
          "Bytes of the constants that it keeps, and of its scratch.");
  nb::class_<Engine>(module, "Engine", "A program's steps over one block of memory: csrc/engine/engine.h.")
      .def(
          "__init__",
          [](Engine* self, std::size_t arena, const Bytes& constants, std::size_t sample_in,
             std::size_t sample_out,
             int threads) { new (self) Engine(arena, list_of(constants), sample_in, sample_out, threads); },
          nb::arg("arena"), nb::arg("constants"), nb::arg("sample_in"), nb::arg("sample_out"),
          nb::arg("threads"))
      .def("add", &add<LayerStep>, "Add a step, which is given away.")
      .def("add", &add<RoundStep>)
      .def("add", &add<CopyStep>)
      .def("add", &add<FillStep>)
      .def("add", &add<OperationStep>)
      .def("run", &run, nb::arg("input").noconvert(), nb::arg("output").noconvert(), nb::arg("samples"),
           "The index of a step that met what is not a number, or -1.")
      .def("time", &time, nb::arg("input").noconvert(), nb::arg("samples"), nb::arg("repeats"),
           "Least seconds of each step over runs of so many samples, all samples together.")
      .def(
          "allocated",
          [](const Engine& engine) {
            const Allocated found = engine.allocated();
            return std::tuple(found.arenas, found.scratch, found.weights);
          },
          "Bytes of arenas and scratch, which are there after the first run, and of what steps keep.")
      .def("__len__", &Engine::size);
}

}  // namespace mixbits
