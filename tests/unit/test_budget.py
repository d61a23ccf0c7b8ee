"""Budgets: what people write, in which units, and what is said when it cannot be read."""

from __future__ import annotations

import pytest
from hypothesis import given

from mixbits.core.budget import AVERAGES, Budget, Limit, format_amount, parse_budget
from mixbits.core.cost import COSTS
from mixbits.core.profile import Op, Profile, Site, Value
from strategies import profiles

# A convolution of 100 weights that reads the input, then a linear layer of 300 weights.
PROFILE = Profile(
    input_shape=(1, 8, 8),
    sites=(
        Site("input", "activation", (1, 8, 8), signed=True, readers=("conv",)),
        Site("conv.weight", "weight", (100,), signed=True, readers=("conv",)),
        Site("relu", "activation", (50,), signed=False, readers=("linear",)),
        Site("linear.weight", "weight", (300,), signed=True, readers=("linear",)),
    ),
    ops=(
        Op("conv", "conv2d", 1000, "conv.weight", "input", channels=4, reduction=25),
        Op("linear", "linear", 300, "linear.weight", "relu", channels=6, reduction=50),
    ),
    values=(
        Value("input", 64, "input", 0, 1),
        Value("relu", 50, "relu", 1, 2),
        Value("linear", 6, None, 2, 3),
    ),
    stored_floats=22,
)
BITS = {"input": 8, "conv.weight": 4, "relu": 2, "linear.weight": 2}

AMOUNTS = {
    "bytes": ("weights=100B", "weights", 100),
    "kB is 1000 bytes": ("weights=70kB", "weights", 70_000),
    "KB is 1000 bytes": ("weights=70KB", "weights", 70_000),
    "KiB is 1024 bytes": ("weights=70KiB", "weights", 71_680),
    "MB": ("size=1.5MB", "size", 1_500_000),
    "MiB": ("size=1.5MiB", "size", 1_572_864),
    "GB": ("size=2GB", "size", 2_000_000_000),
    "GiB": ("size=2GiB", "size", 2**31),
    "bops without unit": ("bops=1000", "bops", 1000),
    "bops in k": ("bops=1k", "bops", 1000),
    "bops in M": ("bops=3M", "bops", 3_000_000),
    "bops in G": ("bops=0.649G", "bops", 649_000_000),
    "bops in GBOP": ("bops=0.5GBOP", "bops", 500_000_000),
    "bops in T": ("bops=1T", "bops", 10**12),
    "exponent": ("bops=6.5e8", "bops", 650_000_000),
    "average weight width": ("weights=3.5bit", "weight_bits", 3.5),
    "average activation width": ("act=4bits", "act_bits", 4),
    "largest activation": ("act_max=8.5KiB", "act_max", 8704),
    "sum of activations": ("act_sum=92KiB", "act_sum", 94_208),
    "peak": ("act_peak=1kB", "act_peak", 1000),
    "spaces": (" weights = 70 KiB ", "weights", 71_680),
}

WRONG = {
    "empty": ("", "the budget is empty; write for example weights=70KiB"),
    "only commas": (" , ", "the budget is empty"),
    "unknown limit": ("watts=3", "unknown limit 'watts' in 'watts=3'; known are act, act_max, .*weights"),
    "internal name": ("weight_bits=4bit", "unknown limit 'weight_bits'"),
    "unknown unit": (
        "weights=70kb",
        r"unknown unit 'kb' in 'weights=70kb'; weights is given in B, kB.*or bit",
    ),
    "no unit": ("weights=70", "unknown unit '' in 'weights=70'"),
    "unit of another cost": (
        "bops=70KiB",
        r"unknown unit 'KiB' in 'bops=70KiB'; bops is given in \(none\), k, M",
    ),
    "width of a size": ("size=4bit", "unknown unit 'bit'"),
    "bytes of an average": ("act=4KiB", "'act' is an average width; write for example act=4bit"),
    "twice": ("weights=70KiB,bops=1G,weights=80KiB", "the budget limits weights twice; give each limit once"),
    "negative": ("weights=-1KiB", "cannot read the limit 'weights=-1KiB'"),
    "zero": ("weights=0KiB", "'weights=0KiB': a limit must be above 0"),
    "no number": ("weights=KiB", "cannot read the limit 'weights=KiB'; write name=number and unit"),
    "two points": ("weights=1.2.3KiB", "'1.2.3' in 'weights=1.2.3KiB' is not a number"),
    "colon": ("weights:70KiB", "cannot read the limit"),
    "second limit wrong": ("weights=70KiB;bops=1G", "cannot read the limit"),
}


