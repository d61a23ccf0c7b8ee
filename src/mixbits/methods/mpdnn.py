"""MPDNN: quantizers parametrized by step size and dynamic range; the width follows and is penalized.

Uhlich et al., "Mixed Precision DNNs: All you need is a good parametrization", ICLR 2020, arXiv 1905.11452.
``d`` is the step, ``q_max`` (``q_min``) the largest (smallest) magnitude, ``b`` the width.

Deviation: widths above 8 bits are not packable (the paper's networks have a few layers of 9 and 10 bits), and
none is wider than the widest candidate: where a range needs more, ``project_`` raises ``d``. (Cutting
``q_max`` instead lets the range collapse: the error's gradient lowers ``d`` all the time.) Power-of-two grids
keep ``q_max / q_min`` within the levels of one byte, so more than 4 bits add no level: 4 is their widest, and
a site that is pinned to more has a uniform grid.
Deviation: power-of-two networks have no learned scale of the logits, as size-constrained ones have in the
authors' code; networks that start untrained take the start from the weights' largest magnitude, not d = 1/8.
Deviation: activation ranges start from observed values (option ``activation_start="paper"`` gives the paper's
data-free start): the paper's is made for batch-normalized ReLUs and does not know signed tensors.
Deviation: the network's input is quantized like any other site unless it is pinned; the paper leaves it in
float.
Deviation: the bias of a linear layer stays float32, in the epilogue; the paper quantizes and counts it (10
values).
Deviation: after the widths are learned they are rounded to the candidates, and finetuning goes on with
learned float steps (per output channel for weights) at fixed widths, weights of 2 bits on -3, -1, 1, 3; the
paper trains one phase with power-of-two steps to the end, 2 bits on -1, 0, 1.
Deviation: widths start one bit above the widest that all could have, not always at 4: from there to 2 bits is
a long way (docs/decisions/0016; ``weight_start=4, activation_start_bits=4`` gives the paper's).
Deviation: the paper keeps the iterate that is best on the test set among those that meet the limits. A width
under a limit never settles: at its threshold the task and the penalty push the step to and fro, and the power
of two flips. Here the widths asked for are running means over about the last tenth of learning (fractions
that rounding and repair respect), and batch-norm statistics are estimated anew at the end, because the
running ones mix both sides of the flips.
Deviation: weights and activations have a lambda each, as in those of the authors' configurations that use 1.0
for activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import isnan
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mixbits.core.grid import MAX_BITS, Codebook, Grid, Uniform, level_count, uniform_range
from mixbits.core.profile import Profile, Site
from mixbits.graph.quant_graph import QuantGraph, put_
from mixbits.quant.functional import (
    ceil,
    clip_gradients,
    dot,
    made_by,
    nearest_away,
    round_half_away,
    straight_through,
)
from mixbits.quant.observe import mse_step
from mixbits.quant.quantizer import Frozen, LearnedStep, Quantizer
from mixbits.search.greedy import Choices
from mixbits.search.ilp import check_feasible
from mixbits.train.finetune import observe
from mixbits.train.method import Learned, Method, Target, usual_grid
from mixbits.train.norms import reestimate_batch_norm_
from mixbits.train.penalty import squared_excess, used
from mixbits.train.steps import Loop, Schedule
from mixbits.train.task import Batches, Task
from mixbits.train.training import Training, drive

Parametrization = Literal["u3", "u2", "u1", "p3", "p2", "p1"]

MARGIN = 1e-5  # parameters stay this far inside their bounds, where a clip would stop their gradient
SMALL = 4e-3  # or this fraction of a bound that is small itself
PAPER_START = 4  # bits
LARGEST_RATIO_EXPONENT = 6  # power-of-two levels 1 .. 64 (and their negatives) are the widest that fit int8
WIDEST_POWERS = 4  # bits of these levels
SQRT2 = 2.0**0.5
MEAN_OVER = 0.1  # share of the training steps that the running mean of a width looks back on
LEARNING_NORM_BATCHES = 30  # batches that estimate batch-norm statistics while and after widths are learned


def pow2(v: Tensor) -> Tensor:
    """The power of two nearest to ``v > 0`` on the log scale; gradient ``pow2(v) / v``."""
    return torch.exp2(round_half_away(torch.log2(v)))


class _Uniform(torch.autograd.Function):
    """:func:`uniform`; saves its arguments only, and rounds again in the backward pass."""

    @staticmethod
    def forward(  # noqa: PLR0917  autograd calls by position
        ctx: Any, x: Tensor, step: Tensor, low: Tensor, high: Tensor, signed: bool
    ) -> Tensor:
        ctx.save_for_backward(x, step, low, high)
        ctx.signed = signed
        return _rounded(x, step, low, high, signed=signed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, step, low, high = ctx.saved_tensors
        ratio = torch.clamp(x, low, high).div_(step)
        to_step = dot(grad, _nearest(ratio, signed=ctx.signed).sub_(ratio))
        to_x, to_low, to_high = clip_gradients(grad, x, low, high)
        return to_x, to_step, to_low, to_high, None


def _nearest(ratio: Tensor, *, signed: bool) -> Tensor:
    """The nearest integers, ties away from zero; two passes where nothing is negative, four elsewhere."""
    return nearest_away(ratio) if signed else (ratio + 0.5).floor_()


def _rounded(x: Tensor, step: Tensor, low: Tensor, high: Tensor, *, signed: bool) -> Tensor:
    return _nearest(torch.clamp(x, low, high).div_(step), signed=signed).mul_(step)


def uniform(x: Tensor, step: Tensor, q_max: Tensor, *, signed: bool) -> Tensor:
    """Eq. (1): ``x`` limited to ``+-q_max`` (unsigned: ``0 .. q_max``) and rounded to ``step``.

    Ties go away from zero.
    """
    arguments = x, step, -q_max if signed else torch.zeros_like(q_max), q_max
    return made_by(partial(_rounded, signed=signed), _Uniform.apply(*arguments, signed), *arguments)


def uniform_bits(step: Tensor, q_max: Tensor, *, signed: bool, least: int) -> Tensor:
    """``ceil(log2(R + 1) + signed)`` with ``R = q_max / step`` rounded, section 4; not below ``least``."""
    bits = ceil(torch.log2(round_half_away(q_max / step) + 1.0) + float(signed))
    return torch.where(bits > least, bits, torch.full_like(bits, least))


def power_of_two(x: Tensor, q_min: Tensor, q_max: Tensor, *, signed: bool) -> Tensor:
    """Eq. (4): signed powers of two from ``q_min`` to ``q_max``, nearest on the log scale.

    Signed tensors have no zero level (0 becomes ``+q_min``); unsigned ones do, below ``q_min / sqrt(2)``.
    Gradients, eqs. (5) and (6) with the sign that eq. (6) omits: to ``x`` the factor ``pow2(|x|) / |x|``
    between the two, to ``q_min`` and ``q_max`` the sign of ``x`` below and above.
    """
    if not signed:
        x = torch.relu(x)
    size = x.abs()
    sign = torch.where(x < 0, -1.0, 1.0).to(x.dtype)
    middle = (size >= q_min) & (size < q_max)
    safe = torch.where(middle, size, torch.ones_like(size))  # log2(0) would poison the gradient
    low = size < q_min if signed else (size >= q_min / SQRT2) & (size < q_min)
    zero = torch.zeros_like(size)
    return sign * (
        torch.where(middle, pow2(safe), zero)
        + torch.where(low, q_min, zero)
        + torch.where(size >= q_max, q_max, zero)
    )


def power_of_two_bits(q_min: Tensor, q_max: Tensor, *, least: int) -> Tensor:
    """``ceil(log2(log2(q_max / q_min) + 1) + 1)``: one bit for the sign, or for zero."""
    bits = ceil(torch.log2(round_half_away(torch.log2(q_max / q_min)) + 1.0) + 1.0)
    return torch.where(bits > least, bits, torch.full_like(bits, least))


def power_of_two_grid(bits: int, exponent: int, *, signed: bool) -> Codebook:
    """Levels ``2**0 .. 2**exponent`` and their negatives, or zero; thresholds at the geometric means."""
    powers = [1 << k for k in range(exponent + 1)]
    halfway = [SQRT2 * power for power in powers[:-1]]
    if signed:
        levels = [-p for p in reversed(powers)] + powers
        edges = [-e for e in reversed(halfway)] + [0.0] + halfway
    else:
        levels, edges = [0, *powers], [1 / SQRT2, *halfway]
    return Codebook(bits, tuple(levels), tuple(edges))


@dataclass(frozen=True)
class Bounds:
    """Legal ranges of the parameters, from the authors' CIFAR-10 code; the defaults are those of weights."""

    step: tuple[float, float] = (2.0**-8, 1.0)
    q_max: tuple[float, float] = (2.0**-8, 127.0)
    q_min: tuple[float, float] = (2.0**-16, 127.0)


