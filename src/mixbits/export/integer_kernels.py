"""Weights that suit the integer kernels of onnxruntime: sums do not saturate, biases round least.

They hold a bias as int32 in units of the integer sums (input step x weight step), rounded: half a unit off
at most. And x86 processors without VNNI add two products of a uint8 and an int8 in saturating int16. Levels
of few bits have room in int8: multiplied by an integer, with the weight step divided by it, the unit becomes
finer, and among the integers that fit there is one of which the bias is nearly a multiple.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mixbits.core.grid import Grid

PAIR_LIMIT = 2**15 - 1  # of the sum of two products in int16
LARGEST_BIAS = 2**30  # in units of the integer sums: well inside int32
FINE_BIAS = 2**24  # units of the bias of a channel whose weights do not matter


def level_limit(activation: Grid) -> int:
    """The largest int8 weight of which no pair of products with these activations saturates.

    Signed activations count as 255, because they are shifted to unsigned where signed ones are slow.

    >>> from mixbits.core.grid import Uniform
    >>> level_limit(Uniform(8, signed=False)), level_limit(Uniform(7, signed=False))
    (64, 127)
    """
    largest = 255 if activation.level_min < 0 else activation.level_max
    return min(127, PAIR_LIMIT // (2 * largest))


def fitted_weights(
    levels: NDArray[np.int16],
    step: NDArray[np.float32],
    bias: NDArray[np.float32],
    *,
    input_step: float,
    limit: int,
) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
    """Levels ``[O, ...]`` and steps ``[O]`` of the same weights, so that the biases ``[O]`` round least.

    Levels stay within ``limit`` where they were. A channel whose step is 0 (batch norm turned it off) gets
    levels 0, and a step that is good for its bias.
    """
    channel = (-1, *(1,) * (levels.ndim - 1))
    largest = np.abs(levels.reshape(len(levels), -1)).max(axis=1, initial=1)
    most = np.maximum(limit // largest, 1)
    factors = np.arange(1, most.max() + 1)[:, None]
    unit = np.abs(step.astype(np.float64)) * input_step / factors
    off = step == 0
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.abs(bias - np.rint(bias / unit) * unit)
    chosen = np.where(off, 1, factors[np.where(factors <= most, error, np.inf).argmin(axis=0), 0])
    alone = np.where(bias == 0, 1, np.abs(bias) / (input_step * FINE_BIAS))
    fitted = np.where(off.reshape(channel), 0, levels * chosen.reshape(channel))
    return fitted.astype(np.int16), np.where(off, alone, step / chosen).astype(np.float32)


def bias_error(bias: NDArray[np.float32], step: NDArray[np.float32], input_step: float) -> float:
    """How far rounding moves the worst bias; infinite if int32 does not hold it."""
    unit = np.abs(step.astype(np.float64)) * input_step
    units = bias / unit
    if np.abs(units).max(initial=0) > LARGEST_BIAS:
        return np.inf
    return float(np.abs(bias - np.rint(units) * unit).max(initial=0))
