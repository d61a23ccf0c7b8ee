"""SDQ against numbers computed apart from it, and the behaviour that its rules promise (Huang et al., arXiv 2206.04459)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixbits.core.budget import parse_budget
from mixbits.core.cost import COSTS
from mixbits.core.grid import Codebook, Grid, Uniform
from mixbits.core.policy import Policy, policy_from_json
from mixbits.core.profile import Profile, Site
from mixbits.graph.quant_graph import QuantGraph, capture, put_
from mixbits.methods.sdq import (
    DBP,
    SDQ,
    EntropyStep,
    StochasticWidth,
    _Pull,
    bin_regularization,
    bins,
    entropy_step,
    soft_choice,
)
from mixbits.quant.quantizer import LearnedStep
from mixbits.search.greedy import InfeasibleError
from mixbits.train.checkpoint import Checkpoint
from mixbits.train.finetune import Finetune, finetune, place_policy, restore_policy, settle_
from mixbits.train.method import Learned, Target, learn
from mixbits.train.steps import Loop
from mixbits.train.task import Task, make_task

# Reference numbers are printed with six or seven digits after the point.
PRINTED = 2e-6
# Standard deviations of a frequency: one run in 16,000 is farther off, and the seeds are fixed.
SIGMAS = 4

# DoReFa weights, 2 * tanh(w) / (2 max |tanh w|), of w = -.9, -.3, .05, .4, 1.2, on grids of levels k / (2^b - 1).
NORMALIZED = 2 * torch.tensor([0.070387, 0.325280, 0.529963, 0.727882, 1.0]) - 1
Q2 = torch.tensor([-1, -1 / 3, 1 / 3, 1 / 3, 1])
Q3 = torch.tensor([-1, -0.428571, 0.142857, 0.428571, 1])
GRADIENT = torch.tensor([0.2, -0.1, 0.4, 0.3, -0.5])


def bipolar(bits: int) -> Uniform:
    return Uniform(bits, signed=True, form="bipolar")


def dbp_of(widths=(2, 3), *, start: float = 0.7, temperature: float = 1.0) -> DBP:
    return DBP(widths, [0.0] * len(widths), start=start, temperature=temperature)


def dorefa(temperature: float = 1.0) -> StochasticWidth:
    dbp = dbp_of(temperature=temperature)
    return StochasticWidth(dbp, [bipolar(2), bipolar(3)], torch.tensor([1 / 3, 1 / 7]), shared_by=1)


# --- the stochastic quantizer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("noise", "expected"),
    [(-5.0, Q2), (-1.3, Q2), (-0.8, Q3), (5.0, Q3)],  # log(.7 / .3) is 0.847
    ids=["narrower", "just narrower", "just wider", "wider"],
)
def test_a_draw_takes_one_of_the_two_grids(noise, expected):
    quantizer = dorefa()
    quantizer.dbp.noise.fill_(noise)

    torch.testing.assert_close(quantizer(NORMALIZED), expected, atol=PRINTED, rtol=0)


def test_mean_and_variance_of_the_draws_are_those_of_a_bernoulli_variable():
    quantizer, outputs = dorefa(), []
    for noise in (5.0, -5.0):
        quantizer.dbp.noise.fill_(noise)
        outputs.append(quantizer(NORMALIZED).detach())
    mean = 0.7 * outputs[0] + 0.3 * outputs[1]
    variance = 0.7 * (outputs[0] - mean).square() + 0.3 * (outputs[1] - mean).square()

    torch.testing.assert_close(mean, torch.tensor([-1, -0.4, 0.2, 0.4, 1]), atol=PRINTED, rtol=0)
    torch.testing.assert_close(
        variance, torch.tensor([0, 0.001905, 0.007619, 0.001905, 0]), atol=PRINTED, rtol=0
    )
    assert float(GRADIENT @ (outputs[0] - outputs[1])) == pytest.approx(-0.038095, abs=PRINTED)


@pytest.mark.parametrize(
    ("temperature", "weight", "slope", "gradient"),
    [
        (1.0, 0.388719, 1.131507, -0.043105),
        (0.5, 0.287941, 1.952677, -0.074388),
        (0.1, 0.010697, 0.503940, -0.019198),
    ],
)
def test_the_gradient_of_beta_is_that_of_the_gumbel_softmax(temperature, weight, slope, gradient):
    beta = torch.tensor(0.7, requires_grad=True)
    soft = soft_choice(beta, torch.tensor(-1.0 - 0.3), temperature)
    soft.backward()
    quantizer = dorefa(temperature)
    quantizer.dbp.noise.fill_(-1.3)
    quantizer(NORMALIZED).backward(GRADIENT)

    assert soft.item() == pytest.approx(weight, abs=PRINTED)
    assert beta.grad.item() == pytest.approx(slope, abs=PRINTED)
    assert quantizer.dbp.beta.grad.item() == pytest.approx(gradient, abs=PRINTED)


def test_without_noise_the_choice_is_beta_itself():
    beta = torch.tensor(0.7, requires_grad=True)
    soft = soft_choice(beta, torch.tensor(0.0), 1.0)
    soft.backward()

    assert soft.item() == pytest.approx(0.7, abs=PRINTED)
    assert beta.grad.item() == pytest.approx(1.0, abs=PRINTED)


def test_the_gradient_of_the_choice_is_bounded_where_beta_starts():
    beta = torch.full((10001,), SDQ().beta_start, requires_grad=True)
    soft_choice(beta, torch.linspace(-20, 20, 10001), 1.0).sum().backward()

    assert beta.grad.max() <= 0.25 / (0.95 * 0.05) + PRINTED


EXPECTED_SLOPES = {  # E[dc/dbeta] at temperatures 1, .5 and .1, whose exact value is 1
    0.5: (0.667, 0.858, 0.992),
    0.7: (0.739, 0.906, 0.995),
    0.9: (1.166, 1.118, 1.006),
    0.99: (2.799, 1.454, 1.026),
}


@pytest.mark.parametrize(("beta", "expected"), EXPECTED_SLOPES.items())
def test_the_gradient_of_the_choice_is_biased_as_the_estimator_is_known_to_be(beta, expected):
    # Quantiles of the logistic noise, so that the mean is an integral; they lie dense, for the tails matter.
    noise = torch.logit((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)
    for temperature, mean in zip((1.0, 0.5, 0.1), expected, strict=True):
        probability = torch.full_like(noise, beta, requires_grad=True)
        soft_choice(probability, noise, temperature).sum().backward()
        assert probability.grad.mean().item() == pytest.approx(mean, abs=1.2e-2)


@pytest.mark.parametrize("beta", [0.5, 0.7, 0.9, 0.95, 0.99])
def test_the_wider_width_is_drawn_with_probability_beta(beta):
    dbp, count = dbp_of(start=beta), 5000
    draws = torch.rand(count, generator=torch.Generator().manual_seed(0))
    chosen = 0.0
    for uniform in draws:
        dbp.draw_(uniform)
        chosen += dbp.choice().item()

    assert abs(chosen / count - beta) < SIGMAS * (beta * (1 - beta) / count) ** 0.5


def test_weights_get_the_gradient_of_the_straight_through_estimator_whatever_is_drawn():
    gradients = []
    for noise in (5.0, -5.0):
        quantizer, w = dorefa(), NORMALIZED.clone().requires_grad_()
        quantizer.dbp.noise.fill_(noise)
        quantizer(w).backward(GRADIENT)
        gradients.append(w.grad)

    torch.testing.assert_close(gradients[0], GRADIENT)
    torch.testing.assert_close(gradients[1], GRADIENT)


def test_only_the_steps_of_what_was_drawn_learn():
    quantizer = dorefa()
    quantizer.dbp.noise.fill_(-5.0)

    quantizer(NORMALIZED).backward(GRADIENT)

    assert quantizer.steps.grad[0] != 0
    assert quantizer.steps.grad[1] == 0


# --- decay -----------------------------------------------------------------------------------------------------------


def test_a_layer_goes_down_the_candidates_as_its_betas_fall_below_the_threshold():
    dbp, rows = dbp_of((2, 3, 4, 8), start=1.0), []
    while dbp.bits() > 2:
        with torch.no_grad():
            dbp.beta -= 0.4
        dbp.project_()
        dbp.decay_(threshold=0.1, share=1.0)
        rows.append((int(dbp.bits()), round(dbp.beta.item(), 6)))

    assert rows == [(8, 0.6), (8, 0.2), (4, 1.0), (4, 0.6), (4, 0.2), (3, 1.0), (3, 0.6), (3, 0.2), (2, 1.0)]


def test_widths_never_rise_and_end_at_the_narrowest():
    dbp, generator, seen = dbp_of((1, 2, 4, 8), start=0.95), torch.Generator().manual_seed(0), []
    for _ in range(300):
        with torch.no_grad():
            dbp.beta += 0.6 * torch.rand((), generator=generator) - 0.4
        dbp.project_()
        dbp.decay_(threshold=0.1, share=0.3)
        seen.append(int(dbp.bits()))

    assert seen == sorted(seen, reverse=True)
    assert set(seen) == {8, 4, 2, 1}


def test_one_noisy_step_does_not_cost_a_layer_its_bits():
    dbp = dbp_of(start=0.9)
    with torch.no_grad():
        dbp.beta.fill_(0.01)
    falls = dbp.decay_(threshold=0.1, share=0.2)

    assert (bool(falls), int(dbp.bits())) == (False, 3)


def test_the_narrowest_width_is_not_given_up_by_any_draw():
    quantizer = dorefa()
    quantizer.dbp.active.fill_(0)
    quantizer.dbp.draw_(torch.tensor(1e-9))

    out = quantizer(NORMALIZED)
    out.backward(GRADIENT)

    torch.testing.assert_close(out, Q2, atol=PRINTED, rtol=0)
    assert quantizer.dbp.beta.grad.item() == 0
    assert quantizer.dbp.expected_bits().item() == 2
    assert not quantizer.dbp.decay_(threshold=1.0, share=1.0)


def test_the_expected_width_lies_between_the_two():
    dbp = dbp_of((2, 4, 8), start=0.75)
    dbp.expected_bits().backward()

    assert dbp.expected_bits().item() == 4 + 0.75 * 4
    assert dbp.beta.grad.item() == 4


# torch 2.13 itself: tracing an autograd function instantiates it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_decay_compiles_nothing_again():
    quantizer = StochasticWidth(
        dbp_of((1, 2, 3)),
        [bipolar(1), bipolar(2), Uniform(3, True)],
        torch.tensor([0.9, 0.5, 0.3]),
        shared_by=5,
    ).train()
    compiled = []

    def backend(module, inputs):
        compiled.append(module)
        return module.forward

    torch.compiler.reset()
    forward = torch.compile(quantizer, backend=backend, dynamic=False, fullgraph=True)
    for place in (2, 1, 0):
        quantizer.dbp.active.fill_(place)
        quantizer.dbp.noise.fill_(float(place))
        torch.testing.assert_close(forward(NORMALIZED), quantizer(NORMALIZED))

    assert len(compiled) == 1


# --- what pulls ------------------------------------------------------------------------------------------------------

ELEMENTS, WIDTHS = [1728, 36864, 73728, 147456], [8, 4, 3, 2]


def test_the_average_width_counts_weights_and_not_layers():
    sites = tuple(Site(f"w{i}", "weight", (n,), True, ()) for i, n in enumerate(ELEMENTS))
    profile = Profile((1,), sites, (), (), 0)
    average = COSTS["weight_bits"].of(profile, {f"w{i}": b for i, b in enumerate(WIDTHS)})

    assert average == pytest.approx(2.607539, abs=PRINTED)
    assert sum(WIDTHS) / len(WIDTHS) == 4.25
    assert [round(32 / bits, 3) for bits in (3.61, 3.66)] == [8.864, 8.743]


class Tiny(nn.Module):
    """Two convolutions of 36 and 144 weights, a linear layer of 192."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.linear = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.bn(self.conv1(x)))))
        return self.linear(F.max_pool2d(x, 2).flatten(1))


