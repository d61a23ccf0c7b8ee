"""Random: uniformly drawn widths, brought to the budget like those of every method. A baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mixbits.graph.quant_graph import QuantGraph
from mixbits.train.method import Learned, Method, Target
from mixbits.train.steps import Loop
from mixbits.train.task import Task


@dataclass(frozen=True)
class RandomBits(Method):
    """An allowed width for every site (or group of tied sites), each as likely.

    Draws from torch's generator, so that the run's seed decides. The common code repairs and fills.
    """

    epochs: int = 0  # nothing is learned, all epochs finetune

    baseline: ClassVar[bool] = True
    paper: ClassVar[str] = "widths drawn at random within the budget; a baseline, from no paper"

    def learn(self, graph: QuantGraph, task: Task, target: Target, loop: Loop) -> Learned:
        """One draw; the common code narrows and widens it into the budget."""
        allowed = target.choices(graph.profile)
        bits: dict[str, float] = {}
        for group in allowed.groups:
            widths = allowed.widths[group[0]]
            drawn = widths[int(torch.randint(len(widths), ()))]
            bits.update(dict.fromkeys(group, drawn))
        return Learned(graph, bits)
