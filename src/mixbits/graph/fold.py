"""Folding: which batch norm becomes part of which layer's scale and bias, and with which numbers."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.nn.modules.batchnorm import _BatchNorm

from mixbits.graph.sites import MAC_OPS, is_batch_norm, module_of


def folded_batch_norm(node: fx.Node) -> fx.Node | None:
    """The batch norm that follows the layer ``node`` and nothing else reads, or None.

    Only norms over the layer's output channels fold: dimension 1 of a convolution's output, of a 2-d linear
    output.
    """
    users = list(node.users)
    if node.target not in MAC_OPS or len(users) != 1 or not is_batch_norm(users[0]):
        return None
    if MAC_OPS[node.target] == "linear" and node.meta["val"].dim() != 2:
        return None
    return users[0]


def batch_norm_affine(node: fx.Node) -> tuple[Tensor, Tensor]:
    """``(scale, shift)`` per channel, float64, of a batch norm in eval mode: ``y = scale * x + shift``."""
    norm = module_of(node)
    assert isinstance(norm, _BatchNorm), f"{node} is not a batch norm"
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        raise ValueError(
            f"{node.meta['address']}: batch norm without running statistics cannot be lowered; "
            "use track_running_stats=True"
        )
    scale = torch.rsqrt(variance.detach().double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -mean.detach().double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale, shift
