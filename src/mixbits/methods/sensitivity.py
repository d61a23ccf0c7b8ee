"""Sensitivity: the widths that change the outputs least, by an integer program, without training.

After HAWQ-V2 (Dong et al. 2020, arXiv 1911.03852), which scores a width by mean Hessian eigenvalue times
squared quantization error, and Fisher variants of it.

Deviation: the curvature is that of the squared change of the outputs (Gauss-Newton), one scalar a channel of
a layer, not one a layer; the error is that of the layer's output after compensated rounding, not that of its
weights; activations are scored too; labels are not needed.
Deviation: HAWQ-V2 picks among policies on a Pareto front; here, as in HAWQ-V3, an integer program decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mixbits.graph.quant_graph import QuantGraph
from mixbits.search.ilp import least_harm
from mixbits.train.calibrate import calibration_images, observe_float, sensitivity
from mixbits.train.method import Learned, Method, Target
from mixbits.train.steps import Loop
from mixbits.train.task import Task


@dataclass(frozen=True)
class Sensitivity(Method):
    """Options of the sensitivity baseline."""

    epochs: int = 0  # nothing is trained, all epochs finetune
    images: int = 256  # training images, unlabelled, that the sensitivities come from

    paper: ClassVar[str] = (
        "curvature x rounding error, integer program: HAWQ-V2, Dong et al. 2020, arXiv 1911.03852"
    )

    def learn(self, graph: QuantGraph, task: Task, target: Target, loop: Loop) -> Learned:
        """Score every site at every width, then choose exactly."""
        allowed = target.choices(graph.profile)
        images = calibration_images(task.train, self.images, loop.device)
        harm = sensitivity(graph, observe_float(graph, images), allowed)
        return Learned(graph, least_harm(graph.profile, target.budget, allowed, harm), fill=False)