@pytest.mark.parametrize(("text", "cost", "amount"), AMOUNTS.values(), ids=AMOUNTS)
def test_a_limit_is_read_in_its_unit(text, cost, amount):
    (limit,) = parse_budget(text).limits

    assert (limit.cost, limit.asked) == (cost, amount)


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_a_budget_that_cannot_be_read_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_budget(text)


def test_a_budget_is_written_as_it_was_read():
    text = "weights=70KiB,act_max=8.1KiB,bops=0.5G"

    assert str(parse_budget(text)) == text
    assert parse_budget(str(parse_budget(text))) == parse_budget(text)


def test_an_average_and_a_size_of_weights_can_both_be_limited():
    limits = parse_budget("weights=4bit,weights=70KiB").limits

    assert [limit.cost for limit in limits] == ["weight_bits", "weights"]


def test_every_cost_can_be_limited():
    written = {cost: name for name, cost in AVERAGES.items()}
    example = {"bytes": "1KiB", "bit": "4bit", "bop": "1M", "cycle": "1M", "fJ": "1uJ"}

    text = ",".join(f"{written.get(name, name)}={example[cost.unit]}" for name, cost in COSTS.items())

    assert [limit.cost for limit in parse_budget(text).limits] == list(COSTS)


def test_costs_of_a_small_network_are_those_computed_by_hand():
    used = {name: cost.of(PROFILE, BITS) for name, cost in COSTS.items()}

    assert used == {
        "weights": 50 + 75,  # bytes: 100 x 4 bit, 300 x 2 bit
        "weight_bits": (100 * 4 + 300 * 2) / 400,
        "size": 125 + 4 * 22,
        "bops": 1000 * 4 * 8 + 300 * 2 * 2,
        "act_max": 13,  # 50 x 2 bit is 12.5 bytes; the input does not count
        "act_sum": 13,
        "act_bits": 2.0,
        "act_peak": 64 + 13,  # at moment 1: the input's codes and the ReLU's
        "bitfusion_cycles": 10 + 1,  # both fit the rows: 25 products of 32 at 4 x 8 bit, 50 of 256 at 2 x 2
        # the array, then DRAM: weights, the input read, the ReLU written and read
        "bitfusion_energy": 11 * 16 * 32 * 459 + (100 * 4 + 300 * 2 + 64 * 8 + 50 * 2 * 2) * 15_000,
    }


def test_averages_count_values_and_not_layers():
    (limit,) = parse_budget("weights=2.5bit").limits

    assert limit.used(PROFILE, BITS) == 2.5  # the mean of the two widths is 3


def test_a_limit_that_is_used_up_exactly_holds():
    assert parse_budget("weights=125B").fits(PROFILE, BITS)
    assert not parse_budget("weights=124B").fits(PROFILE, BITS)


def test_a_budget_names_the_limits_that_are_exceeded():
    budget = parse_budget("weights=124B,bops=1M,act_max=12B")

    assert [limit.text for limit in budget.exceeded(PROFILE, BITS)] == ["weights=124B", "act_max=12B"]


@given(profiles())
def test_a_network_fits_a_budget_of_what_it_uses(profile):
    bits = {site.name: 3 for site in profile.sites}
    used = {name: cost.of(profile, bits) for name, cost in COSTS.items()}

    assert Budget(tuple(Limit(name, amount, name) for name, amount in used.items())).fits(profile, bits)


@pytest.mark.parametrize(
    ("cost", "amount", "text"),
    [
        ("weights", 1023, "1023 B"),
        ("weights", 1024, "1.00 KiB"),
        ("weights", 67_084, "65.51 KiB"),
        ("act_bits", 2.5, "2.500 bit"),
        ("bops", 648_806_400, "0.6488 GBOP"),
    ],
    ids=["bytes", "one KiB", "KiB", "bit", "GBOP"],
)
def test_an_amount_is_written_in_a_unit_that_people_read(cost, amount, text):
    assert format_amount(cost, amount) == text
