"""What every instruction on values becomes in ONNX (opset 21): the counterpart of ``runtime/reference.py``.

Moves take floats or the integers of codes; all else takes floats. Quantizers and layers differ from format
to format and are in the exporters' own files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mixbits.core.infer import window_count
from mixbits.core.program import Instruction
from mixbits.export.onnx_graph import OnnxGraph
from mixbits.runtime.moves import adaptive_windows

FLOAT = np.dtype(np.float32)


@dataclass(frozen=True)
class Call:
    """One instruction while it is exported; ``shapes`` are those of its inputs, batch first."""

    graph: OnnxGraph
    attrs: Mapping[str, Any]
    shapes: Sequence[tuple[int, ...]]
    dtype: np.dtype[Any] = FLOAT  # of the elements: float32, or what codes are stored in
    zero: int = 0  # the element that means 0

    def op(self, kind: str, *inputs: ir.Value | None, **attrs: Any) -> ir.Value:
        """Add a node."""
        return self.graph.op(kind, *inputs, **attrs)

    def number(self, value: float) -> ir.Value:
        """A scalar constant of the elements' type."""
        return self.graph.constant(value, self.dtype)

    def parameter(self, key: str, *shape: int) -> ir.Value | None:
        """The program's constant that an attribute names, in another shape if one is given."""
        name = self.attrs[key]
        if name is None:
            return None
        value = self.graph.program.constants[name]
        return self.graph.constant(value.reshape(shape) if shape else value, name=name)

    def per_channel(self, key: str) -> ir.Value:
        """The same for one value a channel, dimension 1 of the first input."""
        found = self.parameter(key, -1, *(1,) * (len(self.shapes[0]) - 2))
        assert found is not None, key
        return found


Operation: TypeAlias = Callable[..., ir.Value]


def reshape(call: Call, x: ir.Value) -> ir.Value:
    """The same elements in another shape."""
    return call.op("Reshape", x, call.graph.shape(*call.attrs["shape"]))


def permute(call: Call, x: ir.Value) -> ir.Value:
    """Dimensions in another order."""
    return call.op("Transpose", x, perm=call.attrs["dims"])


def slice_(call: Call, x: ir.Value) -> ir.Value:
    """Every so many elements of one dimension."""
    bounds = (call.graph.shape(call.attrs[key]) for key in ("start", "stop", "dim", "step"))
    return call.op("Slice", x, *bounds)


def select(call: Call, x: ir.Value) -> ir.Value:
    """One element of a dimension."""
    index = call.graph.constant(call.attrs["index"], np.int64)
    return call.op("Gather", x, index, axis=call.attrs["dim"])


def expand(call: Call, x: ir.Value) -> ir.Value:
    """Dimensions of size one repeated; ONNX keeps a size where 1 is asked for."""
    sizes = [1 if size == -1 else size for size in call.attrs["shape"]]
    if "batch" not in sizes:
        return call.op("Expand", x, call.graph.shape(*sizes))
    parts = [call.graph.batch_size() if size == "batch" else call.graph.shape(size) for size in sizes]
    return call.op("Expand", x, call.op("Concat", *parts, axis=0))


def pad(call: Call, x: ir.Value) -> ir.Value:
    """Values added around, or cut off where negative."""
    before, after = zip(*call.attrs["pads"], strict=True)
    fill = call.number(call.attrs["value"] + call.zero) if call.attrs["mode"] == "constant" else None
    return call.op("Pad", x, call.graph.shape(*before, *after), fill, mode=call.attrs["mode"])


