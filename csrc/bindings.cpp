// The one binding file: everything Python can call. Arguments are checked here, once, so kernels may trust
// theirs.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "engine/bind_engine.h"
#include "engine/bind_operations.h"
#include "engine/memory.h"
#include "kernels/ceiling.h"
#include "kernels/registry.h"
#include "pack/bits.h"

namespace nb = nanobind;

namespace {

using Bytes = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstBytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Raises ValueError unless `packed_size` bytes hold exactly `count` codes of `bits` bits.
void check_packed(std::size_t count, unsigned bits, std::size_t packed_size) {
  if (bits < 1 || bits > 8) throw nb::value_error(("bits is 1 to 8, not " + std::to_string(bits)).c_str());
  const std::size_t expected = mixbits::packed_bytes(count, bits);
  if (packed_size != expected) {
    throw nb::value_error((std::to_string(count) + " codes of " + std::to_string(bits) + " bits take " +
                           std::to_string(expected) + " bytes, not " + std::to_string(packed_size))
                              .c_str());
  }
}

void pack_bits(const ConstBytes& codes, unsigned bits, const Bytes& packed) {
  check_packed(codes.size(), bits, packed.size());
  const nb::gil_scoped_release released;
  mixbits::pack_bits(codes.data(), codes.size(), bits, packed.data());
}

void unpack_bits(const ConstBytes& packed, unsigned bits, const Bytes& codes) {
  check_packed(codes.size(), bits, packed.size());
  const nb::gil_scoped_release released;
  mixbits::unpack_bits(packed.data(), codes.size(), bits, codes.data());
}

using mixbits::Aligned;

// Every kernel's name, whether this CPU (and MIXBITS_ISA) lets it run, and its instruction set.
std::vector<std::tuple<std::string, bool, std::string>> kernels() {
  std::vector<std::tuple<std::string, bool, std::string>> found;
  for (const mixbits::Kernel* kernel : mixbits::all_kernels()) {
    found.emplace_back(kernel->name, mixbits::usable(kernel->isa), mixbits::name_of(kernel->isa));
  }
  return found;
}

const mixbits::Kernel& usable_kernel(const std::string& name) {
  const mixbits::Kernel* kernel = mixbits::kernel_named(name.c_str());
  if (kernel == nullptr) throw nb::value_error(("there is no kernel " + name).c_str());
  if (!mixbits::usable(kernel->isa)) {
    throw nb::value_error(("kernel " + name + " needs " + mixbits::name_of(kernel->isa) +
                           ", which this CPU does not have or MIXBITS_ISA forbids")
                              .c_str());
  }
  return *kernel;
}

using Map = nb::ndarray<const std::uint8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Levels = nb::ndarray<const std::int16_t, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using Sums = nb::ndarray<std::int32_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

// Empty, or why a kernel cannot compute a convolution.
std::string refuses(const std::string& name, const mixbits::Conv& conv) {
  const char* why = usable_kernel(name).refuses(conv);
  return why == nullptr ? "" : why;
}

std::tuple<double, int, int> kernel_cost(const std::string& name, const mixbits::Conv& conv) {
  const mixbits::Kernel& kernel = usable_kernel(name);
  if (const char* why = kernel.refuses(conv)) throw nb::value_error(("kernel " + name + ": " + why).c_str());
  return {kernel.cycles(conv), kernel.rows(conv), kernel.rows_step};
}

std::size_t weight_bytes(const std::string& name, const mixbits::Conv& conv) {
  return usable_kernel(name).weight_bytes(conv);
}

// Names of the ceilings that this CPU (and MIXBITS_ISA) can measure.
std::vector<std::string> ceilings() {
  std::vector<std::string> names;
  for (const mixbits::Ceiling* ceiling : mixbits::all_ceilings()) {
    if (mixbits::usable(ceiling->isa)) names.emplace_back(ceiling->name);
  }
  return names;
}

// Least seconds of one round over `repeats` measurements of some 0.1 milliseconds.
double time_ceiling(const std::string& name, int repeats) {
  constexpr std::int64_t kRounds = 30000 * mixbits::kCeilingSums;
  for (const mixbits::Ceiling* ceiling : mixbits::all_ceilings()) {
    if (ceiling->name != name || !mixbits::usable(ceiling->isa)) continue;
    const nb::gil_scoped_release released;
    double least = std::numeric_limits<double>::infinity();
    for (int i = 0; i < repeats; ++i) {
      const auto before = std::chrono::steady_clock::now();
      ceiling->run(kRounds);
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - before;
      least = std::min(least, took.count() / kRounds);
    }
    return least;
  }
  throw nb::value_error(("no ceiling " + name + " can be measured here").c_str());
}

std::string isa_problem() {
  const char* problem = mixbits::isa_problem();
  return problem == nullptr ? "" : problem;
}

// A kernel with its packed weights and room to work, for one convolution.
class Prepared {
 public:
  Prepared(const std::string& name, const mixbits::Conv& conv, const Map& input, const Levels& levels,
           int rows, int channels)
      : kernel_(accepting(name, conv)), conv_(conv), rows_(rows), all_(conv.groups * conv.o) {
    const std::size_t shape[] = {std::size_t(conv.in_h), std::size_t(conv.in_w),
                                 std::size_t(conv.pixel_stride)};
    const std::size_t weight[] = {std::size_t(all_), std::size_t(conv.c), std::size_t(conv.kh),
                                  std::size_t(conv.kw)};
    const bool fits =
        std::equal(shape, shape + 3, input.shape_ptr()) &&
        std::equal(weight, weight + 4, levels.shape_ptr()) && conv.pixel_stride >= conv.groups * conv.c &&
        (conv.out_h - 1) * conv.stride_y + (conv.kh - 1) * conv.dilation_y < conv.in_h &&
        (conv.out_w - 1) * conv.stride_x + (conv.kw - 1) * conv.dilation_x < conv.in_w && rows > 0 &&
        rows % kernel_.rows_step == 0 && channels > 0 && channels % mixbits::kChannelBlock == 0;
    if (!fits) throw nb::value_error("the arrays do not fit the convolution");
    block_ = conv.groups == 1 ? std::min(channels, all_) : all_;
    ld_ = mixbits::round_up(block_, 16);
    weights_.emplace(kernel_.weight_bytes(conv));
    kernel_.pack(conv, levels.data(), weights_->data());
    scratch_.emplace(kernel_.scratch_bytes(conv, rows));
    map_.emplace(input.size());
    std::memcpy(map_->data(), input.data(), input.size());
    acc_.emplace(sizeof(std::int32_t) * rows * conv.out_w * ld_);
  }

