"""BMPQ: widths from an integer program that is solved again and again during one training, by bit gradients.

Kundu et al., "BMPQ: Bit-Gradient Sensitivity Driven Mixed-Precision Quantization of DNNs from Scratch", DATE
2022, arXiv 2112.13843. A weight is ``S * sum_j c_j b_j`` with ``c_j`` the weights of two's complement, so the
gradient to its bit j is ``S c_j g`` with g the gradient to the quantized weight, eq. (1) of our notes. The
absolute values of a weight's bit gradients add up to ``S (2**q - 1) |g|``: every such statistic of a layer is
a factor times the mean of |g|, and an ordinary backward pass is all that is needed.

Only the paper's abstract was at hand. What follows it: bit gradients as the sensitivity of a layer, one
training without a trained network, an integer program that sets widths anew while training, under a fixed
budget. All else is a choice of ours, and every option that states one may differ from the paper:

Deviation: the normaliser of the bit gradient. The default ``ref_q`` takes the bit gradients a layer would
have at one width for all, ``max|W| mean|g| (2**r - 1) / (2**(r-1) - 1)``. The other normalisers but ``unit``
depend on the layer's present width; a layer just narrowed then looks more sensitive, and the widths swing to
and fro.
Deviation: epochs have equally many steps, so the mean over epochs of the means over their steps is taken as
the mean over all steps since the last solution; an interval may then be a part of an epoch.
Deviation: interval, warm-up and the end of solving. The first solution comes with the first whole interval
at or after the warm-up. A training too short for one solves once, at ``freeze``.
Deviation: objective ``max -sum s 4**-q``, a site's s not multiplied by its size. With two candidates, as the
paper's 2 and 4 bits, it chooses as ``max sum s q`` does (``value="linear"``). With more the linear one fills
the budget with the widest and the narrowest: on handwritten digits, trained start, 3 bits of 2 to 8, mean of
3 seeds, 97.3 % against 98.0 % (uniform 3 bits: 98.1 %). Of equal solutions the solver takes the one that uses
least of the limits.
Deviation: the step of weights is by default a learned scalar (LSQ), set anew by squared error whenever the
width changes; ``scale="max"`` is ``max|W|`` over the largest level, which at 2 bits makes 9 of 10 normally
distributed weights zero. One bit is -1/+1 and has mean|W| for a step with ``scale="max"``.
Deviation: the gradient passes to weights beyond the largest level too, although the learned step clips them:
|g| is to be that of the quantized weight everywhere, and a clipped weight must find its way back.
Deviation: activations do not have bit gradients here. They share one width, or with
``activations="searched"`` each is a variable of the integer program, as sensitive as the layers that read
it. Their clips start from observed values. Signed tensors are clipped to ``-alpha .. alpha``.
Deviation: widths above 8 bits are not packable: first and last layers, which the paper keeps at 16 bits or
float, are pinned at 8 where a recipe says so, else they are sites like any other.
Deviation: after the widths are learned finetuning goes on with learned steps (per output channel for weights)
at fixed widths; ``lr_after`` lets it go on at the learning rate where learning ended.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mixbits.core.cost import COSTS
from mixbits.core.grid import MAX_BITS, Grid, Uniform
from mixbits.core.profile import Profile, Site
from mixbits.graph.quant_graph import QuantGraph, put_
from mixbits.quant.functional import clip, straight_through
from mixbits.quant.observe import mse_step
from mixbits.quant.quantizer import SMALLEST_STEP, Frozen, Quantizer, limit_step_
from mixbits.search.fit import fit
from mixbits.search.greedy import Choices, InfeasibleError, noise_power
from mixbits.search.ilp import least_harm
from mixbits.train.finetune import OBSERVED_BATCHES, Finetune, observe
from mixbits.train.method import Learned, Method, Target
from mixbits.train.norms import reestimate_batch_norm_
from mixbits.train.steps import Loop, Schedule
from mixbits.train.task import Batches, Task
from mixbits.train.training import Training, drive

Normalizer = Literal["ref_q", "unit", "none", "per_bit", "max_level"]
Scale = Literal["learned", "max"]


def narrow_grid(site: Site, bits: int) -> Grid:
    """Symmetric levels for a signed site (one bit: -1/+1), all codes for an unsigned one."""
    return grid_of(bits, signed=site.signed)


def grid_of(bits: int, *, signed: bool) -> Uniform:
    """The grid of :func:`narrow_grid` by sign.

    >>> grid_of(2, signed=True).levels, grid_of(1, signed=True).levels, grid_of(2, signed=False).levels
    ((-1, 0, 1), (-1, 1), (0, 1, 2, 3))
    """
    if not signed:
        return Uniform(bits, signed=False)
    return Uniform(bits, signed=True, form="narrow" if bits > 1 else "bipolar")


class SwitchedWidth(Quantizer):
    """A quantizer whose width can be set while training: width and levels are buffers, scalars.

    ``width`` in bits, ``low`` and ``high`` the levels at the ends, ``spacing`` that of neighbouring levels.
    """

    width: Tensor
    low: Tensor
    high: Tensor
    spacing: Tensor

    def __init__(self, bits: int, *, signed: bool) -> None:
        super().__init__()
        self.signed = signed
        for name in ("width", "low", "high", "spacing"):
            self.register_buffer(name, torch.zeros(()))
        self._set_levels_(bits)

    def _set_levels_(self, bits: int) -> None:
        grid = grid_of(bits, signed=self.signed)
        self.width.fill_(bits)
        self.low.fill_(grid.level_min)
        self.high.fill_(grid.level_max)
        self.spacing.fill_(grid.spacing)

    def nearest(self, ratio: Tensor) -> Tensor:
        """The level nearest to ``ratio`` (value over step), ties to even levels; no gradient."""
        ratio, shift = ratio.detach(), (self.spacing - 1.0) * self.low  # odd levels start from the lowest
        level = self.spacing * torch.round((ratio - shift) / self.spacing) + shift
        return torch.clamp(level, self.low, self.high)

    def bits(self) -> Tensor:
        """The width, a constant."""
        return self.width.clone()

    def grid(self) -> Uniform:
        """The grid of the present width."""
        return grid_of(int(self.width), signed=self.signed)


class SwitchedWeight(SwitchedWidth):
    """The weight of a layer on symmetric levels with one step, at a width that is set from outside.

    The gradient to the weight is that to the quantized weight everywhere, so that it is the g of the bit
    gradients. ``learned``: the step is a parameter with LSQ's gradient (Esser et al. 2020, eq. (3)).
    ``max``: the step is ``max|W| / high``, taken anew at each training forward, without a gradient.
    """

    step: Tensor

    def __init__(self, bits: int, weight: Tensor, *, scale: Scale) -> None:
        """``weight`` float ``[channels, ...]``: its values give the first step."""
        super().__init__(bits, signed=True)
        self.scale: Scale = scale
        if scale == "learned":
            self.step = nn.Parameter(torch.ones(()))
        else:
            self.register_buffer("step", torch.ones(()))
        self.elements = weight.numel()
        self.set_width_(bits, weight)

    @torch.no_grad()
    def set_width_(self, bits: int, weight: Tensor) -> None:
        """Go on at ``bits``, with the step that suits ``weight``."""
        self._set_levels_(bits)
        if self.scale == "learned":
            self.step.copy_(mse_step(weight.detach().reshape(1, -1).float(), self.grid())[0])
        else:
            self.step.copy_(self._full_range(weight))

    def _full_range(self, weight: Tensor) -> Tensor:
        size = weight.detach().abs()
        step = torch.where(self.spacing > 1.0, size.mean(), size.amax() / self.high)
        return step.clamp_min(SMALLEST_STEP)

    def quantized(self, x: Tensor) -> Tensor:
        """The quantized weight; in bfloat16 training the rounding is still done in float32."""
        if self.scale == "max":
            if self.training:
                self.step.copy_(self._full_range(x))
            return straight_through(x, self.nearest(x / self.step.to(x.dtype)) * self.step.to(x.dtype))
        step = self.step.to(x.dtype)
        ratio = (x / step).detach()
        level = self.nearest(ratio)
        inside = (ratio >= self.low) & (ratio <= self.high)
        to_step = torch.where(inside, level - ratio, level)
        slow = (self.elements * self.high.to(x.dtype)) ** -0.5  # LSQ section 2.2
        return straight_through(x + (step * slow) * to_step, level * step)

    def freeze(self) -> Frozen:
        """The grid of the present width and the step."""
        return Frozen(self.grid(), self.step.detach().float().clone())

    @torch.no_grad()
    def project_(self) -> None:
        """Keep the step positive."""
        self.step.clamp_min_(SMALLEST_STEP)

    def follow_(self, weight: Tensor) -> None:
        """Keep a learned step where its levels are of use."""
        if self.scale == "learned":
            limit_step_(self.step, weight, self.grid())


class Clipped(SwitchedWidth):
    """An activation clipped at a learned ``alpha`` and rounded: PACT (Choi et al. 2018, arXiv 1805.06085).

    The step is ``alpha / high``. Gradient to the input: one strictly inside the range; to ``alpha``: one at
    and above it (for signed tensors minus one at and below ``-alpha``), none from the rounding.
    """

    def __init__(self, bits: int, alpha: Tensor, *, signed: bool) -> None:
        """``alpha`` positive, a scalar: the first clip."""
        super().__init__(bits, signed=signed)
        self.alpha = nn.Parameter(alpha.detach().clone().float().reshape(()))
        self.project_()

    def set_width_(self, bits: int) -> None:
        """Go on at ``bits``, with the same clip."""
        self._set_levels_(bits)

    def _step(self) -> Tensor:
        return self.alpha.detach() / self.high

    def quantized(self, x: Tensor) -> Tensor:
        """The quantized tensor; in bfloat16 training the rounding is still done in float32."""
        alpha, step = self.alpha.to(x.dtype), self._step().to(x.dtype)
        floor = -alpha if self.signed else torch.zeros_like(alpha)
        return straight_through(clip(x, floor, alpha), self.nearest(x / step) * step)

    def freeze(self) -> Frozen:
        """The grid of the present width and the step."""
        return Frozen(self.grid(), self._step().float())

    @torch.no_grad()
    def project_(self) -> None:
        """Keep the clip positive."""
        self.alpha.clamp_min_(SMALLEST_STEP * grid_of(MAX_BITS, signed=False).level_max)


def normalized_bit_gradient(
    gradient: Tensor,
    *,
    peak: Tensor,
    step: Tensor,
    high: Tensor,
    bits: Tensor,
    normalizer: Normalizer,
    reference: int,
) -> Tensor:
    """Mean over a layer's weights of the sum of |bit gradients|, over a normaliser: eq. (2) of our notes.

    All arguments are float ``[layers]``: ``gradient`` the mean of |g|, ``peak`` the largest |W|, ``step``,
    ``high`` and ``bits`` of the present grid (high is 1 at 1 bit). ``reference`` is the width that ``ref_q``
    reckons with.
    """
    if normalizer == "unit":
        return gradient
    if normalizer == "ref_q":
        top = grid_of(reference, signed=True).level_max
        return gradient * peak * (2 * top + (reference > 1)) / top
    if normalizer == "max_level":
        return gradient * step
    # The place values of q bits of two's complement, 2**(q-1) + ... + 1, are one more than -high .. high
    # spans; the one bit of -1/+1 moves the value by two steps. The same sum is in `ref_q`.
    whole = gradient * step * (2.0 * high + (bits > 1).to(high.dtype))
    return whole / bits if normalizer == "per_bit" else whole


class Sums(nn.Module):
    """What a checkpoint keeps of the sensitivities, float64 ``[layers]``: the sum since the last solution.

    ``count`` is the number of steps in it, ``solved`` the sensitivities of the last solution.
    """

    total: Tensor
    count: Tensor
    solved: Tensor

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(layers, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("solved", torch.full((layers,), float("nan"), dtype=torch.float64))

    @torch.no_grad()
    def add_(self, values: Tensor) -> None:
        """Add one step's values; a step with any that is not finite is passed over."""
        finite = torch.isfinite(values).all()
        self.total.add_(torch.where(finite, values, 0.0))
        self.count.add_(finite)

    @torch.no_grad()
    def take_(self) -> Tensor:
        """The mean since the last call, or that of the call before where no step was finite."""
        mean = torch.where(self.count > 0, self.total / self.count, self.solved.nan_to_num(1.0))
        self.solved.copy_(mean)
        self.total.zero_()
        self.count.zero_()
        return mean


