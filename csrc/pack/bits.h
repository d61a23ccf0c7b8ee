// Packed codes: a little-endian stream of `bits`-bit codes, 1 <= bits <= 8.
//
// Code i occupies bits [i * bits, (i + 1) * bits) of the stream; bit k of the stream is bit k % 8 of byte
// k / 8. The unused high bits of the last byte are zero. Drawn with the high bit of each byte on the left:
//
//   w1:  byte i      = | c[8i+7] : 1 | c[8i+6] : 1 | ... | c[8i+1] : 1 | c[8i] : 1 |
//   w2:  byte i      = | c[4i+3] : 2 | c[4i+2] : 2 | c[4i+1] : 2 | c[4i] : 2 |
//   w3:  byte 3i     = | c[8i+2] : low 2 | c[8i+1] : 3 | c[8i] : 3 |
//        byte 3i + 1 = | c[8i+5] : low 1 | c[8i+4] : 3 | c[8i+3] : 3 | c[8i+2] : high 1 |
//        byte 3i + 2 = | c[8i+7] : 3 | c[8i+6] : 3 | c[8i+5] : high 2 |
//   w4:  byte i      = | c[2i+1] : 4 | c[2i] : 4 |
//
// Eight codes fill exactly `bits` bytes, so every group of eight starts at a byte. The definition in readable
// NumPy is src/mixbits/pack/bits.py; both must agree byte for byte.

#pragma once

#include <cstddef>
#include <cstdint>

namespace mixbits {

// Returns ceil(count * bits / 8), the bytes of `count` packed codes.
// The product is taken over whole groups of eight codes, so no intermediate exceeds count + 63: no overflow
// for any count of codes that fits in memory.
constexpr std::size_t packed_bytes(std::size_t count, unsigned bits) {
  return count / 8 * bits + (count % 8 * bits + 7) / 8;
}

// packed[k / 8] bit k % 8 = codes[k / bits] bit k % bits, for k < count * bits; the remaining bits are zero.
//
// codes:  `count` bytes, each < (1 << bits). A larger code spoils its neighbours in the stream, never memory.
// packed: packed_bytes(count, bits) bytes; all are written and none beyond. Must not overlap `codes`.
// Both may be null when count is 0. Neither needs alignment or padding.
void pack_bits(const std::uint8_t* codes, std::size_t count, unsigned bits, std::uint8_t* packed);

// codes[i] = the `bits` bits of the stream that start at bit i * bits: the inverse of pack_bits.
//
// packed: packed_bytes(count, bits) bytes; none beyond are read, and the unused high bits of the last are
// ignored. codes:  `count` bytes; all are written and none beyond. Must not overlap `packed`. Both may be
// null when count is 0. Neither needs alignment or padding.
void unpack_bits(const std::uint8_t* packed, std::size_t count, unsigned bits, std::uint8_t* codes);

}  // namespace mixbits