@pytest.fixture(scope="module")
def tiny() -> QuantGraph:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return capture(Tiny(), torch.zeros(2, 1, 8, 8))


@pytest.fixture(scope="module")
def task() -> Task:
    draw = np.random.default_rng(0)
    targets = draw.integers(0, 3, 90)
    inputs = (draw.normal(size=(90, 1, 8, 8)) + targets[:, None, None, None] - 1).astype(np.float32)
    return make_task((inputs, targets), (inputs[:30], targets[:30]), batch_size=20)


def search(
    graph: QuantGraph, task: Task, method: SDQ, budget: str, loop: Loop | None = None, **target: Any
) -> tuple[Policy, Learned]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return learn(method, graph, task, Target(parse_budget(budget), **target), loop or Loop())


def weight_bits(bits: Mapping[str, float]) -> dict[str, float]:
    return {site: width for site, width in bits.items() if site.endswith("weight")}


@pytest.mark.parametrize(
    "options", [{}, {"search_activations": True}], ids=["weights", "weights and activations"]
)
def test_without_excess_no_width_falls(tiny, task, options):
    _, found = search(tiny, task, SDQ(epochs=3, **options), "weights=8bit")

    assert {math.ceil(bits) for bits in found.bits.values()} == {8}


def test_widths_fall_until_the_expected_cost_fits_and_no_farther(tiny, task):
    rows: list[Mapping[str, Any]] = []
    policy, found = search(tiny, task, SDQ(epochs=20), "weights=4bit", Loop(watch=rows.append))
    averages = [row["avg_weight_bits"] for row in rows if "avg_weight_bits" in row]
    expected = COSTS["weight_bits"].of(tiny.profile, found.bits)

    assert averages[0] == 8
    assert averages == sorted(averages, reverse=True)
    assert 3.5 < expected < 4.5
    assert COSTS["weight_bits"].of(tiny.profile, policy.bits) <= 4