def solving_steps(total: int, *, interval: int, warmup: int, freeze: int) -> list[int]:
    """Numbers of the updates (from 1) after which widths are solved for: multiples of ``interval``.

    None before ``warmup`` or after ``freeze``; if none is left, ``freeze`` itself.

    >>> solving_steps(100, interval=20, warmup=20, freeze=70)
    [20, 40, 60]
    >>> solving_steps(10, interval=20, warmup=0, freeze=7)
    [7]
    """
    multiples = range(interval, total + 1, interval)
    return [step for step in multiples if warmup <= step <= freeze] or [max(min(freeze, total), 1)]


def one_activation_width(profile: Profile, target: Target, allowed: Choices) -> Choices:
    """The choices that are left when all activations have one width, as far as each can.

    It is the width at which the integer program, with equal sensitivities, does least harm to weights and
    activations together. Activations that share their width with a weight stay with it. Where no one width
    fits, which only a limit on latency can bring about, all choices are left.
    """
    weights = {site.name for site in profile.weights}
    free = [name for group in allowed.groups if weights.isdisjoint(group) for name in group]
    found: list[tuple[float, int, Choices]] = []
    for bits in sorted({width for site in free for width in allowed.widths[site]}):
        one = {
            site: (
                max(
                    (width for width in allowed.widths[site] if width <= bits),
                    default=allowed.widths[site][0],
                ),
            )
            for site in free
        }
        left = Choices({**allowed.widths, **one}, allowed.groups)
        try:
            solution = solve(profile, target, left, dict.fromkeys(weights, 1.0), concave=True)
        except InfeasibleError:
            continue
        harm = sum(noise_power(site, width) for site, width in solution.items())
        found.append((harm, -bits, left))
    if not found and free:
        warnings.warn(
            f"bmpq: no one width for all activations meets {target.budget}; each is searched", stacklevel=2
        )
    return min(found, key=lambda entry: entry[:2])[2] if found else allowed


