"""Packing: the bytes are literal, nothing is lost, the length is a law, and C++ equals NumPy."""

from __future__ import annotations

import os
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mixbits.pack import bits as packing
from mixbits.pack import native_available, pack, pack_reference, packed_bytes, unpack, unpack_reference

WIDTHS = range(1, 9)
# Around a byte, around a word, and primes, which share no factor with either.
LENGTHS = [0, 1, 2, 3, 5, 7, 8, 9, 13, 31, 63, 64, 65, 127, 257, 1009]

# Packed by hand from the drawing in mixbits.pack.bits; the bits of one code stand together.
GOLDEN = {
    "w1": (1, [1, 0, 1, 1, 0, 0, 0, 1, 1], [0b10001101, 0b1]),
    "w2": (2, [1, 2, 3, 0, 3], [0b00_11_10_01, 0b11]),
    "w3": (3, [1, 2, 3, 4, 5, 6, 7, 0], [0b11_010_001, 0b0_101_100_0, 0b000_111_11]),
    "w4": (4, [1, 2, 3, 4, 15], [0x21, 0x43, 0x0F]),
    "w5": (5, [1, 2, 4, 8, 16, 31], [0b010_00001, 0b0_00100_00, 0b0000_0100, 0b00_11111_1]),
    "w6": (6, [1, 2, 3, 63], [0b10_000001, 0b0011_0000, 0b111111_00]),
    "w7": (7, [127, 0, 127, 1], [0b0_1111111, 0b11_000000, 0b001_11111, 0b0000_0000]),
    "w8": (8, [0, 1, 128, 255], [0, 1, 128, 255]),
}

each_width = pytest.mark.parametrize("bits", WIDTHS, ids=lambda bits: f"w{bits}")
each_length = pytest.mark.parametrize("count", LENGTHS)
each_golden = pytest.mark.parametrize(("bits", "codes", "packed"), GOLDEN.values(), ids=GOLDEN)
each_packer = pytest.mark.parametrize("packer", [pack, pack_reference])
each_unpacker = pytest.mark.parametrize("unpacker", [unpack, unpack_reference])


@pytest.fixture
def native() -> ModuleType:
    return pytest.importorskip("mixbits._native", reason="built without the native extension")


def codes_of(count: int, bits: int) -> packing.Bytes:
    """Codes that differ from their neighbours and reach both ends of the width."""
    codes = np.random.default_rng(count).integers(0, 1 << bits, count, dtype=np.uint8)
    codes[::5] = 0xFF >> (8 - bits)
    codes[1::5] = 0
    return codes


@st.composite
def widths_and_codes(draw: st.DrawFn) -> tuple[int, packing.Bytes]:
    bits = draw(st.sampled_from(WIDTHS))
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=20))
    return bits, draw(hnp.arrays(np.uint8, shape)) >> np.uint8(8 - bits)


@each_packer
@each_golden
def test_packed_bytes_are_the_ones_drawn(packer, bits, codes, packed):
    assert packer(np.array(codes, np.uint8), bits).tolist() == packed


@each_unpacker
@each_golden
def test_drawn_bytes_unpack_to_their_codes(unpacker, bits, codes, packed):
    assert unpacker(np.array(packed, np.uint8), bits, len(codes)).tolist() == codes


@each_width
@each_length
def test_pack_equals_the_reference(count, bits):
    codes = codes_of(count, bits)
    assert pack(codes, bits).tobytes() == pack_reference(codes, bits).tobytes()


@each_width
@each_length
def test_unpack_equals_the_reference(count, bits):
    # Every bit set, the unused ones of the last byte too: they must be ignored.
    packed = np.full(packed_bytes(count, bits), 0xFF, np.uint8)
    packed[::3] = 0b0110_1001
    assert unpack(packed, bits, count).tobytes() == unpack_reference(packed, bits, count).tobytes()