def weight_limit(strength: float = 2.0) -> _Pull:
    """A limit of 4 bits on the average weight width, with 8 bits at the start."""
    return _Pull(parse_budget("weights=4bit"), [8.0], strength, torch.device("cpu"), seed=0)


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(0.0, 0.0), (0.4, 2.0 * (8 / 6 - 1)), (0.8, 2.0), (1.0, 2.0)],  # the allowance is 8, 6, 4 and 4 bits
)
def test_a_limit_pulls_with_the_excess_over_an_allowance_that_comes_down_to_it(tiny, progress, expected):
    pull, bits = weight_limit(), {site.name: torch.tensor(8.0) for site in tiny.profile.sites}
    pull.adapt_(progress, 1.0)

    assert pull.penalty(tiny.profile, bits).item() == pytest.approx(expected)


def test_a_pull_grows_while_there_is_an_excess_and_shrinks_to_its_least_without_one(tiny):
    pull = weight_limit()
    pull.progress = 1.0
    seen = []
    for width in (8.0, 8.0, 3.0, 3.0, 3.0):
        pull.penalty(tiny.profile, {site.name: torch.tensor(width) for site in tiny.profile.sites})
        pull.adapt_(1.0, 1.5)
        seen.append(pull.strengths.item())

    assert seen == pytest.approx([3.0, 4.5, 3.0, 2.0, 2.0])


