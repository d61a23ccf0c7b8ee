"""The reference: what every instruction computes, in readable NumPy. Native kernels equal it bit for bit.

The functions live in files by family; this is the table. Functions take the values they read, and their
attributes by name, with the names of grids, weights and constants replaced by what they stand for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from mixbits.runtime import elementwise, integer, moves, pools, reductions
from mixbits.runtime.values import Floats, Value, floats_of


def constant(*, constant: Floats) -> Floats:
    """A stored constant."""
    return constant


def scalar(*, value: float) -> Floats:
    """One number."""
    return np.asarray(value, np.float32)


def cat(*parts: Floats, dim: int) -> Floats:
    """Values one after the other along a dimension."""
    return np.concatenate(parts, axis=dim)


def _on_floats(function: Callable[..., Floats], *inputs: Value, **attrs: Any) -> Floats:
    return function(*map(floats_of, inputs), **attrs)


ON_CODES: dict[str, Callable[..., Value]] = {
    "quantize": integer.quantize,
    "conv1d": integer.convolution,
    "conv2d": integer.convolution,
    "linear": integer.linear,
    "reshape": moves.reshape,
    "permute": moves.permute,
    "slice": moves.slice_,
    "select": moves.select,
    "expand": moves.expand,
    "pad": moves.pad,
    "upsample_nearest": moves.upsample_nearest,
    "max_pool": moves.max_pool,
    "adaptive_max_pool": moves.adaptive_max_pool,
    "avg_pool": pools.avg_pool,
    "adaptive_avg_pool": pools.adaptive_avg_pool,
    "mean": pools.mean,
}
ON_FLOATS: dict[str, Callable[..., Floats]] = {
    "constant": constant,
    "scalar": scalar,
    **elementwise.UNARY,
    **elementwise.BINARY,
    "clamp": elementwise.clamp,
    "gelu": elementwise.gelu,
    "elu": elementwise.elu,
    "leaky_relu": elementwise.leaky_relu,
    "softplus": elementwise.softplus,
    "prelu": elementwise.prelu,
    "cat": cat,
    "sum": reductions.sum_,
    "max": reductions.max_,
    "softmax": reductions.softmax,
    "log_softmax": reductions.log_softmax,
    "layer_norm": reductions.layer_norm,
    "group_norm": reductions.group_norm,
    "batch_norm": reductions.batch_norm,
    "matmul": reductions.matmul,
    "attention": reductions.attention,
    "upsample_bilinear": reductions.upsample_bilinear,
}
REFERENCE: dict[str, Callable[..., Value]] = ON_CODES | {
    name: partial(_on_floats, function) for name, function in ON_FLOATS.items()
}