@each_width
@each_length
def test_packed_length_is_count_times_bits_rounded_up_to_bytes(count, bits):
    assert pack(codes_of(count, bits), bits).nbytes == packed_bytes(count, bits) == -(-count * bits // 8)


@given(widths_and_codes())
def test_unpacking_gives_the_packed_codes_back(width_and_codes):
    bits, codes = width_and_codes
    assert np.array_equal(unpack(pack(codes, bits), bits, codes.size), codes.reshape(-1))


@given(widths_and_codes())
def test_unused_bits_of_the_last_byte_are_zero(width_and_codes):
    bits, codes = width_and_codes
    unused = packed_bytes(codes.size, bits) * 8 - codes.size * bits
    assert pack(codes, bits)[-1:].sum() < (1 << (8 - unused))


@given(widths_and_codes())
def test_the_reference_equals_pack_on_any_codes(width_and_codes):
    bits, codes = width_and_codes
    assert np.array_equal(pack(codes, bits), pack_reference(codes, bits))


@each_width
def test_codes_are_packed_in_c_order_whatever_their_strides(bits):
    codes = codes_of(60, bits).reshape(3, 4, 5)
    assert np.array_equal(pack(codes.T, bits), pack(np.ascontiguousarray(codes.T), bits))


@each_width
def test_read_only_arrays_can_be_packed_and_unpacked(bits):
    codes = codes_of(9, bits)
    codes.flags.writeable = False
    packed = pack(codes, bits)
    packed.flags.writeable = False
    assert np.array_equal(unpack(packed, bits, 9), codes)


@pytest.mark.parametrize("bits", range(1, 8), ids=lambda bits: f"w{bits}")
def test_a_code_that_does_not_fit_is_named(bits):
    codes = np.zeros(10, np.uint8)
    codes[6] = 1 << bits
    with pytest.raises(ValueError, match=rf"^code {1 << bits} at flat index 6 does not fit in {bits} bits"):
        pack(codes, bits)


@pytest.mark.parametrize("bits", [-1, 0, 9])
def test_a_width_outside_1_to_8_is_refused(bits):
    with pytest.raises(ValueError, match=f"1 to 8 bits, not {bits}"):
        packed_bytes(8, bits)


def test_a_negative_count_is_refused():
    with pytest.raises(ValueError, match="not -1"):
        packed_bytes(-1, 4)


@pytest.mark.parametrize("size", [0, 3, 5])
def test_packed_bytes_of_another_length_are_refused(size):
    with pytest.raises(ValueError, match=f"10 codes of 3 bits take 4 bytes, not {size}"):
        unpack(np.zeros(size, np.uint8), bits=3, count=10)


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.float32, np.bool_])
def test_codes_that_are_not_uint8_are_refused(dtype):
    with pytest.raises(ValueError, match=f"codes is {np.dtype(dtype)}"):
        pack(np.zeros(4, dtype), bits=4)


@each_width
@each_length
def test_native_packing_writes_its_bytes_and_none_beyond(native, count, bits):
    around = np.full(packed_bytes(count, bits) + 16, 0xAA, np.uint8)
    native.pack_bits(codes_of(count, bits), bits, around[8:-8])
    assert around[:8].tolist() == around[-8:].tolist() == [0xAA] * 8


@each_width
@each_length
def test_native_unpacking_writes_its_codes_and_none_beyond(native, count, bits):
    around = np.full(count + 16, 0xAA, np.uint8)
    native.unpack_bits(pack(codes_of(count, bits), bits), bits, around[8:-8])
    assert around[:8].tolist() == around[-8:].tolist() == [0xAA] * 8


@pytest.mark.parametrize(("bits", "size"), [(3, 3), (3, 5), (0, 0), (9, 12)])
def test_native_packing_checks_width_and_length(native, bits, size):
    with pytest.raises(ValueError, match=r"10 codes of 3 bits take 4 bytes|bits is 1 to 8"):
        native.pack_bits(np.zeros(10, np.uint8), bits, np.zeros(size, np.uint8))


def test_a_build_without_the_extension_gives_the_same_bytes(monkeypatch):
    codes = codes_of(1009, 3)
    packed = pack(codes, 3)
    monkeypatch.setattr(packing, "_native", None)
    assert not native_available()
    assert np.array_equal(pack(codes, 3), packed)
    assert np.array_equal(unpack(packed, 3, codes.size), codes)


@pytest.mark.skipif("MIXBITS_REQUIRE_NATIVE" not in os.environ, reason="the extension is optional here")
def test_the_extension_is_built_where_it_is_required():
    assert native_available()
