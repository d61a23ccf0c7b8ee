#include "engine/moves.h"

#include <algorithm>
#include <cstring>

#include "engine/loops.h"

namespace mixbits {
namespace {

// Side of the square tiles in which a transposition goes: 32 lines of the cache for reading, 32 for writing.
constexpr std::int64_t kTile = 32;

// Same elements as a transposition leaves them: `across` is the dimension along which the input is
// contiguous.
template <class From, class To, class Convert>
void transpose(const From* from, To* to, const Loops<2>& loops, int across, Convert convert) {
  const int line = loops.rank - 1;
  Loops<2> tiles = loops;  // over everything but the two dimensions
  const std::int64_t columns = loops.shape[line], rows = loops.shape[across];
  tiles.shape[line] = tiles.shape[across] = 1;
  const std::int64_t in_step = loops.strides[0][line], out_step = loops.strides[1][line];
  const std::int64_t in_row = loops.strides[0][across], out_row = loops.strides[1][across];
  for_lines(tiles, [&](const std::int64_t (&at)[2]) {
    for (std::int64_t i = 0; i < rows; i += kTile) {
      for (std::int64_t j = 0; j < columns; j += kTile) {
        const std::int64_t last_i = std::min(i + kTile, rows), last_j = std::min(j + kTile, columns);
        for (std::int64_t row = i; row < last_i; ++row) {
          const From* source = from + at[0] + row * in_row;
          To* target = to + at[1] + row * out_row;
          for (std::int64_t column = j; column < last_j; ++column) {
            target[column * out_step] = convert(source[column * in_step]);
          }
        }
      }
    }
  });
}

template <class From, class To, class Convert>
void copy_as(const Tensor& input, const Tensor& output, Loops<2>& loops, Convert convert) {
  const auto* from = static_cast<const From*>(input.data) + loops.start[0];
  auto* to = static_cast<To*>(output.data) + loops.start[1];
  loops.start[0] = loops.start[1] = 0;
  const int line = loops.rank - 1;
  const std::int64_t count = loops.shape[line], in = loops.strides[0][line], out = loops.strides[1][line];
  if (std::abs(in) > 1) {
    for (int dim = 0; dim < line; ++dim) {
      if (std::abs(loops.strides[0][dim]) == 1 && !empty(loops)) {
        return transpose(from, to, loops, dim, convert);
      }
    }
  }
  for_lines(loops, [&](const std::int64_t (&at)[2]) {
    const From* source = from + at[0];
    To* target = to + at[1];
    if (in == 1 && out == 1) {
      for (std::int64_t i = 0; i < count; ++i) target[i] = convert(source[i]);
    } else {
      for (std::int64_t i = 0; i < count; ++i) target[i * out] = convert(source[i * in]);
    }
  });
}

void copy_confined(const Tensor& input, const Tensor& output, Loops<2>& loops) {
  if (!input.is_byte()) return copy_as<float, float>(input, output, loops, [](float x) { return x; });
  if (!output.is_byte()) {
    return copy_as<std::uint8_t, float>(
        input, output, loops,
        [scale = input.scale, offset = input.offset, step = input.step](std::uint8_t byte) {
          return static_cast<float>(scale * byte + offset) * step;
        });
  }
  if (input.scale == output.scale && input.offset == output.offset) {
    return copy_as<std::uint8_t, std::uint8_t>(input, output, loops, [](std::uint8_t byte) { return byte; });
  }
  std::uint8_t table[256];  // the output's bytes of the same levels
  for (int byte = 0; byte < 256; ++byte) {
    table[byte] = static_cast<std::uint8_t>((input.level(static_cast<std::uint8_t>(byte)) - output.offset) /
                                            output.scale);
  }
  copy_as<std::uint8_t, std::uint8_t>(input, output, loops,
                                      [&table](std::uint8_t byte) { return table[byte]; });
}

// A padded dimension of the output is up to three pieces, each a view of the input or constant.
struct Piece {
  std::int64_t to, count;     // where in the output
  std::int64_t from, stride;  // where in the input, elements to go on by
  bool filled;                // constant: not from the input at all
};

// The pieces of a dimension of `size` elements; returns how many there are.
int pieces_of(std::int64_t size, std::int64_t before, std::int64_t after, Padding mode, Piece (&pieces)[3]) {
  int count = 0;
  const auto outside = [&](std::int64_t to, std::int64_t width, bool front) {
    if (width <= 0) return;
    Piece piece{to, width, 0, 0, false};
    switch (mode) {
      case Padding::constant: piece.filled = true; break;
      case Padding::edge: piece.from = front ? 0 : size - 1; break;
      case Padding::reflect: piece.from = front ? width : size - 2, piece.stride = -1; break;
      case Padding::wrap: piece.from = front ? size - width : 0, piece.stride = 1; break;
    }
    pieces[count++] = piece;
  };
  outside(0, before, true);
  const std::int64_t first = std::max<std::int64_t>(-before, 0);
  const std::int64_t inside = size - first - std::max<std::int64_t>(-after, 0);
  if (inside > 0) pieces[count++] = {std::max<std::int64_t>(before, 0), inside, first, 1, false};
  outside(std::max<std::int64_t>(before, 0) + inside, after, false);
  return count;
}

Tensor constant_like(const Tensor& output, const void* value) {
  Tensor tensor = output;
  tensor.data = const_cast<void*>(value);  // read only
  std::fill_n(tensor.strides, kMaxRank, 0);
  return tensor;
}

// Whether row order of a tensor is its order in memory after `shape` takes the place of its own.
bool restride(const Tensor& tensor, std::span<const std::int64_t> shape, std::int64_t* strides) {
  // Groups of old and new dimensions with as many elements; a group is expressible if its old dimensions
  // merge into one.
  int own = 0;
  std::size_t dim = 0;
  while (dim < shape.size() || own < tensor.rank) {
    std::size_t first = dim;
    int old_first = own;
    std::int64_t old_count = own < tensor.rank ? tensor.shape[own++] : 1;
    std::int64_t count = dim < shape.size() ? shape[dim++] : 1;
    while (count != old_count) {
      if (count < old_count) {
        count *= shape[dim++];
      } else {
        old_count *= tensor.shape[own++];
      }
    }
    std::int64_t stride = 1, extent = 0;  // of the merged dimension; extent 0: nothing yet
    for (int k = own - 1; k >= old_first; --k) {
      if (tensor.shape[k] == 1) continue;
      if (extent == 0) {
        stride = tensor.strides[k], extent = tensor.shape[k];
      } else if (tensor.strides[k] == stride * extent) {
        extent *= tensor.shape[k];
      } else {
        return false;
      }
    }
    for (std::size_t k = dim; k-- > first;) {
      strides[k] = stride;
      stride *= shape[k];
    }
  }
  return true;
}

}  // namespace

Tensor permuted(const Tensor& tensor, std::span<const std::int64_t> dims) {
  Tensor view = tensor;
  for (int dim = 0; dim < tensor.rank; ++dim) {
    view.shape[dim] = tensor.shape[dims[dim]];
    view.strides[dim] = tensor.strides[dims[dim]];
  }
  return view;
}

Tensor sliced(const Tensor& tensor, int dim, std::int64_t start, std::int64_t stop, std::int64_t step) {
  Tensor view = tensor;
  stop = std::min(stop, tensor.shape[dim]);
  view.shape[dim] = start < stop ? (stop - start + step - 1) / step : 0;
  view.strides[dim] *= step;
  if (view.shape[dim] > 0) {
    const std::int64_t bytes = tensor.is_byte() ? 1 : sizeof(float);
    view.data = static_cast<std::byte*>(tensor.data) + start * tensor.strides[dim] * bytes;
  }
  return view;
}

Tensor selected(const Tensor& tensor, int dim, std::int64_t index) {
  Tensor view = sliced(tensor, dim, index, index + 1);
  for (int k = dim; k + 1 < view.rank; ++k) {
    view.shape[k] = view.shape[k + 1];
    view.strides[k] = view.strides[k + 1];
  }
  --view.rank;
  return view;
}

Tensor expanded(const Tensor& tensor, std::span<const std::int64_t> shape) {
  Tensor view = tensor;
  view.rank = static_cast<int>(shape.size());
  for (int dim = 0; dim < view.rank; ++dim) {
    const int own = dim - view.rank + tensor.rank;
    view.shape[dim] = shape[dim];
    view.strides[dim] = own < 0 || tensor.shape[own] == 1 ? 0 : tensor.strides[own];
  }
  return view;
}

std::optional<Tensor> reshaped(const Tensor& tensor, std::span<const std::int64_t> shape) {
  Tensor view = tensor;
  view.rank = static_cast<int>(shape.size());
  std::copy(shape.begin(), shape.end(), view.shape);
  std::fill_n(view.strides, kMaxRank, 0);
  if (tensor.elements() != 0 && !restride(tensor, shape, view.strides)) return std::nullopt;
  return view;
}

void copy(const Tensor& input, const Tensor& output, Part part) {
  auto loops = loops_over<2>({&input, &output});
  confine(loops, part);
  copy_confined(input, output, loops);
}

void reshape(const Tensor& input, const Tensor& output, Part part) {
  if (const auto view = reshaped(input, {output.shape, output.shape + output.rank})) {
    return copy(*view, output, part);
  }
  if (const auto view = reshaped(output, {input.shape, input.shape + input.rank})) {
    return copy(input, *view, part);
  }
  // Element by element: neither side's strides fit the other's shape.
  const std::int64_t count = output.elements();
  for (std::int64_t i = part.begin(count); i < part.end(count); ++i) {
    const std::int64_t from = offset_of(input, 0, input.rank, i), to = offset_of(output, 0, output.rank, i);
    Loops<2> one{.rank = 1, .shape = {1}, .strides = {{1}, {1}}, .start = {from, to}};
    copy_confined(input, output, one);
  }
}

void pad(const Tensor& input, const Tensor& output, const Pads& pads, Padding mode, float value, Part part) {
  Piece pieces[kMaxRank][3];
  int counts[kMaxRank], index[kMaxRank] = {};
  for (int dim = 0; dim < output.rank; ++dim) {
    counts[dim] = pieces_of(input.shape[dim], pads.before[dim], pads.after[dim], mode, pieces[dim]);
    if (counts[dim] == 0) return;
  }
  const auto zero = static_cast<std::uint8_t>(-output.offset / output.scale);
  const Tensor constant = constant_like(output, output.is_byte() ? static_cast<const void*>(&zero) : &value);
  for (;;) {
    Tensor from = input, to = output;
    bool filled = false;
    const std::int64_t size = input.is_byte() ? 1 : sizeof(float);
    for (int dim = 0; dim < output.rank; ++dim) {
      const Piece& piece = pieces[dim][index[dim]];
      to = sliced(to, dim, piece.to, piece.to + piece.count);
      filled |= piece.filled;
      from.data = static_cast<std::byte*>(from.data) + piece.from * input.strides[dim] * size;
      from.strides[dim] = input.strides[dim] * piece.stride;
      from.shape[dim] = piece.count;
    }
    copy(filled ? expanded(constant, {to.shape, to.shape + to.rank}) : from, to, part);
    int dim = output.rank - 1;
    for (; dim >= 0 && ++index[dim] == counts[dim]; --dim) index[dim] = 0;
    if (dim < 0) return;
  }
}

void upsample_nearest(const Tensor& input, const Tensor& output, int dims, Part part) {
  const int first = output.rank - dims;
  bool whole = output.rank + dims <= kMaxRank;  // every element repeated equally often
  for (int dim = first; dim < output.rank; ++dim) whole &= output.shape[dim] % input.shape[dim] == 0;
  if (whole) {
    Tensor from = input, to = output;  // [..., size, repeats] in place of [..., size]
    for (int dim = first; dim < output.rank; ++dim) {
      const int at = first + 2 * (dim - first);
      const std::int64_t repeats = output.shape[dim] / input.shape[dim];
      from.shape[at] = to.shape[at] = input.shape[dim];
      from.shape[at + 1] = to.shape[at + 1] = repeats;
      from.strides[at] = input.strides[dim], from.strides[at + 1] = 0;
      to.strides[at] = output.strides[dim] * repeats, to.strides[at + 1] = output.strides[dim];
    }
    from.rank = to.rank = output.rank + dims;
    return copy(from, to, part);
  }
  const std::int64_t columns = output.shape[output.rank - 1], rows = dims == 2 ? output.shape[first] : 1;
  for (std::int64_t row = 0; row < rows; ++row) {
    Tensor from = input, to = output;
    if (dims == 2) {
      from = selected(from, first, row * input.shape[first] / rows);
      to = selected(to, first, row);
    }
    const int last = to.rank - 1;
    for (std::int64_t column = 0; column < columns; ++column) {
      const std::int64_t x = column * from.shape[last] / columns;
      copy(selected(from, last, x), selected(to, last, column), part);
    }
  }
}

void cat(std::span<const Tensor> inputs, const Tensor& output, int dim, Part part) {
  std::int64_t at = 0;
  for (const Tensor& input : inputs) {
    copy(input, sliced(output, dim, at, at + input.shape[dim]), part);
    at += input.shape[dim];
  }
}

}  // namespace mixbits
