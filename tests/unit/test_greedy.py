"""Greedy widths: they fit whenever anything fits, and nothing that fits is left over."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mixbits.core.budget import Budget, Limit, parse_budget
from mixbits.core.cost import COSTS
from mixbits.core.profile import Op, Profile, Site, Value
from mixbits.search.greedy import Choices, InfeasibleError, check_feasible, choices, fit
from strategies import profiles

# input 64 -> a: 100 weights -> relu of 50 values -> b: 300 weights
PROFILE = Profile(
    input_shape=(64,),
    sites=(
        Site("input", "activation", (64,), signed=True, readers=("a",)),
        Site("a.weight", "weight", (100,), signed=True, readers=("a",)),
        Site("relu", "activation", (50,), signed=False, readers=("b",)),
        Site("b.weight", "weight", (300,), signed=True, readers=("b",)),
    ),
    ops=(
        Op("a", "linear", 6400, "a.weight", "input", channels=50, reduction=64),
        Op("b", "linear", 300, "b.weight", "relu", channels=6, reduction=50),
    ),
    values=(Value("input", 64, "input", 0, 1), Value("relu", 50, "relu", 1, 2), Value("b", 6, None, 2, 3)),
    stored_floats=10,
)
WIDTHS = (2, 4, 8)
WIDEST = dict.fromkeys(("input", "a.weight", "relu", "b.weight"), 8)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Profile, Budget, Choices, dict[str, int]]:
    """A network, one to four limits between its lowest and highest cost, candidates with pins and ties, and wishes."""
    profile = draw(profiles())
    names = [site.name for site in profile.sites]
    candidates = st.lists(st.integers(1, 8), min_size=1, max_size=4)
    weights, activations = draw(candidates), draw(candidates)
    pins = draw(st.dictionaries(st.sampled_from(names), st.integers(1, 8), max_size=2))
    ties = [sorted(tie) for tie in draw(st.lists(st.sets(st.sampled_from(names), min_size=2), max_size=2))]
    try:
        allowed = choices(profile, weights, activations, pins=pins, ties=ties)
    except ValueError:  # pinned or given different widths, but tied
        assume(False)
    limits = []
    for name in draw(st.sets(st.sampled_from(sorted(COSTS)), min_size=1, max_size=4)):
        low, high = (COSTS[name].of(profile, allowed.at(lowest=lowest)) for lowest in (True, False))
        limits.append(Limit(name, low + draw(st.floats(0, 1.2)) * (high - low), name))
    return profile, Budget(tuple(limits)), allowed, {name: draw(st.integers(1, 9)) for name in names}


def widened(bits: dict[str, int], allowed: Choices) -> list[dict[str, int]]:
    """Every choice in which one group has its next wider candidate."""
    moves = []
    for group in allowed.groups:
        wider = [width for width in allowed.widths[group[0]] if width > bits[group[0]]]
        if wider:
            moves.append({**bits, **dict.fromkeys(group, wider[0])})
    return moves


@given(problems(), st.booleans())
def test_widths_fit_their_budget_and_their_candidates(problem, fill):
    profile, budget, allowed, wish = problem

    bits = fit(profile, wish, budget, allowed, fill=fill)

    assert budget.fits(profile, bits)
    assert set(bits) == {site.name for site in profile.sites}
    assert all(width in allowed.widths[site] for site, width in bits.items())
    assert all(len({bits[site] for site in group}) == 1 for group in allowed.groups)


@given(problems())
def test_nothing_that_fits_is_left_over(problem):
    profile, budget, allowed, wish = problem

    bits = fit(profile, wish, budget, allowed)

    assert not [move for move in widened(bits, allowed) if budget.fits(profile, move)]


@given(problems())
def test_without_fill_no_site_is_wider_than_wished(problem):
    profile, budget, allowed, wish = problem

    bits = fit(profile, wish, budget, allowed, fill=False)

    for group in allowed.groups:
        widths = allowed.widths[group[0]]
        wished = max(wish[site] for site in group)
        assert bits[group[0]] <= min([width for width in widths if width >= wished], default=widths[-1])


@given(problems())
def test_the_same_problem_has_the_same_answer(problem):
    profile, budget, allowed, wish = problem

    assert fit(profile, wish, budget, allowed) == fit(profile, dict(reversed(wish.items())), budget, allowed)


@given(problems())
def test_a_budget_below_the_lowest_widths_is_infeasible(problem):
    profile, budget, allowed, wish = problem
    limit = budget.limits[0]
    least = limit.used(profile, allowed.at(lowest=True))
    impossible = Budget((*budget.limits[1:], Limit(limit.cost, least * 0.99, "too little")))

    with pytest.raises(InfeasibleError):
        fit(profile, wish, impossible, allowed)


def test_wishes_that_fit_are_kept():
    wish = {"input": 8, "a.weight": 4, "relu": 4, "b.weight": 2}
    allowed = choices(PROFILE, WIDTHS, WIDTHS)

    assert fit(PROFILE, wish, parse_budget("weights=125B"), allowed, fill=False) == wish


def test_wishes_between_candidates_are_rounded_up():
    allowed = choices(PROFILE, WIDTHS, WIDTHS)

    bits = fit(PROFILE, dict.fromkeys(WIDEST, 3), parse_budget("weights=1KiB"), allowed, fill=False)

    assert set(bits.values()) == {4}


def test_the_rest_of_a_budget_is_spent():
    allowed = choices(PROFILE, WIDTHS, WIDTHS)

    bits = fit(PROFILE, dict.fromkeys(WIDEST, 2), parse_budget("weights=200B"), allowed)

    # Both weights at 4 bit take exactly 200 bytes; activations do not count and become as wide as they may.
    assert bits == {"input": 8, "a.weight": 4, "relu": 8, "b.weight": 4}


@pytest.mark.parametrize(
    ("limit", "relu"),
    [("act_max=50B", 8), ("act_max=49B", 4), ("act_max=25B", 4), ("act_max=24B", 2)],
)
def test_a_limit_on_the_largest_activation_caps_it_and_nothing_else(limit, relu):
    bits = fit(PROFILE, WIDEST, parse_budget(limit), choices(PROFILE, WIDTHS, WIDTHS), fill=False)

    assert bits == {**WIDEST, "relu": relu}


def test_tied_sites_take_the_widest_wish_among_them():
    allowed = choices(PROFILE, WIDTHS, WIDTHS, ties=[("a.weight", "relu")])

    bits = fit(
        PROFILE, {**WIDEST, "a.weight": 2, "relu": 4}, parse_budget("weights=1KiB"), allowed, fill=False
    )

    assert bits == {**WIDEST, "a.weight": 4, "relu": 4}


def test_a_pin_binds_the_sites_that_are_tied_to_it():
    allowed = choices(PROFILE, WIDTHS, WIDTHS, pins={"relu": 4}, ties=[("a.weight", "relu")])

    assert fit(PROFILE, WIDEST, parse_budget("weights=1KiB"), allowed) == {**WIDEST, "a.weight": 4, "relu": 4}


def test_ties_that_share_a_site_are_one_tie():
    ties = [("input", "relu"), ("a.weight", "b.weight"), ("b.weight", "relu")]

    allowed = choices(PROFILE, WIDTHS, (4, 8), ties=ties)

    assert [sorted(group) for group in allowed.groups] == [["a.weight", "b.weight", "input", "relu"]]
    assert set(allowed.widths.values()) == {(4, 8)}


def test_a_pin_need_not_be_a_candidate():
    allowed = choices(PROFILE, (2,), (2,), pins={"b.weight": 7})

    assert allowed.widths == {"input": (2,), "a.weight": (2,), "relu": (2,), "b.weight": (7,)}


def test_ties_without_a_common_width_are_refused():
    with pytest.raises(ValueError, match=r"tied sites a\.weight, relu have no width in common"):
        choices(PROFILE, (2, 3), (4, 5), ties=[("a.weight", "relu")])


@pytest.mark.parametrize(
    "arguments", [{"pins": {"b.wieght": 4}}, {"ties": [("a.weight", "b.wieght")]}], ids=["pin", "tie"]
)
def test_an_unknown_site_is_answered_with_the_nearest_name(arguments):
    with pytest.raises(ValueError, match=r"unknown site 'b\.wieght'.*Did you mean 'b\.weight'"):
        choices(PROFILE, WIDTHS, WIDTHS, **arguments)


def test_an_infeasible_budget_says_what_can_be_reached():
    allowed = choices(PROFILE, (2, 4), WIDTHS, pins={"a.weight": 8})
    budget = parse_budget("weights=174B,bops=1G,act_max=12B")

    with pytest.raises(InfeasibleError) as raised:
        check_feasible(PROFILE, budget, allowed)

    # 100 weights pinned at 8 bit and 300 at 2 or 4 bit; 50 activations at 2 or 8 bit.
    assert "  weights=174B: reachable are 175 B to 250 B; at least 175 B, which is 1 B above\n" in str(
        raised.value
    )
    assert "  act_max=12B: reachable are 13 B to 50 B; at least 13 B, which is 1 B above\n" in str(
        raised.value
    )
    assert "bops" not in str(raised.value)
    assert "Ask for more, allow narrower candidates, or drop a pin." in str(raised.value)


def test_the_site_that_suffers_least_is_narrowed():
    def damage(site: str, bits: int) -> float:
        return (1000.0 if site == "b.weight" else 1.0) * 4.0**-bits

    bits = fit(
        PROFILE, WIDEST, parse_budget("weights=350B"), choices(PROFILE, WIDTHS, WIDTHS), damage, fill=False
    )

    # 350 of 400 bytes: either weight could be narrowed to 4 bit.
    assert bits == {**WIDEST, "a.weight": 4}


def test_sites_whose_width_does_no_damage_are_narrowed_first():
    def damage(site: str, bits: int) -> float:
        return 0.0 if site == "b.weight" else 4.0**-bits

    bits = fit(
        PROFILE, WIDEST, parse_budget("weights=250B"), choices(PROFILE, WIDTHS, WIDTHS), damage, fill=False
    )

    assert bits == {**WIDEST, "b.weight": 4}


def test_greedy_finds_the_least_damage_of_all_choices_for_a_small_network():
    budget = parse_budget("weights=180B,bops=150k,act_sum=30B")
    every = [dict(zip(WIDEST, widths, strict=True)) for widths in product(WIDTHS, repeat=4)]

    def damage(bits: dict[str, int]) -> float:
        return sum(4.0**-width for width in bits.values())

    bits = fit(PROFILE, WIDEST, budget, choices(PROFILE, WIDTHS, WIDTHS))

    assert damage(bits) == min(damage(bits) for bits in every if budget.fits(PROFILE, bits))
