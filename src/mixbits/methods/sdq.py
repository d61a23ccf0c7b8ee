"""SDQ: a width is drawn from two neighbours; how likely the wider one is, is learned, and decays.

Huang et al., "SDQ: Stochastic Differentiable Quantization with Mixed Precision", ICML 2022, arXiv 2206.04459.
``beta`` is the differentiable bitwidth parameter (DBP) of a layer: the probability of the wider width
``b_i``, against ``1 - beta`` for the next narrower one. When it has decayed, the layer is at ``b_{i-1}`` and
the next parameter is active. Widths never rise. Then the network is trained at its widths with a float
teacher (soft labels only) and with entropy-aware bin regularization.

The full text was not at hand, only its abstract, its figure 1 and a summary by others; the authors published
no code. What follows is ours.

Deviation: the forward pass takes one candidate (hard), the gradient to ``beta`` is that of the Gumbel-softmax
at temperature 1 (soft). ``beta`` starts at 0.95 rather than 1: near 1 the estimate's variance has no bound.
Deviation: the regularizer that pulls ``beta`` down is ours; the paper's is unknown. Each limit of the budget
pulls with the relative excess of its expected cost, at the expected widths, over an allowance that falls from
the start to the limit in the first part of learning, and not at all below it. How hard it pulls grows while
there is an excess and shrinks while there is none. A term against it counts the relative squared error that a
narrower width would add. Large layers are pulled most and so become narrow first, as the paper reports.
Deviation: the threshold of decay (unknown) is compared with a running mean of ``beta``, because a decay is
final and one batch is noisy.
Deviation: a layer whose ``beta`` is between its bounds at the end asks for a fractional width; rounding up
gives the width that it has reached, and repair narrows those of small ``beta`` first.
Deviation: weights are searched and activations have one width for all, as in the paper's results ("3.61/4"),
unless ``search_activations`` is set. By default that width is of the widest pair (weights, activations) of
single widths in the budget. First and last layers are searched like any other.
Deviation: weights are on DoReFa's bipolar grid with learned steps (LSQ); at 8 bits, where its levels do not
fit a byte, on the full one. The normalization by entropy is the option ``weights="entropy"``, in effect while
training at the learned widths; before that its scale would jump at a decay. In short runs at 2 bits learned
steps did better on ResNet-20 (87.0 against 84.2 %; the full grid 80.9 %) and as well on digits
(docs/decisions/0004-sdq-unknowns.md).
Deviation: the bins' regularizer sums over layers, takes the unbiased variance, and the values as they are,
not clipped (the paper's choices are unknown). With a step per channel it measures values from their level, in
units of the layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mixbits.core.budget import Budget
from mixbits.core.grid import MAX_BITS, Grid, Uniform, level_count
from mixbits.core.profile import Profile, Site
from mixbits.graph.quant_graph import QuantGraph, put_
from mixbits.quant.functional import (
    fake_quantize,
    level_tensor,
    nearest_level,
    quantize_uniform,
    scale_gradient,
    straight_through,
)
from mixbits.quant.observe import mse_step
from mixbits.quant.quantizer import SMALLEST_STEP, Frozen, LearnedStep, Quantizer, limit_step_
from mixbits.search.greedy import Choices, InfeasibleError
from mixbits.search.ilp import check_feasible
from mixbits.train.finetune import Finetune, observe
from mixbits.train.method import Learned, Method, Target
from mixbits.train.norms import reestimate_batch_norm_
from mixbits.train.penalty import used
from mixbits.train.steps import Loop, Schedule
from mixbits.train.task import Batches, Task
from mixbits.train.training import Training, drive

LEAST_BETA = 1e-3  # beta stays this far above 0, where its logarithm ends
MEAN_OVER = 0.01  # share of the training steps that the running mean of beta looks back on
SETTLED = 0.8  # share of the training steps after which the allowances have come down to the limits
DOUBLING = 0.05  # share of the training steps in which a pull doubles while its limit is exceeded
LEARNING_NORM_BATCHES = 30  # batches that estimate batch-norm statistics while and after widths are learned


def soft_choice(beta: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Gumbel-softmax weight of the first of two choices, of probabilities ``beta`` and ``1 - beta``.

    ``noise`` is the difference ``g_0 - g_1`` of two Gumbel variables, which is a logistic one. The weight is
    above one half with probability ``beta`` exactly.

    >>> soft_choice(torch.tensor(0.7), torch.tensor(0.0), 1.0)
    tensor(0.7000)
    """
    beta = torch.clamp(beta, LEAST_BETA, 1.0 - LEAST_BETA)
    return torch.sigmoid((torch.log(beta) - torch.log1p(-beta) + noise) / temperature)


