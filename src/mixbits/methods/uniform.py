"""Uniform: the widest one width for weights and one for activations that fit the budget. The baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mixbits.graph.quant_graph import QuantGraph
from mixbits.search.greedy import InfeasibleError
from mixbits.train.method import Learned, Method, Target
from mixbits.train.steps import Loop
from mixbits.train.task import Task


@dataclass(frozen=True)
class UniformBits(Method):
    """The same width everywhere but for pins, trained by finetuning: LSQ (Esser et al. 2020)."""

    epochs: int = 0  # nothing is learned, all epochs finetune

    paper: ClassVar[str] = (
        "the same width everywhere, learned steps: LSQ, Esser et al. 2020, arXiv 1902.08153"
    )
    baseline: ClassVar[bool] = True

    def learn(self, graph: QuantGraph, task: Task, target: Target, loop: Loop) -> Learned:
        """The widths of :meth:`~mixbits.train.method.Target.widest_pair`."""
        bits = target.widest_pair(graph.profile)
        if bits is None:
            raise InfeasibleError(
                f"no single width for all weights and one for all activations meets {target.budget}; "
                "ask for more, or allow narrower candidates"
            )
        return Learned(graph, bits, fill=False)
