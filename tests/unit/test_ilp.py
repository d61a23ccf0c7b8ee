"""Least harm: the optimum of small problems by trying every choice, laws, and large problems in time."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import product
from math import fsum

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mixbits.core.budget import Budget, Limit, parse_budget
from mixbits.core.cost import COSTS
from mixbits.core.profile import Op, Profile, Site, Value
from mixbits.search import ilp, knapsack
from mixbits.search.greedy import Choices, InfeasibleError, choices
from mixbits.search.ilp import UnprovedWarning, least_harm

HARM_ROUNDING = 1e-9  # relative to the largest harm: what the solvers promise
Problem = tuple[Profile, Budget, Choices, dict[str, dict[int, float]], dict]


@st.composite
def problems(draw: st.DrawFn, most_sites: int = 6) -> Problem:
    """Networks in which any operation may read any activation or share a weight, and one to five limits.

    With pins and ties; harm of sites and of pairs of sites from a few levels (so that optima tie), or any.
    """
    weights, activations = draw(st.integers(1, most_sites // 2)), draw(st.integers(1, most_sites // 2))
    size = st.integers(1, 300)
    sites, ops, values = [], [], []
    sites += [Site(f"w{index}", "weight", (draw(size),), signed=True, readers=()) for index in range(weights)]
    for index in range(activations):
        name = "input" if index == 0 and draw(st.booleans()) else f"a{index}"
        sites.append(Site(name, "activation", (draw(size),), signed=False, readers=()))
        first = draw(st.integers(0, 3))
        values.append(Value(name, sites[-1].elements, name, first, first + draw(st.integers(0, 2))))
    values.append(Value("out", draw(st.integers(1, 20)), None, 3, 3))
    names = [site.name for site in sites]
    for index in range(draw(st.integers(1, 4))):
        weight, read = draw(st.sampled_from(names[:weights])), draw(st.sampled_from(names[weights:]))
        ops.append(Op(f"o{index}", "linear", draw(st.integers(1, 10**6)), weight, read, 1, 1))
    profile = Profile((1,), tuple(sites), tuple(ops), tuple(values), draw(st.integers(0, 20)))
    candidates = st.lists(st.integers(1, 8), min_size=1, max_size=3)
    pins = draw(st.dictionaries(st.sampled_from(names), st.integers(1, 8), max_size=1))
    ties = [sorted(tie) for tie in draw(st.lists(st.sets(st.sampled_from(names), min_size=2), max_size=1))]
    try:
        allowed = choices(profile, draw(candidates), draw(candidates), pins=pins, ties=ties)
    except ValueError:  # pinned or given different widths, but tied
        assume(False)
    limits = []
    for name in sorted(draw(st.sets(st.sampled_from(sorted(COSTS)), min_size=1, max_size=5))):
        low, high = (COSTS[name].of(profile, allowed.at(lowest=lowest)) for lowest in (True, False))
        limits.append(Limit(name, low + draw(st.floats(0, 1.1)) * (high - low), name))
    value = draw(st.sampled_from([st.integers(0, 3).map(float), st.floats(-5, 5), st.floats(0, 1)]))
    harm = {
        site: {width: draw(value) for width in allowed.widths[site]}
        for site in names
        if draw(st.integers(0, 4))
    }
    pairs = {
        (one, two): {w: draw(value) for w in product(allowed.widths[one], allowed.widths[two])}
        for one, two in draw(st.lists(st.tuples(*[st.sampled_from(names)] * 2), max_size=2, unique=True))
        if one != two
    }
    return profile, Budget(tuple(limits)), allowed, harm, pairs


def total(bits: dict[str, int], harm: dict, pairs: dict) -> float:
    alone = [table[bits[site]] for site, table in harm.items()]
    return fsum(alone + [table[bits[one], bits[two]] for (one, two), table in pairs.items()])


def fitting(profile: Profile, budget: Budget, allowed: Choices) -> list[dict[str, int]]:
    """Every choice that meets the budget."""
    found = []
    for widths in product(*(allowed.widths[group[0]] for group in allowed.groups)):
        bits = {site: w for group, w in zip(allowed.groups, widths, strict=True) for site in group}
        if budget.fits(profile, bits):
            found.append(bits)
    return found


def rounding(harm: dict, pairs: dict) -> float:
    tables = [*harm.values(), *pairs.values()]
    return HARM_ROUNDING * max((abs(v) for table in tables for v in table.values()), default=0.0)


def least(profile: Profile, budget: Budget, allowed: Choices, harm: dict, pairs: dict) -> float:
    return min(total(bits, harm, pairs) for bits in fitting(profile, budget, allowed))


@settings(max_examples=300)
@given(problems())
def test_no_choice_does_less_harm(problem):
    profile, budget, allowed, harm, pairs = problem

    bits = least_harm(profile, budget, allowed, harm, pairs)

    assert budget.fits(profile, bits)
    assert list(bits) == [site.name for site in profile.sites]
    assert all(bits[site] in widths for site, widths in allowed.widths.items())
    assert all(len({bits[site] for site in group}) == 1 for group in allowed.groups)
    assert total(bits, harm, pairs) <= least(*problem) + rounding(harm, pairs)


@settings(max_examples=100)
@given(problems())
def test_branch_and_cut_finds_no_less_harm_than_there_is_and_no_more(problem):
    profile, budget, allowed, harm, pairs = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ilp, "MOST_OPTIONS", 0)  # every class has too many options
        bits = least_harm(profile, budget, allowed, harm, pairs)

    assert budget.fits(profile, bits)
    assert total(bits, harm, pairs) <= least(*problem) + rounding(harm, pairs)


@given(problems(), st.randoms())
def test_the_order_of_sites_does_not_matter(problem, random):
    profile, budget, allowed, harm, pairs = problem

    def shuffled(items):
        return tuple(random.sample(list(items), len(items)))

    other = replace(profile, sites=shuffled(profile.sites), ops=shuffled(profile.ops))
    turned = Choices(allowed.widths, shuffled([shuffled(group) for group in allowed.groups]))

    assert least_harm(other, budget, turned, dict(shuffled(harm.items())), pairs) == least_harm(*problem)


@given(problems(), st.integers(-20, 20))
def test_the_scale_of_harm_does_not_matter(problem, exponent):
    profile, budget, allowed, harm, pairs = problem
    factor = 2.0**exponent  # exact, so that ties stay ties
    more, both = (
        {key: {w: v * factor for w, v in table.items()} for key, table in tables.items()}
        for tables in (harm, pairs)
    )

    bits = least_harm(profile, budget, allowed, more, both)

    assert total(bits, harm, pairs) <= least(*problem) + rounding(harm, pairs)


@given(problems(), st.floats(1, 2))
def test_a_larger_budget_never_does_more_harm(problem, factor):
    profile, budget, allowed, harm, pairs = problem
    larger = Budget(tuple(replace(limit, asked=limit.asked * factor) for limit in budget.limits))

    bits, looser = least_harm(*problem), least_harm(profile, larger, allowed, harm, pairs)

    assert total(looser, harm, pairs) <= total(bits, harm, pairs) + rounding(harm, pairs)


def layers(sizes: list[int], values: list[int] | None = None) -> Profile:
    """Operations with a weight and an activation each."""
    names, values = [f"l{index}" for index in range(len(sizes))], values or [1] * len(sizes)
    weights = [Site(f"{n}.weight", "weight", (s,), True, (n,)) for n, s in zip(names, sizes, strict=True)]
    reads = [Site(f"{n}.read", "activation", (s,), False, (n,)) for n, s in zip(names, values, strict=True)]
    ops = [
        Op(n, "linear", 97 * s, f"{n}.weight", f"{n}.read", 1, s) for n, s in zip(names, sizes, strict=True)
    ]
    return Profile((1,), (*weights, *reads), tuple(ops), (Value("l0.read", 1, "l0.read", 0, 0),), 0)


E6 = layers([1000, 2000, 4000, 8000, 16000])
E6_SENSITIVITY = (0.100, 0.030, 0.100, 0.015, 0.060)


@pytest.mark.parametrize(
    ("mean", "candidates", "expected", "objective"),
    [
        (2.0, (2, 4), (2, 2, 2, 2, 2), 0.61),
        (2.2, (2, 4), (4, 4, 2, 2, 2), 0.87),
        (2.5, (2, 4), (4, 4, 4, 2, 2), 1.07),
        (3.0, (2, 4), (4, 4, 4, 4, 2), 1.10),
        (3.5, (2, 4), (4, 4, 4, 2, 4), 1.19),
        (4.0, (2, 4), (4, 4, 4, 4, 4), 1.22),
        (2.0, (2, 3, 4), (2, 2, 2, 2, 2), 0.61),
        (2.2, (2, 3, 4), (4, 2, 3, 2, 2), 0.91),
        (2.5, (2, 3, 4), (4, 4, 4, 2, 2), 1.07),
        (3.0, (2, 3, 4), (4, 4, 4, 2, 3), 1.13),
        (3.5, (2, 3, 4), (4, 4, 4, 2, 4), 1.19),
        (4.0, (2, 3, 4), (4, 4, 4, 4, 4), 1.22),
    ],
)
def test_the_worked_example_of_bmpq(mean, candidates, expected, objective):
    weights = [site.name for site in E6.weights]
    harm = {n: {w: -s * w for w in candidates} for n, s in zip(weights, E6_SENSITIVITY, strict=True)}

    bits = least_harm(E6, parse_budget(f"weights={mean}bit"), choices(E6, candidates, (8,)), harm)

    assert tuple(bits[name] for name in weights) == expected
    assert -total(bits, harm, {}) == pytest.approx(objective, abs=1e-12)


def test_a_budget_out_of_reach_is_infeasible():
    with pytest.raises(InfeasibleError, match=r"1\.900bit|weights=1\.9bit"):
        least_harm(E6, parse_budget("weights=1.9bit"), choices(E6, (2, 4), (8,)), {})


def test_of_equal_harm_the_smaller_cost_is_taken_and_then_the_first_names():
    profile = layers([100, 100, 60, 60])
    harm = {site.name: {2: 1.0, 4: 0.0} for site in profile.weights}

    bits = least_harm(profile, parse_budget("weights=125B"), choices(profile, (2, 4), (8,)), harm)

    # Room for 45 bytes: one layer of 100 values (25 bytes more) and one of 60 (15), or both of 60 (30).
    assert [bits[site.name] for site in profile.weights] == [2, 2, 4, 4]


def test_a_limit_is_met_to_the_last_operation():
    profile = layers([10**9, 10**9 + 1])
    harm = {"l0.weight": {2: 1.0, 3: 0.0}, "l1.weight": {2: 1.01, 3: 0.0}}
    lowest = COSTS["bops"].of(profile, {"l0.weight": 2, "l1.weight": 2, "l0.read": 8, "l1.read": 8})
    allowed = choices(profile, (2, 3), (8,))
    step = 97 * 8 * (10**9 + 1)

    exact = least_harm(profile, Budget((Limit("bops", lowest + step, "bops"),)), allowed, harm)
    below = least_harm(profile, Budget((Limit("bops", lowest + step - 1, "bops"),)), allowed, harm)

    assert (exact["l0.weight"], exact["l1.weight"]) == (2, 3)
    assert (below["l0.weight"], below["l1.weight"]) == (3, 2)


def test_harm_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match=r"harm of l0\.weight is not finite"):
        least_harm(
            E6, parse_budget("weights=4bit"), choices(E6, (2, 4), (8,)), {"l0.weight": {2: np.inf, 4: 0.0}}
        )


def random_problem(seed: int, count: int, spread: float = 2.0) -> Problem:
    """Layers of random sizes, sensitivities and 25 pairs of widths, under three limits."""
    draw, widths = np.random.default_rng(seed), (2, 3, 4, 6, 8)
    profile = layers(*(draw.integers(1000, 500_000, count).tolist() for _ in range(2)))
    macs = draw.integers(10**6, 10**8, count).tolist()
    ops = tuple(replace(op, macs=n) for op, n in zip(profile.ops, macs, strict=True))
    profile, allowed = replace(profile, ops=ops), choices(profile, widths, widths)
    sensitivity = {site.name: float(draw.lognormal(0, spread)) for site in profile.sites}
    harm = {site: {w: s * 4.0**-w for w in widths} for site, s in sensitivity.items()}
    limits = []
    for name, share in (("weights", 0.27), ("act_sum", 0.33), ("bops", 0.16)):
        low, high = (COSTS[name].of(profile, allowed.at(lowest=lowest)) for lowest in (True, False))
        limits.append(Limit(name, low + share * (high - low), name))
    return profile, Budget(tuple(limits)), allowed, harm, {}


def test_nothing_is_printed(capfd):
    capfd.readouterr()  # what pytest itself said before
    least_harm(*random_problem(0, 30))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ilp, "MOST_OPTIONS", 0)
        least_harm(*random_problem(0, 30))

    assert capfd.readouterr() == ("", "")


def test_a_search_that_is_given_up_says_how_much_may_be_missing(monkeypatch):
    monkeypatch.setattr(knapsack, "MOST_LISTED", 100)
    monkeypatch.setattr(ilp, "MOST_NODES", 1)
    profile, budget, allowed, harm, pairs = random_problem(1, 60)

    with pytest.warns(UnprovedWarning, match="other widths may do less harm, by at most"):
        bits = least_harm(profile, budget, allowed, harm, pairs)

    assert budget.fits(profile, bits)


def test_layers_that_are_alike_take_no_longer_than_their_number():
    profile = layers([4096] * 200, [512] * 200)
    allowed = choices(profile, (2, 3, 4, 8), (2, 4, 8))
    harm = {site.name: {w: 4.0**-w for w in (2, 3, 4, 8)} for site in profile.sites}

    bits = least_harm(profile, parse_budget("weights=3.3bit,act=4.1bit"), allowed, harm)

    # 3.3 bit: 60 bit over 200 layers of 3, so 60 layers at 4. 4.1 bit: 20 bit over 4, so 5 layers at 8.
    assert sorted(bits[site.name] for site in profile.weights) == [3] * 140 + [4] * 60
    assert sorted(bits[site.name] for site in profile.activations) == [4] * 195 + [8] * 5


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_four_hundred_layers_take_less_than_two_seconds_of_one_core(seed):
    problem = random_problem(seed, 400)

    began = time.process_time()
    bits = least_harm(*problem)
    seconds = time.process_time() - began

    assert problem[1].fits(problem[0], bits)
    assert seconds < 2.0
