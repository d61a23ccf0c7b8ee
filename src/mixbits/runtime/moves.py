"""Instructions that move elements or pick among them: codes in, codes out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixbits.core.infer import window_count
from mixbits.runtime.values import Codes, Value, floats_of, moved


def reshape(x: Value, *, shape: Sequence[int]) -> Value:
    """The same elements in another shape; -1 is what is left."""
    return moved(x, lambda a: a.reshape(shape))


def permute(x: Value, *, dims: Sequence[int]) -> Value:
    """Dimensions in the order ``dims``."""
    return moved(x, lambda a: a.transpose(dims))


def slice_(x: Value, *, dim: int, start: int, stop: int, step: int) -> Value:
    """Elements ``start, start + step, ...`` below ``stop`` of one dimension."""
    return moved(x, lambda a: a[(slice(None),) * dim + (slice(start, stop, step),)])


def select(x: Value, *, dim: int, index: int) -> Value:
    """One element of a dimension, which goes."""
    return moved(x, lambda a: a[(slice(None),) * dim + (index,)])


def expand(x: Value, *, shape: Sequence[int]) -> Value:
    """Dimensions of size one repeated; -1 keeps a size, new dimensions come first."""

    def move(a: NDArray[Any]) -> NDArray[Any]:
        aligned = (1,) * (len(shape) - a.ndim) + a.shape
        return np.broadcast_to(
            a, [was if size == -1 else size for was, size in zip(aligned, shape, strict=True)]
        )

    return moved(x, move)


def pad(x: Value, *, pads: Sequence[Sequence[int]], mode: str, value: float) -> Value:
    """Elements added before and after each dimension (level 0 for codes), or cut off where negative."""
    if mode == "constant" and value != 0:
        x = floats_of(x)

    def move(a: NDArray[Any]) -> NDArray[Any]:
        cut = tuple(
            slice(max(-before, 0), size - max(-after, 0))
            for size, (before, after) in zip(a.shape, pads, strict=True)
        )
        widths = [(max(before, 0), max(after, 0)) for before, after in pads]
        if mode == "constant":
            return np.pad(a[cut], widths, constant_values=a.dtype.type(value))
        return np.pad(a, widths, mode=mode)  # type: ignore[call-overload]  # one of three literals

    return moved(x, move)


def upsample_nearest(x: Value, *, size: Sequence[int]) -> Value:
    """Each output element is the input element at ``floor(i * size_in / size_out)`` in every dimension."""

    def move(a: NDArray[Any]) -> NDArray[Any]:
        for dim, wanted in enumerate(size, start=a.ndim - len(size)):
            a = np.take(a, np.arange(wanted) * a.shape[dim] // wanted, axis=dim)
        return a

    return moved(x, move)


def lowest(x: Value) -> Any:
    """What padding of a maximum holds: the lowest level, or minus infinity."""
    return np.int16(x.grid.level_min) if isinstance(x, Codes) else np.float32(-np.inf)


def max_pool(
    x: Value,
    *,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil: bool,
) -> Value:
    """Largest element of each window over the last dimensions."""
    fill = lowest(x)

    def move(a: NDArray[Any]) -> NDArray[Any]:
        spatial = zip(a.shape[-len(kernel) :], kernel, stride, padding, dilation, strict=True)
        counts = [window_count(size, k, s, p, dilation=d, ceil=ceil) for size, k, s, p, d in spatial]
        a = pad_for_windows(a, kernel, stride, padding, counts=counts, dilation=dilation, fill=fill)
        out = np.full((*a.shape[: -len(kernel)], *counts), fill, a.dtype)
        for position in product(*map(range, kernel)):
            np.maximum(out, a[window_elements(position, stride, dilation, counts=counts)], out=out)
        return out

    return moved(x, move)


def adaptive_max_pool(x: Value, *, size: Sequence[int]) -> Value:
    """Largest element of each of ``size`` windows that cover everything, see :func:`adaptive_windows`."""

    def move(a: NDArray[Any]) -> NDArray[Any]:
        for dim, count in enumerate(size, start=a.ndim - len(size)):
            lead = (slice(None),) * dim
            windows = adaptive_windows(a.shape[dim], count)
            a = np.stack([a[(*lead, slice(start, stop))].max(axis=dim) for start, stop in windows], axis=dim)
        return a

    return moved(x, move)


def adaptive_windows(size: int, count: int) -> list[tuple[int, int]]:
    """Bounds of ``count`` windows over ``size`` elements.

    Window i goes from ``floor(i * size / count)`` to ``ceil((i + 1) * size / count)``.

    >>> adaptive_windows(5, 2)
    [(0, 3), (2, 5)]
    """
    return [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]


def pad_for_windows(
    a: NDArray[Any],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    *,
    counts: Sequence[int],
    dilation: Sequence[int],
    fill: Any,
) -> NDArray[Any]:
    """The array with padding in front, and behind as much as the last window needs."""
    widths = [(0, 0)] * (a.ndim - len(kernel))
    for size, k, s, p, count, d in zip(
        a.shape[-len(kernel) :], kernel, stride, padding, counts, dilation, strict=True
    ):
        widths.append((p, max((count - 1) * s + d * (k - 1) + 1 - size - p, 0)))
    return np.pad(a, widths, constant_values=fill)


def window_elements(
    position: Sequence[int], stride: Sequence[int], dilation: Sequence[int], *, counts: Sequence[int]
) -> tuple[Any, ...]:
    """Index of the elements that a kernel position meets in all windows."""
    bounds = zip(position, stride, dilation, counts, strict=True)
    return (..., *(slice(i * d, i * d + (count - 1) * s + 1, s) for i, s, d, count in bounds))