def _row(table: Tensor, place: Tensor) -> Tensor:
    """``table[place]`` for a scalar tensor, without reading the scalar: that would wait for the device."""
    return table.index_select(0, place.reshape(1)).squeeze(0)


class DBP(nn.Module):
    """The width of a layer, or of tied tensors, on its way down the candidates.

    ``widths`` are the candidates, rising; ``active`` is the place of ``b_i`` among them and ``beta`` its
    probability; ``mean`` is the running mean of ``beta``, ``noise`` the draw of the step. ``errors`` are the
    relative squared errors of the candidates, summed over the tensors.
    """

    active: Tensor
    mean: Tensor
    noise: Tensor
    errors: Tensor
    table: Tensor

    def __init__(
        self, widths: Sequence[int], errors: Sequence[float] | Tensor, *, start: float, temperature: float
    ) -> None:
        """``start``: value of every ``beta`` when it becomes active, and its upper bound."""
        super().__init__()
        self.widths, self.start, self.temperature = tuple(widths), start, temperature
        self.beta = nn.Parameter(torch.tensor(float(start)))
        self.register_buffer("active", torch.tensor(len(self.widths) - 1))
        self.register_buffer("mean", torch.tensor(float(start)))
        self.register_buffer("noise", torch.tensor(0.0))
        self.register_buffer("errors", torch.as_tensor(errors, dtype=torch.float32).clone())
        self.register_buffer("table", torch.tensor(self.widths, dtype=torch.float32))

    @property
    def narrower(self) -> Tensor:
        """Place of ``b_{i-1}``; of ``b_i`` if there is nothing narrower."""
        return (self.active - 1).clamp_min(0)

    def choice(self) -> Tensor:
        """One where ``b_i`` is drawn, else zero; the gradient is that of the soft choice."""
        soft = soft_choice(self.beta, self.noise, self.temperature)
        return straight_through(soft, (soft > 0.5).to(soft.dtype))

    def bits(self) -> Tensor:
        """``b_i``."""
        return _row(self.table, self.active)

    def expected_bits(self) -> Tensor:
        """``b_{i-1} + beta * (b_i - b_{i-1})``, differentiable; ``b_i`` if there is nothing narrower."""
        low = _row(self.table, self.narrower)
        return low + self.beta * (self.bits() - low)

    def added_error(self) -> Tensor:
        """What the narrower width adds to the relative squared error, times its probability."""
        return (1.0 - self.beta) * (_row(self.errors, self.narrower) - _row(self.errors, self.active))

    @torch.no_grad()
    def draw_(self, uniform: Tensor) -> None:
        """Set the step's noise from a uniform draw in (0, 1); the narrowest width is never given up."""
        noise = torch.logit(uniform.to(self.noise), eps=1e-6)
        self.noise.copy_(torch.where(self.active > 0, noise, torch.full_like(noise, float("inf"))))

    @torch.no_grad()
    def decay_(self, threshold: float, share: float) -> Tensor:
        """Move the mean towards ``beta`` by ``share``; below ``threshold`` take the narrower width.

        Returns whether it did, a boolean scalar on the device.
        """
        self.mean.lerp_(self.beta, share)
        falls = (self.mean < threshold) & (self.active > 0)
        self.active.sub_(falls.to(self.active.dtype))
        for value in (self.beta, self.mean):
            value.copy_(torch.where(falls, torch.full_like(value, self.start), value))
        return falls

    @torch.no_grad()
    def project_(self) -> None:
        """Keep ``beta`` a probability, at most where it starts."""
        self.beta.clamp_(LEAST_BETA, self.start)


