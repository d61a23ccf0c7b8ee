"""Reversed: the integer program of ``sensitivity`` with its ranking turned round. The sanity check.

What is turned round is the harm for each value of a tensor, since limits count bits of values: the program
gives most bits where one bit more for every value costs little and saves much.
A method whose result is no better than this one's has learned nothing about its network.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2
from statistics import fmean
from typing import ClassVar

from mixbits.graph.quant_graph import QuantGraph
from mixbits.search.ilp import least_harm
from mixbits.train.calibrate import calibration_images, observe_float, sensitivity
from mixbits.train.method import Learned, Method, Target
from mixbits.train.steps import Loop
from mixbits.train.task import Task


@dataclass(frozen=True)
class Reversed(Method):
    """Options of the reversed baseline."""

    epochs: int = 0  # nothing is trained, all epochs finetune
    images: int = 256  # training images, unlabelled, that the sensitivities come from

    baseline: ClassVar[bool] = True
    paper: ClassVar[str] = "the least sensitive sites get most bits: a sanity check, as in LIMPQ, 2022"

    def learn(self, graph: QuantGraph, task: Task, target: Target, loop: Loop) -> Learned:
        """Exchange sensitivities, most against least, among the weights and among the activations."""
        allowed = target.choices(graph.profile)
        images = calibration_images(task.train, self.images, loop.device)
        harm = sensitivity(graph, observe_float(graph, images), allowed)
        turned: dict[str, dict[int, float]] = {}
        for sites in (graph.profile.weights, graph.profile.activations):
            # A site's level: log2 of the harm a value, without what every bit does to it, a factor of four.
            level = {
                site.name: fmean(log2(max(value, 1e-30)) + 2 * b for b, value in harm[site.name].items())
                - log2(site.elements)
                for site in sites
            }
            ranked = sorted(sites, key=lambda site: level[site.name])
            for site, opposite in zip(ranked, reversed(ranked), strict=True):
                turned[site.name] = {
                    b: site.elements * 2.0 ** level[opposite.name] * 4.0**-b
                    for b in allowed.widths[site.name]
                }
        return Learned(graph, least_harm(graph.profile, target.budget, allowed, turned), fill=False)
