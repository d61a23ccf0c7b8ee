#include <algorithm>
#include <memory>

#include "engine/make.h"
#include "engine/products.h"
#include "engine/reductions.h"

namespace mixbits {
namespace {

Operation reduce_of(Reader& reader, Reduction reduction) {
  unsigned dims = 0;
  for (const std::int64_t dim : reader.integers("dims", 0, kMaxRank - 1)) dims |= 1U << dim;
  reader.need("dims", dims != 0, "it names no dimension");
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
            need_inputs(in, 1);
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
  const double eps = reader.positive("eps");
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
            need_inputs(in, 1);
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
  const double eps = reader.positive("eps");
  const Affine affine(reader);
  return {
      .check =
          [=](Inputs in, const Tensor& output) {
            need_inputs(in, 1);
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

Shape leading_shape(const Tensor& tensor) { return {tensor.shape, tensor.shape + tensor.rank - 2}; }

Operation matmul_of(Reader&) {
  return {
      .check =
          [](Inputs in, const Tensor& output) {
            need_inputs(in, 2);
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
            need_inputs(in, 3);
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

constexpr Maker kMakers[] = {
    {"mean", [](Reader& reader) { return reduce_of(reader, Reduction::mean); }},
    {"sum", [](Reader& reader) { return reduce_of(reader, Reduction::sum); }},
    {"max", [](Reader& reader) { return reduce_of(reader, Reduction::max); }},
    {"softmax", [](Reader& reader) { return softmax_of(reader, false); }},
    {"log_softmax", [](Reader& reader) { return softmax_of(reader, true); }},
    {"layer_norm", layer_norm_of},
    {"group_norm", group_norm_of},
    {"matmul", matmul_of},
    {"attention", attention_of},
};

}  // namespace

std::span<const Maker> sum_makers() { return kMakers; }

}  // namespace mixbits