OF_ACTIVATIONS = Bounds(q_max=(2.0**-8, 255.0), q_min=(2.0**-14, 255.0))


class LearnedWidth(Quantizer):
    """A quantizer of two learned scalars per tensor, in one of six parametrizations.

    ``u1``: (b, d); ``u2``: (b, q_max); ``u3``: (d, q_max), all uniform with a power-of-two step. ``p1``: (b,
    q_max); ``p2``: (b, q_min); ``p3``: (q_min, q_max), powers of two. ``first`` and ``second`` are the
    parameters in that order.

    Deviation: in ``u2`` the range is cut to ``(2**n - 1) * d`` where the rounded-up step would need more
    codes than the width has. The scalars' bounds widen with the start where a tensor's values lie beyond the
    paper's.
    """

    mean_bits: Tensor  # running mean of the width, kept by the method

    def __init__(
        self,
        parametrization: Parametrization,
        first: float,
        second: float,
        *,
        signed: bool,
        least_bits: int,
        most_bits: int = MAX_BITS,
        bounds: Bounds | None = None,
    ) -> None:
        """``least_bits`` .. ``most_bits``: widths that may be inferred."""
        super().__init__()
        self.parametrization, self.signed = parametrization, signed
        self.least_bits, self.most_bits = least_bits, most_bits
        limits, widths = bounds or Bounds(), (float(least_bits), float(most_bits))
        named = {
            "u1": (widths, limits.step),
            "u2": (widths, limits.q_max),
            "u3": (limits.step, limits.q_max),
            "p1": (widths, limits.q_max),
            "p2": (widths, limits.q_min),
            "p3": (limits.q_min, limits.q_max),
        }
        lows_highs = named[parametrization]
        self.bounds = tuple(
            (min(low, value / 2), max(high, value * 2)) if (low, high) != widths else (low, high)
            for (low, high), value in zip(lows_highs, (first, second), strict=True)
        )
        self.first = nn.Parameter(torch.tensor(float(first)))
        self.second = nn.Parameter(torch.tensor(float(second)))
        self.register_buffer("mean_bits", torch.tensor(float("nan")))
        self.project_()

    def ranges(self) -> tuple[Tensor, Tensor]:
        """``(d, q_max)`` of a uniform, ``(q_min, q_max)`` of a power-of-two quantizer, differentiable."""
        first = torch.clamp(self.first, *self.bounds[0])
        second = torch.clamp(self.second, *self.bounds[1])
        if self.parametrization == "u3":
            return pow2(first), second
        if self.parametrization == "p3":
            return pow2(first), pow2(second)
        # The width parameter counts magnitude bits once the sign (or zero) has taken one.
        magnitude = round_half_away(first) - float(self.signed or self.parametrization.startswith("p"))
        if self.parametrization == "u1":
            step = pow2(second)
            return step, step * (torch.exp2(magnitude) - 1.0)
        if self.parametrization == "u2":
            step = pow2(second / (torch.exp2(magnitude) - 1.0))
            whole = step * (torch.exp2(magnitude) - 1.0)
            return step, torch.where(second > whole, straight_through(second, whole), second)
        exponent = torch.clamp(torch.exp2(magnitude) - 1.0, max=float(LARGEST_RATIO_EXPONENT))
        if self.parametrization == "p1":
            return pow2(second) * torch.exp2(-exponent), pow2(second)
        return pow2(second), pow2(second) * torch.exp2(exponent)

    def quantized(self, x: Tensor) -> Tensor:
        """The quantized tensor; in bfloat16 training the rounding is still done in float32."""
        low, high = (value.to(x.dtype) for value in self.ranges())
        if self.parametrization.startswith("u"):
            return uniform(x, low, high, signed=self.signed)
        return power_of_two(x, low, high, signed=self.signed)

    def bits(self) -> Tensor:
        """The inferred width (section 4); for ``u1``, ``u2``, ``p1``, ``p2`` the rounded width parameter."""
        if self.parametrization in ("u3", "p3"):
            low, high = self.ranges()
            if self.parametrization == "u3":
                return uniform_bits(low, high, signed=self.signed, least=self.least_bits)
            return power_of_two_bits(low, high, least=self.least_bits)
        return round_half_away(torch.clamp(self.first, *self.bounds[0]))

    def freeze(self) -> Frozen:
        """The grid of the inferred width; levels beyond ``q_max`` are not in it."""
        low, high = (value.detach().double() for value in self.ranges())
        bits = int(self.bits().item())
        if self.parametrization.startswith("u"):
            level_max = max(int(round_half_away(high / low).item()), 1)
            return Frozen(uniform_range(bits, level_max, signed=self.signed), low.float())
        exponent = round(torch.log2(high / low).item())
        return Frozen(power_of_two_grid(bits, exponent, signed=self.signed), low.float())

    @torch.no_grad()
    def project_(self) -> None:
        """Keep both parameters inside their bounds, ``d <= q_max`` by swapping, and the width packable."""
        if self.parametrization in ("u3", "p3") and self.first > self.second:
            first, second = self.first.clone(), self.second.clone()
            margin = torch.clamp(second * SMALL, max=MARGIN)
            self.first.copy_(torch.minimum(first, second - margin))
            self.second.copy_(torch.maximum(first + margin, second))
        for value, (low, high) in zip((self.first, self.second), self.bounds, strict=True):
            margin = min(MARGIN, low * SMALL, (high - low) / 4)
            value.clamp_(low + margin, high - margin)
        if self.parametrization == "u3":
            whole = level_count(self.most_bits - self.signed) - 1 + 0.49  # rounds to the largest code at most
            exponent = torch.ceil(torch.log2(self.second / whole) - MARGIN)
            self.first.clamp_(min=torch.exp2(exponent - 0.5) * (1.0 + MARGIN))  # rounds up to 2**exponent
            self.first.clamp_(max=self.bounds[0][1])
            self.second.clamp_(max=pow2(self.first) * whole)
        if self.parametrization == "p3":
            exponent = min(LARGEST_RATIO_EXPONENT, level_count(self.most_bits - 1) - 1)
            self.first.clamp_(min=float(pow2(self.second)) * 2.0**-exponent)

    @torch.no_grad()
    def remember_bits_(self, share: float) -> None:
        """Move the running mean of the width towards the width by ``share`` of their distance."""
        bits = self.bits().detach()
        self.mean_bits.copy_(
            torch.where(self.mean_bits.isnan(), bits, torch.lerp(self.mean_bits, bits, share))
        )

    @torch.no_grad()
    def limit_gradients_(self, weight_decay: float) -> None:
        """Add weight decay, then clamp gradients to ``+-first`` (step or ``q_min``), as the authors' code."""
        for value in (self.first, self.second):
            if value.grad is not None:
                value.grad.add_(value, alpha=weight_decay)
                if self.parametrization in ("u3", "p3"):
                    bound = float(self.first)
                    value.grad.clamp_(-bound, bound)


