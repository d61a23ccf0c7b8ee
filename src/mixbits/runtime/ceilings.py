"""Ceilings: the most that a kernel can reach, from the measured speed of the instructions that it repeats."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from mixbits.pack.bits import native_available

if TYPE_CHECKING or native_available():
    from mixbits import _native

REPEATS = 200  # measurements of instructions, of some 0.1 ms each

Products = Callable[["_native.Conv", int], float]  # convolution, width of its input's bytes: products


def _of_indices(count: int, bits: int) -> Products:
    """``count`` look-ups by indices of ``bits`` bits, each of as many products as codes fit an index."""
    return lambda conv, a_bits: count * (bits // max(conv.w_bits, a_bits))


def _depthwise(channels: int, rows: int) -> Products:
    """Of ``rows`` rows of so many channels, those in the window; two output rows may share their input."""

    def products(conv: _native.Conv, a_bits: int) -> float:
        shared = 1 if conv.stride_y == conv.dilation_y else 0
        return channels * conv.kh / -(-(conv.kh + shared) // rows)

    return products


# Of each kernel: the instructions (csrc/kernels/ceiling.h), and the products that one round of them makes.
MIXES: dict[str, tuple[str, Products]] = {
    "bitplanes_avx512popcnt": (
        "vpandd + vpopcntd + vpaddd",
        lambda conv, a_bits: 512 / (conv.w_bits * a_bits),
    ),
    "depthwise_avx2": ("vpmaddwd + vpaddd", _depthwise(8, 2)),
    "depthwise_avx512vnni": ("vpdpbusd", _depthwise(16, 4)),
    "direct_avx2": ("vpmaddwd + vpaddd", lambda conv, a_bits: 16),
    "dot_avx2": ("vpmaddubsw + vpaddw", lambda conv, a_bits: 32),
    "dot_avx512vnni": ("vpdpbusd", lambda conv, a_bits: 64),
    "table_avx2": ("vpshufb + vpaddb", _of_indices(32, 4)),
    "table_avx512vbmi": ("vpermb + vpaddb", _of_indices(64, 6)),
    "winograd3_avx512vnni": ("vpdpbusd", lambda conv, a_bits: 64 * 81 / 25),  # 25 products in place of 81
    "winograd_avx2": ("vpmaddubsw + vpaddw", lambda conv, a_bits: 32 * 36 / 16),  # 16 in place of 36
    "winograd_avx512vnni": ("vpdpbusd", lambda conv, a_bits: 64 * 36 / 16),
}


def ceiling(kernel: str, conv: _native.Conv) -> float | None:
    """Multiply-accumulates a second that a kernel's instructions allow, from registers; None if not known."""
    if kernel not in MIXES:
        return None
    mix, products = MIXES[kernel]
    return products(conv, conv.a_max.bit_length()) / _seconds_of_round(mix)


@cache
def _seconds_of_round(mix: str) -> float:
    return _native.time_ceiling(mix, REPEATS)