def upsample_nearest(call: Call, x: ir.Value) -> ir.Value:
    """The element at ``floor(i * size_in / size_out)``."""
    size = call.attrs["size"]
    first = len(call.shapes[0]) - len(size)
    if any(max(a, b) % min(a, b) for a, b in zip(call.shapes[0][first:], size, strict=True)):
        for dim, wanted in enumerate(size, start=first):  # Resize rounds i / scale as it likes
            places = np.arange(wanted) * call.shapes[0][dim] // wanted
            x = call.op("Gather", x, call.graph.shape(*places), axis=dim)
        return x
    return _resize(call, x, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")


def upsample_bilinear(call: Call, x: ir.Value) -> ir.Value:
    """Interpolated between neighbours, corners aligned or not."""
    corners = "align_corners" if call.attrs["align_corners"] else "half_pixel"
    return _resize(call, x, mode="linear", coordinate_transformation_mode=corners)


def _resize(call: Call, x: ir.Value, **attrs: Any) -> ir.Value:
    size = call.attrs["size"]
    whole, sizes = len(call.shapes[0]), call.shapes[0][-len(size) :]
    scales = [wanted / was for wanted, was in zip(size, sizes, strict=True)]
    factors = call.graph.constant([1.0] * (whole - len(size)) + scales)
    return call.op("Resize", x, None, factors, **attrs)


def _windows(call: Call, x: ir.Value, pool: Callable[[ir.Value], ir.Value]) -> ir.Value:
    """A pool over [n, C, *sizes]; where there is no C, one is put in for it."""
    if len(call.shapes[0]) == len(call.attrs["kernel"]) + 2:
        return pool(x)
    axis = call.graph.shape(1)
    return call.op("Squeeze", pool(call.op("Unsqueeze", x, axis)), axis)


def _reach(call: Call, dilation: Sequence[int]) -> tuple[list[int], list[int]]:
    """How many windows fit in each dimension, and how far the last one reaches behind the elements."""
    keys = ("kernel", "stride", "padding")
    dims = [call.attrs[key] for key in keys]
    sizes = call.shapes[0][-len(dims[0]) :]
    counts, behind = [], []
    for size, k, s, p, d in zip(sizes, *dims, dilation, strict=True):
        count = window_count(size, k, s, p, dilation=d, ceil=call.attrs["ceil"])
        counts.append(count)
        behind.append(max((count - 1) * s + d * (k - 1) + 1 - size - p, 0))
    return counts, behind


def max_pool(call: Call, x: ir.Value) -> ir.Value:
    """Largest values of windows; padding never wins."""
    attrs = call.attrs
    _, behind = _reach(call, attrs["dilation"])
    return _windows(
        call,
        x,
        lambda x: call.op(
            "MaxPool",
            x,
            kernel_shape=attrs["kernel"],
            strides=attrs["stride"],
            dilations=attrs["dilation"],
            pads=[*attrs["padding"], *behind],
        ),
    )


def avg_pool(call: Call, x: ir.Value) -> ir.Value:
    """Means of windows: of all their elements with padding, times elements / count where these differ."""
    attrs = call.attrs
    kernel, stride, padding = attrs["kernel"], attrs["stride"], attrs["padding"]
    counts, behind = _reach(call, [1] * len(kernel))
    inside = np.ones(())
    sizes = call.shapes[0][-len(kernel) :]
    for count, size, k, s, p in zip(counts, sizes, kernel, stride, padding, strict=True):
        start = np.arange(count) * s - p
        low, high = (-p, size + p) if attrs["include_pad"] else (0, size)
        inside = np.multiply.outer(inside, np.minimum(start + k, high) - np.maximum(start, low))
    divisor = np.maximum(inside, 1) if attrs["divisor"] is None else np.full_like(inside, attrs["divisor"])
    if any(padding) or any(behind):
        around = [*(0,) * (len(call.shapes[0]) - len(kernel))]
        x = call.op("Pad", x, call.graph.shape(*around, *padding, *around, *behind), call.number(0))
    means = _windows(
        call, x, lambda x: call.op("AveragePool", x, kernel_shape=list(kernel), strides=list(stride))
    )
    share = np.prod(kernel) / divisor
    return means if (share == 1).all() else call.op("Mul", means, call.graph.constant(share))


def adaptive_max_pool(call: Call, x: ir.Value) -> ir.Value:
    """Largest values of windows that cover everything, one dimension after the other."""
    sizes, size = call.shapes[0], call.attrs["size"]
    for dim, count in enumerate(size, start=len(sizes) - len(size)):
        axis, parts = call.graph.shape(dim), []
        for start, stop in adaptive_windows(sizes[dim], count):
            whole = (start, stop) == (0, sizes[dim])
            bounds = (call.graph.shape(start), call.graph.shape(stop), axis)
            window = x if whole else call.op("Slice", x, *bounds)
            parts.append(call.op("ReduceMax", window, axis, keepdims=1))
        x = call.op("Concat", *parts, axis=dim) if len(parts) > 1 else parts[0]
    return x


def adaptive_avg_pool(call: Call, x: ir.Value) -> ir.Value:
    """Means of windows that cover everything: products with matrices of shares, unless one window is all."""
    sizes, size = call.shapes[0], call.attrs["size"]
    dims = range(len(sizes) - len(size), len(sizes))
    if all(count == 1 for count in size):
        return call.op("ReduceMean", x, call.graph.shape(*dims), keepdims=1)
    shares = [_shares(sizes[dim], count) for dim, count in zip(dims, size, strict=True)]
    x = call.op("MatMul", x, call.graph.constant(shares[-1].T))
    return call.op("MatMul", call.graph.constant(shares[0]), x) if len(size) == 2 else x


def _shares(size: int, count: int) -> NDArray[np.float64]:
    """[count, size]: each row takes the mean of a window."""
    matrix = np.zeros((count, size))
    for row, (start, stop) in zip(matrix, adaptive_windows(size, count), strict=True):
        row[start:stop] = 1 / (stop - start)
    return matrix


def _reduction(kind: str) -> Operation:
    def reduce(call: Call, x: ir.Value) -> ir.Value:
        axes = call.graph.shape(*call.attrs["dims"])
        return call.op(kind, x, axes, keepdims=int(call.attrs["keepdim"]))

    return reduce


def constant(call: Call) -> ir.Value:
    """A stored constant."""
    found = call.parameter("constant")
    assert found is not None
    return found


def scalar(call: Call) -> ir.Value:
    """One number."""
    return call.number(call.attrs["value"])


def clamp(call: Call, x: ir.Value) -> ir.Value:
    """Limits that are numbers or absent."""
    limits = (call.attrs[key] for key in ("low", "high"))
    return call.op("Clip", x, *(None if limit is None else call.number(limit) for limit in limits))


def silu(call: Call, x: ir.Value) -> ir.Value:
    """Product of x and sigmoid(x)."""
    return call.op("Mul", x, call.op("Sigmoid", x))


def rsqrt(call: Call, x: ir.Value) -> ir.Value:
    """1 / sqrt(x)."""
    return call.op("Reciprocal", call.op("Sqrt", x))


def square(call: Call, x: ir.Value) -> ir.Value:
    """Product of x and x."""
    return call.op("Mul", x, x)


def hardsigmoid(call: Call, x: ir.Value) -> ir.Value:
    """clamp(x + 3, 0, 6) / 6."""
    return call.op("HardSigmoid", x, alpha=1 / 6, beta=0.5)


def gelu(call: Call, x: ir.Value) -> ir.Value:
    """Exact, or the tanh approximation."""
    return call.op("Gelu", x, approximate=call.attrs["approximate"])


def elu(call: Call, x: ir.Value) -> ir.Value:
    """Scale * x where x > 0, else scale * alpha * (exp(input_scale * x) - 1)."""
    inner = call.op("Mul", call.op("Min", x, call.number(0)), call.number(call.attrs["input_scale"]))
    negative = call.op("Elu", inner, alpha=call.attrs["alpha"])
    return call.op("Mul", call.op("Add", call.op("Relu", x), negative), call.number(call.attrs["scale"]))


def leaky_relu(call: Call, x: ir.Value) -> ir.Value:
    """X, or x * slope where it is negative."""
    return call.op("LeakyRelu", x, alpha=call.attrs["slope"])


def softplus(call: Call, x: ir.Value) -> ir.Value:
    """log(1 + exp(beta * x)) / beta, and x itself where beta * x > threshold."""
    beta = call.number(call.attrs["beta"])
    inner = call.op("Mul", x, beta)
    linear = call.op("Greater", inner, call.number(call.attrs["threshold"]))
    return call.op("Where", linear, x, call.op("Div", call.op("Softplus", inner), beta))


def prelu(call: Call, x: ir.Value) -> ir.Value:
    """X, or x * slope where it is negative."""
    return call.op("PRelu", x, call.per_channel("slope"))


def cat(call: Call, *parts: ir.Value) -> ir.Value:
    """Values one after the other along a dimension."""
    return call.op("Concat", *parts, axis=call.attrs["dim"])


def softmax(call: Call, x: ir.Value) -> ir.Value:
    """Along one dimension."""
    return call.op("Softmax", x, axis=call.attrs["dim"])


def log_softmax(call: Call, x: ir.Value) -> ir.Value:
    """Logarithm of the softmax."""
    return call.op("LogSoftmax", x, axis=call.attrs["dim"])


def layer_norm(call: Call, x: ir.Value) -> ir.Value:
    """Over the last dimensions."""
    dims = call.attrs["dims"]
    weight = call.parameter("weight") or call.graph.constant(np.ones(call.shapes[0][-dims:]))
    return call.op(
        "LayerNormalization", x, weight, call.parameter("bias"), axis=-dims, epsilon=call.attrs["eps"]
    )


def group_norm(call: Call, x: ir.Value) -> ir.Value:
    """Over groups of channels and all that follows."""
    channels = call.shapes[0][1]
    weight = call.parameter("weight") or call.graph.constant(np.ones(channels))
    bias = call.parameter("bias") or call.graph.constant(np.zeros(channels))
    groups, eps = call.attrs["groups"], call.attrs["eps"]
    return call.op("GroupNormalization", x, weight, bias, num_groups=groups, epsilon=eps)


def batch_norm(call: Call, x: ir.Value) -> ir.Value:
    """X * scale + shift of each channel."""
    return call.op("Add", call.op("Mul", x, call.per_channel("scale")), call.per_channel("shift"))


def attention(call: Call, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
    """softmax(scale * q k^T) v; causal: query i sees keys 0 .. i."""
    rank = len(call.shapes[1])
    swapped = call.op("Transpose", k, perm=[*range(rank - 2), rank - 1, rank - 2])
    scores = call.op("MatMul", call.op("Mul", q, call.number(call.attrs["scale"])), swapped)
    if call.attrs["causal"]:
        seen = np.tri(call.shapes[0][-2], call.shapes[1][-2], dtype=bool)
        scores = call.op("Add", scores, call.graph.constant(np.where(seen, 0, -np.inf)))
    return call.op("MatMul", call.op("Softmax", scores, axis=-1), v)


def _direct(kind: str) -> Operation:
    """An ONNX operation that is the instruction."""
    return lambda call, *inputs: call.op(kind, *inputs)


MOVES: dict[str, Operation] = {
    "reshape": reshape,
    "permute": permute,
    "slice": slice_,
    "select": select,
    "expand": expand,
    "pad": pad,
    "upsample_nearest": upsample_nearest,
    "max_pool": max_pool,
    "adaptive_max_pool": adaptive_max_pool,
}
ON_FLOATS: dict[str, Operation] = {
    "avg_pool": avg_pool,
    "adaptive_avg_pool": adaptive_avg_pool,
    "mean": _reduction("ReduceMean"),
    "constant": constant,
    "scalar": scalar,
    **{
        name: _direct(kind)
        for name, kind in {
            "abs": "Abs",
            "add": "Add",
            "cos": "Cos",
            "div": "Div",
            "exp": "Exp",
            "hardswish": "HardSwish",
            "log": "Log",
            "matmul": "MatMul",
            "maximum": "Max",
            "minimum": "Min",
            "mish": "Mish",
            "mul": "Mul",
            "neg": "Neg",
            "pow": "Pow",
            "reciprocal": "Reciprocal",
            "relu": "Relu",
            "sigmoid": "Sigmoid",
            "sin": "Sin",
            "sqrt": "Sqrt",
            "sub": "Sub",
            "tanh": "Tanh",
        }.items()
    },
    "attention": attention,
    "batch_norm": batch_norm,
    "cat": cat,
    "clamp": clamp,
    "elu": elu,
    "gelu": gelu,
    "group_norm": group_norm,
    "hardsigmoid": hardsigmoid,
    "layer_norm": layer_norm,
    "leaky_relu": leaky_relu,
    "log_softmax": log_softmax,
    "max": _reduction("ReduceMax"),
    "prelu": prelu,
    "rsqrt": rsqrt,
    "silu": silu,
    "softmax": softmax,
    "softplus": softplus,
    "square": square,
    "sum": _reduction("ReduceSum"),
    "upsample_bilinear": upsample_bilinear,
}


def operation(step: Instruction) -> Operation:
    """What an instruction that is no quantizer and no layer becomes, all of its inputs float."""
    known = MOVES | ON_FLOATS
    if step.op not in known:
        raise ValueError(
            f"{step.name}: no ONNX operation for {step.op} (have: {', '.join(sorted(known))}). "
            "Write the network with one of these, or keep this operation outside the network."
        )
    return known[step.op]