@dataclass(frozen=True)
class BMPQ(Method):
    """Options of BMPQ; see above for what is known of the paper's."""

    epochs: int = 4  # of training while widths are set; the recipes' from scratch have 190
    lr: float = 0.01  # initial learning rate of weights, steps and clips
    momentum: float = 0.9
    weight_decay: float = 1e-4  # on weights
    clip_decay: float = 5e-4  # on the activations' clips, as PACT's
    schedule: Schedule = "cosine"
    interval: float = 0.5  # epochs between two solutions of the integer program
    warmup: float = 0.5  # epochs before the first one
    freeze: float = 0.75  # share of `epochs` after which widths stay
    start_bits: int = 4  # of the weights during the warm-up
    sensitivity: Literal["bit_gradient", "equal", "inverse_size"] = (
        "bit_gradient"  # equal: 1 for every layer; inverse_size: 1 / number of weights; to compare with
    )
    normalizer: Normalizer = "ref_q"  # of the bit gradient: at one width for all; see the file for the others
    layer_share: bool = False  # divide each step's bit gradients by their sum over layers
    value: Literal["concave", "linear"] = "concave"  # of a width: -4**-q, or q
    scale: Scale = "learned"  # step of the weights; max: the largest magnitude over the largest level
    activations: Literal["one_width", "searched"] = "one_width"  # or each with its readers' sensitivity
    lr_after: float = 0.0  # constant learning rate of finetuning, to go on with one schedule; 0: finetune.lr

    paper: ClassVar[str] = (
        "widths solved for during training by bit gradients: BMPQ, Kundu et al. 2022, arXiv 2112.13843"
    )

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError("bmpq.epochs must be 1 or more: sensitivities are means over training steps")
        if self.interval <= 0 or self.warmup < 0 or not 0 < self.freeze <= 1:
            raise ValueError("bmpq needs interval > 0 and warmup >= 0 (epochs), and freeze in 0 .. 1 (share)")

    def learn(self, graph: QuantGraph, task: Task, target: Target, loop: Loop) -> Learned:
        """Train, sum the bit gradients, and set all widths anew after each interval."""
        updates = self.epochs * len(task.train)
        training = self.begin(graph, task.train, target, updates=updates, device=loop.device)
        optimizer = torch.optim.SGD(training.groups, lr=self.lr, momentum=self.momentum)
        return drive(training, task, optimizer, loop, epochs=self.epochs, schedule=self.schedule)

    def begin(
        self, graph: QuantGraph, batches: Batches, target: Target, *, updates: int, device: torch.device
    ) -> Training[Learned]:
        """The same for any loop; an epoch is the ``epochs``-th part of the updates."""
        profile, allowed = graph.profile, target.choices(graph.profile)
        if self.activations == "one_width":
            allowed = one_activation_width(profile, target, allowed)
        self._place_(graph, batches, allowed, device)
        weights = {name: q for name, q in graph.quantizers.items() if isinstance(q, SwitchedWeight)}
        clips = {name: q for name, q in graph.quantizers.items() if isinstance(q, Clipped)}
        sums = Sums(len(weights)).to(device)

        def by_layer(values: Tensor) -> dict[str, float]:
            return dict(zip(weights, values.tolist(), strict=True))

        def widths() -> dict[str, int]:
            return {name: int(q.bits()) for name, q in graph.quantizers.items()}

        def measure() -> dict[str, Any]:
            bits = widths()
            return {
                "avg_weight_bits": COSTS["weight_bits"].of(profile, bits),
                "avg_act_bits": COSTS["act_bits"].of(profile, bits),
                "used": {
                    limit.cost: limit.used(profile, bits) / limit.asked for limit in target.budget.limits
                },
                "sensitivity": {} if sums.solved.isnan().any() else by_layer(sums.solved),
            }

        epoch = updates / self.epochs
        solve_after = set(
            solving_steps(
                updates,
                interval=max(round(self.interval * epoch), 1),
                warmup=round(self.warmup * epoch),
                freeze=round(self.freeze * updates),
            )
        )
        reference = max(target.weight_bits)

        def set_widths(optimizer: torch.optim.Optimizer, done: int) -> None:
            if done not in solve_after:
                return
            solution = solve(
                profile, target, allowed, by_layer(sums.take_()), concave=self.value == "concave"
            )
            for name, quantizer in weights.items():
                if solution[name] != int(quantizer.width):
                    quantizer.set_width_(solution[name], graph.weight(name))
                    for parameter in quantizer.parameters():
                        optimizer.state.pop(parameter, None)  # the momentum of another step
            for name, quantizer in clips.items():
                quantizer.set_width_(solution[name])

        def conclude() -> Learned:
            frozen = {name: quantizer.freeze() for name, quantizer in graph.quantizers.items()}
            return Learned(graph, widths(), narrow_grid, frozen, fill=False)

        return Training(
            graph,
            [
                {"params": graph.network_parameters(), "weight_decay": self.weight_decay},
                {"params": [q.alpha for q in clips.values()], "weight_decay": self.clip_decay},
                {"params": [p for q in weights.values() for p in q.parameters()]},
            ],
            conclude,
            on_gradients=lambda: sums.add_(self._sensitivities(graph, weights, reference)),
            on_update=set_widths,
            measure=measure,
            keep={"sums": sums},
        )

    def finetuning(self, options: Finetune) -> Finetune:
        """The user's options, or (``lr_after``) the learning rate at which learning ended."""
        return replace(options, lr=self.lr_after, schedule="constant") if self.lr_after else options

    @torch.no_grad()
    def _sensitivities(
        self, graph: QuantGraph, weights: Mapping[str, SwitchedWeight], reference: int
    ) -> Tensor:
        """Sensitivity of every layer from the gradients of one backward pass, float64 ``[layers]``."""
        tensors = [graph.weight(name) for name in weights]
        device = tensors[0].device
        if self.sensitivity != "bit_gradient":
            sizes = torch.tensor([w.numel() for w in tensors], dtype=torch.float64, device=device)
            return torch.ones_like(sizes) if self.sensitivity == "equal" else 1.0 / sizes
        quantizers = list(weights.values())
        found = normalized_bit_gradient(
            torch.stack([mean_magnitude(w.grad, w) for w in tensors]),
            peak=torch.stack([w.abs().amax() for w in tensors]).double(),
            step=torch.stack([q.step for q in quantizers]).double(),
            high=torch.stack([q.high for q in quantizers]).double(),
            bits=torch.stack([q.width for q in quantizers]).double(),
            normalizer=self.normalizer,
            reference=reference,
        )
        return found / found.sum() if self.layer_share else found

    def _place_(self, graph: QuantGraph, batches: Batches, allowed: Choices, device: torch.device) -> None:
        """Quantizers at the widths of the warm-up.

        Batch norms that never saw data pass values on unnormalized, and clips that fit those are of no use
        in training; so their statistics are estimated first.
        """
        graph.module.to(device)
        reestimate_batch_norm_(graph, batches, OBSERVED_BATCHES, device)
        observed = observe(graph, [site.name for site in graph.profile.activations], batches, device)
        placed: dict[str, Quantizer] = {}
        for site in graph.profile.sites:
            widths = allowed.widths[site.name]
            bits = min(max(self.start_bits, widths[0]), widths[-1])
            bits = max(width for width in widths if width <= bits)
            if site.kind == "weight":
                placed[site.name] = SwitchedWeight(bits, graph.weight(site.name), scale=self.scale)
                continue
            grid = narrow_grid(site, bits)
            alpha = mse_step(observed[site.name][None], grid)[0] * grid.level_max
            placed[site.name] = Clipped(bits, alpha, signed=site.signed)
        put_(graph, placed)


