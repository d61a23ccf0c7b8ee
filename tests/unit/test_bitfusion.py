"""Bit Fusion as a cost: figures computed by hand, other arrays, and widths found within it."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from mixbits import zoo
from mixbits.core.bitfusion import DRAM_FJ, PAPER, UNIT_FJ
from mixbits.core.budget import format_amount, parse_budget
from mixbits.core.cost import COSTS, find_cost, float_bits
from mixbits.core.profile import Op, Profile, Site, Value
from mixbits.graph.quant_graph import capture
from mixbits.search.fit import fit
from mixbits.search.greedy import InfeasibleError, choices, noise_power

WIDTHS = (2, 3, 4, 5, 6, 7, 8)


def network(*ops: Op, sizes: dict[str, int]) -> Profile:
    sites = tuple(
        Site(
            name,
            "weight" if name.endswith("weight") else "activation",
            (size,),
            signed=True,
            readers=tuple(op.name for op in ops if name in (op.weight, op.input)),
        )
        for name, size in sizes.items()
    )
    return Profile((sizes["input"],), sites, ops, (Value("logits", 10, None, 0, 1),), 0)


# 3x3 convolution, 16 -> 32 channels, 32 x 32 outputs: 144 products an output, all 32 columns at work.
CONV = network(
    Op("conv", "conv2d", 1024 * 32 * 144, "conv.weight", "input", channels=32, reduction=144),
    sizes={"input": 16384, "conv.weight": 4608},
)


def bits(weight: int, activation: int) -> dict[str, int]:
    return {"conv.weight": weight, "input": activation}


@pytest.mark.parametrize(
    ("weight", "activation", "cycles"),
    [
        # 16 bricks a unit / bricks a product = lanes; 16 rows x lanes; rounds of 144 products, 1024 outputs
        (2, 2, 1 * 1024),  # 16 lanes: 256 at once
        (2, 4, 2 * 1024),  # 8: 128
        (4, 4, 3 * 1024),  # 4: 64
        (2, 8, 3 * 1024),  # 4: 64
        (4, 8, 5 * 1024),  # 2: 32
        (8, 8, 9 * 1024),  # 1: 16
        (8, 16, 18 * 1024),  # 9 rounds of 2 cycles
        (16, 16, 36 * 1024),  # 9 rounds of 4 cycles
    ],
)
def test_a_layer_takes_the_cycles_computed_by_hand(weight, activation, cycles):
    for pair in ((weight, activation), (activation, weight)):
        assert COSTS["bitfusion_cycles"].of(CONV, bits(*pair)) == cycles


@pytest.mark.parametrize(
    ("asked", "taken"), [((3, 5), (4, 8)), ((1, 1), (2, 2)), ((7, 2), (8, 2)), ((4, 9), (4, 16))]
)
@pytest.mark.parametrize("name", ["bitfusion_cycles", "bitfusion_energy"])
def test_widths_are_rounded_up_to_operands(name, asked, taken):
    assert COSTS[name].of(CONV, bits(*asked)) == COSTS[name].of(CONV, bits(*taken))


def test_operands_of_more_than_16_bits_are_refused():
    with pytest.raises(ValueError, match=r"conv\.weight: 32 bits are more than the 16"):
        COSTS["bitfusion_cycles"].of(CONV, float_bits(CONV))


def test_an_array_is_stated_by_the_name_of_the_cost():
    small, same = find_cost("bitfusion_cycles_8x4"), find_cost("bitfusion_cycles_16x32")

    # 8 rows x 2 lanes: 9 rounds; 32 channels in 8 passes of 4
    assert small.of(CONV, bits(4, 8)) == 1024 * 9 * 8
    assert same.of(CONV, bits(4, 8)) == COSTS["bitfusion_cycles"].of(CONV, bits(4, 8))


def test_energy_is_the_arrays_and_the_drams():
    two = network(
        CONV.ops[0],
        Op("head", "linear", 10 * 64, "head.weight", "relu", channels=10, reduction=64),
        Op("side", "linear", 10 * 64, "side.weight", "relu", channels=10, reduction=64),
        sizes={"input": 16384, "conv.weight": 4608, "relu": 64, "head.weight": 640, "side.weight": 640},
    )

    used = COSTS["bitfusion_energy"].of(two, {**dict.fromkeys(float_bits(two), 8), "conv.weight": 3})

    cycles = 5 * 1024 + 4 + 4  # 64 products in 4 rounds of 16
    moved = 4608 * 4 + 16384 * 8 + (640 + 640) * 8 + 64 * 8 * 3  # relu is written once and read twice
    assert used == cycles * PAPER.rows * PAPER.columns * UNIT_FJ + moved * DRAM_FJ


def test_groups_of_a_convolution_follow_each_other():
    depthwise = network(
        Op("conv", "conv2d", 1024 * 32 * 9, "conv.weight", "input", channels=32, reduction=9, groups=32),
        sizes={"input": 32768, "conv.weight": 288},
    )

    assert COSTS["bitfusion_cycles"].of(depthwise, bits(8, 8)) == 1024 * 32


def test_the_groups_of_a_captured_network_are_counted():
    graph = capture(zoo.mobilenet_v2_cifar(), torch.zeros(2, 3, 32, 32))
    depthwise = [op for op in graph.profile.ops if op.kind == "conv2d" and op.reduction == 9]

    assert depthwise
    assert all(op.groups == op.channels for op in depthwise)
    assert {op.groups for op in graph.profile.ops if op not in depthwise} == {1}


def test_tensors_have_a_gradient_between_operands():
    weight = torch.tensor(3.0, requires_grad=True)

    used = COSTS["bitfusion_cycles"].of(CONV, {"conv.weight": weight, "input": torch.tensor(8.0)})
    used.backward()

    assert used.item() == (3 + 5) / 2 * 1024
    assert weight.grad.item() == (5 - 3) / 2 * 1024


def chain(layers: int) -> Profile:
    names = [f"l{place}" for place in range(layers)]
    ops = [
        Op(n, "linear", 100 * (1 + i) * 640, f"{n}.weight", "input" if i == 0 else f"{n}/relu", 10, 640)
        for i, n in enumerate(names)
    ]
    return network(*ops, sizes={site: 100 + len(site) for op in ops for site in (op.input, op.weight)})


@pytest.mark.parametrize("share", [0.3, 0.55, 0.8])
@pytest.mark.parametrize("name", ["bitfusion_cycles", "bitfusion_energy_8x8"])
def test_widths_of_least_damage_are_found_within_a_limit(name, share):
    profile = chain(2)
    cost = find_cost(name)
    most = cost.of(profile, dict.fromkeys(float_bits(profile), 8))
    budget = parse_budget(f"{name}={share * most:.0f}{'' if cost.unit == 'cycle' else 'fJ'}")
    allowed = choices(profile, WIDTHS, WIDTHS)

    found = fit(profile, dict.fromkeys(float_bits(profile), 8), budget, allowed)

    def damage(widths: dict[str, int]) -> float:
        return sum(noise_power(site, width) for site, width in widths.items())

    every = (dict(zip(float_bits(profile), widths, strict=True)) for widths in product(WIDTHS, repeat=4))
    assert budget.fits(profile, found)
    assert damage(found) == min(damage(widths) for widths in every if budget.fits(profile, widths))


def test_a_limit_that_no_width_meets_says_what_is_reachable():
    profile = chain(2)
    least = COSTS["bitfusion_cycles"].of(profile, dict.fromkeys(float_bits(profile), 2))

    with pytest.raises(InfeasibleError, match="reachable are 90 cycles to .*at least 90 cycles"):
        fit(
            profile,
            dict.fromkeys(float_bits(profile), 8),
            parse_budget("bitfusion_cycles=50"),
            choices(profile, WIDTHS, WIDTHS),
        )
    assert least == 10 * 3 + 20 * 3


@pytest.mark.parametrize(
    ("text", "asked", "shown"),
    [
        ("bitfusion_cycles=1.5M", 1.5e6, "1,500,000 cycles"),
        ("bitfusion_cycles_8x8=2k", 2e3, "2,000 cycles"),
        ("bitfusion_energy=20uJ", 2e10, "20.0000 uJ"),
    ],
)
def test_limits_are_read_and_written(text, asked, shown):
    (limit,) = parse_budget(text).limits

    assert limit.asked == asked
    assert format_amount(limit.cost, limit.asked) == shown


@pytest.mark.parametrize("text", ["bitfusion_cycles_8=1M", "bitfusion_cycles_0x8=1M", "bitfusion_watts=1"])
def test_unknown_limits_list_the_known_ones(text):
    with pytest.raises(ValueError, match=r"unknown limit .* known are .*bitfusion_cycles"):
        parse_budget(text)
