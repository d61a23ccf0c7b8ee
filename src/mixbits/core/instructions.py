"""The instruction set: the inputs, attributes and shapes of every instruction that a program may contain.

What an instruction computes is said by ``runtime/reference.py``. A new one is a row here and a function
there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from mixbits.core import infer
from mixbits.core.grid import grid_from_json

MAX_RANK = 8  # dimensions of a value
MAX_SIZE = 2**26  # of one dimension, window, stride or padding
MAX_NAME = 1000  # characters
MAX_FLOAT32 = 3.4028234e38


@dataclass(frozen=True)
class Attr:
    """What an attribute may be, in words for messages, and as a test of its JSON value."""

    words: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Declared:
    """A row of the table: number of inputs (None: one or more), attributes (all required), shape rule."""

    inputs: int | None
    attrs: Mapping[str, Attr]
    infer: infer.Rule


def is_int(value: Any, low: int, high: int = MAX_SIZE) -> bool:
    """Whether a JSON value is an integer of a range (true and false are not)."""
    return type(value) is int and low <= value <= high


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number that float32 holds."""
    return type(value) in (int, float) and abs(value) <= MAX_FLOAT32 and math.isfinite(value)


def is_name(value: Any) -> bool:
    """Whether a JSON value is a usable name."""
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME


def _is_list(value: Any, holds: Callable[[Any], bool], length: int | None = None) -> bool:
    if not isinstance(value, list):
        return False
    entries = cast(list[Any], value)
    return (
        len(entries) <= MAX_RANK and (length is None or len(entries) == length) and all(map(holds, entries))
    )


def _is_grid(value: Any) -> bool:
    try:
        grid_from_json(value)
    except ValueError:
        return False
    return True


def _ints(words: str, low: int, length: int | None = None) -> Attr:
    return Attr(words, lambda value: _is_list(value, lambda size: is_int(size, low), length))


def _pairs(low: int, length: int | None = None) -> Attr:
    def holds(value: Any) -> bool:
        return _is_list(value, lambda pair: _is_list(pair, lambda size: is_int(size, low), 2), length)

    return Attr("a list of [before, after]", holds)


def _either(*choices: str) -> Attr:
    return Attr(
        f"one of {', '.join(choices)}", lambda value: value in choices if isinstance(value, str) else False
    )


def _optional(attr: Attr) -> Attr:
    return Attr(f"{attr.words}, or null", lambda value: value is None or attr.holds(value))


# These four mean more than their JSON: the executor puts what they name in their place.
GRID = Attr("a grid", _is_grid)
WEIGHT = Attr("the name of a weight", is_name)
CONSTANT = Attr("the name of a constant", is_name)
MAYBE_CONSTANT = _optional(CONSTANT)
BATCHED = Attr(
    "a list of sizes, -1 (as it is) or 'batch'",
    lambda value: _is_list(value, lambda size: size == "batch" or (is_int(size, -1) and size != 0)),
)

NUMBER = Attr("a finite number", is_number)
POSITIVE = Attr("a number above 0", lambda value: is_number(value) and value > 0)
SIZE = Attr(f"an integer from 1 to {MAX_SIZE}", lambda value: is_int(value, 1))
INDEX = Attr("an integer from 0", lambda value: is_int(value, 0))
DIM = Attr("a dimension, from 0", lambda value: is_int(value, 0, MAX_RANK - 1))
FLAG = Attr("true or false", lambda value: isinstance(value, bool))
DIMS = Attr(
    "different dimensions, from 0",
    lambda value: _is_list(value, lambda d: is_int(d, 0, MAX_RANK - 1)) and len(set(value)) == len(value),
)
SHAPE = Attr(
    "a list of sizes, at most one of them -1",
    lambda value: _is_list(value, lambda s: is_int(s, -1) and s != 0) and value.count(-1) <= 1,
)


def _layer(dims: int) -> Mapping[str, Attr]:
    return {
        "weight": WEIGHT,
        "scale": CONSTANT,
        "bias": CONSTANT,
        "stride": _ints("strides", 1, dims),
        "padding": _pairs(0, dims),
        "dilation": _ints("dilations", 1, dims),
        "groups": SIZE,
    }