  // The whole image; `sums`, if any, is int32 [out_h][out_w][channels].
  void run(std::int32_t* sums) const {
    for (int y = 0; y < conv_.out_h; y += rows_) {
      for (int o = 0; o < all_; o += block_) {
        const int y1 = std::min(y + rows_, conv_.out_h), o1 = std::min(o + block_, all_);
        auto* tile = reinterpret_cast<std::int32_t*>(acc_->data());
        kernel_.run(conv_, {map_->data(), weights_->data(), scratch_->data(), tile, ld_, y, y1, o, o1});
        for (int pixel = 0; sums != nullptr && pixel < (y1 - y) * conv_.out_w; ++pixel) {
          std::copy_n(tile + static_cast<std::ptrdiff_t>(pixel) * ld_, o1 - o,
                      sums + (static_cast<std::ptrdiff_t>(y) * conv_.out_w + pixel) * all_ + o);
        }
      }
    }
  }

 private:
  static const mixbits::Kernel& accepting(const std::string& name, const mixbits::Conv& conv) {
    const mixbits::Kernel& kernel = usable_kernel(name);
    if (const char* why = kernel.refuses(conv))
      throw nb::value_error(("kernel " + name + ": " + why).c_str());
    return kernel;
  }

  const mixbits::Kernel& kernel_;
  const mixbits::Conv conv_;
  int rows_, all_, block_ = 0, ld_ = 0;
  std::optional<Aligned> weights_, scratch_, map_, acc_;
};

// One image by one kernel, `rows` output rows and at most `channels` output channels a call.
void convolve(const std::string& name, const mixbits::Conv& conv, const Map& input, const Levels& levels,
              const Sums& sums, int rows, int channels) {
  const Prepared prepared(name, conv, input, levels, rows, channels);
  if (sums.shape(0) != std::size_t(conv.out_h) || sums.shape(1) != std::size_t(conv.out_w) ||
      sums.shape(2) != std::size_t(conv.groups) * conv.o) {
    throw nb::value_error("sums is not [out_h, out_w, groups * o]");
  }
  const nb::gil_scoped_release released;
  prepared.run(sums.data());
}

// Seconds of each of `repeats` runs of one image, weights and input warm.
std::vector<double> time_kernel(const std::string& name, const mixbits::Conv& conv, const Map& input,
                                const Levels& levels, int rows, int channels, int repeats) {
  const Prepared prepared(name, conv, input, levels, rows, channels);
  const nb::gil_scoped_release released;
  std::vector<double> seconds;
  prepared.run(nullptr);
  for (int i = 0; i < repeats; ++i) {
    const auto before = std::chrono::steady_clock::now();
    prepared.run(nullptr);
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - before).count());
  }
  return seconds;
}

}  // namespace

