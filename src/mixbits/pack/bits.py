"""Codes of 1 to 8 bits, packed without gaps: the storage of every quantized tensor.

The layout is a little-endian stream of bits. Code ``i`` occupies bits ``[i * bits, (i + 1) * bits)`` of the
stream, and bit ``k`` of the stream is bit ``k % 8`` of byte ``k // 8``. The unused high bits of the last byte
are zero. Drawn with the high bit of each byte on the left::

    w1:  byte i      = | c[8i+7] : 1 | c[8i+6] : 1 | ... | c[8i+1] : 1 | c[8i] : 1 |
    w2:  byte i      = | c[4i+3] : 2 | c[4i+2] : 2 | c[4i+1] : 2 | c[4i] : 2 |
    w3:  byte 3i     = | c[8i+2] : low 2 | c[8i+1] : 3 | c[8i] : 3 |
         byte 3i + 1 = | c[8i+5] : low 1 | c[8i+4] : 3 | c[8i+3] : 3 | c[8i+2] : high 1 |
         byte 3i + 2 = | c[8i+7] : 3 | c[8i+6] : 3 | c[8i+5] : high 2 |
    w4:  byte i      = | c[2i+1] : 4 | c[2i] : 4 |

Codes are unsigned here; a signed grid stores ``code - code_min``.

`pack_reference` and `unpack_reference` define the layout. `pack` and `unpack` check their arguments and give
the same result, in C++ where the extension was built.
"""

from __future__ import annotations

import importlib.util

import numpy as np
from numpy.typing import NDArray

# Asked by name, not by `except ImportError`: an extension that is there but does not load is an error to see.
if importlib.util.find_spec("mixbits._native") is not None:
    from mixbits import _native
else:
    _native = None

Bytes = NDArray[np.uint8]


def native_available() -> bool:
    """Whether the C++ extension was built; if not, NumPy gives the same results more slowly."""
    return _native is not None


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of ``count`` packed codes of ``bits`` bits, rounded up to whole bytes.

    >>> packed_bytes(8, bits=3), packed_bytes(9, bits=3)
    (3, 4)
    """
    _check_bits(bits)
    if count < 0:
        raise ValueError(f"a tensor has 0 or more codes, not {count}")
    return (count * bits + 7) // 8


def pack(codes: Bytes, bits: int) -> Bytes:
    """Codes of any shape as one row of packed bytes, in C order.

    Raises:
        ValueError: a code does not fit in ``bits`` bits, or ``codes`` is not uint8.

    >>> [hex(byte) for byte in pack(np.array([[1, 2], [3, 4]], np.uint8), bits=4)]
    ['0x21', '0x43']
    """
    size_bytes = packed_bytes(codes.size, bits)
    _check_uint8("codes", codes)
    flat = np.ascontiguousarray(codes).reshape(-1)
    if flat.size and int(flat.max()) >= (1 << bits):
        index = int(np.argmax(flat >= (1 << bits)))
        raise ValueError(
            f"code {flat[index]} at flat index {index} does not fit in {bits} bits (they hold codes below "
            f"{1 << bits}). Pack with more bits, or store code - code_min."
        )
    if _native is None:
        return pack_reference(flat, bits)
    packed = np.empty(size_bytes, np.uint8)
    _native.pack_bits(flat, bits, packed)
    return packed


def unpack(packed: Bytes, bits: int, count: int) -> Bytes:
    """The ``count`` codes that `pack` put into ``packed``, one a byte, in one row.

    Raises:
        ValueError: ``packed`` is not exactly the bytes of ``count`` codes, or not uint8.

    >>> unpack(np.array([0x21, 0x43], np.uint8), bits=4, count=4).tolist()
    [1, 2, 3, 4]
    """
    size_bytes = packed_bytes(count, bits)
    _check_uint8("packed", packed)
    if packed.size != size_bytes:
        raise ValueError(f"{count} codes of {bits} bits take {size_bytes} bytes, not {packed.size}")
    flat = np.ascontiguousarray(packed).reshape(-1)
    if _native is None:
        return unpack_reference(flat, bits, count)
    codes = np.empty(count, np.uint8)
    _native.unpack_bits(flat, bits, codes)
    return codes


def pack_reference(codes: Bytes, bits: int) -> Bytes:
    """The definition of `pack`: write out every bit of every code, then cut the stream into bytes.

    >>> pack_reference(np.array([1, 2, 3], np.uint8), bits=3).tolist() == [0b11_010_001, 0b0]
    True
    """
    bit_of_code = np.arange(bits, dtype=np.uint8)
    stream = (codes.reshape(-1, 1) >> bit_of_code) & 1  # [count, bits]: a code a row, its low bit first
    return np.packbits(stream, bitorder="little")


def unpack_reference(packed: Bytes, bits: int, count: int) -> Bytes:
    """The definition of `unpack`: ``bits`` bits a row, each worth its power of two.

    >>> unpack_reference(np.array([0b11_010_001, 0b0], np.uint8), bits=3, count=3).tolist()
    [1, 2, 3]
    """
    stream = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    worth = np.left_shift(1, np.arange(bits)).astype(np.uint8)
    return stream @ worth


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"packed codes have 1 to 8 bits, not {bits}")


def _check_uint8(name: str, array: NDArray[np.generic]) -> None:
    if array.dtype != np.uint8:
        raise ValueError(f"{name} is {array.dtype}, not uint8. Store code - code_min as uint8.")