_WINDOW = {"kernel": _ints("window sizes", 1), "stride": _ints("strides", 1), "padding": _ints("paddings", 0)}
_UNARY = (
    *("abs", "cos", "exp", "hardsigmoid", "hardswish", "log", "mish", "neg", "reciprocal", "relu", "rsqrt"),
    *("sigmoid", "silu", "sin", "sqrt", "square", "tanh"),
)
_BINARY = ("add", "div", "maximum", "minimum", "mul", "pow", "sub")

INSTRUCTIONS: dict[str, Declared] = {
    # integers
    "quantize": Declared(1, {"grid": GRID, "step": CONSTANT}, infer.quantize),
    "conv1d": Declared(1, _layer(1), infer.convolution),
    "conv2d": Declared(1, _layer(2), infer.convolution),
    "linear": Declared(1, {"weight": WEIGHT, "scale": CONSTANT, "bias": CONSTANT}, infer.linear),
    # values move: codes stay codes
    "reshape": Declared(1, {"shape": SHAPE}, infer.reshape),
    "permute": Declared(1, {"dims": DIMS}, infer.permute),
    "slice": Declared(1, {"dim": DIM, "start": INDEX, "stop": INDEX, "step": SIZE}, infer.slice_),
    "select": Declared(1, {"dim": DIM, "index": INDEX}, infer.select),
    "expand": Declared(1, {"shape": BATCHED}, infer.expand),
    "pad": Declared(
        1,
        {"pads": _pairs(-MAX_SIZE), "mode": _either("constant", "reflect", "edge", "wrap"), "value": NUMBER},
        infer.pad,
    ),
    "upsample_nearest": Declared(1, {"size": _ints("sizes", 1)}, infer.upsample),
    "max_pool": Declared(1, {**_WINDOW, "dilation": _ints("dilations", 1), "ceil": FLAG}, infer.max_pool),
    "adaptive_max_pool": Declared(1, {"size": _ints("sizes", 1)}, infer.adaptive_max_pool),
    # sums of codes, or of floats
    "avg_pool": Declared(
        1, {**_WINDOW, "ceil": FLAG, "include_pad": FLAG, "divisor": _optional(SIZE)}, infer.avg_pool
    ),
    "adaptive_avg_pool": Declared(1, {"size": _ints("sizes", 1)}, infer.adaptive_avg_pool),
    "mean": Declared(1, {"dims": DIMS, "keepdim": FLAG}, infer.reduce),
    # floats
    "constant": Declared(0, {"constant": CONSTANT}, infer.constant),
    "scalar": Declared(0, {"value": NUMBER}, infer.scalar),
    **{name: Declared(1, {}, infer.same) for name in _UNARY},
    **{name: Declared(2, {}, infer.broadcast) for name in _BINARY},
    "clamp": Declared(1, {"low": _optional(NUMBER), "high": _optional(NUMBER)}, infer.same),
    "gelu": Declared(1, {"approximate": _either("none", "tanh")}, infer.same),
    "elu": Declared(1, {"alpha": NUMBER, "scale": NUMBER, "input_scale": NUMBER}, infer.same),
    "leaky_relu": Declared(1, {"slope": NUMBER}, infer.same),
    "softplus": Declared(1, {"beta": POSITIVE, "threshold": NUMBER}, infer.same),
    "prelu": Declared(1, {"slope": CONSTANT}, infer.prelu),
    "cat": Declared(None, {"dim": DIM}, infer.cat),
    "sum": Declared(1, {"dims": DIMS, "keepdim": FLAG}, infer.reduce),
    "max": Declared(1, {"dims": DIMS, "keepdim": FLAG}, infer.reduce),
    "softmax": Declared(1, {"dim": DIM}, infer.softmax),
    "log_softmax": Declared(1, {"dim": DIM}, infer.softmax),
    "layer_norm": Declared(
        1, {"dims": SIZE, "weight": MAYBE_CONSTANT, "bias": MAYBE_CONSTANT, "eps": POSITIVE}, infer.layer_norm
    ),
    "group_norm": Declared(
        1,
        {"groups": SIZE, "weight": MAYBE_CONSTANT, "bias": MAYBE_CONSTANT, "eps": POSITIVE},
        infer.group_norm,
    ),
    "batch_norm": Declared(1, {"scale": CONSTANT, "shift": CONSTANT}, infer.batch_norm),
    "matmul": Declared(2, {}, infer.matmul),
    "attention": Declared(3, {"scale": NUMBER, "causal": FLAG}, infer.attention),
    "upsample_bilinear": Declared(1, {"size": _ints("sizes", 1, 2), "align_corners": FLAG}, infer.upsample),
}
