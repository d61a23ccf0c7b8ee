"""Norms, softmax, matrix products and attention."""

from __future__ import annotations

from math import sqrt

import torch
from torch import fx

from mixbits.graph.calls import arguments
from mixbits.lower.builder import Builder, positive_dims, rank, rule, unsupported

aten = torch.ops.aten


@rule(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default)
def softmax(builder: Builder, node: fx.Node) -> str:
    """Softmax or its logarithm along one dimension."""
    op = "log_softmax" if "log_softmax" in str(node.target) else "softmax"
    (dim,) = positive_dims(arguments(node)["dim"], node)
    return builder.emit(op, node, builder.value(node.args[0], node), dim=dim)


@rule(aten.layer_norm.default)
def layer_norm(builder: Builder, node: fx.Node) -> str:
    """Over the last dimensions."""
    call = arguments(node)
    return builder.emit(
        "layer_norm",
        node,
        builder.value(call["input"], node),
        dims=len(call["normalized_shape"]),
        weight=builder.parameter(call["weight"], node),
        bias=builder.parameter(call["bias"], node),
        eps=call["eps"],
    )


@rule(aten.group_norm.default, aten.instance_norm.default)
def group_norm(builder: Builder, node: fx.Node) -> str:
    """Over groups of channels; of an instance norm each channel is one."""
    call = arguments(node)
    groups = call["num_groups"] if "num_groups" in call else call["input"].meta["val"].shape[1]
    return builder.emit(
        "group_norm",
        node,
        builder.value(call["input"], node),
        groups=groups,
        weight=builder.parameter(call["weight"], node),
        bias=builder.parameter(call["bias"], node),
        eps=call["eps"],
    )


@rule(aten.rms_norm.default)
def rms_norm(builder: Builder, node: fx.Node) -> str:
    """Each value over the root of mean of squares + eps, taken over the last dimensions."""
    call = arguments(node)
    tensor = call["input"]
    eps = torch.finfo(torch.float32).eps if call["eps"] is None else call["eps"]
    dims = list(range(rank(tensor)))[-len(call["normalized_shape"]) :]

    value = builder.value(tensor, node)
    mean = builder.emit("mean", node, builder.emit("square", node, value), dims=dims, keepdim=True)
    size = builder.emit("rsqrt", node, builder.emit("add", node, mean, builder.value(eps, node)))
    value = builder.emit("mul", node, value, size)
    if call["weight"] is None:
        return value
    return builder.emit("mul", node, value, builder.value(call["weight"], node))


@rule(aten.matmul.default, aten.bmm.default, aten.mm.default)
def matmul(builder: Builder, node: fx.Node) -> str:
    """A product of matrices that are both computed: in float."""
    if any(isinstance(a, fx.Node) and rank(a) < 2 for a in node.args[:2]):
        raise unsupported(node, "a vector", "Give it a second dimension with unsqueeze.")
    return builder.emit("matmul", node, *(builder.value(operand, node) for operand in node.args[:2]))


@rule(aten.scaled_dot_product_attention.default)
def attention(builder: Builder, node: fx.Node) -> str:
    """Attention without a mask, or with the causal one."""
    call = arguments(node)
    if call["attn_mask"] is not None or call["enable_gqa"]:
        what = "attn_mask" if call["attn_mask"] is not None else "enable_gqa"
        raise unsupported(node, what, "Write it with matmul, add and softmax.")
    query = call["query"]
    scale = call["scale"] if call["scale"] is not None else 1 / sqrt(query.meta["val"].shape[-1])
    inputs = [builder.value(call[key], node) for key in ("query", "key", "value")]
    return builder.emit("attention", node, *inputs, scale=scale, causal=bool(call["is_causal"]))