def start_from_peak(peak: float, bits: int) -> tuple[float, float]:
    """The paper's ``(d, q_max)`` for weights of largest magnitude ``peak``.

    >>> start_from_peak(0.3, 4), start_from_peak(0.3, 5)
    ((0.03125, 0.21875), (0.03125, 0.46875))
    """
    magnitudes = level_count(bits - 1) - 1
    exponent = torch.log2(torch.tensor((peak + torch.finfo(torch.float32).eps) / magnitudes))
    floor_up_to = 4  # bits; wider starts round the step up
    step = 2.0 ** float(torch.floor(exponent) if bits <= floor_up_to else torch.ceil(exponent))
    return step, step * magnitudes


def as_parameters(
    parametrization: Parametrization, step: float, q_max: float, bits: int
) -> tuple[float, float]:
    """``(first, second)`` of a parametrization from a step, a range and the width they mean."""
    top = 2.0 ** round(float(torch.log2(torch.tensor(q_max))))
    bottom = top * 2.0 ** -min(level_count(bits - 1) - 1, LARGEST_RATIO_EXPONENT)
    return {
        "u1": (float(bits), step),
        "u2": (float(bits), q_max),
        "u3": (step, q_max),
        "p1": (float(bits), top),
        "p2": (float(bits), bottom),
        "p3": (bottom, top),
    }[parametrization]


