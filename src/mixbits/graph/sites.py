"""Sites: which tensors of a captured network can be quantized. The table of operations lives here.

A site is the weight of a convolution or linear layer, and every activation that such a layer or an average
pool reads. Operations that only move values or pick among them (``CARRIERS``) are looked through, so that
what is stored between two layers is codes and a tensor read twice has one quantizer.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import fx
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

aten = torch.ops.aten

# Operations with integer arithmetic: target -> kind. Inputs are (activation, weight, bias, ...).
MAC_OPS: dict[Any, str] = {
    aten.conv2d.default: "conv2d",
    aten.conv2d.padding: "conv2d",
    aten.conv1d.default: "conv1d",
    aten.conv1d.padding: "conv1d",
    aten.linear.default: "linear",
}
WEIGHT = 1  # place of the weight among those inputs
# Multiply-accumulate operations that exist in torch but have no integer rule here.
NO_INTEGER_RULE = {
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "lstm",
    "gru",
    "rnn_tanh",
    "rnn_relu",
    "bilinear",
    "embedding_bag",
}
# Views share their input's memory.
VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.permute.default,
    aten.transpose.int,
}
POOLS = {
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.mean.dim,
    aten.adaptive_avg_pool1d.default,
}
MAX_POOLS = {aten.max_pool2d.default, aten.adaptive_max_pool2d.default, aten.max_pool2d_with_indices.default}
SELECTIONS = {aten.slice.Tensor, aten.select.int, aten.expand.default}
ELEMENTWISE = {
    aten.relu.default,
    aten.relu6.default,
    aten.hardtanh.default,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.silu.default,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.gelu.default,
    aten.elu.default,
    aten.leaky_relu.default,
    aten.softplus.default,
    aten.mish.default,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
}
NEVER_NEGATIVE = {
    aten.relu.default,
    aten.relu6.default,
    aten.sigmoid.default,
    aten.hardsigmoid.default,
    aten.softmax.int,
    aten._softmax.default,
    aten.softplus.default,
    aten.abs.default,
    aten.exp.default,
    aten.square.default,
}
SIGN_KEEPING = VIEWS | POOLS | MAX_POOLS | SELECTIONS | {aten.add.Tensor, aten.mul.Tensor, aten.cat.default}


def is_tensor(node: Any) -> TypeGuard[fx.Node]:
    """Whether a node is a tensor (and not a size or a constant)."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def module_of(node: fx.Node) -> torch.nn.Module | None:
    """The module that a ``call_module`` node calls."""
    if node.op != "call_module":
        return None
    captured = node.graph.owning_module
    assert captured is not None, "a captured graph belongs to one module"
    return captured.get_submodule(str(node.target))


def input_node(node: fx.Node, index: int = 0) -> fx.Node:
    """The node that computes (or holds) an argument that must be a tensor, such as a layer's weight."""
    argument = node.args[index]
    assert isinstance(argument, fx.Node), f"{node}: argument {index} is {argument!r}, not a tensor"
    return argument


def is_dropout(node: fx.Node) -> bool:
    """Whether a node is a dropout module."""
    return isinstance(module_of(node), _DropoutNd)


def is_batch_norm(node: fx.Node) -> bool:
    """Whether a node is a batch-norm module."""
    return isinstance(module_of(node), _BatchNorm)


def is_zero_pad(node: fx.Node) -> bool:
    """Whether a node pads with zeros."""
    if node.target not in (aten.pad.default, aten.constant_pad_nd.default):
        return False
    mode = node.args[2] if node.target is aten.pad.default and len(node.args) > 2 else "constant"
    position = 3 if node.target is aten.pad.default else 2
    value = node.args[position] if len(node.args) > position else node.kwargs.get("value")
    return mode == "constant" and not value


def is_carrier(node: fx.Node) -> bool:
    """Whether every output value of a node is an input value or zero: codes pass through unchanged."""
    return node.target in VIEWS | MAX_POOLS or is_dropout(node) or is_zero_pad(node)


def source(node: fx.Node) -> fx.Node:
    """The tensor that a chain of carriers starts from."""
    while is_carrier(node) and is_tensor(node.args[0]):
        node = node.args[0]
    return node


def is_signed(node: fx.Node) -> bool:
    """Whether a tensor may hold negative values."""
    if node.target in NEVER_NEGATIVE:
        return False
    if node.target in (aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default):
        low = node.args[1] if len(node.args) > 1 else -1.0
        return not (isinstance(low, int | float) and low >= 0)
    if node.target in (aten.add.Tensor, aten.mul.Tensor):
        constants = [*node.args, *node.kwargs.values()]
        if any(isinstance(value, int | float) and value < 0 for value in constants):
            return True
    if node.target in SIGN_KEEPING or is_dropout(node) or is_zero_pad(node):
        inputs = [arg for arg in node.all_input_nodes if is_tensor(arg)]
        return any(is_signed(arg) for arg in inputs) or not inputs
    return True


def mac_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Convolutions and linear layers in order; raises ``ValueError`` for those that cannot be quantized."""
    found = []
    for node in graph.nodes:
        short = str(node.target).removeprefix("aten.").split(".")[0]
        if node.op == "call_function" and short in NO_INTEGER_RULE:
            raise ValueError(
                f"{node.meta['address']}: no integer rule for {short} (have: conv1d, conv2d, linear). "
                "Keep this layer outside the network that mixbits quantizes."
            )
        if node.target not in MAC_OPS:
            continue
        weight = node.args[WEIGHT]
        if not (isinstance(weight, fx.Node) and weight.op == "get_attr"):
            raise ValueError(
                f"{node.meta['address']}: its weight is computed, not a parameter, so it cannot be packed. "
                "Remove the parametrization first (torch.nn.utils.parametrize.remove_parametrizations)."
            )
        found.append(node)
    if not found:
        raise ValueError("the network has no convolution or linear layer, so there is nothing to quantize")
    return found


def float_weights(graph: fx.Graph) -> dict[str, str]:
    """Parameters that matrix products other than linear layers read, which stay float, by the product."""
    found: dict[str, str] = {}
    for node in graph.nodes:
        if node.target not in (aten.matmul.default, aten.mm.default, aten.bmm.default):
            continue
        for operand in map(source, (input_node(node, 0), input_node(node, 1))):
            if operand.op == "get_attr":
                found[node.meta["address"]] = operand.meta["address"]
    return found


def site_nodes(graph: fx.Graph) -> dict[str, fx.Node]:
    """The node of every site, by name: activations in order of computation, weights after their inputs."""
    sites: dict[str, fx.Node] = {}
    macs = set(mac_nodes(graph))
    for node in graph.nodes:
        if node in macs or node.target in POOLS:
            tensor = source(input_node(node))
            sites.setdefault(tensor.meta["address"], tensor)
        if node in macs:
            weight = input_node(node, WEIGHT)
            sites.setdefault(weight.meta["address"], weight)
    return sites
