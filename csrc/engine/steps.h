// The steps that make integers: layers with all that follows them, and rounding of values.
#pragma once

#include <memory>
#include <vector>

#include "engine/engine.h"
#include "engine/finish.h"
#include "engine/operations.h"
#include "engine/tensor.h"
#include "kernels/kernel.h"

namespace mixbits {

// Where pixel (0, 0) of a value's first image lies; strides in bytes.
struct PixelPlace {
  Place place;
  std::int64_t image = 0, row = 0, pixel = 0;
};

// A convolution or linear layer, its residual, limits and roundings.
struct LayerStep final : Step {
  struct Bytes {
    PixelPlace to;
    Rounding rounding;
  };

  const Kernel* kernel = nullptr;
  Conv conv;
  Aligned weights;
  Aligned scale, bias;  // float32 [outputs rounded up to 16]
  std::int64_t images = 1;
  Place input;  // of the window of output (0, 0)
  std::int64_t input_image = 0;

  // Padding of level 0 where the input's grid has no such level: the border's byte stands for `border_level`,
  // and what it adds to the sums is taken away again. The input without padding is [size_y][size_x].
  int border_level = 0;
  int pad_y = 0, pad_x = 0, size_y = 0, size_x = 0;

  Finish::Residual residual_kind = Finish::none;
  PixelPlace residual;
  bool finite_residual = false;
  float residual_step = 1;
  int residual_scale = 1, residual_offset = 0;
  bool limited = false;
  float low = 0, high = 0;
  bool gives_floats = false;
  PixelPlace floats;
  std::vector<Bytes> bytes;

  // Exact sums on kernel `by`, from weight levels int16 [outputs][c][kh][kw].
  void use(const Kernel& by, const std::int16_t* levels);

  bool run(const Frame& frame) const override;
  // These are of the kernel, shapes and padding alone: `planned_bytes` is what `kept_bytes` will be.
  std::size_t scratch_bytes() const override;
  std::size_t planned_bytes() const;
  std::size_t kept_bytes() const override;

  int outputs() const { return conv.groups * conv.o; }
  std::size_t channel_bytes() const { return sizeof(float) * round_up(outputs(), 16); }  // scale's, bias's

 private:
  int strip_rows() const;
  std::vector<int> taps_outside(int y, int x) const;
  int excess_pixels() const;
  void find_excess(const std::int16_t* levels);
  void take_excess(std::int32_t* acc, int ld, int y0, int y1, int o0, int o1) const;
  bool run_job(const Frame& frame, std::int64_t image, int y0, int y1, int o0, int o1) const;

  // What the border adds to the sums of output pixels that meet it, in the order of rows: int32
  // [excess_pixels][y, x, sum of output 0, 1, ...].
  Aligned excess_;
  bool finite_ = false;  // scale and bias
};

// A value of a run: a tensor whose data lies at a place.
struct Operand {
  Tensor tensor;
  Place place;

  Tensor in(const Frame& frame) const {
    Tensor found = tensor;
    found.data = frame.at(place);
    return found;
  }
};

// Values rounded onto a grid: strided floats, or bytes of another grid, to strided bytes.
struct RoundStep final : Step {
  Operand from, to;
  Rounding rounding;

  bool run(const Frame& frame) const override;

 private:
  // Images of at most four channels in pixels of four bytes, which are written whole: what networks read.
  bool makes_pixels() const;
  bool round_pixels(const Frame& frame, const Tensor& source, const Tensor& target) const;
};

// Nothing but its borders: memory that others leave as it was.
struct FillStep final : Step {
  bool run(const Frame&) const override { return true; }
};

// The same elements elsewhere.
struct CopyStep final : Step {
  Operand from, to;

  bool run(const Frame& frame) const override;
};

// Any other instruction.
struct OperationStep final : Step {
  Operation operation;
  std::vector<Operand> inputs;
  Operand output;

  bool run(const Frame& frame) const override;
  std::size_t scratch_bytes() const override;
  std::size_t kept_bytes() const override { return operation.constant_bytes; }
};

}  // namespace mixbits
