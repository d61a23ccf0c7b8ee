#include "engine/operations.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string_view>
#include <tuple>
#include <utility>

#include "engine/elementwise.h"
#include "engine/moves.h"
#include "engine/pools.h"
#include "engine/products.h"
#include "engine/reductions.h"

namespace mixbits {
namespace {

using Inputs = std::span<const Tensor>;
using Shape = std::vector<std::int64_t>;

constexpr std::int64_t kMaxSize = 1 << 26;  // MAX_SIZE of core/instructions.py

std::string words(const Shape& shape) {
  std::string text = "[";
  for (const std::int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

void need(bool condition, const std::string& problem) {
  if (!condition) throw std::invalid_argument(problem);
}

// The attributes of one instruction; what is missing, of another kind or left over is an error.
class Reader {
 public:
  Reader(const std::string& name, const Attributes& attributes) : name_(name), left_(attributes) {}

  const std::string& name() const { return name_; }

  bool flag(const char* key) { return as<bool>(key, "true or false"); }
  std::string choice(const char* key) { return as<std::string>(key, "a word"); }
  Constant constant(const char* key) { return as<Constant>(key, "a constant"); }
  std::vector<std::array<std::int64_t, 2>> pairs(const char* key) {
    const Attribute value = take(key);
    if (const auto* none = std::get_if<Shape>(&value); none != nullptr && none->empty()) return {};
    return as<std::vector<std::array<std::int64_t, 2>>>(key, "a list of pairs", value);
  }

  double number(const char* key) { return number(key, take(key)); }
  std::optional<double> maybe_number(const char* key) {
    const Attribute value = take(key);
    if (std::holds_alternative<std::monostate>(value)) return std::nullopt;
    return number(key, value);
  }
  std::shared_ptr<const Constant> maybe_constant(const char* key) {
    const Attribute value = take(key);
    if (std::holds_alternative<std::monostate>(value)) return nullptr;
    return std::make_shared<const Constant>(as<Constant>(key, "a constant or null", value));
  }
  std::int64_t integer(const char* key, std::int64_t low, std::int64_t high = kMaxSize) {
    const auto value = as<std::int64_t>(key, "an integer");
    need(low <= value && value <= high, problem(key) + std::to_string(value) + " is out of range");
    return value;
  }
  std::int64_t maybe_integer(const char* key, std::int64_t low) {
    const auto found = left_.find(key);
    if (found != left_.end() && std::holds_alternative<std::monostate>(found->second)) {
      left_.erase(found);
      return 0;
    }
    return integer(key, low);
  }
  Shape integers(const char* key, std::int64_t low, std::int64_t high = kMaxSize) {
    const auto values = as<Shape>(key, "a list of integers");
    need(values.size() <= kMaxRank, problem(key) + "it has too many entries");
    for (const std::int64_t value : values) {
      need(low <= value && value <= high, problem(key) + std::to_string(value) + " is out of range");
    }
    return values;
  }
  // Sizes of windows' dimensions.
  Shape spatial(const char* key, std::int64_t low) {
    Shape sizes = integers(key, low);
    need(sizes.size() == 1 || sizes.size() == 2, problem(key) + "windows have one or two dimensions");
    return sizes;
  }

  void done() const {
    if (!left_.empty()) throw std::invalid_argument(name_ + ": it has no attribute " + left_.begin()->first);
  }

  std::string problem(const char* key) const { return name_ + ": attribute " + key + ": "; }

 private:
  Attribute take(const char* key) {
    const auto found = left_.find(key);
    if (found == left_.end()) throw std::invalid_argument(problem(key) + "it is missing");
    Attribute value = std::move(found->second);
    left_.erase(found);
    return value;
  }
  template <class T>
  T as(const char* key, const char* kind, const Attribute& value) const {
    if (const T* held = std::get_if<T>(&value)) return *held;
    throw std::invalid_argument(problem(key) + "it is not " + kind);
  }
  template <class T>
  T as(const char* key, const char* kind) {
    return as<T>(key, kind, take(key));
  }
  double number(const char* key, const Attribute& value) const {
    if (const auto* integer = std::get_if<std::int64_t>(&value)) return static_cast<double>(*integer);
    const auto held = as<double>(key, "a number", value);
    need(std::isfinite(held), problem(key) + "it is not finite");
    return held;
  }

  const std::string name_;
  Attributes left_;
};

Shape shape_of(const Tensor& tensor) { return {tensor.shape, tensor.shape + tensor.rank}; }

void need_shape(const Tensor& tensor, const Shape& wanted, const char* what = "output") {
  need(shape_of(tensor) == wanted,
       std::string(what) + " is " + words(shape_of(tensor)) + ", wanted is " + words(wanted));
}

void need_floats(const Tensor& output) { need(!output.is_byte(), "its output is floats"); }

// Codes stay codes, or become floats.
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

std::size_t no_scratch(Inputs) { return 0; }

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

// Operations by family.

Operation pointwise(Elements function, std::size_t inputs) {
  return {
      .check =
          [inputs](Inputs in, const Tensor& output) {
            need(in.size() == inputs, "it has " + std::to_string(inputs) + " inputs");
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

// Of an input and constants of its channels.
Operation channelwise(Elements function, std::vector<Constant> constants, bool one_is_enough) {
  const auto stored = std::make_shared<const std::vector<Constant>>(std::move(constants));
  return {
      .check =
          [stored, one_is_enough](Inputs in, const Tensor& output) {
            need(in.size() == 1, "it has one input");
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

// One input, no scratch; `rule` gives the output's shape.
template <class Rule, class Types, class Run>
Operation of_one(Rule rule, Types types, Run run) {
  return {
      .check =
          [rule, types](Inputs in, const Tensor& output) {
            need(in.size() == 1, "it has one input");
            types(in[0], output);
            need_shape(output, rule(in[0], output));
          },
      .scratch_bytes = no_scratch,
      .run = [run](Inputs in, const Tensor& output, std::byte*, Part part) { run(in[0], output, part); },
  };
}

void floats_out(const Tensor&, const Tensor& output) { need_floats(output); }

// A move that another view of the input expresses.
template <class Rule, class View>
Operation of_view(Rule rule, View view) {
  return of_one(rule, need_movable, [view](const Tensor& input, const Tensor& output, Part part) {
    copy(view(input, output), output, part);
  });
}

Operation stored(Constant constant) {
  return {
      .check =
          [shape = constant.shape](Inputs in, const Tensor& output) {
            need(in.empty(), "it has no input");
            need_floats(output);
            need_shape(output, shape);
          },
      .scratch_bytes = no_scratch,
      .run = [constant = std::make_shared<const Constant>(std::move(constant))](
                 Inputs, const Tensor& output, std::byte*,
                 Part part) { copy(tensor_of(*constant), output, part); },
  };
}

Operation reshape_of(Reader& reader) {
  reader.integers("shape", -1);  // the output's shape says the same
  return of_one(
      [](const Tensor& input, const Tensor& output) {
        need(input.elements() == output.elements(),
             "output is " + words(shape_of(output)) + ", which " + words(shape_of(input)) + " does not fit");
        return shape_of(output);
      },
      need_movable,
      [](const Tensor& input, const Tensor& output, Part part) { reshape(input, output, part); });
}

Operation permute_of(Reader& reader) {
  const Shape dims = reader.integers("dims", 0, kMaxRank - 1);
  Shape sorted = dims;
  std::sort(sorted.begin(), sorted.end());
  for (std::size_t dim = 0; dim < sorted.size(); ++dim) {
    need(sorted[dim] == static_cast<std::int64_t>(dim),
         reader.problem("dims") + words(dims) + " is no order of dimensions");
  }
  return of_view(
      [dims](const Tensor& input, const Tensor&) {
        need(dims.size() == static_cast<std::size_t>(input.rank),
             words(dims) + " does not order the dimensions of " + words(shape_of(input)));
        return shape_of(permuted(input, dims));
      },
      [dims](const Tensor& input, const Tensor&) { return permuted(input, dims); });
}

Operation slice_of(Reader& reader) {
  const auto dim = static_cast<int>(reader.integer("dim", 0, kMaxRank - 1));
  const std::int64_t start = reader.integer("start", 0), stop = reader.integer("stop", 0),
                     step = reader.integer("step", 1);
  const auto view = [=](const Tensor& input, const Tensor&) { return sliced(input, dim, start, stop, step); };
  return of_view(
      [=](const Tensor& input, const Tensor& output) {
        need_dim(dim, input);
        return shape_of(view(input, output));
      },
      view);
}

Operation select_of(Reader& reader) {
  const auto dim = static_cast<int>(reader.integer("dim", 0, kMaxRank - 1));
  const std::int64_t index = reader.integer("index", 0);
  const auto view = [=](const Tensor& input, const Tensor&) { return selected(input, dim, index); };
  return of_view(
      [=](const Tensor& input, const Tensor& output) {
        need_dim(dim, input);
        need(index < input.shape[dim], "index " + std::to_string(index) + " does not exist in dimension " +
                                           std::to_string(dim) + " of " + words(shape_of(input)));
        return shape_of(view(input, output));
      },
      view);
}

Operation expand_of(Reader& reader) {
  const Shape sizes = reader.integers("shape", -1);
  return of_view(
      [sizes](const Tensor& input, const Tensor& output) {
        const auto rank = static_cast<std::size_t>(output.rank);
        need(rank == sizes.size() && input.rank <= output.rank,
             "output is of another rank than its shape says");
        Shape shape = broadcast({shape_of(input), Shape(rank, 1)});
        for (std::size_t dim = 0; dim < rank; ++dim) {
          const std::int64_t size = sizes[dim] == kBatch ? output.shape[dim] : sizes[dim];
          need(size == -1 || shape[dim] == 1 || shape[dim] == size,
               words(shape_of(input)) + " cannot be expanded to " + words(sizes));
          if (size != -1) shape[dim] = size;
        }
        return shape;
      },
      [](const Tensor& input, const Tensor& output) {
        return expanded(input, {output.shape, output.shape + output.rank});
      });
}

Operation pad_of(Reader& reader) {
  const auto entries = reader.pairs("pads");
  need(entries.size() <= kMaxRank, reader.problem("pads") + "it has too many entries");
  Pads pads{};
  for (std::size_t dim = 0; dim < entries.size(); ++dim) {
    for (const std::int64_t width : entries[dim]) {
      need(std::abs(width) <= kMaxSize, reader.problem("pads") + std::to_string(width) + " is out of range");
    }
    std::tie(pads.before[dim], pads.after[dim]) = std::tie(entries[dim][0], entries[dim][1]);
  }
  const std::string mode_name = reader.choice("mode");
  const std::map<std::string, Padding> modes = {{"constant", Padding::constant},
                                                {"reflect", Padding::reflect},
                                                {"edge", Padding::edge},
                                                {"wrap", Padding::wrap}};
  need(modes.count(mode_name) != 0, reader.problem("mode") + "there is no mode " + mode_name);
  const Padding mode = modes.at(mode_name);
  const auto value = static_cast<float>(reader.number("value"));
  const auto rank = entries.size();
  return of_one(
      [=](const Tensor& input, const Tensor&) {
        need(rank == static_cast<std::size_t>(input.rank),
             std::to_string(rank) + " pairs of padding do not fit " + words(shape_of(input)));
        Shape shape = shape_of(input);
        for (std::size_t dim = 0; dim < rank; ++dim) {
          const std::int64_t size = shape[dim], before = pads.before[dim], after = pads.after[dim];
          const std::int64_t most = mode == Padding::constant  ? kMaxSize
                                    : mode == Padding::edge    ? (size > 0 ? kMaxSize : 0)
                                    : mode == Padding::reflect ? std::max<std::int64_t>(size - 1, 0)
                                                               : size;
          const bool cuts = std::min(before, after) < 0;
          need(std::max(before, after) <= most && (!cuts || mode == Padding::constant) &&
                   -std::min<std::int64_t>(before, 0) - std::min<std::int64_t>(after, 0) <=
                       std::max<std::int64_t>(size - 1, 0),
               "its padding does not fit " + words(shape_of(input)));
          shape[dim] += before + after;
        }
        return shape;
      },
      [=](const Tensor& input, const Tensor& output) {
        need_movable(input, output);
        need(!output.is_byte() || mode != Padding::constant ||
                 (value == 0 && output.offset <= 0 && -output.offset % output.scale == 0 &&
                  -output.offset / output.scale <= 255),
             "its output's bytes have none for what it pads with");
      },
      [=](const Tensor& input, const Tensor& output, Part part) {
        pad(input, output, pads, mode, value, part);
      });
}

// The output of sizes `size` in place of the last dimensions.
auto resized(const Shape& size) {
  return [size](const Tensor& input, const Tensor&) {
    Shape shape = shape_of(input);
    need(shape.size() > size.size(), words(shape) + " has too few dimensions");
    for (std::size_t k = 0; k < size.size(); ++k) {
      std::int64_t& own = shape[shape.size() - size.size() + k];
      need(own > 0, "there is nothing in " + words(shape_of(input)));
      own = size[k];
    }
    return shape;
  };
}

Operation upsample_nearest_of(Reader& reader) {
  const Shape size = reader.spatial("size", 1);
  return of_one(resized(size), need_movable,
                [dims = static_cast<int>(size.size())](const Tensor& input, const Tensor& output, Part part) {
                  upsample_nearest(input, output, dims, part);
                });
}

Operation upsample_bilinear_of(Reader& reader) {
  const Shape size = reader.spatial("size", 1);
  need(size.size() == 2, reader.problem("size") + "it has two entries");
  const bool align_corners = reader.flag("align_corners");
  return of_one(resized(size), floats_out, [=](const Tensor& input, const Tensor& output, Part part) {
    upsample_bilinear(input, output, align_corners, part);
  });
}

Operation adaptive_of(Reader& reader, bool max) {
  const Shape size = reader.spatial("size", 1);
  const auto run = max ? adaptive_max_pool : adaptive_avg_pool;
  return of_one(resized(size), max ? need_same_bytes : floats_out,
                [run, dims = static_cast<int>(size.size())](const Tensor& input, const Tensor& output,
                                                            Part part) { run(input, output, dims, part); });
}

Windows windows_of(Reader& reader, bool dilated) {
  const Shape kernel = reader.spatial("kernel", 1), stride = reader.spatial("stride", 1),
              padding = reader.spatial("padding", 0),
              dilation = dilated ? reader.spatial("dilation", 1) : Shape(kernel.size(), 1);
  for (const auto& [key, sizes] :
       {std::pair{"stride", &stride}, std::pair{"padding", &padding}, std::pair{"dilation", &dilation}}) {
    need(sizes->size() == kernel.size(), reader.problem(key) + "it has other dimensions than the kernel");
  }
  Windows windows{.dims = static_cast<int>(kernel.size())};
  for (std::size_t dim = 0; dim < kernel.size(); ++dim) {
    windows.kernel[dim] = kernel[dim], windows.stride[dim] = stride[dim];
    windows.padding[dim] = padding[dim], windows.dilation[dim] = dilation[dim];
    need(2 * padding[dim] <= kernel[dim], reader.problem("padding") + "it is more than half of the window");
  }
  return windows;
}

auto pooled(const Windows& windows, bool ceil) {
  return [windows, ceil](const Tensor& input, const Tensor&) {
    Shape shape = shape_of(input);
    need(input.rank > windows.dims, words(shape) + " has too few dimensions");
    for (int k = 0; k < windows.dims; ++k) {
      std::int64_t& size = shape[shape.size() - windows.dims + k];
      size = window_count(size, windows.kernel[k], windows.stride[k], windows.padding[k], windows.dilation[k],
                          ceil);
      need(size >= 1, "its window does not fit " + words(shape_of(input)));
    }
    return shape;
  };
}

Operation max_pool_of(Reader& reader) {
  const Windows windows = windows_of(reader, true);
  return of_one(pooled(windows, reader.flag("ceil")), need_same_bytes,
                [windows](const Tensor& input, const Tensor& output, Part part) {
                  max_pool(input, output, windows, part);
                });
}

Operation avg_pool_of(Reader& reader) {
  const Windows windows = windows_of(reader, false);
  const bool include_pad = reader.flag("include_pad");
  const std::int64_t divisor = reader.maybe_integer("divisor", 1);
  return of_one(pooled(windows, reader.flag("ceil")), floats_out,
                [=](const Tensor& input, const Tensor& output, Part part) {
                  avg_pool(input, output, windows, include_pad, divisor, part);
                });
}

Operation reduce_of(Reader& reader, Reduction reduction) {
  unsigned dims = 0;
  for (const std::int64_t dim : reader.integers("dims", 0, kMaxRank - 1)) dims |= 1U << dim;
  need(dims != 0, reader.problem("dims") + "it names no dimension");
  const bool keepdim = reader.flag("keepdim");
  return of_one(
      [=](const Tensor& input, const Tensor&) {
        Shape shape;
        need(dims >> input.rank == 0, "it reduces a dimension that " + words(shape_of(input)) + " lacks");
        for (int dim = 0; dim < input.rank; ++dim) {
          const bool gone = (dims >> dim & 1) != 0;
          need(!gone || input.shape[dim] > 0, "there is nothing to reduce in " + words(shape_of(input)));
          if (!gone || keepdim) shape.push_back(gone ? 1 : input.shape[dim]);
        }
        return shape;
      },
      floats_out,
      [=](const Tensor& input, const Tensor& output, Part part) {
        Tensor whole = output;  // with the reduced dimensions, of size one
        if (!keepdim) {
          whole.rank = input.rank;
          for (int dim = 0, own = 0; dim < input.rank; ++dim) {
            const bool gone = (dims >> dim & 1) != 0;
            whole.shape[dim] = gone ? 1 : output.shape[own];
            whole.strides[dim] = gone ? 0 : output.strides[own];
            own += gone ? 0 : 1;
          }
        }
        reduce(reduction, input, whole, dims, part);
      });
}

Operation softmax_of(Reader& reader, bool logarithm) {
  const auto dim = static_cast<int>(reader.integer("dim", 0, kMaxRank - 1));
  return {
      .check =
          [dim](Inputs in, const Tensor& output) {
            need(in.size() == 1, "it has one input");
            need_floats(output);
            need_shape(output, shape_of(in[0]));
            need_dim(dim, in[0]);
            need(in[0].shape[dim] > 0, "there is nothing to take the softmax of");
          },
      .scratch_bytes = [dim](Inputs in) { return line_scratch(in[0].shape[dim]); },
      .run = [=](Inputs in, const Tensor& output, std::byte* scratch,
                 Part part) { softmax(in[0], output, dim, logarithm, scratch, part); },
  };
}

// Weight and bias of a norm.
struct Affine {
  explicit Affine(Reader& reader)
      : weight(reader.maybe_constant("weight")), bias(reader.maybe_constant("bias")) {}

  void need_shapes(const Shape& wanted) const {
    for (const auto& constant : {weight, bias}) {
      need(constant == nullptr || constant->shape == wanted,
           "its weight or bias is not of shape " + words(wanted));
    }
  }
  static const float* values(const std::shared_ptr<const Constant>& constant) {
    return constant == nullptr ? nullptr : constant->values.data();
  }

  std::shared_ptr<const Constant> weight, bias;
};

Operation layer_norm_of(Reader& reader) {
  const auto dims = static_cast<int>(reader.integer("dims", 1));
  const double eps = reader.number("eps");
  const auto normalized = [dims](const Tensor& input) {
    return Shape(input.shape + input.rank - dims, input.shape + input.rank);
  };
  const auto length = [normalized](const Tensor& input) {
    std::int64_t elements = 1;
    for (const std::int64_t size : normalized(input)) elements *= size;
    return elements;
  };
  const Affine affine(reader);
  return {
      .check =
          [=](Inputs in, const Tensor& output) {
            need(in.size() == 1, "it has one input");
            need_floats(output);
            need_shape(output, shape_of(in[0]));
            need(dims <= in[0].rank && length(in[0]) > 0,
                 words(shape_of(in[0])) + " has no " + std::to_string(dims) + " dimensions to normalize");
            affine.need_shapes(normalized(in[0]));
          },
      .scratch_bytes = [length](Inputs in) { return line_scratch(length(in[0])); },
      .run =
          [=](Inputs in, const Tensor& output, std::byte* scratch, Part part) {
            layer_norm(in[0], output, dims, Affine::values(affine.weight), Affine::values(affine.bias), eps,
                       scratch, part);
          },
  };
}

Operation group_norm_of(Reader& reader) {
  const std::int64_t groups = reader.integer("groups", 1);
  const double eps = reader.number("eps");
  const Affine affine(reader);
  return {
      .check =
          [=](Inputs in, const Tensor& output) {
            need(in.size() == 1, "it has one input");
            need_floats(output);
            need_shape(output, shape_of(in[0]));
            need(in[0].rank >= 2 && in[0].shape[1] % groups == 0,
                 words(shape_of(in[0])) + " does not divide into " + std::to_string(groups) + " groups");
            for (int dim = 1; dim < in[0].rank; ++dim) {
              need(in[0].shape[dim] > 0, words(shape_of(in[0])) + " has no channels to normalize");
            }
            affine.need_shapes({in[0].shape[1]});
          },
      .scratch_bytes =
          [=](Inputs in) {
            const std::int64_t images = std::max<std::int64_t>(in[0].shape[0], 1);
            return line_scratch(in[0].elements() / images / groups);
          },
      .run =
          [=](Inputs in, const Tensor& output, std::byte* scratch, Part part) {
            group_norm(in[0], output, groups, Affine::values(affine.weight), Affine::values(affine.bias), eps,
                       scratch, part);
          },
  };
}

Operation cat_of(Reader& reader) {
  const auto dim = static_cast<int>(reader.integer("dim", 0, kMaxRank - 1));
  return {
      .check =
          [dim](Inputs in, const Tensor& output) {
            need(!in.empty(), "it has no inputs");
            Shape shape = shape_of(in[0]);
            need_dim(dim, in[0]);
            shape[dim] = 0;
            for (const Tensor& tensor : in) {
              need_movable(tensor, output);
              Shape others = shape_of(tensor);
              need(tensor.rank == in[0].rank, words(others) + " does not continue " + words(shape_of(in[0])));
              others[dim] = shape[dim];
              need(others == shape, words(shape_of(tensor)) + " does not continue " + words(shape_of(in[0])));
              shape[dim] += tensor.shape[dim];
            }
            need_shape(output, shape);
          },
      .scratch_bytes = no_scratch,
      .run = [dim](Inputs in, const Tensor& output, std::byte*, Part part) { cat(in, output, dim, part); },
  };
}

Shape leading_shape(const Tensor& tensor) { return {tensor.shape, tensor.shape + tensor.rank - 2}; }

Operation matmul_of(Reader&) {
  return {
      .check =
          [](Inputs in, const Tensor& output) {
            need(in.size() == 2, "it has two inputs");
            need_floats(output);
            const Tensor &a = in[0], &b = in[1];
            need(a.rank >= 2 && b.rank >= 2, "matrices have two dimensions or more");
            need(a.shape[a.rank - 1] == b.shape[b.rank - 2],
                 "a matrix " + words(shape_of(a)) + " cannot be multiplied by " + words(shape_of(b)));
            Shape shape = broadcast({leading_shape(a), leading_shape(b)});
            shape.insert(shape.end(), {a.shape[a.rank - 2], b.shape[b.rank - 1]});
            need_shape(output, shape);
          },
      .scratch_bytes = [](Inputs in) { return matmul_scratch(in[0], in[1]); },
      .run = [](Inputs in, const Tensor& output, std::byte* scratch,
                Part part) { matmul(in[0], in[1], output, scratch, part); },
  };
}

Operation attention_of(Reader& reader) {
  const double scale = reader.number("scale");
  const bool causal = reader.flag("causal");
  return {
      .check =
          [](Inputs in, const Tensor& output) {
            need(in.size() == 3, "it has three inputs");
            need_floats(output);
            const Tensor &q = in[0], &k = in[1], &v = in[2];
            need(std::min({q.rank, k.rank, v.rank}) >= 2, "matrices have two dimensions or more");
            need(q.shape[q.rank - 1] == k.shape[k.rank - 1] && k.shape[k.rank - 2] == v.shape[v.rank - 2] &&
                     k.shape[k.rank - 2] > 0,
                 "queries " + words(shape_of(q)) + ", keys " + words(shape_of(k)) + ", values " +
                     words(shape_of(v)) + " do not fit");
            Shape shape = broadcast({leading_shape(q), leading_shape(k), leading_shape(v)});
            shape.insert(shape.end(), {q.shape[q.rank - 2], v.shape[v.rank - 1]});
            need_shape(output, shape);
          },
      .scratch_bytes = [](Inputs in) { return attention_scratch(in[0], in[1], in[2]); },
      .run = [=](Inputs in, const Tensor& output, std::byte* scratch,
                 Part part) { attention(in[0], in[1], in[2], output, scale, causal, scratch, part); },
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
  need(approximate == "none" || approximate == "tanh",
       reader.problem("approximate") + "there is no " + approximate);
  return pointwise(gelu(approximate == "tanh"), 1);
}

Operation elu_of(Reader& reader) {
  const double alpha = reader.number("alpha"), scale = reader.number("scale");
  return pointwise(elu(alpha, scale, reader.number("input_scale")), 1);
}

Operation softplus_of(Reader& reader) {
  const double beta = reader.number("beta");
  return pointwise(softplus(beta, reader.number("threshold")), 1);
}

using Make = Operation (*)(Reader&);

const std::pair<std::string_view, Make> kOperations[] = {
    {"reshape", reshape_of},
    {"permute", permute_of},
    {"slice", slice_of},
    {"select", select_of},
    {"expand", expand_of},
    {"pad", pad_of},
    {"upsample_nearest", upsample_nearest_of},
    {"upsample_bilinear", upsample_bilinear_of},
    {"max_pool", max_pool_of},
    {"avg_pool", avg_pool_of},
    {"adaptive_max_pool", [](Reader& reader) { return adaptive_of(reader, true); }},
    {"adaptive_avg_pool", [](Reader& reader) { return adaptive_of(reader, false); }},
    {"mean", [](Reader& reader) { return reduce_of(reader, Reduction::mean); }},
    {"sum", [](Reader& reader) { return reduce_of(reader, Reduction::sum); }},
    {"max", [](Reader& reader) { return reduce_of(reader, Reduction::max); }},
    {"softmax", [](Reader& reader) { return softmax_of(reader, false); }},
    {"log_softmax", [](Reader& reader) { return softmax_of(reader, true); }},
    {"layer_norm", layer_norm_of},
    {"group_norm", group_norm_of},
    {"cat", cat_of},
    {"matmul", matmul_of},
    {"attention", attention_of},
    {"clamp", clamp_of},
    {"gelu", gelu_of},
    {"elu", elu_of},
    {"softplus", softplus_of},
    {"constant", [](Reader& reader) { return stored(reader.constant("constant")); }},
    {"scalar", [](Reader& reader) { return stored({{}, {static_cast<float>(reader.number("value"))}}); }},
    {"leaky_relu",
     [](Reader& reader) { return pointwise(leaky_relu(static_cast<float>(reader.number("slope"))), 1); }},
    {"prelu", [](Reader& reader) { return channelwise(prelu(), {reader.constant("slope")}, true); }},
    {"batch_norm",
     [](Reader& reader) {
       return channelwise(batch_norm(), {reader.constant("scale"), reader.constant("shift")}, false);
     }},
};

}  // namespace

Operation make_operation(const std::string& name, const Attributes& attributes) {
  Reader reader(name, attributes);
  Operation operation;
  if (Elements function = unary(name)) {
    operation = pointwise(std::move(function), 1);
  } else if (Elements both = binary(name)) {
    operation = pointwise(std::move(both), 2);
  } else {
    const auto* found = std::find_if(std::begin(kOperations), std::end(kOperations),
                                     [&](const auto& entry) { return entry.first == name; });
    need(found != std::end(kOperations), "there is no operation " + name);
    operation = found->second(reader);
  }
  reader.done();
  return operation;
}

std::vector<std::string> operation_names() {
  std::vector<std::string> names;
  for (const std::string_view name : unary_names()) names.emplace_back(name);
  for (const std::string_view name : binary_names()) names.emplace_back(name);
  for (const auto& [name, make] : kOperations) names.emplace_back(name);
  return names;
}

}  // namespace mixbits
