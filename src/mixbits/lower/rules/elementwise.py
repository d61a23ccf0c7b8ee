"""Float operations on single elements."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mixbits.graph.calls import arguments
from mixbits.lower.builder import Builder, positive_dims, rule, unsupported

aten = torch.ops.aten

UNARY: dict[Any, str] = {
    aten.abs.default: "abs",
    aten.cos.default: "cos",
    aten.exp.default: "exp",
    aten.hardsigmoid.default: "hardsigmoid",
    aten.hardswish.default: "hardswish",
    aten.log.default: "log",
    aten.mish.default: "mish",
    aten.neg.default: "neg",
    aten.reciprocal.default: "reciprocal",
    aten.relu.default: "relu",
    aten.rsqrt.default: "rsqrt",
    aten.sigmoid.default: "sigmoid",
    aten.silu.default: "silu",
    aten.sin.default: "sin",
    aten.sqrt.default: "sqrt",
    aten.square.default: "square",
    aten.tanh.default: "tanh",
}
BINARY: dict[Any, str] = {
    aten.add.Tensor: "add",
    aten.add.Scalar: "add",
    aten.div.Tensor: "div",
    aten.div.Scalar: "div",
    aten.maximum.default: "maximum",
    aten.minimum.default: "minimum",
    aten.mul.Tensor: "mul",
    aten.mul.Scalar: "mul",
    aten.pow.Tensor_Scalar: "pow",
    aten.pow.Tensor_Tensor: "pow",
    aten.sub.Tensor: "sub",
    aten.sub.Scalar: "sub",
    aten.rsub.Scalar: "sub",
    aten.rsub.Tensor: "sub",
}


@rule(*UNARY)
def unary(builder: Builder, node: fx.Node) -> str:
    """One operand, no attributes."""
    return builder.emit(UNARY[node.target], node, builder.value(node.args[0], node))


@rule(*BINARY)
def binary(builder: Builder, node: fx.Node) -> str:
    """Two operands, tensors or numbers; alpha multiplies the second, rsub takes them the other way round."""
    first, second = (builder.value(operand, node) for operand in node.args[:2])
    alpha = arguments(node).get("alpha", 1)
    reversed_ = "rsub" in str(node.target)
    if alpha != 1:
        scaled = first if reversed_ else second
        scaled = builder.emit(
            "mul", node, scaled, builder.value(alpha, node), output=f"{node.meta['address']}:scaled"
        )
        first, second = (scaled, second) if reversed_ else (first, scaled)
    return builder.emit(BINARY[node.target], node, *((second, first) if reversed_ else (first, second)))


@rule(aten.relu6.default)
def relu6(builder: Builder, node: fx.Node) -> str:
    """clamp(x, 0, 6)."""
    return builder.emit("clamp", node, builder.value(node.args[0], node), low=0, high=6)


@rule(aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)
def clamp(builder: Builder, node: fx.Node) -> str:
    """Limits that are numbers or absent."""
    call = arguments(node)
    low, high = call.get("min_val", call.get("min")), call.get("max_val", call.get("max"))
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        raise unsupported(node, "computed limits", "Use numbers.")
    return builder.emit("clamp", node, builder.value(node.args[0], node), low=low, high=high)


@rule(aten.gelu.default)
def gelu(builder: Builder, node: fx.Node) -> str:
    """Exact, or the tanh approximation."""
    return builder.emit(
        "gelu", node, builder.value(node.args[0], node), approximate=arguments(node)["approximate"]
    )


@rule(aten.elu.default)
def elu(builder: Builder, node: fx.Node) -> str:
    """ELU, CELU and SELU in torch's general form."""
    call = arguments(node)
    attrs: dict[str, Any] = {key: float(call[key]) for key in ("alpha", "scale", "input_scale")}
    return builder.emit("elu", node, builder.value(node.args[0], node), **attrs)


@rule(aten.celu.default)
def celu(builder: Builder, node: fx.Node) -> str:
    """CELU: x > 0 ? x : alpha * (exp(x / alpha) - 1)."""
    alpha = float(arguments(node)["alpha"])
    return builder.emit(
        "elu", node, builder.value(node.args[0], node), alpha=alpha, scale=1.0, input_scale=1 / alpha
    )


@rule(aten.selu.default)
def selu(builder: Builder, node: fx.Node) -> str:
    """ELU with the constants of Klambauer et al. 2017 (arXiv 1706.02515), equation (2)."""
    alpha, scale = 1.6732632423543772, 1.0507009873554805
    return builder.emit(
        "elu", node, builder.value(node.args[0], node), alpha=alpha, scale=scale, input_scale=1.0
    )


@rule(aten.leaky_relu.default)
def leaky_relu(builder: Builder, node: fx.Node) -> str:
    """One slope, a number."""
    slope = float(arguments(node)["negative_slope"])
    return builder.emit("leaky_relu", node, builder.value(node.args[0], node), slope=slope)


@rule(aten.softplus.default)
def softplus(builder: Builder, node: fx.Node) -> str:
    """With beta, and the threshold above which it is linear."""
    call = arguments(node)
    attrs: dict[str, Any] = {key: float(call[key]) for key in ("beta", "threshold")}
    return builder.emit("softplus", node, builder.value(node.args[0], node), **attrs)


@rule(aten.log_sigmoid.default)
def log_sigmoid(builder: Builder, node: fx.Node) -> str:
    """-log(1 + exp(-x)); above 100 the exponential is nothing."""
    negative = builder.emit("neg", node, builder.value(node.args[0], node))
    return builder.emit("neg", node, builder.emit("softplus", node, negative, beta=1.0, threshold=100.0))


@rule(aten.glu.default)
def glu(builder: Builder, node: fx.Node) -> str:
    """The first half times the sigmoid of the second."""
    call, tensor = arguments(node), node.args[0]
    assert isinstance(tensor, fx.Node)
    (dim,) = positive_dims(call["dim"], tensor)
    half, value = builder.sizes(node)[dim], builder.value(tensor, node)
    first, second = (
        builder.emit("slice", node, value, dim=dim, start=start, stop=start + half, step=1)
        for start in (0, half)
    )
    return builder.emit("mul", node, first, builder.emit("sigmoid", node, second))


@rule(aten.prelu.default, aten._prelu_kernel.default)
def prelu(builder: Builder, node: fx.Node) -> str:
    """Learned slopes."""
    slope = builder.parameter(node.args[1], node)
    return builder.emit("prelu", node, builder.value(node.args[0], node), slope=slope)
