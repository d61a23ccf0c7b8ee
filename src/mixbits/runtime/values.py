"""What flows between instructions: float32 arrays, and codes as integer levels with their step and grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mixbits.core.grid import Grid, levels_of
from mixbits.core.program import PackedWeight
from mixbits.pack.bits import unpack

Floats: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True)
class Codes:
    """A quantized tensor: the value of an element is ``step * level``.

    ``levels`` is int16, batch first; padding puts level 0 in even where the grid has no level 0.
    """

    levels: NDArray[np.int16]
    step: np.float32
    grid: Grid

    def __post_init__(self) -> None:
        assert self.levels.dtype == np.int16

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape, batch first."""
        return self.levels.shape

    def floats(self) -> Floats:
        """The real values, float32: one multiplication each."""
        return self.levels.astype(np.float32) * self.step


@dataclass(frozen=True)
class Weight:
    """A layer's weight: levels int16 ``[O, ...]``, and the largest sum of magnitudes of a channel."""

    levels: NDArray[np.int16]
    largest_sum: int


def weight_levels(name: str, weight: PackedWeight) -> NDArray[np.int16]:
    """The levels of a packed weight; raises ``ValueError`` if a code has no level."""
    codes = unpack(weight.packed, weight.grid.bits, int(np.prod(weight.shape))).reshape(weight.shape)
    if codes.size and int(codes.max()) >= len(weight.grid.levels):
        raise ValueError(
            f"{name}: code {int(codes.max())} has no level; its grid has {len(weight.grid.levels)}. "
            "The file is damaged or was written by something else."
        )
    return levels_of(codes, weight.grid)


def unpack_weight(name: str, weight: PackedWeight) -> Weight:
    """A packed weight as the reference takes it; raises ``ValueError`` if a code has no level."""
    levels = weight_levels(name, weight)
    sums = np.abs(levels.reshape(levels.shape[0], -1), dtype=np.int64).sum(axis=1)
    return Weight(levels, int(sums.max(initial=0)))


Value: TypeAlias = Floats | Codes


def floats_of(value: Value) -> Floats:
    """The real values of codes or floats."""
    return value.floats() if isinstance(value, Codes) else value


def numbers_of(value: Value) -> tuple[NDArray[Any], float]:
    """Codes as ``(levels, step)``, floats as ``(values, 1.0)``: what sums of both start from."""
    return (value.levels, float(value.step)) if isinstance(value, Codes) else (value, 1.0)


def moved(value: Value, move: Callable[[NDArray[Any]], NDArray[Any]]) -> Value:
    """The value after a function that only moves elements: codes stay codes."""
    return replace(value, levels=move(value.levels)) if isinstance(value, Codes) else move(value)
