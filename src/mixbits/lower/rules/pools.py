"""Pools and reductions."""

from __future__ import annotations

from math import prod

import torch
from torch import fx

from mixbits.graph.calls import arguments, per_dim
from mixbits.lower.builder import Builder, positive_dims, rule, short_name, unsupported

aten = torch.ops.aten


@rule(aten.max_pool1d.default, aten.max_pool2d.default)
def max_pool(builder: Builder, node: fx.Node) -> str:
    """Largest values of windows."""
    call = arguments(node)
    dims = 1 if "1d" in str(node.target) else 2
    kernel = per_dim(call["kernel_size"], dims)
    return builder.emit(
        "max_pool",
        node,
        builder.value(node.args[0], node),
        kernel=kernel,
        stride=per_dim(call["stride"] or kernel, dims),
        padding=per_dim(call["padding"], dims),
        dilation=per_dim(call["dilation"], dims),
        ceil=call["ceil_mode"],
    )


@rule(aten.avg_pool1d.default, aten.avg_pool2d.default)
def avg_pool(builder: Builder, node: fx.Node) -> str:
    """Means of windows."""
    call = arguments(node)
    dims = 1 if "1d" in str(node.target) else 2
    kernel = per_dim(call["kernel_size"], dims)
    return builder.emit(
        "avg_pool",
        node,
        builder.value(node.args[0], node),
        kernel=kernel,
        stride=per_dim(call["stride"] or kernel, dims),
        padding=per_dim(call["padding"], dims),
        ceil=call["ceil_mode"],
        include_pad=call["count_include_pad"],
        divisor=call.get("divisor_override"),
    )


@rule(
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool2d.default,
)
def adaptive_avg_pool(builder: Builder, node: fx.Node) -> str:
    """Means of as many windows as asked for."""
    dims = 1 if "1d" in str(node.target) else 2
    return builder.emit(
        "adaptive_avg_pool", node, builder.value(node.args[0], node), size=builder.sizes(node)[-dims:]
    )


@rule(aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default)
def reduce(builder: Builder, node: fx.Node) -> str:
    """Mean, sum, maximum or minimum over dimensions of a sample."""
    value, dims, keepdim = _reduced(builder, node)
    op = short_name(node.target)
    if op == "amin":
        return minimum(builder, node, value, dims=dims, keepdim=keepdim)
    return builder.emit("max" if op == "amax" else op, node, value, dims=dims, keepdim=keepdim)


def _reduced(builder: Builder, node: fx.Node) -> tuple[str, list[int], bool]:
    """What is reduced, over which dimensions, and whether these stay."""
    call, tensor = arguments(node), node.args[0]
    assert isinstance(tensor, fx.Node)
    dims = positive_dims(call["dim"], tensor)
    if any(builder.sizes(tensor)[dim] == -1 for dim in dims):
        raise unsupported(node, "the batch dimension", "Reduce over the dimensions of one sample.")
    return builder.value(tensor, node), dims, bool(call["keepdim"])


def minimum(builder: Builder, node: fx.Node, value: str, *, dims: list[int], keepdim: bool) -> str:
    """The negative of the largest negative."""
    largest = builder.emit("max", node, builder.emit("neg", node, value), dims=dims, keepdim=keepdim)
    return builder.emit("neg", node, largest)


@rule(aten.var.dim, aten.var.correction, aten.std.dim, aten.std.correction)
def variance(builder: Builder, node: fx.Node) -> str:
    """Mean squared distance from the mean, corrected, or its root."""
    call, tensor = arguments(node), node.args[0]
    assert isinstance(tensor, fx.Node)
    value, dims, keepdim = _reduced(builder, node)
    count = prod(builder.sizes(tensor)[dim] for dim in dims)
    correction = call["correction"] if "correction" in call else int(call["unbiased"])
    correction = 1 if correction is None else correction
    mean = builder.emit("mean", node, value, dims=dims, keepdim=True)
    squares = builder.emit("square", node, builder.emit("sub", node, value, mean))
    result = builder.emit("mean", node, squares, dims=dims, keepdim=keepdim)
    if correction:
        factor = builder.value(count / (count - correction), node)
        result = builder.emit("mul", node, result, factor)
    return builder.emit("sqrt", node, result) if short_name(node.target) == "std" else result


@rule(aten.linalg_vector_norm.default)
def vector_norm(builder: Builder, node: fx.Node) -> str:
    """The root of the sum of squares."""
    order = arguments(node)["ord"]
    if order != 2:
        raise unsupported(node, f"the order {order}", "Use the Euclidean norm.")
    value, dims, keepdim = _reduced(builder, node)
    squares = builder.emit("square", node, value)
    return builder.emit("sqrt", node, builder.emit("sum", node, squares, dims=dims, keepdim=keepdim))
