"""Method: the interface of everything that learns widths, and what is promised for all of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor

from mixbits.core.budget import Budget
from mixbits.core.grid import Grid, Uniform
from mixbits.core.policy import Policy
from mixbits.core.profile import Profile, Site
from mixbits.graph.capture import refuse_wrapped
from mixbits.graph.quant_graph import QuantGraph
from mixbits.quant.quantizer import Frozen, LearnedStep, Quantizer
from mixbits.search.fit import fit
from mixbits.search.greedy import Choices, choices, noise_power
from mixbits.search.ilp import check_feasible
from mixbits.train.finetune import Finetune
from mixbits.train.randomness import own_random_states
from mixbits.train.steps import PLAIN_LOOP, Loop
from mixbits.train.task import Batches, Inputs, Task, batches_of
from mixbits.train.training import Training

ROUNDING_SLACK = 1e-6  # a learned width of 3.0000001 bits, a rounding error, is 3 bits


@dataclass(frozen=True)
class Target:
    """What must come out: limits, allowed widths, sites that share a width, sites whose width is given."""

    budget: Budget
    weight_bits: Sequence[int] = (2, 3, 4, 5, 6, 7, 8)
    activation_bits: Sequence[int] = (2, 3, 4, 5, 6, 7, 8)
    ties: Sequence[Sequence[str]] = ()
    pins: Mapping[str, int] = field(default_factory=dict)

    def choices(self, profile: Profile) -> Choices:
        """Allowed widths of every site; raises ``ValueError`` for unknown sites or a budget out of reach."""
        for bits in (*self.weight_bits, *self.activation_bits, *self.pins.values()):
            Uniform(bits, signed=False)  # raises for a width that does not exist
        allowed = choices(profile, self.weight_bits, self.activation_bits, ties=self.ties, pins=self.pins)
        check_feasible(profile, self.budget, allowed)
        return allowed

    def widest_pair(self, profile: Profile) -> dict[str, int] | None:
        """Every site's bits at the widest pair of a weight and an activation width that fits, if one does.

        Widest is the largest smaller width, then the largest sum, then the larger weight width. A site that
        cannot have its width takes the next narrower one that it can, or its narrowest; activations tied to
        a weight have its width. Raises as :meth:`choices`.
        """
        allowed = self.choices(profile)
        weights = {site.name for site in profile.weights}
        tied = {name for group in allowed.groups if weights.intersection(group) for name in group}
        widest, largest = None, (0, 0, 0)
        for weight, activation in product(set(self.weight_bits), set(self.activation_bits)):
            rank = (min(weight, activation), weight + activation, weight)
            wish = {site: weight if site in tied else activation for site in allowed.widths}
            bits = {
                site: max((width for width in widths if width <= wish[site]), default=widths[0])
                for site, widths in allowed.widths.items()
            }
            if rank > largest and self.budget.fits(profile, bits):
                widest, largest = bits, rank
        return widest


def full_grid(site: Site, bits: int) -> Uniform:
    """The uniform grid that uses all codes; one bit of a signed tensor is -1/+1."""
    return Uniform(bits, site.signed, "bipolar" if site.signed and bits == 1 else "full")


def usual_grid(site: Site, bits: int) -> Uniform:
    """The grid of a width where a method has none of its own: :func:`full_grid` but for weights of 2 bits.

    Those are on -3, -1, 1, 3, which fit them better than -2, -1, 0, 1 (docs/decisions/0004).
    """
    odd = site.signed and site.kind == "weight" and bits == 2
    return Uniform(bits, True, "bipolar") if odd else full_grid(site, bits)


@dataclass(frozen=True)
class Learned:
    """What a method returns: widths as it learned them, and the network it learned them with.

    ``bits`` may be fractional or beyond the candidates: ``learn`` rounds up and repairs. ``grid_of(site,
    bits)`` is the kind of grid the method wants at the final width. ``frozen`` are its learned steps, a start
    for finetuning. ``among`` are the choices that repair and filling keep to, the target's if it is None.
    """

    graph: QuantGraph
    bits: Mapping[str, float]
    grid_of: Callable[[Site, int], Grid] = usual_grid
    frozen: Mapping[str, Frozen] = field(default_factory=dict)
    fill: bool = True  # spend what is left of the budget on wider sites
    among: Choices | None = None


class Method(ABC):
    """A way to learn widths: a concrete one is a dataclass in its own file, whose fields are its options."""

    paper: ClassVar[str]  # one line for `mixbits methods`
    baseline: ClassVar[bool] = False  # what the others must beat: always part of `mixbits compare`
    epochs: int  # of training that `learn` uses; the rest of a run's epochs finetunes

    @abstractmethod
    def learn(self, graph: QuantGraph, task: Task, target: Target, loop: Loop) -> Learned:
        """Learn widths on ``graph``, which the method may change; it is a copy."""

    def begin(
        self, graph: QuantGraph, batches: Batches, target: Target, *, updates: int, device: torch.device
    ) -> Training[Learned]:
        """Learning on ``graph`` as an object that any loop can drive for ``updates`` updates.

        Raises ``ValueError`` for methods that train nothing or that are not written for it.
        """
        name = type(self).__name__
        raise ValueError(
            f"{name} cannot learn in another loop: it has no training to be driven. Learn with "
            "mixbits.learn, and train at its policy in your loop with mixbits.begin_finetuning"
        )

    def finetuning(self, options: Finetune) -> Finetune:
        """The options of training at the learned widths, where the paper asks for others than the user's."""
        return options

    def quantizer(self, site: Site, grid: Grid, step: Tensor, shared_by: int) -> Quantizer:
        """What stands on a site while training at the learned widths; its grid must stay ``grid``."""
        return LearnedStep(grid, step, shared_by=shared_by)

    def extra_loss(self, student: QuantGraph) -> Callable[[], Tensor] | None:
        """A term that the paper adds to the loss while training at the learned widths."""
        return None


