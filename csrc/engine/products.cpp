#include "engine/products.h"

#include <algorithm>
#include <cstdlib>

#include "engine/loops.h"
#include "engine/vector.h"

namespace mixbits {
namespace {

constexpr std::int64_t kRows = kPanelRows, kColumns = kPanelColumns;

std::int64_t rounded_up(std::int64_t size, std::int64_t unit) { return (size + unit - 1) / unit * unit; }

// A matrix in doubles, in panels of `width` columns: [columns / width][rows][width], 0 behind the last
// column. Column j, row i lies at `at + i * row + j * column` of the tensor.
void pack(const Tensor& tensor, std::int64_t at, std::int64_t row, std::int64_t column, std::int64_t rows,
          std::int64_t columns, std::int64_t width, double* packed) {
  double buffer[kChunk];
  const bool by_column = std::abs(row) < std::abs(column);  // read along what is contiguous
  for (std::int64_t first = 0; first < columns; first += width, packed += rows * width) {
    const std::int64_t count = std::min(width, columns - first);
    if (count < width) std::fill_n(packed, rows * width, 0.0);
    if (by_column) {
      for (std::int64_t j = 0; j < count; ++j) {
        for (std::int64_t done = 0; done < rows; done += kChunk) {
          const std::int64_t length = std::min(kChunk, rows - done);
          read(tensor, at + done * row + (first + j) * column, row, length, buffer);
          for (std::int64_t i = 0; i < length; ++i) packed[(done + i) * width + j] = buffer[i];
        }
      }
    } else {
      for (std::int64_t i = 0; i < rows; ++i) {
        read(tensor, at + i * row + first * column, column, count, packed + i * width);
      }
    }
  }
}

// The leading dimensions of tensors whose last two are matrices.
Tensor leading(const Tensor& tensor) {
  Tensor view = tensor;
  view.rank -= 2;
  return view;
}

std::int64_t rows_of(const Tensor& tensor) { return tensor.shape[tensor.rank - 2]; }
std::int64_t columns_of(const Tensor& tensor) { return tensor.shape[tensor.rank - 1]; }
std::int64_t row_stride(const Tensor& tensor) { return tensor.strides[tensor.rank - 2]; }
std::int64_t column_stride(const Tensor& tensor) { return tensor.strides[tensor.rank - 1]; }

void write_rows(const double* from, std::int64_t ld, std::int64_t rows, const Tensor& output,
                std::int64_t at) {
  const std::int64_t columns = columns_of(output), stride = column_stride(output);
  for (std::int64_t r = 0; r < rows; ++r) {
    float* to = static_cast<float*>(output.data) + at + r * row_stride(output);
    for (std::int64_t j = 0; j < columns; ++j) to[j * stride] = static_cast<float>(from[r * ld + j]);
  }
}

// Calls `matrix(at)` with the offsets of every matrix and `rows(at, first, count)` for its tiles of rows.
// Tiles, counted over all matrices, are shared by the parts; a matrix of which a part has none is left out.
template <int N, class Matrix, class Rows>
void for_tiles(const Tensor* const (&tensors)[N], Part part, Matrix matrix, Rows rows) {
  Tensor leads[N];
  const Tensor* pointers[N];
  for (int k = 0; k < N; ++k) leads[k] = leading(*tensors[k]), pointers[k] = &leads[k];
  const auto loops = loops_over(pointers);
  const std::int64_t height = rows_of(*tensors[N - 1]), tiles = (height + kRows - 1) / kRows;
  const std::int64_t all = tiles * leads[N - 1].elements();
  const std::int64_t begin = part.begin(all), end = part.end(all);
  std::int64_t before = 0;  // tiles of earlier matrices
  const int line = loops.rank - 1;
  for_lines(loops, [&](const std::int64_t (&start)[N]) {
    for (std::int64_t i = 0; i < loops.shape[line]; ++i, before += tiles) {
      const std::int64_t first = std::max(begin - before, std::int64_t{0});
      const std::int64_t last = std::min(end - before, tiles);
      if (first >= last) continue;
      std::int64_t at[N];
      for (int k = 0; k < N; ++k) at[k] = start[k] + i * loops.strides[k][line];
      matrix(at);
      for (std::int64_t tile = first; tile < last; ++tile) {
        rows(at, tile * kRows, std::min(kRows, height - tile * kRows));
      }
    }
  });
}

}  // namespace

std::size_t matmul_scratch(const Tensor& a, const Tensor& b) {
  const std::int64_t depth = columns_of(a), columns = rounded_up(columns_of(b), kColumns);
  return sizeof(double) * static_cast<std::size_t>(depth * columns + kRows * depth + kRows * columns);
}

void matmul(const Tensor& a, const Tensor& b, const Tensor& output, std::byte* scratch, Part part) {
  const std::int64_t depth = columns_of(a), columns = rounded_up(columns_of(b), kColumns);
  const VectorLoops& loops = vector_loops();
  auto* right = reinterpret_cast<double*>(scratch);  // all of b
  double* left = right + depth * columns;            // rows of a
  double* sums = left + kRows * depth;
  for_tiles<3>(
      {&a, &b, &output}, part,
      [&](const std::int64_t* at) {
        pack(b, at[1], row_stride(b), column_stride(b), depth, columns_of(b), kColumns, right);
      },
      [&](const std::int64_t* at, std::int64_t first, std::int64_t count) {
        pack(a, at[0] + first * row_stride(a), column_stride(a), row_stride(a), depth, count, kRows, left);
        loops.product(left, right, depth, columns, sums, columns);
        write_rows(sums, columns, count, output, at[2] + first * row_stride(output));
      });
}

std::size_t attention_scratch(const Tensor& q, const Tensor& k, const Tensor& v) {
  const std::int64_t depth = columns_of(q), keys = rows_of(k), padded = rounded_up(keys, kColumns),
                     columns = rounded_up(columns_of(v), kColumns);
  return sizeof(double) * static_cast<std::size_t>(depth * padded + keys * columns + kRows * depth +
                                                   2 * kRows * padded + kRows * columns);
}

void attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& output, double scale,
               bool causal, std::byte* scratch, Part part) {
  const std::int64_t depth = columns_of(q), keys = rows_of(k), padded = rounded_up(keys, kColumns),
                     columns = rounded_up(columns_of(v), kColumns);
  const VectorLoops& loops = vector_loops();
  auto* packed_keys = reinterpret_cast<double*>(scratch);
  double* packed_values = packed_keys + depth * padded;
  double* queries = packed_values + keys * columns;
  double* scores = queries + kRows * depth;  // [kRows][padded]
  double* shares = scores + kRows * padded;  // [keys][kRows]
  double* sums = shares + kRows * padded;
  for_tiles<4>(
      {&q, &k, &v, &output}, part,
      [&](const std::int64_t* at) {
        pack(k, at[1], column_stride(k), row_stride(k), depth, keys, kColumns, packed_keys);
        pack(v, at[2], row_stride(v), column_stride(v), keys, columns_of(v), kColumns, packed_values);
      },
      [&](const std::int64_t* at, std::int64_t first, std::int64_t count) {
        pack(q, at[0] + first * row_stride(q), column_stride(q), row_stride(q), depth, count, kRows, queries);
        loops.product(queries, packed_keys, depth, padded, scores, padded);
        for (std::int64_t r = 0; r < kRows; ++r) {
          double* row = scores + r * padded;
          for (std::int64_t j = 0; j < keys; ++j) row[j] *= scale;
          const std::int64_t seen = causal ? std::min(first + r + 1, keys) : keys;
          loops.softmax(seen, row);
          std::fill(row + seen, row + keys, 0.0);
          for (std::int64_t j = 0; j < keys; ++j) shares[j * kRows + r] = row[j];
        }
        loops.product(shares, packed_values, keys, columns, sums, columns);
        write_rows(sums, columns, count, output, at[3] + first * row_stride(output));
      });
}

}  // namespace mixbits
