"""Grids: the finite sets of values that a tensor may take, and the definition of rounding onto them.

Everything that quantizes in mixbits (training, packing, the reference runtime, exports) means what this file
says. A value is ``step * level``; a *code* is the unsigned integer ``0 .. 2**bits - 1`` that is stored for a
level.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

Form: TypeAlias = Literal["full", "narrow", "bipolar"]
FORMS: tuple[Form, ...] = ("full", "narrow", "bipolar")
MAX_BITS = 8


def level_count(bits: int) -> int:
    """Number of codes of a ``bits``-bit field."""
    return 1 << bits


@dataclass(frozen=True)
class Uniform:
    """Equally spaced levels ``level_min .. level_max``; code 0 is the lowest level.

    ``form`` is ``full`` (two's complement; unsigned: from 0), ``narrow`` (symmetric, one code unused) or
    ``bipolar`` (odd integers, DoReFa's grid: one bit is -1/+1).

    >>> Uniform(2, signed=True).levels, Uniform(2, signed=True, form="narrow").levels
    ((-2, -1, 0, 1), (-1, 0, 1))
    >>> Uniform(2, signed=True, form="bipolar").levels, Uniform(2, signed=False).levels
    ((-3, -1, 1, 3), (0, 1, 2, 3))
    """

    bits: int
    signed: bool
    form: Form = "full"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MAX_BITS:
            raise ValueError(f"a grid of {self.bits} bits does not exist; widths are 1 to {MAX_BITS}")
        if self.form not in FORMS:
            raise ValueError(f"unknown form {self.form!r}; a uniform grid is one of {', '.join(FORMS)}")
        if not self.signed and self.form != "full":
            raise ValueError(f"an unsigned grid is always 'full'; {self.form!r} needs signed=True")
        if self.form == "narrow" and self.bits < 2:
            raise ValueError("a narrow signed grid needs 2 bits or more; for 1 bit use form='bipolar'")

    @property
    def level_min(self) -> int:
        """Lowest level, an integer."""
        half = level_count(self.bits) // 2
        if not self.signed:
            return 0
        return {"full": -half, "narrow": 1 - half, "bipolar": 1 - 2 * half}[self.form]

    @property
    def level_max(self) -> int:
        """Highest level, an integer."""
        half = level_count(self.bits) // 2
        if not self.signed:
            return 2 * half - 1
        return 2 * half - 1 if self.form == "bipolar" else half - 1

    @property
    def spacing(self) -> int:
        """Distance of neighbouring levels: 2 on a bipolar grid, else 1."""
        return 2 if self.form == "bipolar" else 1

    @property
    def levels(self) -> tuple[int, ...]:
        """All levels in the order of their codes."""
        return tuple(range(self.level_min, self.level_max + 1, self.spacing))


@dataclass(frozen=True)
class Codebook:
    """Any increasing levels of one byte (signed or unsigned): power-of-two grids and learned levels.

    ``edges[i]`` is the threshold (in steps) at and above which a value belongs to level ``i + 1`` rather than
    ``i``; by default the midpoints, so that the nearest level is taken.

    >>> Codebook(2, levels=(-4, -1, 1, 4)).edges
    (-2.5, 0.0, 2.5)
    """

    bits: int
    levels: tuple[int, ...]
    edges: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        levels, half_byte = self.levels, level_count(MAX_BITS) // 2
        if not 1 <= self.bits <= MAX_BITS:
            raise ValueError(f"a codebook of {self.bits} bits does not exist; widths are 1 to {MAX_BITS}")
        if not 2 <= len(levels) <= level_count(self.bits):
            raise ValueError(
                f"{len(levels)} levels do not fit {self.bits} bits (2 to {level_count(self.bits)})"
            )
        if any(a >= b for a, b in pairwise(levels)):
            raise ValueError(f"levels must increase strictly, got {levels}")
        lowest, highest = (-half_byte, half_byte - 1) if levels[0] < 0 else (0, 2 * half_byte - 1)
        if levels[0] < lowest or levels[-1] > highest:
            raise ValueError(
                f"levels must fit one byte ({lowest} .. {highest}), got {levels[0]} .. {levels[-1]}"
            )
        if not self.edges:
            midpoints = tuple((a + b) / 2 for a, b in pairwise(levels))
            object.__setattr__(self, "edges", midpoints)
        between = zip(levels, self.edges, levels[1:], strict=False)
        if len(self.edges) != len(levels) - 1 or not all(a < e <= b for a, e, b in between):
            raise ValueError(f"edges must lie between neighbouring levels, got {self.edges} for {levels}")

    @property
    def signed(self) -> bool:
        """Whether some level is negative."""
        return self.levels[0] < 0

    @property
    def level_min(self) -> int:
        """Lowest level."""
        return self.levels[0]

    @property
    def level_max(self) -> int:
        """Highest level."""
        return self.levels[-1]


Grid: TypeAlias = Uniform | Codebook


def uniform_range(bits: int, level_max: int, *, signed: bool) -> Grid:
    """The grid ``-level_max .. level_max`` (unsigned: from 0) in ``bits`` bits, all codes used or not.

    >>> uniform_range(3, 3, signed=True), uniform_range(3, 2, signed=True).levels
    (Uniform(bits=3, signed=True, form='narrow'), (-2, -1, 0, 1, 2))
    """
    whole = Uniform(bits, signed, "narrow" if signed else "full")
    if whole.level_max == level_max:
        return whole
    return Codebook(bits, tuple(range(-level_max if signed else 0, level_max + 1)))


def quantize(x: NDArray[np.float32], step: NDArray[np.float32] | float, grid: Grid) -> NDArray[np.uint8]:
    """Codes of the levels nearest to ``x / step``, saturated to ``grid``; ties to even levels.

    ``step`` is a positive float32 scalar or broadcasts against ``x``. The division is done in float32: this
    is the definition that native kernels must equal exactly.

    >>> quantize(np.float32([0.26, -9.0]), 0.5, Uniform(4, signed=True)).tolist()
    [9, 0]
    """
    ratio = np.asarray(x, np.float32) / np.asarray(step, np.float32)
    if isinstance(grid, Codebook):
        edges = np.asarray(grid.edges, np.float32)
        return np.searchsorted(edges, ratio.ravel(), side="right").astype(np.uint8).reshape(ratio.shape)
    if grid.form == "bipolar":  # odd levels: code c is level 2c + level_min
        codes = np.rint((ratio - grid.level_min) / np.float32(2))
    else:  # round first, shift after: ties go to even levels, not to even codes
        codes = np.rint(ratio) - grid.level_min
    return np.clip(codes, 0, len(grid.levels) - 1).astype(np.uint8)


def levels_of(codes: NDArray[np.uint8], grid: Grid) -> NDArray[np.int16]:
    """Integer levels of stored codes (int16, because bipolar 8-bit levels reach 255)."""
    return np.asarray(grid.levels, np.int16)[codes]


def dequantize(
    codes: NDArray[np.uint8], step: NDArray[np.float32] | float, grid: Grid
) -> NDArray[np.float32]:
    """Values ``step * level`` in float32.

    >>> dequantize(np.uint8([9, 0]), 0.5, Uniform(4, signed=True)).tolist()
    [0.5, -4.0]
    """
    return levels_of(codes, grid).astype(np.float32) * np.asarray(step, np.float32)


def grid_to_json(grid: Grid) -> dict[str, Any]:
    """Plain JSON of a grid, read back by :func:`grid_from_json`."""
    if isinstance(grid, Uniform):
        return {"bits": grid.bits, "signed": grid.signed, "form": grid.form}
    return {"bits": grid.bits, "levels": list(grid.levels), "edges": list(grid.edges)}


def grid_from_json(entry: Any) -> Grid:
    """The grid of a JSON object; raises ``ValueError`` saying what is wrong with it.

    >>> grid_from_json({"bits": 3, "signed": True, "form": "narrow"})
    Uniform(bits=3, signed=True, form='narrow')
    """
    if not isinstance(entry, dict):
        raise ValueError(f"a grid is an object such as {{'bits': 4, 'signed': true}}, got {entry!r}")
    fields = cast("dict[str, Any]", entry)  # keys of JSON are strings
    known = {"bits", "levels", "edges"} if "levels" in fields else {"bits", "signed", "form"}
    unknown = set(fields) - known
    if unknown or "bits" not in fields:
        raise ValueError(f"a grid has the keys {sorted(known)}, got {sorted(fields)}")
    bits = fields["bits"]
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise ValueError(f"bits must be an integer, got {bits!r}")
    if "levels" in fields:
        levels, edges = fields["levels"], fields.get("edges", [])
        if not _is_list_of(levels, int):
            raise ValueError("levels must be a list of integers")
        if not _is_list_of(edges, int, float):
            raise ValueError("edges must be a list of numbers")
        return Codebook(bits, tuple(levels), tuple(float(v) for v in edges))
    signed, form = fields.get("signed", True), fields.get("form", "full")
    if not isinstance(signed, bool):
        raise ValueError(f"signed must be true or false, got {signed!r}")
    return Uniform(bits, signed, form)


def _is_list_of(value: Any, *types: type) -> bool:
    """Whether a JSON value is a list of exactly these types: ``True`` is no integer."""
    return isinstance(value, list) and all(type(item) in types for item in cast("list[Any]", value))


def describe(grid: Grid) -> str:
    """A few words for reports.

    >>> describe(Uniform(4, signed=False)), describe(Codebook(2, (-2, -1, 1, 2)))
    ('4 bit unsigned', '2 bit codebook of 4')
    """
    if isinstance(grid, Codebook):
        return f"{grid.bits} bit codebook of {len(grid.levels)}"
    sign = "signed" if grid.signed else "unsigned"
    return f"{grid.bits} bit {sign}" + ("" if grid.form == "full" else f" {grid.form}")
