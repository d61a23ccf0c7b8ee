#include <algorithm>
#include <map>
#include <tuple>

#include "engine/make.h"
#include "engine/moves.h"

namespace mixbits {
namespace {

// A move that another view of the input expresses.
template <class Rule, class View>
Operation of_view(Rule rule, View view) {
  return of_one(rule, need_movable, [view](const Tensor& input, const Tensor& output, Part part) {
    copy(view(input, output), output, part);
  });
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
    reader.need("dims", sorted[dim] == static_cast<std::int64_t>(dim),
                words(dims) + " is no order of dimensions");
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
  const auto entries = reader.pairs("pads", -kMaxSize);
  Pads pads{};
  for (std::size_t dim = 0; dim < entries.size(); ++dim) {
    pads.before[dim] = entries[dim][0], pads.after[dim] = entries[dim][1];
  }
  const std::string mode_name = reader.choice("mode");
  const std::map<std::string, Padding> modes = {{"constant", Padding::constant},
                                                {"reflect", Padding::reflect},
                                                {"edge", Padding::edge},
                                                {"wrap", Padding::wrap}};
  reader.need("mode", modes.count(mode_name) != 0, "there is no mode " + mode_name);
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

constexpr Maker kMakers[] = {
    {"reshape", reshape_of}, {"permute", permute_of}, {"slice", slice_of}, {"select", select_of},
    {"expand", expand_of},   {"pad", pad_of},         {"cat", cat_of},
};

}  // namespace

std::span<const Maker> move_makers() { return kMakers; }

}  // namespace mixbits
