"""Quantize, and the layers on codes: exact integer sums, then a float32 scale and bias a channel.

``y = float32(acc) * scale[c] + bias[c]``, each operation rounded by itself (no fused multiply-add).
``acc`` is the exact integer sum of weight level x activation level, below 2**31.

Why a float matrix product gives the exact integer: all products and all partial sums, in whatever order, are
integers of magnitude at most S, the largest sum of |weight level| of a channel times the largest |activation
level|. float32 holds all integers up to 2**24, so nothing is rounded where S <= 2**24; beyond that float64
(up to 2**53) takes over. Fused multiply-adds make no difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixbits.core import grid as grids
from mixbits.core.grid import Grid
from mixbits.core.infer import largest_level
from mixbits.runtime.values import Codes, Floats, Value, Weight, floats_of

EXACT_IN_FLOAT32 = 2**24
COLUMNS = (
    2**21
)  # elements of the im2col buffer; samples are taken in groups that fit, at least one kernel position


def quantize(x: Value, *, grid: Grid, step: Floats) -> Codes:
    """Codes of the nearest levels (``core.grid.quantize``); codes of another grid become values first."""
    values = floats_of(x)
    if np.isnan(values).any():
        raise ValueError(
            "not a number (NaN) cannot be quantized; an operation before divided by zero or overflowed"
        )
    codes = grids.quantize(values, step, grid)
    return Codes(grids.levels_of(codes, grid), np.float32(step), grid)


def linear(x: Codes, *, weight: Weight, scale: Floats, bias: Floats) -> Floats:
    """Codes [..., K], weight [O, K], scale and bias [O] to floats [..., O]."""
    dtype = exact_dtype(weight, x)
    acc = x.levels.astype(dtype) @ weight.levels.astype(dtype).T
    return acc.astype(np.float32) * scale + bias


def convolution(
    x: Codes,
    *,
    weight: Weight,
    scale: Floats,
    bias: Floats,
    stride: Sequence[int],
    padding: Sequence[Sequence[int]],
    dilation: Sequence[int],
    groups: int,
) -> Floats:
    """Codes [n, C, *sizes], weight [O, C / groups, *kernel], scale and bias [O] to floats [n, O, *sizes].

    One or two spatial dimensions; padding is (before, after) of each, filled with level 0.
    """
    dtype = exact_dtype(weight, x)
    w = weight.levels.astype(dtype)
    levels = np.pad(x.levels, [(0, 0), (0, 0), *((a, b) for a, b in padding)]).astype(dtype)
    depthwise = w.shape[1] == 1 and w.shape[0] == groups
    acc = (_depthwise if depthwise else _grouped)(levels, w, stride=stride, dilation=dilation, groups=groups)
    channel = (slice(None), *(None,) * len(stride))
    return acc.astype(np.float32) * scale[channel] + bias[channel]


def exact_dtype(weight: Weight, x: Codes) -> type[np.float32 | np.float64]:
    """The float type that holds every partial sum exactly."""
    bound = weight.largest_sum * largest_level(x.grid)
    return np.float32 if bound <= EXACT_IN_FLOAT32 else np.float64


def _windows(
    sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[list[int], list[tuple[slice, ...]]]:
    """Output sizes, and for each kernel position, in row order, the input elements that it meets."""
    out = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(sizes, kernel, stride, dilation, strict=True)
    ]
    positions = [
        tuple(
            slice(i * d, i * d + (count - 1) * s + 1, s)
            for i, count, s, d in zip(position, out, stride, dilation, strict=True)
        )
        for position in product(*map(range, kernel))
    ]
    return out, positions


def _depthwise(
    x: NDArray[Any], w: NDArray[Any], *, stride: Sequence[int], dilation: Sequence[int], groups: int
) -> NDArray[Any]:
    """One filter a channel: a multiply-add of whole maps for each kernel position."""
    out, positions = _windows(x.shape[2:], w.shape[2:], stride, dilation)
    taps = w.reshape(groups, -1)  # [C, kernel positions]
    acc = np.zeros((x.shape[0], groups, *out), x.dtype)
    channel = (slice(None), *(None,) * len(out))
    for tap, position in zip(taps.T, positions, strict=True):
        acc += x[(..., *position)] * tap[channel]
    return acc


def _grouped(
    x: NDArray[Any], w: NDArray[Any], *, stride: Sequence[int], dilation: Sequence[int], groups: int
) -> NDArray[Any]:
    """im2col: columns [n, groups, positions x C / groups, pixels], and a matrix product a sample and group.

    Columns are made for as many samples and kernel positions at a time as the buffer holds.
    """
    out, positions = _windows(x.shape[2:], w.shape[2:], stride, dilation)
    n, c, pixels = x.shape[0], x.shape[1] // groups, int(np.prod(out))
    taps = np.moveaxis(
        w.reshape(groups, w.shape[0] // groups, c, -1), 3, 2
    )  # [g, O / g, kernel positions, C / g]
    acc = np.zeros((n, groups, w.shape[0] // groups, pixels), x.dtype)
    maps = x.reshape(n, groups, c, *x.shape[2:])
    at_once = max(COLUMNS // max(groups * c * pixels, 1), 1)  # kernel positions of one sample
    samples = max(at_once // len(positions), 1)
    for first in range(0, n, samples):
        some = slice(first, first + samples)
        for start in range(0, len(positions), at_once):
            part = positions[start : start + at_once]
            columns = np.stack([maps[(some, ..., *position)] for position in part], axis=2)
            columns = columns.reshape(len(columns), groups, len(part) * c, pixels)
            acc[some] += taps[:, :, start : start + len(part)].reshape(groups, -1, len(part) * c) @ columns
    return acc.reshape(n, w.shape[0], *out)