class StochasticWidth(Quantizer):
    """A tensor on the grid of ``b_i`` or ``b_{i-1}`` as its :class:`DBP` has drawn; in ``eval()`` of ``b_i``.

    ``steps`` is ``[candidates]`` or ``[candidates, channels, 1, ...]``, learned as :class:`LearnedStep` does.
    The gradient to ``beta`` is ``<G, Q_hi(x) - Q_lo(x)>`` times that of the choice.
    """

    levels: Tensor
    gradient_scale: Tensor

    def __init__(self, dbp: DBP, grids: Sequence[Uniform], steps: Tensor, *, shared_by: int) -> None:
        """``grids``: one for each candidate of ``dbp``; ``shared_by``: how many values share one step."""
        super().__init__()
        self.dbp, self.grids = dbp, tuple(grids)
        self.steps = nn.Parameter(steps.detach().clone().float().clamp_min(SMALLEST_STEP))
        self.register_buffer("levels", torch.stack([level_tensor(grid) for grid in grids]))
        scales = [(shared_by * max(grid.level_max, 1)) ** -0.5 for grid in grids]
        self.register_buffer("gradient_scale", torch.tensor(scales))

    def _quantized(self, x: Tensor, place: Tensor) -> Tensor:
        """``fake_quantize`` at the candidate of that place, without a branch on it."""
        step = scale_gradient(_row(self.steps, place), _row(self.gradient_scale, place))
        return quantize_uniform(x, step, _row(self.levels, place))

    def quantized(self, x: Tensor) -> Tensor:
        """The quantized tensor; in bfloat16 training the rounding is still done in float32."""
        if not self.training:
            return self._quantized(x, self.dbp.active)
        choice, wide, narrow = self.dbp.choice(), self.dbp.active, self.dbp.narrower
        chosen = choice.detach()
        taken = torch.where(chosen > 0.5, wide, narrow)
        drawn = self._quantized(x, taken)
        with torch.no_grad():  # only beta learns from what was not drawn
            difference = drawn - self._quantized(x, wide + narrow - taken)
        return drawn + (choice - chosen) * (2.0 * chosen - 1.0) * difference

    def bits(self) -> Tensor:
        """``b_i``, without a gradient; what ``beta`` expects is ``dbp.expected_bits()``."""
        return self.dbp.bits()

    def freeze(self) -> Frozen:
        """Grid and steps of ``b_i``."""
        place = int(self.dbp.active)
        step = self.steps[place].detach().float()
        return Frozen(self.grids[place], step.flatten() if step.dim() else step.clone())

    @torch.no_grad()
    def project_(self) -> None:
        """Keep steps positive and ``beta`` a probability."""
        self.steps.clamp_min_(SMALLEST_STEP)
        self.dbp.project_()

    def follow_(self, weight: Tensor) -> None:
        """Keep steps where their levels are of use."""
        for step, grid in zip(self.steps.detach(), self.grids, strict=True):
            limit_step_(step, weight, grid)