def test_the_error_of_the_narrower_width_holds_against_the_pull():
    dbp = DBP((2, 4, 8), [0.2, 0.05, 0.01], start=0.75, temperature=1.0)
    dbp.added_error().backward()
    assert dbp.added_error().item() == pytest.approx(0.25 * 0.04)
    assert dbp.beta.grad.item() == pytest.approx(-0.04)  # a larger beta is a smaller error

    dbp.active.fill_(1)
    assert dbp.added_error().item() == pytest.approx(0.25 * 0.15)


def test_a_decay_ends_the_momentum_of_the_beta_that_fell(tiny, task):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        target = Target(parse_budget("weights=3bit"))
        training = SDQ().begin(tiny.copy(), task.train, target, updates=100, device=torch.device("cpu"))
    decay, dbps = (
        training.keep["decay"],
        [q.dbp for q in training.graph.quantizers.values() if hasattr(q, "dbp")],
    )
    for dbp in dbps:
        dbp.beta.grad = torch.tensor(0.01)
    decay.step()
    fallen, other = dbps[0], dbps[1]
    with torch.no_grad():
        fallen.mean.fill_(0.0)
        fallen.beta.fill_(0.0)
    training.on_update(torch.optim.SGD(training.groups, lr=0.1), 1)

    velocity = {dbp: decay.state[dbp.beta]["momentum_buffer"].item() for dbp in (fallen, other)}
    assert velocity == {fallen: 0.0, other: pytest.approx(0.01)}


