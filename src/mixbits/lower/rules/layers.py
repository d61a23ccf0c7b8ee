"""Quantizers, convolutions, linear layers and batch norm."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from mixbits.core import grid as grids
from mixbits.core.grid import grid_to_json
from mixbits.core.infer import MAX_ACCUMULATOR, accumulator_bound
from mixbits.core.program import PackedWeight
from mixbits.graph.calls import arguments, padding_pairs, per_dim
from mixbits.graph.fold import batch_norm_affine, folded_batch_norm
from mixbits.graph.sites import source
from mixbits.lower.builder import Builder, rule, tensor_of, unsupported
from mixbits.pack.bits import pack

aten = torch.ops.aten


def quantize(builder: Builder, node: fx.Node, site: str) -> str:
    """Codes of an activation site. An unsigned grid cuts off negative values: a ReLU in front of it goes."""
    frozen, tensor = builder.frozen[site], node.args[0]
    assert isinstance(tensor, fx.Node)
    if frozen.step.numel() != 1:
        raise ValueError(
            f"{site}: {frozen.step.numel()} steps on an activation; an activation site has one step"
        )
    if tensor.target is aten.relu.default and frozen.grid.level_min >= 0:
        tensor = tensor.args[0]
    step = builder.constant(f"{site}/step", frozen.step.reshape(()))
    value = builder.value(tensor, node)
    return builder.emit("quantize", node, value, name=site, grid=grid_to_json(frozen.grid), step=step)


def pack_weight(builder: Builder, node: fx.Node, site: str) -> None:
    """Codes of a weight site, packed once however often it is read."""
    frozen, weight = builder.frozen[site], tensor_of(node.args[0])  # type: ignore[arg-type]
    values, step = weight.detach().cpu().float().numpy(), frozen.step.cpu().numpy()
    if not np.isfinite(values).all():
        raise ValueError(f"{site}: the weight holds infinities or NaN; check the trained network")
    if step.size not in (1, len(values)):
        raise ValueError(
            f"{site}: {step.size} steps for {len(values)} output channels; use one step, or one a channel"
        )
    codes = grids.quantize(values, step.reshape(-1, *(1,) * (values.ndim - 1)), frozen.grid)
    builder.weights[site] = PackedWeight(values.shape, frozen.grid, pack(codes, frozen.grid.bits))


def batch_norm(builder: Builder, node: fx.Node) -> str:
    """A batch norm that is part of no layer."""
    address = node.meta["address"]
    scale, shift = batch_norm_affine(node)
    return builder.emit(
        "batch_norm",
        node,
        builder.value(node.args[0], node),
        scale=builder.constant(f"{address}/scale", scale),
        shift=builder.constant(f"{address}/shift", shift),
    )


@rule(aten.conv2d.default, aten.conv1d.default, aten.conv2d.padding, aten.conv1d.padding)
def convolution(builder: Builder, node: fx.Node) -> str:
    """A convolution with the batch norm that follows it, if that folds."""
    call = arguments(node)
    site, shared = _layer(builder, node, call)
    kernel = builder.weights[site].shape[2:]
    dims = len(kernel)
    dilation = per_dim(call["dilation"], dims)
    return _emit_layer(
        builder,
        node,
        f"conv{dims}d",
        shared,
        stride=per_dim(call["stride"], dims),
        padding=padding_pairs(call["padding"], kernel, dilation),
        dilation=dilation,
        groups=call["groups"],
    )


@rule(aten.linear.default)
def linear(builder: Builder, node: fx.Node) -> str:
    """A linear layer with the batch norm that follows it, if that folds."""
    _, shared = _layer(builder, node, arguments(node))
    return _emit_layer(builder, node, "linear", shared)


def _layer(builder: Builder, node: fx.Node, call: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """The weight's site, and the attributes that all layers have.

    ``scale[c]`` is weight step x input step x batch norm's scale, ``bias[c]`` is bias x batch norm's scale +
    its shift; products in float64, rounded to float32 once.
    """
    name = builder.layers[node]
    site = builder.quantizers[call["weight"]]
    read = source(call["input"])  # the quantizer of the input, through operations that only move values
    if read not in builder.quantizers:
        raise ValueError(f"{name}: its input has no quantizer. Place a quantizer or learn a policy.")
    weight, grid = builder.weights[site], builder.frozen[builder.quantizers[read]].grid
    bound = accumulator_bound(int(np.prod(weight.shape[1:])), weight.grid, grid)
    if bound > MAX_ACCUMULATOR:
        raise ValueError(
            f"{name}: its sums can reach {bound}, beyond the 32-bit accumulator ({MAX_ACCUMULATOR}). "
            f"Use fewer bits for {site!r} or {builder.quantizers[read]!r}, or split the layer."
        )
    channels = weight.shape[0]
    step = builder.frozen[builder.quantizers[read]].step.double().reshape(())
    scale = builder.frozen[site].step.double().reshape(-1).expand(channels) * step
    bias = _bias(node, call["bias"], channels)
    norm = folded_batch_norm(node)
    if norm is not None:
        factor, shift = (part.cpu() for part in batch_norm_affine(norm))
        scale, bias = scale * factor, bias * factor + shift
    return site, {
        "weight": site,
        "scale": builder.constant(f"{name}/scale", scale),
        "bias": builder.constant(f"{name}/bias", bias),
    }


def _bias(node: fx.Node, operand: Any, channels: int) -> Tensor:
    """A layer's bias in float64, zeros if it has none."""
    if operand is None:
        return torch.zeros(channels, dtype=torch.float64)
    if operand.op != "get_attr":
        raise unsupported(node, "a computed bias", "Make the bias a parameter.")
    return tensor_of(operand).detach().cpu().double()


def _emit_layer(builder: Builder, node: fx.Node, op: str, shared: dict[str, str], **attrs: Any) -> str:
    """The instruction of a layer; its output is also the value of the batch norm that it took in."""
    norm = folded_batch_norm(node)
    end = node if norm is None else norm
    value = builder.value(node.args[0], node)
    name = builder.layers[node]
    output = builder.emit(op, node, value, name=name, output=end.meta["address"], **shared, **attrs)
    builder.values[end] = output
    return output
