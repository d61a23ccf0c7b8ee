"""Native kernels: which there are, and a layer as they see it.

A kernel gives exact int32 sums of a convolution, see ``csrc/kernels/kernel.h``. A linear layer is a 1x1
convolution of one row. Without the native extension there are none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from mixbits.core.grid import Codebook, Grid, describe
from mixbits.pack.bits import native_available

if TYPE_CHECKING or native_available():
    from mixbits import _native

PIXEL_UNIT = 4  # bytes of a pixel are a multiple of it
LARGEST_BYTE = 255


@dataclass(frozen=True)
class Bytes:
    """How a grid's levels are stored a byte each: level = scale * byte + offset, the largest byte, level 0.

    ``zero`` is the byte of level 0, None if the grid has no such level.
    """

    scale: int
    offset: int
    largest: int
    zero: int | None


def bytes_of(grid: Grid, *, padded: bool = False) -> Bytes:
    """Storage of an activation grid; with ``padded``, level 0 has a byte even if the grid lacks it.

    Raises ``ValueError`` if that takes more than a byte (bipolar levels of 8 bits with padding).

    >>> from mixbits.core.grid import Uniform
    >>> bytes_of(Uniform(4, signed=True)), bytes_of(Uniform(2, signed=True, form="bipolar"))
    (Bytes(scale=1, offset=-8, largest=15, zero=8), Bytes(scale=2, offset=-3, largest=3, zero=None))
    >>> bytes_of(Uniform(2, signed=True, form="bipolar"), padded=True)
    Bytes(scale=1, offset=-3, largest=6, zero=3)
    """
    low, high = grid.level_min, grid.level_max
    scale = 1 if isinstance(grid, Codebook) else grid.spacing
    if padded and (low % scale or low > 0):
        scale, low = 1, min(low, 0)
    largest = (high - low) // scale
    if largest > LARGEST_BYTE:
        raise ValueError(
            f"it puts level 0 between the levels of {describe(grid)}, which then need more than a byte; "
            "use one bit less, or a grid that has level 0"
        )
    return Bytes(scale, low, largest, -low // scale if low % scale == 0 and low <= 0 else None)


def pixel_stride(channels: int) -> int:
    """Bytes of a pixel of a map.

    >>> pixel_stride(3), pixel_stride(64)
    (4, 64)
    """
    return -(-channels // PIXEL_UNIT) * PIXEL_UNIT


def out_size(size: int, kernel: int, stride: int, dilation: int) -> int:
    """Output size of a dimension whose input is ``size`` with its padding."""
    return (size - dilation * (kernel - 1) - 1) // stride + 1


def convolution(
    weight_shape: Sequence[int],
    weight_grid: Grid,
    input_grid: Grid,
    *,
    size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[Sequence[int]] = ((0, 0), (0, 0)),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> _native.Conv:
    """A layer on one image: weight [O, C / groups, kh, kw], input [C, *size], padding (before, after).

    Padding holds level 0, or the lowest level where the grid has no such level.
    """
    outputs, channels, kh, kw = weight_shape
    storage = bytes_of(input_grid)
    conv = _native.Conv()
    conv.c, conv.o, conv.groups, conv.kh, conv.kw = channels, outputs // groups, groups, kh, kw
    (conv.stride_y, conv.stride_x), (conv.dilation_y, conv.dilation_x) = stride, dilation
    conv.in_h, conv.in_w = (s + before + after for s, (before, after) in zip(size, padding, strict=True))
    conv.out_h = out_size(conv.in_h, kh, stride[0], dilation[0])
    conv.out_w = out_size(conv.in_w, kw, stride[1], dilation[1])
    conv.pixel_stride = pixel_stride(channels * groups)
    conv.a_max, conv.a_scale, conv.a_offset = storage.largest, storage.scale, storage.offset
    conv.a_zero = storage.zero or 0
    conv.w_bits = weight_grid.bits
    conv.w_min, conv.w_max = weight_grid.level_min, weight_grid.level_max
    steps = {b - a for a, b in pairwise(weight_grid.levels)}
    conv.w_step = steps.pop() if len(steps) == 1 else 0
    return conv