def test_larger_layers_become_narrower(tiny, task):
    _, found = search(tiny, task, SDQ(epochs=20), "weights=3bit")

    assert found.bits["conv1.weight"] > found.bits["linear.weight"]


@pytest.mark.parametrize("budget", ["weights=3bit,act=4.5bit", "bops=200k", "act_max=150B,weights=3bit"])
def test_activations_have_one_width_in_the_policy_too(tiny, task, budget):
    # What the limits leave over would make some of them wider, one by one.
    policy, _ = search(tiny, task, SDQ(epochs=2), budget)

    assert {policy.bits[site.name] for site in tiny.profile.activations} == {4}


def test_activations_have_one_width_unless_they_are_searched(tiny, task):
    _, fixed = search(tiny, task, SDQ(epochs=2), "act_max=150B,weights=3bit")
    _, searched = search(tiny, task, SDQ(epochs=10, search_activations=True), "act_sum=200B")

    activations = {site.name for site in tiny.profile.activations}
    # 256 values of at most 150 B: four bits.
    assert {fixed.bits[site] for site in activations} == {4}
    assert len({searched.bits[site] for site in activations}) > 1


@pytest.mark.parametrize(
    ("budget", "width"),
    [("weights=2bit", 8), ("act=5.9bit", 5), ("bops=200k", 4), ("weights=2bit,bops=200k", 8)],
    ids=["no limit on it", "on it", "on its product with weights", "on the product, and narrow weights"],
)
def test_the_width_of_activations_comes_from_the_budget(tiny, task, budget, width):
    # 36 * 64 + 144 * 64 + 192 MACs, 17 bit operations for each: 4 x 4 or 2 x 8 bits.
    _, found = search(tiny, task, SDQ(epochs=0), budget)

    assert {found.bits[site.name] for site in tiny.profile.activations} == {width}


def test_a_stated_width_of_activations_is_kept(tiny, task):
    policy, _ = search(tiny, task, SDQ(epochs=2, activation_bits=3), "weights=4bit", pins={"input": 8})

    activations = {site.name for site in tiny.profile.activations}
    assert {site: policy.bits[site] for site in activations} == {
        site: 8 if site == "input" else 3 for site in activations
    }


def test_a_stated_width_of_activations_that_cannot_fit_is_refused(tiny, task):
    with pytest.raises(InfeasibleError, match=r"activation_bits=8 does not fit act_max=150B at any widths"):
        search(tiny, task, SDQ(activation_bits=8), "act_max=150B")


def test_tied_tensors_share_one_dbp(tiny, task):
    ties = [("conv2.weight", "relu")]
    assert "relu" in {site.name for site in tiny.profile.sites}

    _, found = search(tiny, task, SDQ(epochs=4), "weights=4bit", ties=ties)

    quantizers = found.graph.quantizers
    assert quantizers["conv2.weight"].dbp is quantizers["relu"].dbp
    assert quantizers["conv2.weight"].dbp is not quantizers["conv1.weight"].dbp
    assert found.bits["conv2.weight"] == found.bits["relu"] < 8


# --- going on ----------------------------------------------------------------------------------------------------------


def equal_states(one: Learned, other: Learned) -> bool:
    states = [found.graph.module.state_dict() for found in (one, other)]
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][k], states[1][k]) for k in states[0]
    )


