"""Methods: whatever learns widths keeps the promises of ``learn``, without training a second time for any of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import is_dataclass, replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixbits.core.budget import parse_budget
from mixbits.core.cost import COSTS
from mixbits.core.grid import Codebook, Uniform, dequantize, quantize
from mixbits.core.latency import LatencyTable, LayerTimes
from mixbits.core.policy import Policy
from mixbits.graph.quant_graph import QuantGraph, capture
from mixbits.methods import find_methods, method_named
from mixbits.search.greedy import InfeasibleError
from mixbits.train.finetune import place_policy
from mixbits.train.method import Learned, Method, Target, learn
from mixbits.train.steps import Loop
from mixbits.train.task import Task, make_task

METHODS = find_methods()
each_method = pytest.mark.parametrize("name", METHODS)

# The network below has 649 weights and computes 519 values of activations, 256 of them in one tensor. At 8 bit that is
# 649 B, 519 B, 256 B and 767,296 bit operations; at 2 bit a quarter, and a sixteenth of the operations.
BUDGETS = {
    "weights in bytes": "weights=300B",
    "average weight width": "weights=3.5bit",
    "everything stored": "size=450B",
    "operations": "bops=100k",
    "average activation width": "act=4.5bit",
    "largest activation": "act_max=100B",
    "sum of activations": "act_sum=200B",
    "activations at once": "act_peak=200B",
    "the lowest widths": "weights=2bit",
    "no limit in effect": "weights=1MiB",
    "weights, activations and operations": "weights=0.3KiB,act_max=100B,bops=150k",
    "Bit Fusion": "bitfusion_cycles_2x2=1k,bitfusion_energy=150nJ",
    "all at once": "weights=3bit,size=0.5KiB,act=5bit,act_sum=0.25KiB,act_max=150B,act_peak=0.25KiB,bops=200k",
}
each_budget = pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
CANDIDATES = (2, 3, 4, 6, 8)
NEAR_A_TIE = 1e-3  # in steps


class Tiny(nn.Module):
    """Two convolutions with a residual around the second, a pool, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.fc1 = nn.Linear(64, 7)
        self.fc2 = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.conv2(x))
        return self.fc2(F.relu(self.fc1(F.max_pool2d(x, 2).flatten(1))))


@cache
def tiny() -> QuantGraph:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return capture(Tiny(), torch.zeros(2, 1, 8, 8))


def random_task() -> Task:
    draw = np.random.default_rng(0)
    inputs, targets = draw.normal(size=(60, 1, 8, 8)).astype(np.float32), draw.integers(0, 3, 60)
    return make_task((inputs, targets), (inputs[:6], targets[:6]), batch_size=18)


