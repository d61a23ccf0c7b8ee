"""Means: sums are exact on codes and float64 on floats, then comes one multiplication in float32.

``y = float32(sum) * float32(step / count)``: the sum is of levels, or of floats with a step of 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixbits.core.infer import window_count
from mixbits.runtime.moves import adaptive_windows, pad_for_windows, window_elements
from mixbits.runtime.values import Floats, Value, numbers_of


def sum_type(a: NDArray[Any]) -> type[np.int64 | np.float64]:
    """What sums of levels and of floats are computed in."""
    return np.int64 if a.dtype == np.int16 else np.float64


def _scaled(total: NDArray[Any], step: float, count: Any) -> Floats:
    return total.astype(np.float32) * (step / np.asarray(count, np.float64)).astype(np.float32)


def mean(x: Value, *, dims: Sequence[int], keepdim: bool) -> Floats:
    """Mean over dimensions."""
    a, step = numbers_of(x)
    total = a.sum(axis=tuple(dims), keepdims=keepdim, dtype=sum_type(a))
    return _scaled(total, step, np.prod([a.shape[dim] for dim in dims]))


def avg_pool(
    x: Value,
    *,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil: bool,
    include_pad: bool,
    divisor: int | None,
) -> Floats:
    """Mean of each window over the last dimensions; the count is ``divisor``, or the window's elements.

    With ``include_pad`` the padding counts, but not what hangs over it where ``ceil`` added a window.
    """
    a, step = numbers_of(x)
    sizes = a.shape[-len(kernel) :]
    spatial = list(zip(sizes, kernel, stride, padding, strict=True))
    counts = [window_count(size, k, s, p, ceil=ceil) for size, k, s, p in spatial]
    ones = [1] * len(kernel)
    a = pad_for_windows(a, kernel, stride, padding, counts=counts, dilation=ones, fill=a.dtype.type(0))
    total = np.zeros((*a.shape[: -len(kernel)], *counts), sum_type(a))
    for position in product(*map(range, kernel)):
        total += a[window_elements(position, stride, ones, counts=counts)]
    inside = np.ones((), np.int64)
    for count, (size, k, s, p) in zip(counts, spatial, strict=True):
        start = np.arange(count) * s - p
        low, high = (-p, size + p) if include_pad else (0, size)
        inside = np.multiply.outer(inside, np.minimum(start + k, high) - np.maximum(start, low))
    return _scaled(total, step, np.maximum(inside, 1) if divisor is None else divisor)


def adaptive_avg_pool(x: Value, *, size: Sequence[int]) -> Floats:
    """Mean of each of ``size`` windows that cover everything, see :func:`adaptive_windows`."""
    a, step = numbers_of(x)
    inside = np.ones((), np.int64)
    for dim, count in enumerate(size, start=a.ndim - len(size)):
        lead = (slice(None),) * dim
        windows = adaptive_windows(a.shape[dim], count)
        sums = [a[(*lead, slice(start, stop))].sum(axis=dim, dtype=sum_type(a)) for start, stop in windows]
        a = np.stack(sums, axis=dim)
        inside = np.multiply.outer(inside, [stop - start for start, stop in windows])
    return _scaled(a, step, inside)