@dataclass(frozen=True)
class MPDNN(Method):
    """Options of MPDNN; defaults are the paper's where it states them."""

    epochs: int = 4  # of learning widths; the paper trains 160 in one phase
    lr: float = 0.01  # initial learning rate of weights, steps and ranges
    momentum: float = 0.9
    weight_decay: float = 2e-4  # on everything, steps and ranges included
    schedule: Schedule = "cosine"  # "thirds" is the paper's
    parametrization: Parametrization = (
        "u3"  # u1 (b, d), u2 (b, q_max), u3 (d, q_max), p1, p2, p3 powers of two
    )
    strength: float = 0.1  # lambda of weight and operation limits, per (KiB above)^2 on the paper's ResNet-20
    activation_strength: float = 1.0  # lambda of activation limits, likewise
    weight_start: int = 0  # bits that weights start with; 0: one above the widest all could have, at most 4
    activation_start_bits: int = 0  # bits that activations start with; 0: likewise
    activation_start: Literal["observed", "paper"] = "observed"  # paper: d = 1/8 whatever the data

    paper: ClassVar[str] = "step size and dynamic range learned: MPDNN, Uhlich et al. 2020, arXiv 1905.11452"

    def learn(self, graph: QuantGraph, task: Task, target: Target, loop: Loop) -> Learned:
        """Train network and quantizers together under the limits as penalties, eq. (10)."""
        updates = self.epochs * len(task.train)
        training = self.begin(graph, task.train, target, updates=updates, device=loop.device)
        optimizer = torch.optim.SGD(training.groups, lr=self.lr, momentum=self.momentum)
        return drive(training, task, optimizer, loop, epochs=self.epochs, schedule=self.schedule)

    def begin(
        self, graph: QuantGraph, batches: Batches, target: Target, *, updates: int, device: torch.device
    ) -> Training[Learned]:
        """The same for any loop."""
        profile, allowed = graph.profile, self._allowed(graph.profile, target)
        self._place_(graph, batches, target, allowed, device)
        learning = {site: q for site, q in graph.quantizers.items() if isinstance(q, LearnedWidth)}
        fixed = {site: q.grid.bits for site, q in graph.quantizers.items() if isinstance(q, LearnedStep)}
        graph.module.to(device)
        remembered = 1.0 / max(MEAN_OVER * updates, 1.0)

        def widths() -> dict[str, Any]:
            return {**fixed, **{site: quantizer.bits() for site, quantizer in learning.items()}}

        @torch.no_grad()
        def rounded_widths() -> dict[str, int]:
            return {site: int(bits) for site, bits in widths().items()}

        def limit_gradients() -> None:
            for quantizer in learning.values():
                quantizer.limit_gradients_(self.weight_decay)
                quantizer.remember_bits_(remembered)

        def penalty(loss: Tensor) -> Tensor:
            strengths = {"strength": self.strength, "activation_strength": self.activation_strength}
            return squared_excess(profile, widths(), target.budget, **strengths)

        def conclude() -> Learned:
            if updates:
                reestimate_batch_norm_(graph, batches, LEARNING_NORM_BATCHES, device)
            frozen = {site: quantizer.freeze() for site, quantizer in graph.quantizers.items()}
            means = {site: float(quantizer.mean_bits) for site, quantizer in learning.items()}
            asked = {**rounded_widths(), **{site: mean for site, mean in means.items() if not isnan(mean)}}
            return Learned(graph, asked, self._grid, frozen, among=allowed)

        return Training(
            graph,
            [
                {"params": graph.network_parameters(), "weight_decay": self.weight_decay},
                {"params": [p for q in graph.quantizers.values() for p in q.parameters()]},
            ],
            conclude,
            penalty=penalty,
            on_gradients=limit_gradients,
            measure=lambda: used(profile, target.budget, rounded_widths()),
            estimate_norms=LEARNING_NORM_BATCHES,
        )

    def _allowed(self, profile: Profile, target: Target) -> Choices:
        """The target's choices; of power-of-two levels those that add any, where there is such a one."""
        allowed = target.choices(profile)
        if self.parametrization.startswith("u"):
            return allowed
        few = {
            site: tuple(bits for bits in widths if bits <= WIDEST_POWERS) or widths[:1]
            for site, widths in allowed.widths.items()
        }
        allowed = Choices(few, allowed.groups)
        check_feasible(profile, target.budget, allowed)
        return allowed

    def _grid(self, site: Site, bits: int) -> Grid:
        if self.parametrization.startswith("u") or not 1 < bits <= WIDEST_POWERS:
            return usual_grid(site, bits)
        exponent = min(level_count(bits - 1) - 1, LARGEST_RATIO_EXPONENT)
        return power_of_two_grid(bits, exponent, signed=site.signed)

    def _place_(
        self, graph: QuantGraph, batches: Batches, target: Target, choices: Choices, device: torch.device
    ) -> None:
        """A :class:`LearnedWidth` on every site, a :class:`LearnedStep` where a pin leaves one width."""
        allowed, fitting = choices.widths, target.widest_pair(graph.profile) or choices.at(lowest=True)
        activations = [site.name for site in graph.profile.activations]
        observed = observe(graph, activations, batches, device)
        placed: dict[str, Quantizer] = {}
        for site in graph.profile.sites:
            widths, weight = allowed[site.name], site.kind == "weight"
            values = (graph.weight(site.name).detach() if weight else observed[site.name]).reshape(1, -1)
            if len(widths) == 1:
                grid = self._grid(site, widths[0])
                placed[site.name] = LearnedStep(grid, mse_step(values, grid)[0], shared_by=values.numel())
                continue
            asked = self.weight_start if weight else self.activation_start_bits
            least = max(widths[0], 2 if site.signed else 1)
            bits = min(max(asked or min(fitting[site.name] + 1, PAPER_START), least), widths[-1])
            step, q_max = self._start(values, bits, weight=weight, signed=site.signed)
            placed[site.name] = LearnedWidth(
                self.parametrization,
                *as_parameters(self.parametrization, step, q_max, bits),
                signed=site.signed,
                least_bits=least,
                most_bits=widths[-1],
                bounds=Bounds() if weight else OF_ACTIVATIONS,
            )
        put_(graph, placed)

    def _start(self, values: Tensor, bits: int, *, weight: bool, signed: bool) -> tuple[float, float]:
        magnitudes = level_count(bits - signed) - 1
        if weight:
            return start_from_peak(float(values.abs().max()), bits)
        if self.activation_start == "paper":
            return 0.125, 0.125 * magnitudes
        step = float(pow2(mse_step(values, Uniform(bits, signed, "narrow" if signed else "full"))[0]))
        return step, step * magnitudes