class UnreadBatches:
    """Data that nothing may read."""

    def __len__(self) -> int:
        return 1

    def epoch(
        self, number: int, first: int = 0, rng: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        pytest.fail("the data were read")


def latencies() -> LatencyTable:
    """Milliseconds of the network's layers in no order of widths."""
    draw, pairs = np.random.default_rng(0), (len(CANDIDATES), len(CANDIDATES))
    layers = tuple(
        LayerTimes(op.name, op.macs, tuple(map(tuple, draw.integers(10**6, 10**7, pairs).tolist())), ())
        for op in tiny().profile.ops
    )
    about = {"network": "tiny", "cpu": "any", "isa": "native", "mixbits": "0", "date": "2026-11-21"}
    return LatencyTable(
        **about, threads=1, batch=1, tuned=False, weight_bits=CANDIDATES, activation_bits=CANDIDATES,
        layers=layers, rest_ns=10**6,
    )  # fmt: skip


def quick(name: str) -> Method:
    method = METHODS[name]()
    return replace(method, epochs=min(method.epochs, 1))


def run(name: str, **target) -> tuple[Policy, Learned]:
    target = {"weight_bits": CANDIDATES, "activation_bits": CANDIDATES} | target
    budget = parse_budget(target.pop("budget"), target.pop("latency", None))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return learn(quick(name), tiny(), random_task(), Target(budget, **target), Loop())


@cache
def learned(name: str, budget: str) -> tuple[Policy, Learned]:
    return run(name, budget=budget)


def cost(name: str, policy: Policy) -> float:
    return COSTS[name].of(tiny().profile, policy.bits)


@each_method
def test_a_method_is_a_dataclass_that_names_its_paper_and_is_found_by_its_file(name):
    assert is_dataclass(METHODS[name])
    assert METHODS[name].__module__ == f"mixbits.methods.{name}"
    assert METHODS[name].paper
    assert method_named(name) is METHODS[name]


@each_method
@each_budget
def test_a_policy_fits_its_budget(name, budget):
    policy, _ = learned(name, budget)

    assert parse_budget(budget).exceeded(tiny().profile, policy.bits) == []


@each_method
@pytest.mark.parametrize("more", ["", ",weights=5bit,act=6bit"], ids=["alone", "with averages"])
def test_a_policy_fits_a_limit_on_latency_though_wider_may_be_faster(name, more):
    table = latencies()
    slow = table.amount(tiny().profile).of({site.name: 4 for site in tiny().profile.sites})
    budget = f"ms={slow}{more}"

    policy, _ = run(name, budget=budget, latency=table)

    assert parse_budget(budget, table).exceeded(tiny().profile, policy.bits) == []


@each_method
@each_budget
def test_a_policy_gives_every_site_a_candidate(name, budget):
    policy, _ = learned(name, budget)

    policy.check(tiny().profile)
    assert set(policy.bits) == {site.name for site in tiny().profile.sites}
    assert set(policy.bits.values()) <= set(CANDIDATES)


@each_method
def test_candidates_of_weights_and_activations_are_kept_apart(name):
    policy, _ = run(name, budget="weights=250B", weight_bits=(2, 4), activation_bits=(5, 7))

    assert {policy.bits[site.name] for site in tiny().profile.weights} <= {2, 4}
    assert {policy.bits[site.name] for site in tiny().profile.activations} <= {5, 7}


@each_method
def test_widths_of_one_bit_can_be_candidates(name):
    policy, _ = run(name, budget="weights=1bit,act=1.5bit", weight_bits=(1, 2), activation_bits=(1, 2, 4))

    policy.check(tiny().profile)
    assert {policy.bits[site.name] for site in tiny().profile.weights} == {1}


@each_method
def test_pins_and_ties_are_honoured_under_a_budget(name):
    pins = {"conv1.weight": 8, "input": 5}
    ties = [("conv2.weight", "relu"), ("fc1.weight", "fc2.weight")]
    assert {"relu", "relu.1"} < {site.name for site in tiny().profile.sites}

    policy, _ = run(name, budget="weights=400B,act_sum=400B", pins=pins, ties=ties)

    assert {site: policy.bits[site] for site in pins} == pins
    assert all(policy.bits[a] == policy.bits[b] for a, b in ties)
    assert cost("weights", policy) <= 400
    assert cost("act_sum", policy) <= 400


@each_method
def test_a_network_with_every_site_pinned_keeps_the_pins(name):
    pins = {site.name: 3 for site in tiny().profile.sites}

    policy, _ = run(name, budget="weights=1KiB", pins=pins)

    assert policy.bits == pins


@each_method
@pytest.mark.parametrize(
    ("tight", "loose", "used"),
    [("weights=3bit", "weights=6bit", "weights"), ("bops=60k", "bops=300k", "bops")],
    ids=["weights", "operations"],
)
def test_a_looser_budget_never_costs_less(name, tight, loose, used):
    assert cost(used, learned(name, tight)[0]) <= cost(used, learned(name, loose)[0])


@each_method
def test_the_same_seed_gives_the_same_policy(name):
    budget = BUDGETS["weights, activations and operations"]

    assert run(name, budget=budget)[0] == learned(name, budget)[0]


@each_method
def test_the_given_network_is_not_changed(name):
    before = {key: value.clone() for key, value in tiny().module.state_dict().items()}
    code, training = tiny().module.code, tiny().module.training

    run(name, budget="weights=3bit")

    after = tiny().module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert (tiny().module.code, tiny().module.training, tiny().quantizers) == (code, training, {})


@each_method
def test_an_infeasible_budget_is_refused_before_any_data_is_read(name):
    unread = Task(UnreadBatches(), UnreadBatches(), UnreadBatches())
    target = Target(parse_budget("weights=1KiB,act_max=60B"), CANDIDATES, CANDIDATES)

    with pytest.raises(InfeasibleError, match="act_max=60B: reachable are 64 B to 256 B"):
        learn(quick(name), tiny(), unread, target, Loop())


@each_method
def test_an_unknown_pin_is_refused_with_the_nearest_name_before_any_data_is_read(name):
    unread = Task(UnreadBatches(), UnreadBatches(), UnreadBatches())
    target = Target(parse_budget("weights=1KiB"), pins={"conv3.weight": 8})

    with pytest.raises(ValueError, match=r"unknown site 'conv3\.weight'.*Did you mean 'conv\d\.weight'"):
        learn(quick(name), tiny(), unread, target, Loop())


@each_method
@each_budget
def test_finetuning_can_start_from_what_was_learned(name, budget):
    policy, found = learned(name, budget)

    placed = place_policy(tiny(), policy, random_task().train, start=found.frozen)

    assert set(found.frozen) <= set(policy.bits)
    assert all((quantizer.step > 0).all() for quantizer in placed.quantizers.values())
    assert torch.isfinite(placed(torch.ones(2, 1, 8, 8))).all()


@each_method
@pytest.mark.parametrize("budget", ["weights=3bit", "weights=0.3KiB,act_max=100B,bops=150k"])
def test_quantizers_that_were_learned_with_compute_their_frozen_grids(name, budget):
    _, found = learned(name, budget)
    graph = found.graph.copy()

    for site, quantizer in graph.quantizers.items():
        frozen = quantizer.eval().freeze()
        if graph.profile.site(site).kind == "weight":
            values = graph.weight(site).detach()
            step = frozen.step.reshape(-1, *[1] * (values.dim() - 1)) if frozen.step.dim() else frozen.step
        else:
            values, step = torch.linspace(-1.3, 1.7, 999) * frozen.grid.level_max * frozen.step, frozen.step
        with torch.no_grad():
            computed = quantizer(values)
        grid, ratio = frozen.grid, values / step
        wanted = dequantize(quantize(values.numpy(), step.numpy(), grid), step.numpy(), grid)
        # A method may round ties its own way; nothing else may differ.
        thresholds = torch.tensor(grid.edges if isinstance(grid, Codebook) else midpoints(grid))
        tie = (ratio.flatten()[:, None] - thresholds).abs().min(1).values.reshape(ratio.shape) < NEAR_A_TIE
        assert torch.equal(computed[~tie], torch.from_numpy(wanted)[~tie]), site


def midpoints(grid: Uniform) -> list[float]:
    return [(low + high) / 2 for low, high in pairwise(grid.levels)]


@each_method
@pytest.mark.parametrize("uneven", ["activations", "wide weights"])
def test_latency_that_no_one_width_and_no_narrow_widths_meet(name, uneven):
    """Layers that are quick at one pair of widths only: another for each layer, or the widest weights."""
    ops, last = tiny().profile.ops, len(CANDIDATES) - 1
    quick_at = [
        (last, (0, last)[index % 2] if uneven == "activations" else last) for index in range(len(ops))
    ]
    layers = tuple(
        LayerTimes(
            op.name,
            op.macs,
            tuple(tuple(10**6 if (w, a) == at else 10**7 for a in range(last + 1)) for w in range(last + 1)),
            (),
        )
        for op, at in zip(ops, quick_at, strict=True)
    )
    table = replace(latencies(), layers=layers, rest_ns=0)
    least = len(ops)  # milliseconds

    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            policy, _ = run(name, budget=f"ms={least}", latency=table)
    except InfeasibleError as error:
        assert "no single width for all weights and one for all activations meets" in str(error)
        return
    said = [str(warning.message) for warning in told if warning.category is UserWarning]
    # What does not fill up a limit with several widths keeps to one, and says that it does not here.
    elsewhere, _ = learned(name, "weights=3bit,act=2.5bit")
    keeps_to_one = len({elsewhere.bits[site.name] for site in tiny().profile.activations}) == 1
    if uneven == "activations" and keeps_to_one:
        assert any("no one width for all activations meets" in message for message in said)
    else:
        assert said == []

    limit = parse_budget(f"ms={least}", table)
    assert limit.fits(tiny().profile, policy.bits)


@each_method
def test_the_network_that_was_learned_with_keeps_the_names_of_the_given_one(name):
    _, found = learned(name, "weights=3bit")
    state = found.graph.module.state_dict()

    missing = [key for key in tiny().module.state_dict() if key not in state]

    assert missing == []
    assert found.graph.module is not tiny().module


def test_an_unknown_method_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=f"unknown method 'mpdn'; known are {', '.join(METHODS)}"):
        method_named("mpdn")
