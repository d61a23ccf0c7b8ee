"""Where values lie: strides, places in the arena, borders, and how values become bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from mixbits.core.grid import Codebook, Grid
from mixbits.core.program import Instruction
from mixbits.pack.bits import native_available
from mixbits.runtime.kernels import PIXEL_UNIT, Bytes, pixel_stride

if TYPE_CHECKING or native_available():
    from mixbits import _native

FLOAT_BYTES = 4
# Vectors of a linear layer that are a row of its convolution: a divisor near GOOD_ROW, or all up to MAX_ROW.
GOOD_ROW, MAX_ROW = 64, 256


@dataclass(eq=False)
class Buffer:
    """A piece of the arena: its size, and the first and the last step that use it."""

    size: int
    first: int
    last: int
    offset: int = 0


@dataclass(frozen=True)
class Placed:
    """A value in memory: strides and offset in elements; ``storage`` and ``step`` if it is bytes."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    home: Buffer | str  # or the name of a block
    offset: int = 0
    storage: Bytes | None = None
    grid: Grid | None = None
    step: float = 1.0
    # Of a map or of rows of vectors that nothing was cut from: what lies behind a pixel's channels is 0. Its
    # border is (top, bottom, left, right).
    whole: bool = False
    finite: bool = False  # of floats: no input makes them infinite
    border: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def element(self) -> int:
        """Bytes of an element."""
        return FLOAT_BYTES if self.storage is None else 1

    @property
    def nbytes(self) -> int:
        """Bytes of its elements; those that are repeated by a stride of 0 count once."""
        sizes = zip(self.shape, self.strides, strict=True)
        return prod(size for size, stride in sizes if stride) * self.element

    @property
    def operand(self) -> _native.Operand:
        """As the engine's operations see it, once the arena is laid out."""
        storage = self.storage or Bytes(1, 0, 0, None)
        return _native.Operand(
            place=self.place,
            bytes=self.storage is not None,
            shape=list(self.shape),
            strides=list(self.strides),
            scale=storage.scale,
            offset=storage.offset,
            step=self.step,
            lowest=0 if self.grid is None else (self.grid.level_min - storage.offset) // storage.scale,
        )

    @property
    def place(self) -> _native.Place:
        """Where its first element lies, once the arena is laid out."""
        start = self.home.offset if isinstance(self.home, Buffer) else 0
        block = "arena" if isinstance(self.home, Buffer) else self.home
        return _native.Place(getattr(_native.Block, block), start + self.offset * self.element)

    def pixels(self, *, rows: int) -> _native.PixelPlace:
        """Where its pixels lie: those of a map, or vectors, ``rows`` of them in a row."""
        e, s = self.element, self.strides
        if rows:
            return _native.PixelPlace(self.place, 0, rows * s[-2] * e, s[-2] * e)
        row = s[2] if len(s) == 4 else 0
        return _native.PixelPlace(self.place, s[0] * e, row * e, s[-1] * e)


def dense(shape: Sequence[int], order: Sequence[int] | None = None) -> tuple[int, ...]:
    """Strides without gaps; the last dimension of ``order`` lies closest together.

    >>> dense((1, 3, 4, 5)), dense((1, 3, 4, 5), (0, 2, 3, 1))
    ((60, 20, 5, 1), (60, 1, 15, 3))
    """
    strides, total = [0] * len(shape), 1
    for dim in reversed(range(len(shape)) if order is None else list(order)):
        strides[dim] = total
        total *= shape[dim]
    return tuple(strides)


def order_of(value: Placed) -> list[int]:
    """Dimensions from the one that lies farthest apart to the closest; of equal ones, in their order."""
    return sorted(range(len(value.shape)), key=lambda dim: -abs(value.strides[dim]))


def moved_view(value: Placed, step: Instruction, wanted: tuple[int, ...]) -> Placed | None:
    """What a move makes of a value by strides alone; None for a reshape that needs a copy."""
    attrs, shape, strides = step.attrs, list(value.shape), list(value.strides)
    offset = value.offset
    if step.op == "permute":
        shape, strides = ([given[dim] for dim in attrs["dims"]] for given in (shape, strides))
    elif step.op == "slice":
        dim = attrs["dim"]
        offset += attrs["start"] * strides[dim]
        strides[dim] *= attrs["step"]
    elif step.op == "select":
        offset += attrs["index"] * strides[attrs["dim"]]
        del strides[attrs["dim"]]
    elif step.op == "expand":
        new = len(wanted) - len(shape)
        strides = [0] * new + [
            0 if size == 1 and to != 1 else stride
            for size, to, stride in zip(shape, wanted[new:], strides, strict=True)
        ]
    else:
        reshaped = reshaped_strides(shape, strides, wanted)
        if reshaped is None:
            return None
        strides = list(reshaped)
    return replace(
        value, shape=wanted, strides=tuple(strides), offset=offset, whole=False, border=(0, 0, 0, 0)
    )