@pytest.mark.parametrize("stop_after", [1, 13, 22])
@pytest.mark.parametrize("searched", [False, True], ids=["weights", "activations too"])
def test_a_search_that_was_stopped_goes_on_bit_for_bit(tiny, task, tmp_path: Path, stop_after, searched):
    method, budget = SDQ(epochs=6, search_activations=searched), "weights=3bit,act=4bit"
    _, whole = search(tiny, task, method, budget)
    checkpoint = Checkpoint(tmp_path / "learn.pt")

    def watch(row: Mapping[str, Any]) -> None:
        if row.get("step") == stop_after:
            checkpoint.stop.set()

    with pytest.raises(KeyboardInterrupt):
        search(tiny, task, method, budget, Loop(checkpoint=checkpoint, watch=watch))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)  # whatever random numbers come must be those of the checkpoint
        loop, target = Loop(checkpoint=Checkpoint(tmp_path / "learn.pt")), Target(parse_budget(budget))
        _, resumed = learn(method, tiny, task, target, loop)

    assert len(set(whole.bits.values())) > 1
    assert resumed.bits == whole.bits
    assert equal_states(resumed, whole)


def test_another_seed_draws_otherwise(tiny, task):
    _, one = search(tiny, task, SDQ(epochs=2), "weights=3bit")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        _, other = learn(SDQ(epochs=2), tiny, task, Target(parse_budget("weights=3bit")), Loop())

    assert not equal_states(one, other)


@pytest.mark.parametrize("weights", ["entropy", "bipolar", "full"])
def test_a_strategy_read_from_its_file_gives_the_same_network(tiny, task, weights):
    method = SDQ(epochs=2, weights=weights)
    policy, found = search(tiny, task, method, "weights=3bit")
    options = method.finetuning(Finetune(epochs=2, lr=0.01, norm_batches=2))
    trained = finetune(
        found.graph, policy, task, options, start=found.frozen, teacher=tiny,
        quantizer=method.quantizer, extra_loss=method.extra_loss,
    )  # fmt: skip
    read = policy_from_json(json.loads(json.dumps(policy.to_json())))
    restored = restore_policy(tiny, read, trained.module.state_dict())

    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(restored(x), trained(x))
    assert all(isinstance(quantizer, LearnedStep) for quantizer in trained.quantizers.values())


# --- phase 2: entropy and bins -----------------------------------------------------------------------------------------

W = torch.tensor([-1.2, -0.8, -0.4, -0.3, 0.1, 0.35, 0.5, 0.9])
W_NORMALIZED = torch.tensor(
    [-1.406593, -0.937729, -0.468864, -0.351648, 0.117216, 0.410256, 0.586081, 1.054945]
)
CODES = torch.tensor([0, 0, 1, 1, 2, 2, 2, 3])
LEVELS = torch.tensor([-1, -1 / 3, 1 / 3, 1])


def test_normalized_weights_and_their_levels_are_those_of_the_formula():
    step = entropy_step(W, bits=2)
    quantizer = EntropyStep(bipolar(2), 1.0).train()

    torch.testing.assert_close(W / (step * bipolar(2).level_max), W_NORMALIZED, atol=PRINTED, rtol=0)
    torch.testing.assert_close(quantizer(W) / (step * 3), LEVELS[CODES], atol=PRINTED, rtol=0)
    assert quantizer.freeze().step == step


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_every_level_gets_as_many_of_uniform_weights(bits):
    w = (torch.arange(1600) + 0.5) / 800 - 1
    quantizer = EntropyStep(bipolar(bits), 1.0).train()
    _, counts = torch.unique(quantizer(0.3 * w), return_counts=True)

    assert counts.tolist() == [1600 >> bits] * 2**bits


def test_the_step_by_entropy_gets_its_gradient_through_the_weights():
    w = W.clone().requires_grad_()
    EntropyStep(bipolar(2), 1.0).train()(w)[0].backward()  # -1.2 is clipped to -3 steps

    # d(-3 mean|w| / 2) / dw = -1.5 sign(w) / 8 for every weight.
    torch.testing.assert_close(w.grad, -1.5 / 8 * W.sign())