NB_MODULE(_native, module) {
  module.doc() = "The C++ parts of mixbits. Each has a NumPy definition that it equals exactly.";
  module.def(
      "pack_bits", &pack_bits, nb::arg("codes").noconvert(), nb::arg("bits"), nb::arg("packed").noconvert(),
      "Write `codes` (uint8, each below 1 << bits) into `packed` (uint8, exactly the bytes they take).");
  module.def(
      "unpack_bits", &unpack_bits, nb::arg("packed").noconvert(), nb::arg("bits"),
      nb::arg("codes").noconvert(),
      "Write the codes in `packed` into `codes` (uint8, one byte a code): the inverse of `pack_bits`.");

  using mixbits::Conv;
  nb::class_<Conv>(module, "Conv", "A convolution of one image as kernels see it: csrc/kernels/kernel.h.")
      .def(nb::init<>())
      .def_rw("c", &Conv::c)
      .def_rw("o", &Conv::o)
      .def_rw("groups", &Conv::groups)
      .def_rw("kh", &Conv::kh)
      .def_rw("kw", &Conv::kw)
      .def_rw("stride_y", &Conv::stride_y)
      .def_rw("stride_x", &Conv::stride_x)
      .def_rw("dilation_y", &Conv::dilation_y)
      .def_rw("dilation_x", &Conv::dilation_x)
      .def_rw("out_h", &Conv::out_h)
      .def_rw("out_w", &Conv::out_w)
      .def_rw("in_h", &Conv::in_h)
      .def_rw("in_w", &Conv::in_w)
      .def_rw("pixel_stride", &Conv::pixel_stride)
      .def_rw("a_max", &Conv::a_max)
      .def_rw("a_scale", &Conv::a_scale)
      .def_rw("a_offset", &Conv::a_offset)
      .def_rw("a_zero", &Conv::a_zero)
      .def_rw("w_bits", &Conv::w_bits)
      .def_rw("w_min", &Conv::w_min)
      .def_rw("w_max", &Conv::w_max)
      .def_rw("w_step", &Conv::w_step);
  mixbits::bind_operations(module);
  mixbits::bind_engine(module);
  module.def("kernels", &kernels, "Name, whether it can run here, and instruction set of every kernel.");
  module.def("refuses", &refuses, nb::arg("name"), nb::arg("conv"),
             "Why a kernel cannot compute a convolution; empty if it can.");
  module.def("convolve", &convolve, nb::arg("name"), nb::arg("conv"), nb::arg("input").noconvert(),
             nb::arg("levels").noconvert(), nb::arg("sums").noconvert(), nb::arg("rows"), nb::arg("channels"),
             "Exact sums of one image, int32 [out_h, out_w, groups * o], by one kernel.");
  module.def("time_kernel", &time_kernel, nb::arg("name"), nb::arg("conv"), nb::arg("input").noconvert(),
             nb::arg("levels").noconvert(), nb::arg("rows"), nb::arg("channels"), nb::arg("repeats"),
             "Seconds of each of `repeats` runs of one image, weights and input warm.");
  module.def("kernel_cost", &kernel_cost, nb::arg("name"), nb::arg("conv"),
             "Estimated cycles of an image, and output rows of a call that suit the kernel.");
  module.def("weight_bytes", &weight_bytes, nb::arg("name"), nb::arg("conv"),
             "Bytes of a convolution's weights as a kernel keeps them.");
  module.def("ceilings", &ceilings, "Instruction mixes whose speed can be measured here.");
  module.def("time_ceiling", &time_ceiling, nb::arg("name"), nb::arg("repeats"),
             "Least seconds of one round of an instruction mix: csrc/kernels/ceiling.h.");
  module.def("isa_problem", &isa_problem, "Empty, or what is wrong with MIXBITS_ISA.");
  module.def("cpu_model", &mixbits::cpu_model, "The CPU's model name.");
}
