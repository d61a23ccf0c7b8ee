"""Formulas of fake quantization on tensors; the definition they must agree with is ``core/grid.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mixbits.core.grid import Codebook, Grid, Uniform

hardtanh_backward = torch.ops.aten.hardtanh_backward
SMALLEST = torch.finfo(torch.float32).tiny
COMPARED_EDGES = 15  # of a codebook: compiled, comparing with so many is faster than searching them


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
    return straight_through(x, nearest_away(x))


def nearest_away(x: Tensor) -> Tensor:
    """:func:`round_half_away` without a gradient."""
    return x.abs().add_(0.5).floor_().copysign_(x)


def ceil(x: Tensor) -> Tensor:
    """Smallest integer not below ``x``, gradient one."""
    return straight_through(x, torch.ceil(x))


class _Clip(torch.autograd.Function):
    """``x`` limited to ``low .. high``; saves no more than its arguments."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ctx.save_for_backward(x, low, high)
        return torch.minimum(torch.maximum(x, low), high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return clip_gradients(grad, *ctx.saved_tensors)


def clip_gradients(grad: Tensor, x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`clip` passes of ``grad`` to ``x``, ``low`` and ``high``."""
    if _numbers_are_near(x):
        inside = hardtanh_backward(grad, x, float(low), float(high))
        beyond = grad - inside
        above = dot(beyond, (x > low).to(x.dtype))
        return inside, beyond.sum() - above, above
    above, below = grad * at_least(x, high), grad * at_least(low, x)
    return grad - above - below, below.sum(), above.sum()


def at_least(a: Tensor, b: Tensor) -> Tensor:
    """1 where ``a >= b``, else 0.

    Compiled it stays arithmetic: the compiler would keep a comparison for the backward pass as a tensor of
    bool, which it writes a value at a time, in ten times the time of all the rest.
    """
    if torch.compiler.is_compiling():
        return (torch.sign(a - b) + 1.0).clamp(max=1.0)
    return (a >= b).to(a.dtype)


def within(grad: Tensor, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``grad`` where ``low <= x <= high``, else 0; ``low`` and ``high`` are levels, scalars."""
    if _numbers_are_near(x):
        # Its bounds are exclusive: put them one step of float32 outside.
        bounds = [float(level) for level in (low, high)]
        margins = [abs(bound) * torch.finfo(torch.float32).eps + SMALLEST for bound in bounds]
        return hardtanh_backward(grad, x, bounds[0] - margins[0], bounds[1] + margins[1])
    return grad * at_least(x, low) * at_least(high, x)


def _numbers_are_near(x: Tensor) -> bool:
    """Whether scalar tensors can be read in passing, for faster operations that want numbers."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def clip(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``x`` limited to ``low .. high``, scalars; at a bound and beyond, the gradient goes to the bound.

    >>> x, high = torch.tensor([0.5, 1.0, 2.0]), torch.tensor(1.0, requires_grad=True)
    >>> clip(x, -high, high).sum().backward(); high.grad.item()
    2.0
    """
    return _Clip.apply(x, low, high)


def nearest_level(ratio: Tensor, grid: Grid) -> Tensor:
    """Level of ``grid`` that ``ratio`` (value / step) belongs to, as float; no gradient of its own."""
    if isinstance(grid, Codebook):
        if torch.compiler.is_compiling() and len(grid.edges) <= COMPARED_EDGES:
            ratio = ratio.detach()
            level = torch.full_like(ratio, grid.levels[0])
            for edge, above in zip(grid.edges, grid.levels[1:], strict=True):
                level = torch.where(ratio >= edge, float(above), level)
            return level
        # One dimension has one layout: compiled, a copy of more would be laid out like the tensor again.
        codes = torch.bucketize(ratio.detach().reshape(-1), ratio.new_tensor(grid.edges), right=True)
        return ratio.new_tensor(grid.levels)[codes].reshape(ratio.shape)
    if grid.form == "bipolar":
        low = grid.level_min
        return torch.clamp(2 * torch.round((ratio - low) / 2) + low, low, grid.level_max)
    return torch.clamp(torch.round(ratio), grid.level_min, grid.level_max)


class _FakeQuantize(torch.autograd.Function):
    """``step * level`` nearest to ``x``; saves its arguments only, and rounds again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, levels: Tensor) -> Tensor:
        ctx.save_for_backward(x, step, levels)
        return _quantized(x, step, levels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, step, levels = ctx.saved_tensors
        ratio = x / step
        inside = within(grad, ratio, levels[0], levels[1])
        # To the step: inside, level - x / step; outside, the level.
        if step.dim() or torch.compiler.is_compiling():
            below = inside * ratio
            to_step = _to_levels_(ratio, levels).mul_(grad).sub_(below).sum_to_size(step.shape)
        else:  # two calls that make no tensor
            below = dot(inside, ratio)
            to_step = dot(grad, _to_levels_(ratio, levels)) - below
        return inside, to_step, None


def single(x: Tensor) -> Tensor:
    """``x`` in float32 if it has half precision, which cannot tell where between two levels a value is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _itself(x: Tensor) -> Tensor:
    return x


def _quantized(x: Tensor, step: Tensor, levels: Tensor) -> Tensor:
    return _to_levels_(x / step, levels).mul_(step)


def _to_levels_(ratio: Tensor, levels: Tensor) -> Tensor:
    """The nearest levels, in the memory of ``ratio``."""
    low, high, spacing, origin = levels.tolist() if _numbers_are_near(ratio) else levels.unbind()
    if isinstance(spacing, float) and spacing == 1.0:
        return ratio.clamp_(low, high).round_()
    return ratio.sub_(origin).div_(spacing).round_().mul_(spacing).add_(origin).clamp_(low, high)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The sum of the products, in one pass: ordinarily by one call, compiled by fusing the two."""
    if torch.compiler.is_compiling():
        return (a * b).sum()
    if a.stride() == b.stride() and not a.is_contiguous():  # any order will do, if it is the same
        order = sorted(range(a.dim()), key=lambda dim: -a.stride(dim))
        a, b = a.permute(order), b.permute(order)
    return torch.dot(a.reshape(-1), b.reshape(-1))


def level_tensor(grid: Uniform) -> Tensor:
    """A uniform grid as float ``[4]``: lowest and highest level, their spacing, and a level to count from.

    >>> level_tensor(Uniform(2, signed=True, form="bipolar")).tolist()
    [-3.0, 3.0, 2.0, -3.0]
    """
    origin = grid.level_min if grid.spacing > 1 else 0
    return torch.tensor([grid.level_min, grid.level_max, grid.spacing, origin], dtype=torch.float32)


def quantize_uniform(x: Tensor, step: Tensor, levels: Tensor) -> Tensor:
    """:func:`fake_quantize` on the grid that ``levels`` (see :func:`level_tensor`) hold at the time.

    Code compiled for one grid serves all.
    """
    return made_by(_quantized, _FakeQuantize.apply(x, step, levels), x, step, levels)


def made_by(function: Callable[..., Tensor], out: Tensor, *arguments: Tensor) -> Tensor:
    """``out``, with a note for :func:`saving_inputs_only` of how to make it again, without gradients."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        out.made_by = function, *(argument.detach() for argument in arguments)  # type: ignore[attr-defined]
    return out


def saving_inputs_only() -> torch.autograd.graph.saved_tensors_hooks:
    """A context in which no operation keeps a fake-quantized tensor for its backward pass.

    What was quantized is kept anyway; there it is quantized again, with the same outcome. A convolution then
    keeps no more than in the float network. Compiled code chooses for itself.

    >>> x, step = torch.ones(3, requires_grad=True), torch.tensor(0.3)
    >>> with saving_inputs_only():
    ...     y = fake_quantize(x, step, Uniform(2, signed=False)).square().sum()
    >>> y.backward(); x.grad
    tensor([0., 0., 0.])
    """

    def pack(tensor: Tensor) -> tuple[Callable[..., Tensor], Tensor, tuple[Tensor, ...], int]:
        function, x, *rest = getattr(tensor, "made_by", (_itself, tensor))
        return function, x, tuple(rest), x._version

    def unpack(packed: tuple[Callable[..., Tensor], Tensor, tuple[Tensor, ...], int]) -> Tensor:
        function, x, rest, version = packed
        if x._version != version:  # hooks put an end to autograd's own check
            raise RuntimeError(
                f"a tensor of shape {list(x.shape)} that backward needs was changed in place after it "
                "was used; leave out the in-place operation, or work on a clone"
            )
        with torch.no_grad():
            return function(x, *rest)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def fake_quantize(x: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """``step * level`` nearest to ``x``, with the gradients of LSQ, eqs. (1)-(3) (arXiv 1902.08153).

    ``x`` float ``[*]``, ``step`` positive, a scalar or ``[c, 1, ...]``. To ``x``: one inside the range, zero
    outside; to ``step``: ``level - x / step`` inside, else the level.

    >>> fake_quantize(torch.tensor([0.26, -9.0]), torch.tensor(0.5), Uniform(4, signed=True)).tolist()
    [0.5, -4.0]
    """
    if isinstance(grid, Uniform):
        return quantize_uniform(x, step, level_tensor(grid).to(x))
    ratio = x / step
    inside = torch.clamp(ratio, grid.level_min, grid.level_max)
    return straight_through(inside, nearest_level(ratio, grid)) * step


def scale_gradient(x: Tensor, factor: Tensor | float) -> Tensor:
    """``x`` exactly, with its gradient multiplied by ``factor``."""
    return straight_through(x * factor, x)
