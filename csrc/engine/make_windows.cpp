#include <utility>

#include "engine/make.h"
#include "engine/moves.h"
#include "engine/pools.h"

namespace mixbits {
namespace {

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
  reader.need("size", size.size() == 2, "it has two entries");
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
    reader.need(key, sizes->size() == kernel.size(), "it has other dimensions than the kernel");
  }
  Windows windows{.dims = static_cast<int>(kernel.size())};
  for (std::size_t dim = 0; dim < kernel.size(); ++dim) {
    windows.kernel[dim] = kernel[dim], windows.stride[dim] = stride[dim];
    windows.padding[dim] = padding[dim], windows.dilation[dim] = dilation[dim];
    reader.need("padding", 2 * padding[dim] <= kernel[dim], "it is more than half of the window");
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
  const std::int64_t divisor = reader.maybe_integer("divisor", 1).value_or(0);
  return of_one(pooled(windows, reader.flag("ceil")), floats_out,
                [=](const Tensor& input, const Tensor& output, Part part) {
                  avg_pool(input, output, windows, include_pad, divisor, part);
                });
}

constexpr Maker kMakers[] = {
    {"upsample_nearest", upsample_nearest_of},
    {"upsample_bilinear", upsample_bilinear_of},
    {"max_pool", max_pool_of},
    {"avg_pool", avg_pool_of},
    {"adaptive_max_pool", [](Reader& reader) { return adaptive_of(reader, true); }},
    {"adaptive_avg_pool", [](Reader& reader) { return adaptive_of(reader, false); }},
};

}  // namespace

std::span<const Maker> window_makers() { return kMakers; }

}  // namespace mixbits