class EntropyStep(Quantizer):
    """Weights on a bipolar grid with the step ``mean|w| / 2**(b - 1)``: no parameter, the weights decide.

    That is DoReFa's grid on weights normalized to the mean magnitude ``2**(b - 1) / (2**b - 1)``: of weights
    that are uniform around zero every level gets as many. One step for the tensor; its gradient goes to the
    weights. ``step`` is that of the last pass in training, which is the one used in ``eval()``.
    """

    step: Tensor

    def __init__(self, grid: Grid, step: float) -> None:
        """``step``: in effect before the first pass in training."""
        super().__init__()
        self.grid = grid
        self.register_buffer("step", torch.tensor(max(step, SMALLEST_STEP)))

    def quantized(self, x: Tensor) -> Tensor:
        """The quantized weights, normalized anew while training."""
        if not self.training:
            return fake_quantize(x, self.step, self.grid)
        step = entropy_step(x, self.grid.bits)
        self.step.copy_(step.detach())
        return fake_quantize(x, step, self.grid)

    def bits(self) -> Tensor:
        """The grid's width, a constant."""
        return torch.tensor(float(self.grid.bits), device=self.step.device)

    def freeze(self) -> Frozen:
        """The grid and the step of the last pass in training."""
        return Frozen(self.grid, self.step.clone())

    def project_(self) -> None:
        """Nothing to project."""


