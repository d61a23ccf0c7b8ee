"""Pools and reductions."""

from __future__ import annotations

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


@rule(aten.mean.dim, aten.sum.dim_IntList, aten.amax.default)
def reduce(builder: Builder, node: fx.Node) -> str:
    """Mean, sum or maximum over dimensions of a sample."""
    call = arguments(node)
    tensor = node.args[0]
    assert isinstance(tensor, fx.Node)
    dims = positive_dims(call["dim"], tensor)
    if any(builder.sizes(tensor)[dim] == -1 for dim in dims):
        raise unsupported(node, "the batch dimension", "Reduce over the dimensions of one sample.")
    op = {"amax": "max"}.get(short_name(node.target), short_name(node.target))
    return builder.emit(op, node, builder.value(tensor, node), dims=dims, keepdim=bool(call["keepdim"]))