def test_bins_have_the_printed_means_and_variances():
    sizes, means, variances = bins(W_NORMALIZED, CODES, 4)
    biased = variances * (sizes - 1) / sizes
    distance = (means - LEVELS).square().sum().item()

    assert sizes.tolist() == [2, 2, 3, 1]
    torch.testing.assert_close(
        means, torch.tensor([-1.172161, -0.410256, 0.371184, 1.054945]), atol=PRINTED, rtol=0
    )
    assert distance == pytest.approx(0.0400083, abs=PRINTED)
    assert biased.sum().item() == pytest.approx(0.0957957, abs=PRINTED)
    assert variances.sum().item() == pytest.approx(0.1728902, abs=PRINTED)
    assert distance + biased.sum().item() == pytest.approx(0.1358040, abs=PRINTED)


def test_the_regularization_of_bins_is_the_printed_one():
    total = bin_regularization(W, entropy_step(W, bits=2), bipolar(2))

    assert total.item() == pytest.approx(0.2128985, abs=PRINTED)


def test_the_later_variant_with_distances_of_elements_differs():
    clipped = W_NORMALIZED.clamp(-1, 1)
    variant = (LEVELS[CODES] - clipped).square().mean() + bins(clipped, CODES, 4)[2].sum()

    assert variant.item() == pytest.approx(0.0822979, abs=PRINTED)


def test_the_regularization_does_not_depend_on_units_or_on_bins_that_are_empty():
    grid = Uniform(8, True)
    one = bin_regularization(W, torch.tensor(0.01), grid)

    assert torch.isfinite(one)
    torch.testing.assert_close(bin_regularization(10 * W, torch.tensor(0.1), grid), one)


def test_channels_of_tiny_weights_get_no_large_gradient():
    w = torch.stack([W, 1e-4 * W]).requires_grad_()
    step = torch.stack([entropy_step(W, 2), entropy_step(1e-4 * W, 2)])[:, None]
    bin_regularization(w, step, bipolar(2)).backward()

    assert w.grad[1].abs().max() < w.grad[0].abs().max()


@pytest.mark.parametrize("grid", [bipolar(2), Uniform(3, True), Codebook(2, (-4, -1, 1, 4))], ids=str)
def test_the_regularization_alone_draws_each_bin_together_and_keeps_it_occupied(grid):
    w = torch.randn(400, generator=torch.Generator().manual_seed(0)).requires_grad_()
    step = torch.tensor(2.0 / grid.level_max)
    levels = torch.tensor(grid.levels, dtype=torch.float32)

    def occupancy() -> tuple[Tensor, Tensor]:
        codes = (w.detach()[:, None] / step - levels).abs().argmin(1)
        sizes, _, variances = bins(w.detach(), codes, len(levels))
        return sizes, variances

    before = occupancy()
    optimizer = torch.optim.SGD([w], lr=3.0)
    for _ in range(1000):
        optimizer.zero_grad()
        bin_regularization(w, step, grid).backward()
        optimizer.step()
    after = occupancy()

    assert torch.equal(after[0], before[0])
    assert after[1].sum() < 0.05 * before[1].sum()


def test_the_term_of_a_network_is_the_sum_over_its_weights(tiny, task):
    method = SDQ()
    policy = Policy(
        {
            site.name: bipolar(2) if site.kind == "weight" else Uniform(4, site.signed)
            for site in tiny.profile.sites
        }
    )
    student = place_policy(tiny, policy, task.train, quantizer=method.quantizer)
    term = method.extra_loss(student)
    expected = sum(
        bin_regularization(student.weight(site.name), student.quantizers[site.name].step, bipolar(2))
        for site in tiny.profile.weights
    )

    assert term is not None
    torch.testing.assert_close(term(), 0.1 * expected)
    assert SDQ(bin_strength=0.0).extra_loss(student) is None


BIPOLAR_WEIGHT = Site("w", "weight", (4, 2), True, ())
OTHERS: dict[str, tuple[Site, Grid]] = {
    "full": (BIPOLAR_WEIGHT, Uniform(3, True)),
    "narrow": (BIPOLAR_WEIGHT, Uniform(3, True, "narrow")),
    "codebook": (BIPOLAR_WEIGHT, Codebook(2, (-4, -1, 1, 4))),
    "activation": (Site("x", "activation", (4,), True, ()), bipolar(2)),
}


