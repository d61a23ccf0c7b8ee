#include "pack/bits.h"

#include <algorithm>
#include <bit>
#include <cassert>
#include <cstring>

namespace mixbits {
namespace {

// A group of eight codes is handled as one 64-bit word, byte i of memory being bits [8i, 8i + 8) of the word.
static_assert(std::endian::native == std::endian::little, "the packed layout is read and written as words");

// The word whose every lane of `lane_bits` bits has its low `width` bits set.
consteval std::uint64_t lanes_of(unsigned lane_bits, unsigned width) {
  std::uint64_t word = 0;
  for (unsigned at = 0; at < 64; at += lane_bits) word |= ((std::uint64_t{1} << width) - 1) << at;
  return word;
}

// Eight codes, one a byte, to 8 * Bits adjacent bits. Neighbours are joined three times: 8-bit lanes holding
// one code become 16-bit lanes holding two, then 32-bit lanes holding four, then one word holding eight.
// Every step keeps the lower neighbour and moves the upper one down onto it. A lane of n bits holds n / 8
// codes, that is n / 8 * Bits <= n bits, so lanes never touch.
template <unsigned Bits>
constexpr std::uint64_t squeeze(std::uint64_t word) {
  word = (word & lanes_of(16, Bits)) | ((word >> (8 - Bits)) & (lanes_of(16, Bits) << Bits));
  word = (word & lanes_of(32, 2 * Bits)) | ((word >> (16 - 2 * Bits)) & (lanes_of(32, 2 * Bits) << 2 * Bits));
  word = (word & lanes_of(64, 4 * Bits)) | ((word >> (32 - 4 * Bits)) & (lanes_of(64, 4 * Bits) << 4 * Bits));
  return word;
}

// The inverse of `squeeze`: the three joins undone in reverse order. Bits of the word from 8 * Bits up are
// dropped.
template <unsigned Bits>
constexpr std::uint64_t spread(std::uint64_t word) {
  word = (word & lanes_of(64, 4 * Bits)) | ((word & (lanes_of(64, 4 * Bits) << 4 * Bits)) << (32 - 4 * Bits));
  word = (word & lanes_of(32, 2 * Bits)) | ((word & (lanes_of(32, 2 * Bits) << 2 * Bits)) << (16 - 2 * Bits));
  word = (word & lanes_of(16, Bits)) | ((word & (lanes_of(16, Bits) << Bits)) << (8 - Bits));
  return word;
}

// The drawing in bits.h, w3: codes 1, 2, 3, 4, 5, 6, 7, 0 are the octal digits of the stream, lowest first.
static_assert(squeeze<3>(0x00'07'06'05'04'03'02'01) == 007654321);
static_assert(spread<3>(0xFF00'0000'0000'0000 | 007654321) == 0x00'07'06'05'04'03'02'01);

template <unsigned Bits>
void pack_groups(const std::uint8_t* codes, std::size_t count, std::uint8_t* packed) {
  for (std::size_t group = 0; group < count / 8; ++group) {
    std::uint64_t word;
    std::memcpy(&word, codes + 8 * group, 8);
    word = squeeze<Bits>(word);
    std::memcpy(packed + Bits * group, &word, Bits);
  }
  if (const std::size_t rest = count % 8; rest != 0) {
    std::uint64_t word = 0;
    std::memcpy(&word, codes + count - rest, rest);
    word = squeeze<Bits>(word);
    std::memcpy(packed + count / 8 * Bits, &word, packed_bytes(rest, Bits));
  }
}

template <unsigned Bits>
void unpack_groups(const std::uint8_t* packed, std::size_t count, std::uint8_t* codes) {
  // Reading eight bytes for a group of Bits is several times faster than reading Bits, and `spread` drops the
  // rest. Only the last groups, where fewer than eight bytes are left, must read exactly.
  const std::size_t size_bytes = packed_bytes(count, Bits);
  const std::size_t wide = size_bytes < 8 ? 0 : std::min(count / 8, (size_bytes - 8) / Bits + 1);
  for (std::size_t group = 0; group < wide; ++group) {
    std::uint64_t word;
    std::memcpy(&word, packed + Bits * group, 8);
    word = spread<Bits>(word);
    std::memcpy(codes + 8 * group, &word, 8);
  }
  for (std::size_t group = wide; group < count / 8; ++group) {
    std::uint64_t word = 0;
    std::memcpy(&word, packed + Bits * group, Bits);
    word = spread<Bits>(word);
    std::memcpy(codes + 8 * group, &word, 8);
  }
  if (const std::size_t rest = count % 8; rest != 0) {
    std::uint64_t word = 0;
    std::memcpy(&word, packed + count / 8 * Bits, packed_bytes(rest, Bits));
    word = spread<Bits>(word);
    std::memcpy(codes + count - rest, &word, rest);
  }
}

}  // namespace

void pack_bits(const std::uint8_t* codes, std::size_t count, unsigned bits, std::uint8_t* packed) {
  switch (bits) {
    case 1: return pack_groups<1>(codes, count, packed);
    case 2: return pack_groups<2>(codes, count, packed);
    case 3: return pack_groups<3>(codes, count, packed);
    case 4: return pack_groups<4>(codes, count, packed);
    case 5: return pack_groups<5>(codes, count, packed);
    case 6: return pack_groups<6>(codes, count, packed);
    case 7: return pack_groups<7>(codes, count, packed);
    case 8: return pack_groups<8>(codes, count, packed);
    default: assert(!"bits is 1 to 8: the binding checks it");
  }
}

void unpack_bits(const std::uint8_t* packed, std::size_t count, unsigned bits, std::uint8_t* codes) {
  switch (bits) {
    case 1: return unpack_groups<1>(packed, count, codes);
    case 2: return unpack_groups<2>(packed, count, codes);
    case 3: return unpack_groups<3>(packed, count, codes);
    case 4: return unpack_groups<4>(packed, count, codes);
    case 5: return unpack_groups<5>(packed, count, codes);
    case 6: return unpack_groups<6>(packed, count, codes);
    case 7: return unpack_groups<7>(packed, count, codes);
    case 8: return unpack_groups<8>(packed, count, codes);
    default: assert(!"bits is 1 to 8: the binding checks it");
  }
}

}  // namespace mixbits