def entropy_step(w: Tensor, bits: int) -> Tensor:
    """The bipolar grid's step at which ``w / (step * level_max)`` is normalized by entropy.

    >>> entropy_step(torch.tensor([-1.0, 0.5, 1.5]), bits=2)
    tensor(0.5000)
    """
    return (w.abs().mean() / (level_count(bits) // 2)).clamp_min(SMALLEST_STEP)


def bins(values: Tensor, codes: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """How many values have each of ``count`` codes, their mean and unbiased variance, float ``[count]``.

    Empty bins have mean 0, bins of one value variance 0. Differentiable in ``values``.
    """
    values, codes = values.flatten(), codes.flatten()
    empty = values.new_zeros(count)
    sizes = empty.index_add(0, codes, torch.ones_like(values))
    means = empty.index_add(0, codes, values) / sizes.clamp_min(1.0)
    squares = empty.index_add(0, codes, (values - means[codes]).square())
    return sizes, means, squares / (sizes - 1.0).clamp_min(1.0)


def bin_regularization(w: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """Eq. (10): over all bins, squared distance of the values' mean from the level, plus their variance.

    ``w`` float ``[*]``; ``step`` broadcasts against it and gets no gradient. Values are measured from their
    level, which changes neither term while there is one step, and in units of the (mean) largest level: a
    channel of small weights has a small step of its own, but no larger a share for that.
    """
    step = step.detach()
    levels = torch.tensor(grid.levels, dtype=torch.float32, device=w.device)
    level = nearest_level(w.detach() / step, grid)
    unit = step.mean() * float(max(grid.level_max, -grid.level_min))
    codes = torch.searchsorted(levels, level.reshape(-1))
    _, means, variances = bins((w - level * step) / unit, codes, len(levels))
    return (means.square() + variances).sum()


class _Pull:
    """The pull of every limit on the widths, the draws, and how far learning is: the state of the search."""

    def __init__(
        self, budget: Budget, start: Sequence[float], strength: float, device: torch.device, seed: int
    ) -> None:
        """``start``: what each limit's cost is at the start; ``strength``: the least that a limit pulls."""
        self.budget, self.start, self.least = budget, start, strength
        self.strengths = torch.full((len(start),), strength, device=device)
        self.excess = torch.zeros(len(start), device=device)
        self.progress = 0.0
        # Seeded by the run's random numbers, so that a run's seed is the only one.
        self.generator = torch.Generator().manual_seed(seed)

    def penalty(self, profile: Profile, bits: Mapping[str, Any]) -> Tensor:
        """``sum_j strength_j * max(0, used_j / allowed_j - 1)``."""
        excess = []
        for limit, start in zip(self.budget.limits, self.start, strict=True):
            waiting = max(0.0, 1.0 - self.progress / SETTLED)
            allowed = limit.asked + max(start - limit.asked, 0.0) * waiting
            used = torch.as_tensor(limit.used(profile, bits), dtype=torch.float32)
            excess.append(torch.relu(used.to(self.strengths.device) / allowed - 1.0))
        stacked = torch.stack(excess)
        self.excess = stacked.detach()
        return (self.strengths * stacked).sum()

    def adapt_(self, progress: float, factor: float) -> None:
        """After a step: multiply the strengths where a limit is exceeded, divide them where it is not."""
        changed = torch.where(self.excess > 0, self.strengths * factor, self.strengths / factor)
        self.strengths = changed.clamp_min(self.least)
        self.progress = progress

    def state_dict(self) -> dict[str, Any]:
        """Strengths, progress and the generator's state."""
        return {
            "strengths": self.strengths,
            "progress": self.progress,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Put a state back."""
        self.strengths = state_dict["strengths"].to(self.strengths.device)
        self.progress = state_dict["progress"]
        self.generator.set_state(state_dict["generator"])


@dataclass(frozen=True)
class SDQ(Method):
    """Options of SDQ; the paper's training recipe is unknown."""

    epochs: int = 4  # of learning widths
    lr: float = 0.01  # initial learning rate of weights and steps
    momentum: float = 0.9  # of weights, steps and betas
    weight_decay: float = 1e-4  # on weights; steps and betas are not decayed
    schedule: Schedule = "cosine"
    beta_travel: float = 200.0  # way of a beta over all of learning under a gradient of 1
    beta_start: float = 0.95  # probability of the wider width when a DBP becomes active
    beta_threshold: float = 0.1  # probability of the wider width below which it is given up
    temperature: float = 1.0  # of the Gumbel-softmax
    strength: float = 1.0  # least pull of a limit: loss for a cost of twice its allowance
    error_strength: float = 4.0  # loss for a relative squared error of 1, which holds against the pull
    search_activations: bool = False  # learn widths of activations too
    activation_bits: int = 0  # of all activations, if not searched; 0 chooses from the budget
    weights: Literal["entropy", "bipolar", "full"] = "bipolar"  # grid of weights
    bin_strength: float = 0.1  # lambda_E of the bins' regularization while finetuning; 0 leaves it out
    distill: bool = True  # finetune on the float network's outputs only, at temperature 1

    paper: ClassVar[str] = (
        "widths drawn from two neighbours, decaying: SDQ, Huang et al. 2022, arXiv 2206.04459"
    )

    def learn(self, graph: QuantGraph, task: Task, target: Target, loop: Loop) -> Learned:
        """Phase 1: train weights, steps and active DBPs together; decay what falls below the threshold."""
        updates = self.epochs * len(task.train)
        training = self.begin(graph, task.train, target, updates=updates, device=loop.device)
        optimizer = torch.optim.SGD(training.groups, lr=self.lr, momentum=self.momentum)
        return drive(training, task, optimizer, loop, epochs=self.epochs, schedule=self.schedule)

    def begin(
        self, graph: QuantGraph, batches: Batches, target: Target, *, updates: int, device: torch.device
    ) -> Training[Learned]:
        """The same for any loop; the betas have an optimizer of their own."""
        profile, allowed = graph.profile, self._allowed(graph.profile, target)
        seed = int(torch.randint(1 << 31, ()))  # before a DataLoader is read, which seeds torch anew
        dbps = self._place_(graph, batches, allowed, device)
        graph.module.to(device)
        searched = list(dict.fromkeys(dbps.values()))
        betas = {id(dbp.beta) for dbp in searched}
        rest = [p for q in graph.quantizers.values() for p in q.parameters() if id(p) not in betas]
        total = max(updates, 1)
        decay = torch.optim.SGD(
            [{"params": [dbp.beta for dbp in searched]}],
            lr=self.beta_travel * (1.0 - self.momentum) / total,
            momentum=self.momentum,
        )
        fixed = {site: widths[0] for site, widths in allowed.widths.items() if site not in dbps}

        @torch.no_grad()
        def reached() -> dict[str, int]:
            return {**fixed, **{site: int(dbp.bits()) for site, dbp in dbps.items()}}

        def penalty(loss: Tensor) -> Tensor:
            expected = {dbp: dbp.expected_bits() for dbp in searched}
            bits = {**fixed, **{site: expected[dbp] for site, dbp in dbps.items()}}
            against = sum((dbp.added_error() for dbp in searched), torch.zeros((), device=device))
            return pull.penalty(profile, bits) + self.error_strength * against

        def draw() -> None:
            for dbp, uniform in zip(
                searched, torch.rand(len(searched), generator=pull.generator), strict=True
            ):
                dbp.draw_(uniform)

        def move_betas() -> None:
            decay.step()
            decay.zero_grad()  # no other optimizer moves them

        def decay_betas(optimizer: torch.optim.Optimizer, done: int) -> None:
            for dbp in searched:
                falls = dbp.decay_(self.beta_threshold, share=min(1.0 / (MEAN_OVER * total), 1.0))
                velocity = decay.state[dbp.beta].get("momentum_buffer")
                if velocity is not None:
                    velocity.mul_(~falls)
            pull.adapt_(done / total, 2.0 ** (1.0 / (DOUBLING * total)))
            draw()

        def conclude() -> Learned:
            if updates:
                reestimate_batch_norm_(graph, batches, LEARNING_NORM_BATCHES, device)
            frozen = {site: quantizer.freeze() for site, quantizer in graph.quantizers.items()}
            asked = {**fixed, **{site: dbp.expected_bits().item() for site, dbp in dbps.items()}}
            return Learned(graph, asked, self._grid, frozen, among=allowed)

        begun = reached()
        start = [float(limit.used(profile, begun)) for limit in target.budget.limits]
        pull = _Pull(target.budget, start, self.strength, device, seed)
        draw()
        return Training(
            graph,
            [
                {"params": graph.network_parameters(), "weight_decay": self.weight_decay},
                {"params": rest},
            ],
            conclude,
            penalty=penalty,
            on_gradients=move_betas,
            on_update=decay_betas,
            measure=lambda: used(profile, target.budget, reached()),
            estimate_norms=LEARNING_NORM_BATCHES,
            keep={"decay": decay, "pull": pull},
        )

    def finetuning(self, options: Finetune) -> Finetune:
        """Phase 2 learns from the teacher alone; the divergence's gradient is that of soft cross entropy."""
        return replace(options, distill=1.0, temperature=1.0) if self.distill else options

    def quantizer(self, site: Site, grid: Grid, step: Tensor, shared_by: int) -> Quantizer:
        """Bipolar weights by entropy if asked for; anything else has a learned step."""
        bipolar = isinstance(grid, Uniform) and grid.form == "bipolar"
        if self.weights == "entropy" and site.kind == "weight" and bipolar:
            return EntropyStep(grid, float(step.mean()))
        return LearnedStep(grid, step, shared_by=shared_by)

    def extra_loss(self, student: QuantGraph) -> Callable[[], Tensor] | None:
        """``lambda_E`` times the bins' regularization, summed over all weights."""
        if not self.bin_strength:
            return None
        weights = [
            (student.weight(site.name), student.quantizers[site.name]) for site in student.profile.weights
        ]

        def regularization() -> Tensor:
            total = torch.zeros((), device=weights[0][0].device)
            for weight, quantizer in weights:
                frozen = quantizer.freeze()
                step = (
                    frozen.step.reshape(-1, *[1] * (weight.dim() - 1)) if frozen.step.dim() else frozen.step
                )
                total = total + bin_regularization(weight, step, frozen.grid)
            return self.bin_strength * total

        return regularization

    def _grid(self, site: Site, bits: int) -> Uniform:
        """Bipolar for weights where its levels fit a byte (8 bits: -255 .. 255), else full."""
        wanted = site.kind == "weight" and self.weights != "full" and bits < MAX_BITS
        return Uniform(bits, site.signed, "bipolar" if site.signed and (wanted or bits == 1) else "full")

    def _allowed(self, profile: Profile, target: Target) -> Choices:
        """The target's choices, with one width for all activations that are not searched.

        Activations tied to a weight are searched with it. A site that may not have that width has the next
        narrower one it may have, or else its narrowest. Where no one width fits, which only a limit on
        latency can bring about, activations are searched.
        """
        allowed = target.choices(profile)
        weights = {site.name for site in profile.weights}
        stated = [
            name
            for group in allowed.groups
            if not self.search_activations and not weights.intersection(group)
            for name in group
        ]

        def at(widths: tuple[int, ...], bits: int) -> int:
            return max((width for width in widths if width <= bits), default=widths[0])

        def narrowed(bits: int) -> Choices:
            one = {site: (at(allowed.widths[site], bits),) for site in stated}
            return Choices({**allowed.widths, **one}, allowed.groups)

        def feasible(bits: int) -> bool:
            try:
                check_feasible(profile, target.budget, narrowed(bits))
            except InfeasibleError:
                return False
            return True

        if self.activation_bits:
            if not feasible(self.activation_bits):
                raise InfeasibleError(
                    f"activation_bits={self.activation_bits} does not fit {target.budget} at any widths of "
                    "the weights; ask for fewer, or leave it 0 to choose from the budget"
                )
            return narrowed(self.activation_bits)
        fitting = []
        for weight, activation in product(set(target.weight_bits), set(target.activation_bits)):
            chosen = narrowed(activation)
            bits = {site: at(widths, weight) for site, widths in chosen.widths.items()}
            if target.budget.fits(profile, bits):
                fitting.append((min(weight, activation), activation))
        if fitting:
            return narrowed(max(fitting)[1])
        widest = max((bits for bits in set(target.activation_bits) if feasible(bits)), default=None)
        if widest is None:
            warnings.warn(
                f"sdq: no one width for all activations meets {target.budget}; each is searched", stacklevel=2
            )
        return allowed if widest is None else narrowed(widest)

    def _place_(
        self, graph: QuantGraph, batches: Batches, allowed: Choices, device: torch.device
    ) -> dict[str, DBP]:
        """Put a :class:`StochasticWidth` where there is a choice, else a :class:`LearnedStep`.

        Returns the DBP of every site that has one.
        """
        profile = graph.profile
        observed = observe(graph, [site.name for site in profile.activations], batches, device)
        placed: dict[str, Quantizer] = {}
        dbps: dict[str, DBP] = {}
        for group in allowed.groups:
            widths = allowed.widths[group[0]]
            dbp = DBP(widths, [0.0] * len(widths), start=self.beta_start, temperature=self.temperature)
            for name in group:
                site = profile.site(name)
                weight = site.kind == "weight"
                values = graph.weight(name).detach().flatten(1) if weight else observed[name].reshape(1, -1)
                grids = [self._grid(site, bits) for bits in widths]
                rows = torch.stack([mse_step(values, grid) for grid in grids])  # [candidates, rows]
                shared = values.shape[1] if weight else site.elements
                shape = [-1, *[1] * (len(site.shape) - 1)] if weight else []
                if len(widths) == 1:
                    placed[name] = LearnedStep(grids[0], rows[0].reshape(shape), shared_by=shared)
                    continue
                dbp.errors += torch.tensor(
                    [
                        relative_error(values, row[:, None], grid)
                        for row, grid in zip(rows, grids, strict=True)
                    ]
                )
                dbps[name] = dbp
                placed[name] = StochasticWidth(
                    dbp, grids, rows.reshape(len(widths), *shape), shared_by=shared
                )
        put_(graph, placed)
        return dbps


def relative_error(values: Tensor, step: Tensor, grid: Grid) -> float:
    """``||Q(x) - x||**2 / ||x||**2``; 0 for values that are all 0."""
    error = (step * nearest_level(values / step, grid) - values).square().sum()
    return float(error / values.square().sum().clamp_min(SMALLEST_STEP))