@pytest.mark.parametrize(("site", "grid"), OTHERS.values(), ids=OTHERS)
def test_grids_of_other_kinds_get_a_learned_step(site, grid):
    quantizer = SDQ(weights="entropy").quantizer(site, grid, torch.tensor(0.2), 8)

    assert isinstance(quantizer, LearnedStep)
    assert quantizer.freeze().grid == grid


@pytest.mark.parametrize(
    ("weights", "kind"), [("entropy", EntropyStep), ("bipolar", LearnedStep), ("full", LearnedStep)]
)
def test_bipolar_weights_get_the_quantizer_that_the_option_names(weights, kind):
    quantizer = SDQ(weights=weights).quantizer(BIPOLAR_WEIGHT, bipolar(2), torch.full((4, 1), 0.2), 2)

    assert type(quantizer) is kind
    assert quantizer.freeze().grid == bipolar(2)


# --- phase 2: the teacher ----------------------------------------------------------------------------------------------

TEACHER = torch.tensor([[2.0, 0.5, -1.0], [0.0, 1.0, 3.0]])
STUDENT = torch.tensor([[1.0, 1.0, 0.0], [0.5, 0.2, 1.5]])


def linear(logits: Tensor) -> QuantGraph:
    """A layer that answers the two unit vectors with these logits."""
    layer = nn.Linear(2, 3)
    with torch.no_grad():
        layer.weight.copy_(logits.T)
        layer.bias.zero_()
    return capture(nn.Sequential(nn.Flatten(), layer), torch.zeros(2, 2, 1, 1))


def test_finetuning_imitates_the_teacher_and_uses_no_hard_label():
    inputs, targets = np.eye(2, dtype=np.float32).reshape(2, 2, 1, 1), np.array([2, 0])
    task = make_task((inputs, targets), (inputs, targets), held_out=(inputs, targets), batch_size=2)
    student, rows, lr = linear(STUDENT), [], 0.25
    # Steps at which the student's weights and inputs are exact.
    exact = {"1.weight": 0.1, "input": 0.5}
    options = SDQ().finetuning(
        Finetune(epochs=1, lr=lr, weight_decay=0.0, temperature=4.0, schedule="constant")
    )

    trained = finetune(
        student,
        Policy({site.name: Uniform(8, site.signed) for site in student.profile.sites}),
        task,
        options,
        Loop(watch=rows.append),
        teacher=linear(TEACHER),
        quantizer=lambda site, grid, step, shared_by: LearnedStep(
            grid, torch.tensor(exact[site.name]), shared_by=shared_by
        ),
    )

    logits = STUDENT.clone().requires_grad_()
    cross_entropy = -(TEACHER.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    entropy = -(TEACHER.softmax(-1) * TEACHER.log_softmax(-1)).sum(-1).mean()
    cross_entropy.backward()
    assert cross_entropy.item() == pytest.approx(0.7932591, abs=PRINTED)
    assert entropy.item() == pytest.approx(0.5729256, abs=PRINTED)
    loss = next(row["loss"] for row in rows if "loss" in row)
    assert loss == pytest.approx(0.2203335, abs=PRINTED)
    # The bias had the summed gradient of soft cross entropy.
    bias = trained.module.state_dict()["1.bias"]
    torch.testing.assert_close(bias, -lr * logits.grad.sum(0), atol=PRINTED, rtol=0)


def test_the_teacher_can_be_left_out():
    options = Finetune(distill=0.0, temperature=4.0)

    assert SDQ(distill=False).finetuning(options) == options
    assert SDQ().finetuning(options) == Finetune(distill=1.0, temperature=1.0)


def test_a_settled_network_computes_what_it_was_trained_to_compute(tiny):
    graph = tiny.copy()
    policy = Policy({site.name: SDQ()._grid(site, 2) for site in graph.profile.sites})
    put_(
        graph,
        {
            site.name: EntropyStep(
                policy.grids[site.name], float(graph.weight(site.name).detach().abs().mean()) / 2
            )
            for site in graph.profile.weights
        },
    )
    graph.module.eval()
    images = torch.randn(4, *graph.profile.input_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = graph(images)

        settle_(graph, policy)

        assert torch.equal(graph(images), before)
    assert {type(quantizer) for quantizer in graph.quantizers.values()} == {LearnedStep}
