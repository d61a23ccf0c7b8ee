"""Rounding of a layer's weights that makes up for each rounding error in the weights not rounded yet."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DAMPING = 0.01  # of the mean input power, added to every input's: keeps the second moments invertible
BLOCK = 64  # columns after which the errors so far are passed on together


def compensated_levels(
    weight: Tensor, moments: Tensor, step: Tensor, nearest: Callable[[Tensor], Tensor]
) -> Tensor:
    """Levels whose layer output is near that of ``weight``, by the column-wise solver of GPTQ.

    ``weight`` float ``[groups, rows, d]``; ``moments`` the inputs' second moments, ``[groups, d, d]``;
    ``step`` ``[groups, rows]``; ``nearest`` takes values in steps, ``[groups, rows]``, to levels. Returns
    levels like ``weight``. After Frantar et al. 2023 (arXiv 2210.17323); columns in falling order of power.
    """
    power = moments.diagonal(dim1=-2, dim2=-1)
    order = torch.argsort(power, dim=-1, descending=True)
    left = torch.take_along_dim(weight, order[:, None, :], -1)
    moments = torch.take_along_dim(moments, order[:, :, None], -2)
    moments = torch.take_along_dim(moments, order[:, None, :], -1)
    damped = (DAMPING * power.mean(-1)).clamp_min(torch.finfo(power.dtype).tiny)
    moments = moments + torch.diag_embed(damped[:, None].expand_as(power))
    # Row k of the upper factor says how an error in column k is best made up for in those after it.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    factor = torch.linalg.cholesky(inverse, upper=True)
    levels = torch.empty_like(left)
    for begin in range(0, left.shape[-1], BLOCK):
        end = min(begin + BLOCK, left.shape[-1])
        errors = torch.empty_like(left[..., begin:end])
        for column in range(begin, end):
            level = nearest(left[..., column] / step)
            error = (left[..., column] - level * step) / factor[:, column, column, None]
            left[..., column + 1 : end] -= error[..., None] * factor[:, None, column, column + 1 : end]
            levels[..., column], errors[..., column - begin] = level, error
        left[..., end:] -= errors @ factor[:, begin:end, end:]
    return torch.empty_like(levels).scatter_(-1, order[:, None, :].expand_as(levels), levels)