def learn(
    method: Method, graph: QuantGraph, task: Task, target: Target, loop: Loop = PLAIN_LOOP
) -> tuple[Policy, Learned]:
    """Run a method and turn what it learned into a policy that covers every site and fits the budget exactly.

    Raises ``InfeasibleError`` before any training if no choice of candidates can fit.
    """
    target.choices(graph.profile)
    return policy_of(method.learn(graph.copy(), task, target, loop), graph.profile, target)


def begin_learning(
    method: Method,
    graph: QuantGraph,
    inputs: Inputs,
    target: Target,
    *,
    updates: int,
    device: str | torch.device = "cpu",
) -> Training[tuple[Policy, Learned]]:
    """Learning of widths for a loop of the user's; its result is that of :func:`learn`.

    ``inputs`` are training inputs, float ``[n, ...]`` in one tensor, or a ``DataLoader`` of
    ``(inputs, targets)``, from which starts are chosen. ``updates`` is how often the optimizer will step: the
    method's epochs, and limits that come down over them, are parts of it. ``device`` is where the loop
    trains. Learning rate, momentum and schedule are the loop's, not the method's; ``groups`` have the
    method's weight decay.

    Raises ``ValueError`` for methods that need a loop of their own, and ``InfeasibleError`` before training
    if no choice of candidates can fit.
    """
    if updates < 1:
        raise ValueError(f"updates={updates}: say how often the optimizer will step while widths are learned")
    refuse_wrapped(graph.module)
    target.choices(graph.profile)
    with own_random_states():
        learning = method.begin(
            graph.copy(), batches_of(inputs), target, updates=updates, device=torch.device(device)
        )

    def conclude() -> tuple[Policy, Learned]:
        with own_random_states():
            return policy_of(learning.conclude(), graph.profile, target)

    training: Any = replace(
        learning,
        conclude=conclude,
        identity={"method": str(method), "target": str(target), "updates": updates},
        planned=updates,
    )
    training.attach_()
    return training


def policy_of(learned: Learned, profile: Profile, target: Target) -> tuple[Policy, Learned]:
    """What a method learned, as a policy that covers every site and fits the budget exactly."""
    missing = [site.name for site in profile.sites if site.name not in learned.bits]
    if missing:
        raise ValueError(f"the method gave no width to {', '.join(missing[:3])}")
    wished = {site: math.ceil(bits - ROUNDING_SLACK) for site, bits in learned.bits.items()}
    bits = fit(
        profile,
        wished,
        target.budget,
        learned.among or target.choices(profile),
        damage=lambda site, width: noise_power(site, width) / noise_power(site, learned.bits[site]),
        fill=learned.fill,
    )
    policy = Policy({site.name: learned.grid_of(site, bits[site.name]) for site in profile.sites})
    policy.check(profile)
    return policy, learned
