"""Ranges: choose a step for a grid from the values it will quantize."""

from __future__ import annotations

import torch
from torch import Tensor

from mixbits.core.grid import Codebook, Grid
from mixbits.quant.functional import nearest_level
from mixbits.quant.quantizer import SMALLEST_STEP, Frozen, Quantizer

STEPS_TRIED = 48  # fractions of the largest magnitude; finer changes the error by less than 1 %
KEPT_VALUES = 65536  # values of one site kept for the search


def mse_step(values: Tensor, grid: Grid) -> Tensor:
    """The step of least squared quantization error for each row.

    ``values`` float ``[rows, n]``; returns ``[rows]``. Tried are equal fractions of the step that just avoids
    clipping.

    >>> from mixbits.core.grid import Uniform
    >>> mse_step(torch.tensor([[-1.0, 0.0, 1.0]]), Uniform(2, signed=True, form="narrow"))
    tensor([1.])
    """
    reach = max(grid.level_max, -grid.level_min if isinstance(grid, Codebook) else 1)
    top = values.abs().amax(1).clamp_min(SMALLEST_STEP) / reach
    best, least = top.clone(), torch.full_like(top, float("inf"))
    for fraction in torch.arange(STEPS_TRIED, 0, -1, device=values.device) / STEPS_TRIED:
        step = top * fraction
        level = nearest_level(values / step[:, None], grid)
        error = (level * step[:, None] - values).square().sum(1)
        best = torch.where(error < least, step, best)
        least = torch.minimum(error, least)
    return best.clamp_min(SMALLEST_STEP)


class Recorder(Quantizer):
    """Passes values through and keeps an evenly spaced sample of them, for choosing a step."""

    def __init__(self, batches: int) -> None:
        """``batches``: how many batches will be seen; each contributes an equal share."""
        super().__init__()
        self._share = max(KEPT_VALUES // max(batches, 1), 1)
        self._kept: list[Tensor] = []

    def quantized(self, x: Tensor) -> Tensor:
        """``x`` itself."""
        flat = x.detach().flatten().float()
        self._kept.append(flat[:: max(flat.numel() // self._share, 1)][: self._share].clone())
        return x

    def values(self) -> Tensor:
        """The kept values, float ``[n]``."""
        return torch.cat(self._kept)

    def bits(self) -> Tensor:
        """Float width."""
        return torch.tensor(32.0)

    def freeze(self) -> Frozen:
        """Not possible: a recorder has no grid."""
        raise ValueError("a recorder only watches values; place a quantizer before freezing")

    def project_(self) -> None:
        """Nothing to project."""
