"""Formulas of fake quantization on tensors; the definition they must agree with is ``core/grid.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixbits.core.grid import Codebook, Grid


class _StraightThrough(torch.autograd.Function):
    """Forward: ``value``; backward: the gradient goes to ``path`` unchanged."""

    @staticmethod
    def forward(ctx: Any, path: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def straight_through(path: Tensor, value: Tensor) -> Tensor:
    """``value`` exactly, with the gradient of ``path`` (Bengio et al. 2013, arXiv 1308.3432).

    >>> x = torch.tensor(0.7, requires_grad=True)
    >>> y = straight_through(x, x.round()); y.backward(); (y.item(), x.grad.item())
    (1.0, 1.0)
    """
    return _StraightThrough.apply(path, value.detach())


def round_half_even(x: Tensor) -> Tensor:
    """Nearest integer, ties to even, gradient one."""
    return straight_through(x, torch.round(x))


def round_half_away(x: Tensor) -> Tensor:
    """Nearest integer, ties away from zero, gradient one.

    >>> round_half_away(torch.tensor([-2.5, -0.5, 0.5, 1.5])).tolist()
    [-3.0, -1.0, 1.0, 2.0]
    """
    return straight_through(x, torch.sign(x) * torch.floor(x.abs() + 0.5))


def ceil(x: Tensor) -> Tensor:
    """Smallest integer not below ``x``, gradient one."""
    return straight_through(x, torch.ceil(x))


def nearest_level(ratio: Tensor, grid: Grid) -> Tensor:
    """Level of ``grid`` that ``ratio`` (value / step) belongs to, as float; no gradient of its own."""
    if isinstance(grid, Codebook):
        edges = ratio.new_tensor(grid.edges)
        return ratio.new_tensor(grid.levels)[torch.bucketize(ratio.detach().contiguous(), edges, right=True)]
    if grid.form == "bipolar":
        low = grid.level_min
        return torch.clamp(2 * torch.round((ratio - low) / 2) + low, low, grid.level_max)
    return torch.clamp(torch.round(ratio), grid.level_min, grid.level_max)


def fake_quantize(x: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """``step * level`` nearest to ``x``, with the gradients of LSQ, eqs. (1)-(3) (arXiv 1902.08153).

    ``x`` float ``[*]``, ``step`` positive, a scalar or ``[c, 1, ...]``. To ``x``: one inside the range, zero
    outside; to ``step``: ``level - x / step`` inside, the level at the clip outside.

    >>> from mixbits.core.grid import Uniform
    >>> fake_quantize(torch.tensor([0.26, -9.0]), torch.tensor(0.5), Uniform(4, signed=True)).tolist()
    [0.5, -4.0]
    """
    ratio = x / step
    inside = torch.clamp(ratio, grid.level_min, grid.level_max)
    return straight_through(inside, nearest_level(ratio, grid)) * step


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """``x`` exactly, with its gradient multiplied by ``factor``."""
    return straight_through(x * factor, x)