def reshaped_strides(
    shape: Sequence[int], strides: Sequence[int], wanted: Sequence[int]
) -> tuple[int, ...] | None:
    """Strides of the same elements in another shape, None if no strides give them.

    >>> reshaped_strides((2, 3, 4), (24, 8, 1), (6, 2, 2)), reshaped_strides((2, 3), (1, 2), (6,))
    ((8, 2, 1), None)
    """
    runs: list[list[int]] = []  # [size, stride of the last dimension] of runs of dimensions that lie like one
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if runs and runs[-1][1] == size * stride:
            runs[-1] = [runs[-1][0] * size, stride]
        else:
            runs.append([size, stride])
    found = [0] * len(wanted)
    left, stride = runs[-1] if runs else [1, 1]
    for dim in reversed(range(len(wanted))):
        if wanted[dim] == 1:
            found[dim] = stride
            continue
        if left == 1 and runs:
            runs.pop()
            left, stride = runs[-1] if runs else [1, 1]
        if left % wanted[dim]:
            return None
        found[dim] = stride
        stride *= wanted[dim]
        left //= wanted[dim]
    return tuple(found)


def lay_out(buffers: Sequence[Buffer]) -> int:
    """Give every buffer its offset, so that those in use at the same time do not overlap; the arena's size.

    The largest first, each at the lowest place that is free for as long as it lives.
    """
    placed: list[Buffer] = []
    for buffer in sorted(buffers, key=lambda b: (-b.size, b.first)):
        near = sorted(
            (b for b in placed if b.first <= buffer.last and buffer.first <= b.last), key=lambda b: b.offset
        )
        offset = 0
        for other in near:
            if other.offset - offset >= buffer.size:
                break
            offset = max(offset, other.offset + other.size)
        buffer.offset = offset
        placed.append(buffer)
    return max((b.offset + b.size for b in buffers), default=0)


def rounding(grid: Grid, to: Placed, step: float) -> _native.Rounding:
    """How values become the bytes of a grid."""
    assert to.storage is not None
    stored = to.storage
    if isinstance(grid, Codebook):
        codes = [(level - stored.offset) // stored.scale for level in grid.levels]
        return _native.codebook_rounding(
            step, np.asarray(grid.edges, np.float32), np.asarray(codes, np.uint8)
        )
    byte_step = grid.spacing // stored.scale
    if grid.level_min != stored.offset:
        raise ValueError(f"codes from {grid.level_min} are stored from {stored.offset}")
    return _native.uniform_rounding(step, grid.level_min, grid.spacing, len(grid.levels) - 1, byte_step)


def image(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """[n, C, H, W] of a map; of [n, C, W], H is 1."""
    n, c, *size = shape
    h, w = size if len(size) == 2 else (1, *size)
    return n, c, h, w


def two(values: Sequence[Any], missing: Any) -> Sequence[Any]:
    """Attributes of two dimensions; those of a 1-D convolution behind ``missing``."""
    return values if len(values) == 2 else [missing, *values]


def rows_stride(value: Placed) -> int | None:
    """The distance of vectors of the last dimension, None if they do not lie one after the other."""
    shape, strides = value.shape, value.strides
    if shape[-1] != 1 and strides[-1] != 1:
        return None
    apart = [(size, stride) for size, stride in zip(shape[:-1], strides[:-1], strict=True) if size != 1]
    if not apart:
        return pixel_stride(shape[-1]) if value.whole or shape[-1] % PIXEL_UNIT == 0 else None
    if any(a[1] != b[0] * b[1] for a, b in pairwise(apart)):
        return None
    return apart[-1][1]


def row_length(vectors: int) -> int:
    """How many vectors of a linear layer make a row of its convolution.

    >>> row_length(1), row_length(196), row_length(197), row_length(4096)
    (1, 49, 197, 64)
    """
    good = [row for row in range(min(GOOD_ROW, vectors), 0, -1) if vectors % row == 0]
    return good[0] if good[0] >= GOOD_ROW // 4 or vectors > MAX_ROW else vectors
