// The one binding file: everything Python can call. Arguments are checked here, once, so kernels may trust
// theirs.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <string>

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
}
