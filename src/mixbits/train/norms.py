"""Batch-norm statistics estimated anew at fixed weights and widths."""

from __future__ import annotations

from itertools import islice

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from mixbits.graph.quant_graph import QuantGraph
from mixbits.train.task import Batches


def reestimate_batch_norm_(graph: QuantGraph, batches: Batches, count: int, device: torch.device) -> None:
    """Replace batch norms' running statistics by means over ``count`` training batches at fixed weights."""
    norms = [m for m in graph.module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    graph.module.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    with torch.no_grad():
        for inputs, _ in islice(batches.epoch(0), count):
            graph(inputs.to(device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
