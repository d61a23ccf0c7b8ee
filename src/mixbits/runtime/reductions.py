"""Float operations that sum: norms, softmax, matrix products, attention, interpolation.

Sums are float64 and the result is rounded to float32 once: it does not depend on the order of summation, but
for values that lie within 1e-15 of a tie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixbits.runtime.values import Floats

Doubles = NDArray[np.float64]


def sum_(x: Floats, *, dims: Sequence[int], keepdim: bool) -> Floats:
    """Sum over dimensions."""
    return x.sum(axis=tuple(dims), keepdims=keepdim, dtype=np.float64).astype(np.float32)


def max_(x: Floats, *, dims: Sequence[int], keepdim: bool) -> Floats:
    """Largest value over dimensions."""
    return x.max(axis=tuple(dims), keepdims=keepdim)


def _softmax(x: Doubles, dim: int) -> Doubles:
    e = np.exp(x - x.max(axis=dim, keepdims=True))
    return e / e.sum(axis=dim, keepdims=True)


def softmax(x: Floats, *, dim: int) -> Floats:
    """Exp(x) over its sum along a dimension."""
    return _softmax(x.astype(np.float64), dim).astype(np.float32)


def log_softmax(x: Floats, *, dim: int) -> Floats:
    """Logarithm of the softmax."""
    shifted = x.astype(np.float64) - x.max(axis=dim, keepdims=True)
    return (shifted - np.log(np.exp(shifted).sum(axis=dim, keepdims=True))).astype(np.float32)


def _normalized(x: Doubles, axes: tuple[int, ...], eps: float) -> Doubles:
    """Mean 0 and variance 1 (with ``eps`` added to the biased variance) over ``axes``."""
    centred = x - x.mean(axis=axes, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(axis=axes, keepdims=True) + eps)


def _affine(x: Doubles, weight: Any, bias: Any) -> Floats:
    x = x if weight is None else x * weight
    return (x if bias is None else x + bias).astype(np.float32)


def layer_norm(x: Floats, *, dims: int, weight: Floats | None, bias: Floats | None, eps: float) -> Floats:
    """Normalized over the last ``dims`` dimensions, whose shape weight and bias have."""
    normal = _normalized(x.astype(np.float64), tuple(range(x.ndim - dims, x.ndim)), eps)
    return _affine(normal, weight, bias)


def group_norm(x: Floats, *, groups: int, weight: Floats | None, bias: Floats | None, eps: float) -> Floats:
    """[n, C, ...] normalized over each of ``groups`` groups of channels and all that follows."""
    grouped = x.astype(np.float64).reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    normal = _normalized(grouped, tuple(range(2, grouped.ndim)), eps).reshape(x.shape)
    channel = (slice(None), *(None,) * (x.ndim - 2))
    return _affine(
        normal, None if weight is None else weight[channel], None if bias is None else bias[channel]
    )


def batch_norm(x: Floats, *, scale: Floats, shift: Floats) -> Floats:
    """X * scale + shift of each channel (dimension 1), two roundings."""
    channel = (slice(None), *(None,) * (x.ndim - 2))
    return x * scale[channel] + shift[channel]


def matmul(a: Floats, b: Floats) -> Floats:
    """[..., m, k] times [..., k, n], leading dimensions broadcast."""
    return (a.astype(np.float64) @ b.astype(np.float64)).astype(np.float32)


def attention(q: Floats, k: Floats, v: Floats, *, scale: float, causal: bool) -> Floats:
    """softmax(scale * q k^T) v; causal: query i sees keys 0 .. i."""
    scores = q.astype(np.float64) @ np.swapaxes(k.astype(np.float64), -1, -2) * scale
    if causal:
        scores = np.where(np.tri(*scores.shape[-2:], dtype=bool), scores, -np.inf)
    return (_softmax(scores, -1) @ v.astype(np.float64)).astype(np.float32)


def upsample_bilinear(x: Floats, *, size: Sequence[int], align_corners: bool) -> Floats:
    """[..., H, W] to [..., *size], rows then columns; weights in float64."""
    rows, columns = (
        _interpolation(was, wanted, align_corners=align_corners)
        for was, wanted in zip(x.shape[-2:], size, strict=True)
    )
    return (rows @ x.astype(np.float64) @ columns.T).astype(np.float32)


def _interpolation(size: int, wanted: int, *, align_corners: bool) -> Doubles:
    """[wanted, size]: the two neighbours of each output position and their shares."""
    if align_corners:
        position = np.arange(wanted) * ((size - 1) / (wanted - 1) if wanted > 1 else 0.0)
    else:
        position = np.maximum((np.arange(wanted) + 0.5) * (size / wanted) - 0.5, 0)
    low = np.minimum(position.astype(np.int64), size - 1)
    matrix = np.zeros((wanted, size))
    matrix[np.arange(wanted), low] = 1 - (position - low)
    matrix[np.arange(wanted), np.minimum(low + 1, size - 1)] += position - low
    return matrix
