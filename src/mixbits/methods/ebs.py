"""EBS: every candidate width quantizes one meta weight; learned strengths mix the results.

Li et al., "Efficient Bitwidth Search for Practical Mixed Precision Neural Network", 2020, arXiv 2003.07577. A
layer's weight and its input are each quantized to every candidate; the results are summed with the softmax of
learned strengths, one set for weights and one for activations, and one convolution reads the two sums.
Weights learn on one half of the training data, strengths on the other, under a hinge on the expected cost.
The width of the largest strength is kept, and the network is trained again at these widths.

``N`` candidates of ``b_i`` bits and ``n_i`` = largest code; ``p`` the softmax; ``a`` the clip.

Only the paper's abstract and figure 1 were at hand. They give: meta weights, softmax and sum on both sides,
one convolution, the largest strength, retraining. What follows is not known to be the paper's.

Deviation: DoReFa weights (arXiv 1606.06160, section 2.5) lie in -1 .. 1, which loses the scale of a trained
network. Here they are multiplied by a learned range, the parameters start as those values whose transform is
the trained weight (limited to the range), and ``tanh`` takes the weight over the range where the range is
above one. After learning the transformed weights are written back.
Deviation: the largest ``|tanh w|`` has no gradient (DoReFa's code lets it through; it concerns one weight).
Deviation: one bit is -1/+1 times the range, as the formula says, not DoReFa's mean magnitude, so that all
candidates share one range. Their magnitudes differ all the same, and where no batch norm follows, the
strengths can reward the scale: on digits the last layer leant to 1 bit, whose larger logits had less loss.
Deviation: first and last layers are searched like any other; pin them to leave them out, as the recipe does.
Deviation: activations are PACT (arXiv 1805.06085) with one clip for all candidates and the gradient of the
rounding error inside the clip; signed tensors are clipped on both sides and take the grid of the weights.
Ranges and clips start at the least squared error of the mixture, and their gradient is divided by the square
root of the number of values that share them.
Deviation: a pinned site has one candidate. Tied sites share their strengths, so for a tied layer the product
of two expected widths is below the expected product.
Deviation: the hinge is on the expected cost relative to the limit, for every limit of the budget; the cost of
the largest strengths may be another, so ``learn`` repairs widths and spends what is left.
Deviation: strengths start equal and learn with Adam without weight decay (momenta as DARTS has them). The
sampled form ("gumbel") is soft, with a temperature that falls exponentially from 5 to 0.1.
Deviation: in a loop of the user's, updates of weights and of strengths alternate, and which samples are whose
is that loop's loader's business (``AlternateHalves`` keeps halves apart).
Deviation: training at the learned widths stays on bipolar grids for signed tensors. On digits (4-bit
activations, 3 seeds) bipolar, full and narrow grids had 98.5, 98.1 and 97.5 % at 2 bit, 98.4 % each at 3 bit,
98.7, 98.6 and 98.4 % at 4 bit.
Deviation: training at the learned widths starts from the meta weights. Its steps are learned, a channel for
weights, and start at the least squared error of the final width, for a clip learned for all candidates suits
none (on digits at 2 to 3 bit +0.2 % over the learned clips, mean of 7 pairs of runs, within their noise).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mixbits.core.budget import Budget
from mixbits.core.grid import Uniform
from mixbits.core.profile import Profile
from mixbits.graph.quant_graph import QuantGraph, put_
from mixbits.quant.functional import dot, scale_gradient, single
from mixbits.quant.quantizer import SMALLEST_STEP, Frozen, LearnedStep, Quantizer
from mixbits.train.finetune import observe
from mixbits.train.method import Learned, Method, Target
from mixbits.train.norms import reestimate_batch_norm_
from mixbits.train.penalty import used
from mixbits.train.steps import DivergedError, Loop, Schedule, steps
from mixbits.train.task import Batches, Task, TwoHalves
from mixbits.train.training import Training

RANGES_TRIED = 48  # fractions of the largest magnitude, as for the steps of other methods
START_VALUES = 65536  # values of one tensor that its start range is chosen from
STRENGTH_BETAS = (0.5, 0.999)  # of Adam, as in DARTS
LEARNING_NORM_BATCHES = 30  # batches that estimate batch-norm statistics for the widths of largest strength


class _Mix(torch.autograd.Function):
    """``sum_i p_i X_i``; backward quantizes ``x`` again, so that only ``x`` is kept, however many widths."""

    @staticmethod
    def forward(  # noqa: PLR0917  torch gives positions
        ctx: Any, x: Tensor, clip: Tensor, shares: Tensor, top_codes: Tensor, signed: bool
    ) -> Tensor:
        ctx.save_for_backward(x, clip, shares, top_codes)
        ctx.signed = signed
        unit = _unit(x, clip, signed=signed)
        mixed = torch.zeros_like(unit)
        for top, share in zip(top_codes.unbind(), (shares / top_codes).unbind(), strict=True):
            mixed.addcmul_(torch.mul(unit, top).round_(), share)
        return mixed.mul_(2.0).sub_(1.0).mul_(clip) if signed else mixed.mul_(clip)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        (grad,) = grads
        x, clip, shares, top_codes = ctx.saved_tensors
        unit = _unit(x, clip, signed=ctx.signed)
        products = torch.stack(  # <grad, X_i>, in codes
            [dot(grad, torch.mul(unit, top).round_()) for top in top_codes.unbind()]
        )
        products = products / top_codes
        if ctx.signed:
            products = 2.0 * products - grad.sum()
        products = products * clip
        low = -clip if ctx.signed else torch.zeros_like(clip)
        inside = grad * ((x >= low) & (x <= clip))
        of_x = dot(inside, x.to(inside.dtype))
        return inside.to(x.dtype), ((shares * products).sum() - of_x) / clip, products, None, None


def _unit(x: Tensor, clip: Tensor, *, signed: bool) -> Tensor:
    """``x`` limited to ``+-clip`` (unsigned: ``0 .. clip``) and mapped to 0 .. 1, at least float32."""
    ratio = single(x) / clip
    return (ratio.mul_(0.5).add_(0.5) if signed else ratio).clamp_(0.0, 1.0)


def mix(x: Tensor, clip: Tensor, shares: Tensor, top_codes: Tensor, *, signed: bool) -> Tensor:
    """``sum_i shares_i X_i``: ``x`` limited to ``0 .. clip`` and rounded to ``top_codes_i`` equal steps.

    ``x`` float ``[*]``, ``clip`` positive ``[]``, ``shares`` and ``top_codes`` ``[N]``. With ``n_i`` the top
    codes, ``X_i = clip * round(n_i x / clip) / n_i``. Gradients: to ``x`` one inside; to ``clip`` the mixture
    over clip, less ``x / clip`` inside (PACT's with the rounding error); to ``shares_i`` the sum of ``X_i``.
    Signed ``X_i`` are ``clip * (2 round(n_i (x / clip + 1) / 2) / n_i - 1)``, DoReFa's.

    >>> x, clip, shares = torch.tensor([-1.0, 0.2, 0.4, 3.0]), torch.tensor(1.0), torch.tensor([0.5, 0.5])
    >>> mix(x, clip, shares, torch.tensor([1.0, 3.0]), signed=False)
    tensor([0.0000, 0.1667, 0.1667, 1.0000])
    """
    mixed = _Mix.apply(x, clip, shares, top_codes, signed)
    assert isinstance(mixed, Tensor)
    return mixed


def dorefa(w: Tensor, divisor: Tensor | float = 1.0) -> Tensor:
    """``tanh(w / divisor)`` over its largest magnitude, which has no gradient: in -1 .. 1.

    DoReFa's weights in 0 .. 1 are half of it plus one half.

    >>> (dorefa(torch.tensor([-0.9, 0.05, 1.2])) / 2 + 0.5).tolist()
    [0.0703..., 0.5299..., 1.0]
    """
    squashed = torch.tanh(w / divisor)
    return squashed / squashed.detach().abs().amax().clamp_min(SMALLEST_STEP)


def gumbel_like(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Independent samples ``-log(-log(u))``, ``u`` uniform in 0 .. 1, from torch's random numbers."""
    return -torch.empty(x.shape).exponential_(generator=generator).log().to(x)


class Strengths(nn.Module):
    """Learned strengths ``[N]`` of the candidate widths of one site, or of sites that share one width."""

    bits: Tensor  # [N], rising
    top_codes: Tensor  # [N], the largest code of each width
    noise: Tensor  # [N], added to the strengths; zero but for sampling
    temperature: Tensor  # [], of the softmax

    def __init__(self, candidates: Sequence[int]) -> None:
        super().__init__()
        tops = [Uniform(bits, signed=False).level_max for bits in candidates]
        self.register_buffer("bits", torch.tensor([float(bits) for bits in candidates]))
        self.register_buffer("top_codes", torch.tensor([float(top) for top in tops]))
        self.register_buffer("noise", torch.zeros(len(tops)))
        self.register_buffer("temperature", torch.ones(()))
        self.value = nn.Parameter(torch.zeros(len(tops)))

    def shares(self) -> Tensor:
        """What each candidate contributes to the sum."""
        return torch.softmax((self.value + self.noise) / self.temperature, 0)

    def expected_bits(self) -> Tensor:
        """``sum_i p_i b_i``, without noise."""
        return (torch.softmax(self.value, 0) * self.bits).sum()

    def best(self) -> Tensor:
        """The place of the largest strength."""
        return self.value.argmax()

    @torch.no_grad()
    def draw_(self, temperature: float, generator: torch.Generator | None = None) -> None:
        """New noise for a sampled sum at this temperature."""
        self.noise.copy_(gumbel_like(self.value, generator))
        self.temperature.fill_(temperature)


class Mixture(Quantizer):
    """A tensor at every candidate width, summed; in ``eval()`` at the width of the largest strength.

    Signed tensors are on bipolar grids (odd multiples of ``clip / n``), others on ``0 .. n`` of ``clip / n``.
    """

    def __init__(
        self, strengths: Strengths, clip: Tensor | float, *, signed: bool, shared_by: int = 1
    ) -> None:
        """``shared_by``: values (of one sample) that share the clip; its gradient is divided by the root."""
        super().__init__()
        self.strengths, self.signed, self.gradient_scale = strengths, signed, shared_by**-0.5
        self.clip = nn.Parameter(torch.as_tensor(clip).detach().clone().float())
        self.project_()

    def learning_clip(self) -> Tensor:
        """The clip with its scaled gradient."""
        return scale_gradient(self.clip, self.gradient_scale)

    def quantized(self, x: Tensor) -> Tensor:
        """The mixture of ``x``."""
        return self.at_clip(x, self.learning_clip())

    def at_clip(self, x: Tensor, clip: Tensor) -> Tensor:
        """The mixture of ``x`` at a clip; rounding is done in float32 at least."""
        if self.training:
            return mix(x, clip, self.strengths.shares(), self.strengths.top_codes, signed=self.signed)
        top = self.strengths.top_codes[self.strengths.best()]
        step = clip / top
        if self.signed:
            return step * torch.clamp(2 * torch.round((x / step + top) / 2) - top, -top, top)
        return step * torch.clamp(torch.round(x / step), min=torch.zeros_like(top), max=top)

    def bits(self) -> Tensor:
        """The expected width while learning, that of the largest strength in ``eval()``."""
        if self.training:
            return self.strengths.expected_bits()
        return self.strengths.bits[self.strengths.best()]

    def freeze(self) -> Frozen:
        """The grid of the largest strength."""
        place = int(self.strengths.best())
        grid = bipolar_grid(int(self.strengths.bits[place]), signed=self.signed)
        return Frozen(grid, (self.clip / self.strengths.top_codes[place]).detach().float())

    @torch.no_grad()
    def project_(self) -> None:
        """Keep the clip positive."""
        self.clip.clamp_min_(SMALLEST_STEP * float(self.strengths.top_codes[-1]))


class MetaWeight(Quantizer):
    """The mixture of a meta weight: DoReFa's transform, times the range that is the mixture's clip."""

    divisor: Tensor  # [], of the weight under tanh

    def __init__(self, mixture: Mixture) -> None:
        super().__init__()
        self.mixture = mixture
        self.register_buffer("divisor", mixture.clip.detach().clamp_min(1.0))

    def quantized(self, x: Tensor) -> Tensor:
        """The mixture of the transformed weight."""
        clip = self.mixture.learning_clip()
        return self.mixture.at_clip(clip * dorefa(x.to(clip.dtype), self.divisor), clip)

    @torch.no_grad()
    def meta_of(self, weight: Tensor) -> Tensor:
        """The meta weight whose transform is ``weight``, limited to the range."""
        clip, divisor = self.mixture.clip, self.divisor
        return divisor * torch.atanh(torch.tanh(clip / divisor) * torch.clamp(weight / clip, -1.0, 1.0))

    @torch.no_grad()
    def weight_of(self, meta: Tensor) -> Tensor:
        """The transformed weight, before rounding."""
        return self.mixture.clip * dorefa(meta, self.divisor)

    def bits(self) -> Tensor:
        """The mixture's width."""
        return self.mixture.bits()

    def freeze(self) -> Frozen:
        """The mixture's grid."""
        return self.mixture.freeze()

    def project_(self) -> None:
        """Keep the range positive."""
        self.mixture.project_()


def bipolar_grid(bits: int, *, signed: bool) -> Uniform:
    """The grid of EBS's quantizers: DoReFa's for signed tensors."""
    return Uniform(bits, signed, "bipolar" if signed else "full")


@torch.no_grad()
def start_clip(values: Tensor, candidates: Sequence[int], *, signed: bool) -> Tensor:
    """The clip ``[]`` of least squared error of the equal mixture of all candidates; ``values`` ``[n]``."""
    values = values[:: max(values.numel() // START_VALUES, 1)]
    top_codes = Strengths(candidates).top_codes.to(values)
    shares = torch.full_like(top_codes, 1 / len(top_codes))
    top = values.abs().amax().clamp_min(SMALLEST_STEP * float(top_codes[-1]))
    clips = top * torch.arange(RANGES_TRIED, 0, -1, device=values.device) / RANGES_TRIED
    errors = [(mix(values, clip, shares, top_codes, signed=signed) - values).square().sum() for clip in clips]
    return clips[torch.stack(errors).argmin()]


def expected_excess(profile: Profile, bits: Mapping[str, Any], budget: Budget) -> Tensor:
    """``sum_j max(0, E[used_j] / asked_j - 1)`` over the limits of a budget; ``bits`` are expected widths.

    A product of an expected weight width and an expected activation width is the expected product, because
    the two are chosen independently; so operations and sums of bytes are exact expectations. The others are
    costs at the expected widths: latency and Bit Fusion's, interpolated between known widths, and the largest
    activation and the activation peak, whose expectation is no less.
    """
    total = torch.zeros((), device=next((b.device for b in bits.values() if isinstance(b, Tensor)), None))
    for limit in budget.limits:
        cost = limit.used(profile, bits)
        if isinstance(cost, Tensor):  # else nothing that it counts can change
            total = total + torch.relu(cost / limit.asked - 1.0)
    return total


@dataclass(frozen=True)
class EBS(Method):
    """Options of EBS; the paper's values are not known but for the softmax and its one convolution."""

    epochs: int = 4  # of learning widths: each reads half of the data for weights, half for strengths
    lr: float = 0.01  # initial learning rate of weights, ranges and clips
    momentum: float = 0.9
    weight_decay: float = 1e-4  # on weights
    schedule: Schedule = "cosine"  # of lr
    mixing: Literal["softmax", "gumbel"] = "softmax"  # EBS-Det, EBS-Sto
    strength_lr: float = 0.1  # of Adam, constant
    strength: float = 1.0  # lambda: loss per relative excess of an expected cost over its limit
    first_temperature: float = 5.0  # of "gumbel"
    last_temperature: float = 0.1  # of "gumbel", reached exponentially

    paper: ClassVar[str] = "strengths of all widths of one meta weight: EBS, Li et al. 2020, arXiv 2003.07577"

    def learn(self, graph: QuantGraph, task: Task, target: Target, loop: Loop) -> Learned:
        """Weights on one half of the training data, strengths on the other, in turns."""
        data, processes = TwoHalves(task.train), loop.processes
        updates = self.epochs * len(data)
        learning = self._start(graph, task.train, target, updates, loop.device)
        optimizer = torch.optim.SGD(learning.weights, lr=self.lr, momentum=self.momentum)
        forward = torch.compile(graph.module, dynamic=False) if loop.compile else graph.module
        for step in steps(
            graph,
            replace(task, train=data),
            optimizer,
            loop,
            epochs=self.epochs,
            schedule=self.schedule,
            measure=learning.measure,
            estimate_norms=LEARNING_NORM_BATCHES,
            keep={"strengths": learning},
        ):
            learning.draw_(step.progress)
            inputs, targets = (part.to(loop.device) for part in processes.part(data.other))
            with torch.autocast(loop.device.type, torch.bfloat16, enabled=loop.bf16):
                outputs = forward(inputs).float()
            share = processes.share(inputs, data.other)
            value = task.loss(outputs, targets) * share + learning.penalty()
            if not torch.isfinite(value):
                raise DivergedError(
                    "ebs: the loss on the strengths' half of the data became infinite or not a number; lower "
                    "--ebs.lr or --ebs.strength-lr, or look for such values in the data"
                )
            grads = torch.autograd.grad(value, learning.strengths)
            processes.average_(grads)
            for strength, grad in zip(learning.strengths, grads, strict=True):
                strength.grad = grad
            learning.optimizer.step()
            learning.draw_(step.progress)
        return learning.conclude()

    def begin(
        self, graph: QuantGraph, batches: Batches, target: Target, *, updates: int, device: torch.device
    ) -> Training[Learned]:
        """The same for any loop, whose updates are in turns one of weights and one of strengths.

        Which data are whose is up to the loop: see :class:`~mixbits.train.task.AlternateHalves`.
        """
        learning = self._start(graph, batches, target, updates, device)
        rest = [p for group in learning.weights for p in group["params"]]

        def step_strengths() -> None:
            if learning.of_strengths:
                learning.optimizer.step()
            for parameter in [*learning.strengths, *(rest if learning.of_strengths else [])]:
                parameter.grad = None  # what has none is left alone by the loop's optimizer

        def pass_on(optimizer: torch.optim.Optimizer, done: int) -> None:
            learning.of_strengths = not learning.of_strengths
            learning.draw_(min(-(-done // 2) / -(-updates // 2), 1.0))

        return Training(
            graph,
            learning.weights,
            learning.conclude,
            penalty=lambda loss: learning.penalty(),
            on_gradients=step_strengths,
            on_update=pass_on,
            measure=learning.measure,
            keep={"strengths": learning},
            estimate_norms=LEARNING_NORM_BATCHES,
        )

    def _start(
        self, graph: QuantGraph, batches: Batches, target: Target, updates: int, device: torch.device
    ) -> _Learning:
        """Mixtures on every site, equal strengths."""
        seed = int(torch.randint(1 << 31, ()))  # before a DataLoader is read, which seeds torch anew
        mixtures = self._place_(graph, batches, target, device)
        graph.module.to(device)
        return _Learning(self, graph, batches, target.budget, mixtures, updates, device, seed)

    def _place_(
        self, graph: QuantGraph, batches: Batches, target: Target, device: torch.device
    ) -> dict[str, Mixture]:
        """A mixture on every site; weights become meta weights. Returns the mixtures by site."""
        allowed = target.choices(graph.profile)
        activations = [site.name for site in graph.profile.activations]
        observed = observe(graph, activations, batches, device)
        shared = {}
        for group in allowed.groups:
            shared |= dict.fromkeys(group, Strengths(allowed.widths[group[0]]))
        mixtures: dict[str, Mixture] = {}
        placed: dict[str, Quantizer] = {}
        for site in graph.profile.sites:
            widths = allowed.widths[site.name]
            weight = graph.weight(site.name).detach() if site.kind == "weight" else None
            values = observed[site.name] if weight is None else weight.flatten()
            clip = start_clip(values, widths, signed=site.signed)
            mixture = Mixture(shared[site.name], clip.cpu(), signed=site.signed, shared_by=site.elements)
            placed[site.name] = mixtures[site.name] = mixture
            if weight is not None:
                meta = MetaWeight(mixture)
                weight.copy_(meta.to(weight.device).meta_of(weight))
                placed[site.name] = meta
        put_(graph, placed)
        return mixtures


class _Learning:
    """Mixtures while they learn: their strengths, what moves these, and what all of it comes to."""

    of_strengths = False  # the turn, where updates are in turns

    def __init__(  # noqa: PLR0917  one caller
        self,
        method: EBS,
        graph: QuantGraph,
        batches: Batches,
        budget: Budget,
        mixtures: Mapping[str, Mixture],
        updates: int,
        device: torch.device,
        seed: int,
    ) -> None:
        self._method, self._graph, self._batches, self._budget = method, graph, batches, budget
        self._mixtures, self._updates, self._device = mixtures, updates, device
        self._groups = list(dict.fromkeys(mixture.strengths for mixture in mixtures.values()))
        self.strengths = [group.value for group in self._groups]
        self.optimizer = torch.optim.Adam(self.strengths, lr=method.strength_lr, betas=STRENGTH_BETAS)
        self.weights: list[dict[str, Any]] = [
            {"params": graph.network_parameters(), "weight_decay": method.weight_decay},
            {"params": [mixture.clip for mixture in mixtures.values()]},
        ]
        # Seeded by the run's random numbers, so that a run's seed is the only one.
        self._generator = torch.Generator().manual_seed(seed)
        self.draw_(0.0)

    def draw_(self, progress: float) -> None:
        """New noise for sampled sums."""
        if self._method.mixing == "gumbel":
            first, last = self._method.first_temperature, self._method.last_temperature
            for group in self._groups:
                group.draw_(first * (last / first) ** progress, self._generator)

    def penalty(self) -> Tensor:
        """The hinge on expected costs."""
        return self._method.strength * expected_excess(self._graph.profile, self._expected(), self._budget)

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        """Fields of the metrics: costs of the largest strengths, and expected fractions of the limits."""
        profile, expected = self._graph.profile, self._expected()
        fractions = {
            limit.cost: float(limit.used(profile, expected)) / limit.asked for limit in self._budget.limits
        }
        return {**used(profile, self._budget, self._best()), "expected": fractions}

    def state_dict(self) -> dict[str, Any]:
        """Whose turn it is, the state of the strengths' optimizer and of the noise."""
        return {
            "of_strengths": self.of_strengths,
            "optimizer": self.optimizer.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Put a state back."""
        self.of_strengths = state_dict["of_strengths"]
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self._generator.set_state(state_dict["generator"])

    def conclude(self) -> Learned:
        """Transformed weights in place of meta weights; on every site the width of the largest strength."""
        graph, bits = self._graph, self._best()
        settled: dict[str, Quantizer] = {}
        for site, quantizer in graph.quantizers.items():
            frozen = quantizer.freeze()
            if isinstance(quantizer, MetaWeight):
                weight = graph.weight(site).detach()
                weight.copy_(quantizer.weight_of(weight))
            settled[site] = LearnedStep(frozen.grid, frozen.step, shared_by=1).to(frozen.step.device)
        put_(graph, settled)
        if self._updates:
            reestimate_batch_norm_(graph, self._batches, LEARNING_NORM_BATCHES, self._device)
        return Learned(graph, bits, lambda site, bits: bipolar_grid(bits, signed=site.signed))

    def _best(self) -> dict[str, int]:
        return {
            site: int(mixture.strengths.bits[mixture.strengths.best()])
            for site, mixture in self._mixtures.items()
        }

    def _expected(self) -> dict[str, Tensor]:
        return {site: mixture.strengths.expected_bits() for site, mixture in self._mixtures.items()}
