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


def _depthwise(conv: _native.Conv, a_bits: int) -> float:
    """16 channels x the part of four rows that a window of two output rows fills."""
    return 16 * conv.kh / -(-(conv.kh + 1) // 4)


# Of each kernel: the instructions (csrc/kernels/ceiling.h), and the products that one round of them makes.
MIXES: dict[str, tuple[str, Products]] = {
    "bitplanes_avx512popcnt": (
        "vpandd + vpopcntd + vpaddd",
        lambda conv, a_bits: 512 / (conv.w_bits * a_bits),
    ),
    "depthwise_avx512vnni": ("vpdpbusd", _depthwise),
    "dot_avx2": ("vpmaddubsw + vpaddw", lambda conv, a_bits: 32),
    "dot_avx512vnni": ("vpdpbusd", lambda conv, a_bits: 64),
    "table_avx2": ("vpshufb + vpaddb", _of_indices(32, 4)),
    "table_avx512vbmi": ("vpermb + vpaddb", _of_indices(64, 6)),
    "winograd_avx512vnni": ("vpdpbusd", lambda conv, a_bits: 64 * 36 / 16),  # 16 products in place of 36
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
