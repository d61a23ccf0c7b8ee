"""The program of a network whose widths are still to be found: for its instructions and their times."""

from __future__ import annotations

import torch

from mixbits.core.grid import MAX_BITS, Uniform
from mixbits.core.program import Program
from mixbits.graph.quant_graph import QuantGraph, put_
from mixbits.lower.lower import lower
from mixbits.quant.quantizer import LearnedStep

ANY_STEP = 0.05


def lower_untrained(graph: QuantGraph, *, bits: int = MAX_BITS) -> Program:
    """A network without quantizers, at one width and any steps: its values mean nothing."""
    network = graph.copy()
    put_(
        network,
        {
            site.name: LearnedStep(Uniform(bits, site.signed), torch.tensor(ANY_STEP), shared_by=1)
            for site in graph.profile.sites
        },
    )
    network.module.eval()
    return lower(network)
