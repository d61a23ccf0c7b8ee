"""Quantizers: what stands on an edge of a captured network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mixbits.core.grid import Codebook, Grid
from mixbits.quant.functional import fake_quantize, level_tensor, quantize_uniform, scale_gradient, single

SMALLEST_STEP = 1e-8  # keeps x / step finite in float32
LEAST_REACH = 1 / 64  # of a weight's largest magnitude, that its largest level has at least


@dataclass(frozen=True)
class Frozen:
    """A quantizer as plain values: the grid, and the step as float32 ``[]`` or ``[channels]``."""

    grid: Grid
    step: Tensor


class Quantizer(nn.Module, ABC):
    """One edge: float tensor in, float tensor out, on the grid of :meth:`freeze` in ``eval()``."""

    def forward(self, x: Tensor) -> Tensor:
        """The quantized tensor, of the shape and type of ``x``; half precision is quantized in float32."""
        return self.quantized(single(x)).to(x.dtype)

    @abstractmethod
    def quantized(self, x: Tensor) -> Tensor:
        """The quantized tensor of ``x``, which is float32 or more."""

    @abstractmethod
    def bits(self) -> Tensor:
        """The width, a scalar tensor, differentiable while it is learned."""

    @abstractmethod
    def freeze(self) -> Frozen:
        """Grid and step if training stopped now."""

    @abstractmethod
    def project_(self) -> None:
        """Put the parameters back into their legal set; called after every update."""

    def follow_(self, weight: Tensor) -> None:
        """The same as far as it depends on the weight that is quantized; called after ``project_``."""


@torch.no_grad()
def limit_step_(step: Tensor, weight: Tensor, grid: Grid) -> None:
    """Keep a learned step where it uses the levels of its grid.

    The largest level reaches at most the largest magnitude of the values that share the step, and at least
    ``LEAST_REACH`` of it. LSQ's gradient (arXiv 1902.08153) alone lets steps run away at larger learning
    rates, the more so the fewer values share one; values that then round to zero never bring it back
    (docs/decisions/0017). ``step`` is ``[]`` or ``[channels, 1, ...]``.
    """
    rows = weight.detach().flatten(1) if step.dim() else weight.detach().reshape(1, -1)
    top = max(grid.level_max, -grid.level_min if isinstance(grid, Codebook) else 1)
    full = (torch.linalg.vector_norm(rows, float("inf"), 1) / top).reshape(step.shape)
    step.copy_(torch.clamp(step, LEAST_REACH * full, full).clamp_min(SMALLEST_STEP))


class LearnedStep(Quantizer):
    """A fixed grid with a learned step: LSQ (Esser et al. 2020, arXiv 1902.08153), finetuning's quantizer.

    ``step`` is ``[]`` or one per slice of the first dimension, ``[channels, 1, ...]``. The step's gradient is
    scaled by ``1 / sqrt(n * level_max)``, with n the values that share the step (of one sample for
    activations), LSQ section 2.2. A codebook's levels count in units of their mean spacing, so that its step
    learns as fast as that of a uniform grid with as many levels.
    """

    gradient_scale: Tensor
    levels: Tensor

    def __init__(self, grid: Grid, step: Tensor, *, shared_by: int) -> None:
        """``shared_by``: how many values share one step (n above)."""
        super().__init__()
        self.grid = grid
        self.step = nn.Parameter(step.detach().clone().float().clamp_min(SMALLEST_STEP))
        spacing = 1.0
        if isinstance(grid, Codebook):
            spacing = (grid.level_max - grid.level_min) / (len(grid.levels) - 1)
        # The step of a spacing is `spacing * step`: its gradient is smaller, and its change larger, by that.
        level_max = max(grid.level_max, 1) / spacing
        scale = (shared_by * level_max) ** -0.5 / spacing**2
        # Tensors, so that code compiled for one width serves all; made from the grid, so not saved.
        self.register_buffer("gradient_scale", torch.tensor(scale), persistent=False)
        levels = torch.empty(0) if isinstance(grid, Codebook) else level_tensor(grid)
        self.register_buffer("levels", levels, persistent=False)

    def quantized(self, x: Tensor) -> Tensor:
        """Fake-quantized ``x``."""
        step = scale_gradient(self.step, self.gradient_scale).to(x.dtype)
        if isinstance(self.grid, Codebook):
            return fake_quantize(x, step, self.grid)
        return quantize_uniform(x, step, self.levels)

    def bits(self) -> Tensor:
        """The grid's width, a constant."""
        return torch.tensor(float(self.grid.bits), device=self.step.device)

    def freeze(self) -> Frozen:
        """The grid and the step as they are."""
        return Frozen(
            self.grid, self.step.detach().float().flatten() if self.step.dim() else self.step.detach().float()
        )

    def project_(self) -> None:
        """Keep the step positive."""
        with torch.no_grad():
            self.step.clamp_min_(SMALLEST_STEP)

    def follow_(self, weight: Tensor) -> None:
        """Keep the step where its levels are of use."""
        limit_step_(self.step, weight, self.grid)
