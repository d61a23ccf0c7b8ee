"""Float operations on single elements.

Arithmetic, clamps and their piecewise-linear relatives are float32, every operation rounded by itself.
Transcendental functions are evaluated in float64 and rounded to float32 once, so that their values do not
depend on a math library.
"""

from __future__ import annotations

from collections.abc import Callable
from math import pi, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

from mixbits.runtime.values import Floats

Doubles = NDArray[np.float64]

_GELU_SLOPE = sqrt(
    2 / pi
)  # of the tanh approximation, Hendrycks and Gimpel 2016 (arXiv 1606.08415), section 2
_GELU_CUBIC = 0.044715


def rounded_once(function: Callable[[Doubles], Doubles]) -> Callable[[Floats], Floats]:
    """The function evaluated in float64 and rounded to float32."""
    return lambda x: function(x.astype(np.float64)).astype(np.float32)


def _sigmoid(x: Doubles) -> Doubles:
    return 1 / (1 + np.exp(-x))


def _softplus(x: Doubles) -> Doubles:
    return np.logaddexp(0, x)


def relu(x: Floats) -> Floats:
    """max(x, 0)."""
    return np.maximum(x, np.float32(0))


def hardsigmoid(x: Floats) -> Floats:
    """clamp(x + 3, 0, 6) / 6."""
    return clamp(x + np.float32(3), low=0, high=6) / np.float32(6)


def hardswish(x: Floats) -> Floats:
    """Product of x and clamp(x + 3, 0, 6) / 6, from left to right."""
    return x * clamp(x + np.float32(3), low=0, high=6) / np.float32(6)


def clamp(x: Floats, *, low: float | None, high: float | None) -> Floats:
    """min(max(x, low), high)."""
    x = x if low is None else np.maximum(x, np.float32(low))
    return x if high is None else np.minimum(x, np.float32(high))


def leaky_relu(x: Floats, *, slope: float) -> Floats:
    """X, or x * slope where it is negative."""
    return np.where(x > 0, x, x * np.float32(slope))


def prelu(x: Floats, *, slope: Floats) -> Floats:
    """X, or x * slope where it is negative; slope [1] or [C], of dimension 1."""
    if slope.size > 1:
        slope = slope.reshape(-1, *(1,) * (x.ndim - 2))
    return np.where(x > 0, x, x * slope)


def gelu(x: Floats, *, approximate: str) -> Floats:
    """Product of x and Phi(x), with the normal distribution's Phi, or its tanh approximation."""
    if approximate == "tanh":
        return rounded_once(lambda x: x / 2 * (1 + np.tanh(_GELU_SLOPE * (x + _GELU_CUBIC * x**3))))(x)
    return rounded_once(lambda x: x / 2 * (1 + erf(x / sqrt(2))))(x)


def elu(x: Floats, *, alpha: float, scale: float, input_scale: float) -> Floats:
    """Scale * x where x > 0, else scale * alpha * (exp(input_scale * x) - 1)."""

    def function(x: Doubles) -> Doubles:
        return np.where(x > 0, x * scale, scale * alpha * np.expm1(np.minimum(x * input_scale, 0)))

    return rounded_once(function)(x)


def softplus(x: Floats, *, beta: float, threshold: float) -> Floats:
    """log(1 + exp(beta * x)) / beta, and x itself where beta * x > threshold."""
    return rounded_once(lambda x: np.where(x * beta > threshold, x, _softplus(x * beta) / beta))(x)


UNARY: dict[str, Callable[[Floats], Floats]] = {
    "abs": np.abs,
    "cos": rounded_once(np.cos),
    "exp": rounded_once(np.exp),
    "hardsigmoid": hardsigmoid,
    "hardswish": hardswish,
    "log": rounded_once(np.log),
    "mish": rounded_once(lambda x: x * np.tanh(_softplus(x))),
    "neg": np.negative,
    "reciprocal": lambda x: np.float32(1) / x,
    "relu": relu,
    "rsqrt": rounded_once(lambda x: 1 / np.sqrt(x)),
    "sigmoid": rounded_once(_sigmoid),
    "silu": rounded_once(lambda x: x * _sigmoid(x)),
    "sin": rounded_once(np.sin),
    "sqrt": np.sqrt,
    "square": np.square,
    "tanh": rounded_once(np.tanh),
}
BINARY: dict[str, Callable[[Floats, Floats], Floats]] = {
    "add": np.add,
    "div": np.divide,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "mul": np.multiply,
    "pow": lambda x, y: np.power(x.astype(np.float64), y).astype(np.float32),
    "sub": np.subtract,
}
