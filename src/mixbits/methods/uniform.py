"""Uniform: the widest one width for weights and one for activations that fit the budget. The baseline."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
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
        """The pair of widths that fits with the largest smaller width, then the largest sum."""
        profile, allowed = graph.profile, target.choices(graph.profile)
        fitting = []
        for weight, activation in product(
            sorted(set(target.weight_bits)), sorted(set(target.activation_bits))
        ):
            wish = {site.name: weight if site.kind == "weight" else activation for site in profile.sites}
            bits = {
                site: widths[0] if len(widths) == 1 else wish[site] for site, widths in allowed.widths.items()
            }
            if target.budget.fits(profile, bits):
                fitting.append(((min(weight, activation), weight + activation, weight), bits))
        if not fitting:
            raise InfeasibleError(
                f"no single width for all weights and one for all activations meets {target.budget}; "
                "ask for more, or allow narrower candidates"
            )
        return Learned(graph, max(fitting, key=lambda entry: entry[0])[1], fill=False)
