"""Costs: integers and tensors agree, wider never costs less, and ResNet-20 costs what the literature says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixbits import zoo
from mixbits.core.budget import parse_budget
from mixbits.core.cost import COSTS, FLOAT_BITS, float_bits
from mixbits.core.profile import Profile
from mixbits.graph.quant_graph import capture
from strategies import profiles

each_cost = pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)

KIB = 1024
# Arithmetic of a few hundred terms in float64, whose relative rounding error is 1.1e-16 each.
FLOAT64_SUM = 1e-12
# Landscape figures are printed with three or four digits.
THREE_DIGITS = 5e-3

# Costs that need not fall with widths: below 2 bits, or where a small layer does not fill an array.
FLAT = {"bitfusion_cycles", "bitfusion_energy"}

# GBOPs of ResNet-20 (option A) as the literature counts them: MACs x weight bits x activation bits over all
# layers, the first and the last layer included at `ends` bits.
RESNET20_GBOPS = {
    "float": (32, 32, 41.52),
    "8/8": (8, 8, 2.595),
    "4/4": (4, 4, 0.649),
    "4/4, ends 8": (4, 8, 0.670),
    "3/3, ends 8": (3, 8, 0.389),
    "2/2, ends 8": (2, 8, 0.189),
}


@st.composite
def profiles_and_bits(draw: st.DrawFn) -> tuple[Profile, dict[str, int]]:
    profile = draw(profiles())
    return profile, {site.name: draw(st.integers(1, 8)) for site in profile.sites}


@pytest.fixture(scope="module")
def resnet20() -> Profile:
    return capture(zoo.resnet20(), torch.zeros(2, 3, 32, 32)).profile


def same_bits(profile: Profile, weights: int, activations: int) -> dict[str, int]:
    return {site.name: weights if site.kind == "weight" else activations for site in profile.sites}


@each_cost
@given(profiles_and_bits())
def test_integers_and_tensors_agree_up_to_the_rounding_of_bytes_and_operands(cost, drawn):
    profile, bits = drawn
    taken = {site: min((w for w in cost.operands if w >= b), default=b) for site, b in bits.items()}

    def smooth(bits: dict[str, int]) -> float:
        tensors = {site: torch.tensor(float(width), dtype=torch.float64) for site, width in bits.items()}
        return float(cost.of(profile, tensors))

    exact, low, high = cost.of(profile, bits), smooth(bits), smooth(taken)

    # Each packed tensor takes up to one byte more than its bits.
    rounding = len(profile.sites) if cost.unit == "bytes" else 0
    slack = FLOAT64_SUM * exact
    assert low - slack <= exact <= high + rounding + slack


@each_cost
@given(profiles_and_bits(), st.data())
def test_a_wider_site_never_costs_less(cost, drawn, data):
    profile, bits = drawn
    site = data.draw(st.sampled_from(sorted(bits)))

    assert cost.of(profile, {**bits, site: bits[site] + 1}) >= cost.of(profile, bits)


@each_cost
@given(profiles())
def test_wider_everywhere_costs_more(cost, profile):
    # At 8 bits and 16, not below, a tensor of one value differs in bytes.
    assert cost.of(profile, same_bits(profile, 16, 16)) > cost.of(profile, same_bits(profile, 8, 8))


@each_cost
@given(profiles_and_bits())
def test_the_gradient_of_a_cost_is_never_negative(cost, drawn):
    profile, bits = drawn
    tensors = {site: torch.tensor(float(width), requires_grad=True) for site, width in bits.items()}

    cost.of(profile, tensors).backward()

    grads = [width.grad.item() for width in tensors.values() if width.grad is not None]
    assert min(grads) >= 0
    assert max(grads) > 0 or cost.name in FLAT


@each_cost
def test_bytes_are_whole_and_all_costs_are_python_numbers(cost, resnet20):
    used = cost.of(resnet20, same_bits(resnet20, 3, 5))

    assert isinstance(used, float if cost.unit == "bit" else int)


def test_resnet20_has_its_published_numbers(resnet20):
    relus = [site for site in resnet20.activations if "relu" in site.name]

    assert sum(site.elements for site in resnet20.weights) == 268_336
    assert len(resnet20.weights) == len(resnet20.ops) == 20
    assert len(relus) == 19
    assert sum(site.elements for site in relus) == 188_416
    assert [(s.name, s.elements) for s in resnet20.activations if s not in relus] == [
        ("input", 3072),
        ("adaptive_avg_pool2d", 64),
    ]
    assert sum(op.macs for op in resnet20.ops) == 40_551_040


# The paper counts the 10 biases of the linear layer with the weights (1048.23 KiB, 40 bytes more) and does
# not count the pooled tensor of 64 values with the activations.
@pytest.mark.parametrize(
    ("cost", "weights", "activations", "amount"),
    [
        ("weights", 2, 32, 67_084),
        ("weights", 32, 32, 1_073_344),
        ("weights", 4, 4, 134_168),
        ("act_max", 2, 32, 64 * KIB),
        ("act_max", 2, 4, 8 * KIB),
        ("act_sum", 2, 32, 736 * KIB + 64 * 4),
        ("act_sum", 2, 4, 92 * KIB + 64 // 2),
        ("weight_bits", 3, 4, 3.0),
        ("act_bits", 3, 4, 4.0),
    ],
)
def test_resnet20_costs_what_the_paper_says(resnet20, cost, weights, activations, amount):
    assert COSTS[cost].of(resnet20, same_bits(resnet20, weights, activations)) == amount


def test_the_limit_of_70_kib_allows_2_137_bit_on_average(resnet20):
    allowed = parse_budget("weights=70KiB").limits[0].asked * 8 / 268_336

    assert allowed == pytest.approx(2.137, rel=1e-4)


@pytest.mark.parametrize(("inner", "ends", "gbops"), RESNET20_GBOPS.values(), ids=RESNET20_GBOPS)
def test_resnet20_has_the_bit_operations_of_the_literature(resnet20, inner, ends, gbops):
    bits = same_bits(resnet20, inner, inner)
    for op in (resnet20.ops[0], resnet20.ops[-1]):
        bits |= {op.weight: ends, op.input: ends}

    assert COSTS["bops"].of(resnet20, bits) / 1e9 == pytest.approx(gbops, rel=THREE_DIGITS)


def test_a_weight_that_is_read_twice_is_stored_once_and_multiplied_twice():
    profile = capture(zoo.shared_cnn(), torch.zeros(2, 3, 32, 32)).profile
    shared = [op for op in profile.ops if op.weight == "shared.weight"]

    before, after = (
        {site.name: 8 if site.name == "shared.weight" else 4 for site in profile.sites},
        {site.name: 4 for site in profile.sites},
    )

    def saved(name: str) -> int:
        return COSTS[name].of(profile, before) - COSTS[name].of(profile, after)

    assert saved("weights") == 9 * 32 * 32 * 4 // 8
    assert saved("bops") == (9 * 32 * 32) * (16 * 16 + 8 * 8) * (8 - 4) * 4
    assert [op.name for op in shared] == ["shared", "shared.1"]


def test_float_networks_have_32_bit_everywhere(resnet20):
    assert set(float_bits(resnet20).values()) == {FLOAT_BITS}
    assert len(float_bits(resnet20)) == len(resnet20.sites)
