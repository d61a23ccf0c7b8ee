"""Penalties: limits as terms of a loss, and how much of them is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mixbits.core.budget import Budget
from mixbits.core.cost import COSTS, Bits
from mixbits.core.profile import Profile

# Uhlich et al. 2020 (arXiv 1905.11452) penalize 0.1 * (KiB above the limit)**2 on ResNet-20, whose limits
# these are, and scale 0.1 by the square of the size for larger networks. Relative to the limit that is the
# same number everywhere. Limits without a counterpart in the paper count like its limit on weights.
PAPER_ACTIVATION_KIB = {"act_max": 8.1, "act_peak": 8.1, "act_sum": 92.1, "act_bits": 92.1}
PAPER_WEIGHT_KIB = 70.1


def squared_excess(
    profile: Profile, bits: Bits, budget: Budget, *, strength: float, activation_strength: float
) -> Tensor:
    """``sum_j lambda_j * (T_j * max(0, used_j / asked_j - 1))**2``, eq. (10) of Uhlich et al.

    ``bits`` maps sites to scalar tensors or integers. ``T_j`` is the paper's limit of that kind in KiB, so
    that the strengths are the paper's lambdas (0.1; for activations 0.1 or 1.0).
    """
    total: Any = torch.zeros(())
    for limit in budget.limits:
        used = limit.used(profile, bits)
        if not isinstance(used, Tensor):
            continue  # every site it counts is pinned
        relative = torch.relu(used / limit.asked - 1.0)
        if limit.cost in PAPER_ACTIVATION_KIB:
            total = total + activation_strength * (PAPER_ACTIVATION_KIB[limit.cost] * relative).square()
        else:
            total = total + strength * (PAPER_WEIGHT_KIB * relative).square()
    return total


def used(profile: Profile, budget: Budget, bits: Mapping[str, int]) -> dict[str, Any]:
    """Average widths and the used fraction of every limit, for the record of a run."""
    return {
        "avg_weight_bits": COSTS["weight_bits"].of(profile, bits),
        "avg_act_bits": COSTS["act_bits"].of(profile, bits),
        "used": {limit.cost: limit.used(profile, bits) / limit.asked for limit in budget.limits},
    }