def mean_magnitude(gradient: Tensor | None, weight: Tensor) -> Tensor:
    """Mean of |g| in float64; a weight that no output depends on has none."""
    if gradient is None:
        return torch.zeros((), dtype=torch.float64, device=weight.device)
    return gradient.abs().mean(dtype=torch.float64)


def solve(
    profile: Profile,
    target: Target,
    allowed: Choices,
    sensitivity: Mapping[str, float],
    *,
    concave: bool = False,
) -> dict[str, int]:
    """Widths of largest ``sum s q`` (``concave``: ``-sum s 4**-q``) within the budget, eq. (5) of our notes.

    ``sensitivity`` is that of the weights; an activation's is the mean of those that it is multiplied with,
    or of all if a pool alone reads it.
    """
    overall = sum(sensitivity.values()) / len(sensitivity)
    read_with: dict[str, list[float]] = {}
    for op in profile.ops:
        read_with.setdefault(op.input, []).append(sensitivity[op.weight])
    harm: dict[str, dict[int, float]] = {}
    for site in profile.sites:
        met = read_with.get(site.name, [overall])
        s = sensitivity[site.name] if site.kind == "weight" else sum(met) / len(met)
        widths = allowed.widths[site.name]
        harm[site.name] = {w: s * noise_power(site.name, w) if concave else -s * w for w in widths}
    found = least_harm(profile, target.budget, allowed, harm)
    # The solver's limits hold up to a rounding error of floating-point sums; a policy's hold exactly.
    return fit(profile, found, target.budget, allowed, fill=False)
