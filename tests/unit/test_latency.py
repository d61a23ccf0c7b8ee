"""Latency as a cost: tables, what integers and tensors make of them, and solvers that take no order for granted."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixbits.core.budget import Budget, Limit, budget_points, format_amount, parse_budget
from mixbits.core.cost import Lookup
from mixbits.core.latency import LatencyTable, LayerTimes, read_latency
from mixbits.core.profile import Op, Profile, Site
from mixbits.search.fit import fit
from mixbits.search.greedy import Choices, InfeasibleError, choices
from mixbits.search.ilp import check_feasible, least_harm

FLOAT64 = 1e-9  # relative: a handful of operations in float64
WIDTHS = (2, 4, 8)


def site(name: str, kind: str, elements: int = 10) -> Site:
    return Site(name, kind, (elements,), signed=kind == "weight", readers=())


# Two layers read one activation, a third another.
PROFILE = Profile(
    (1,),
    (
        *(site(f"w{i}", "weight", 100 * (i + 1)) for i in range(3)),
        site("x", "activation"),
        site("y", "activation"),
    ),
    (
        Op("a", "linear", 1000, "w0", "x", 1, 1),
        Op("b", "linear", 2000, "w1", "x", 1, 1),
        Op("c", "linear", 3000, "w2", "y", 1, 1),
    ),
    (),
    0,
)


def table(ns: dict[str, list[list[int]]], *, rest: int = 0, widths: tuple[int, ...] = WIDTHS) -> LatencyTable:
    layers = tuple(
        LayerTimes(op.name, op.macs, tuple(map(tuple, ns[op.name])), (("k",) * len(widths),) * len(widths))
        for op in PROFILE.ops
    )
    about = {"network": "n", "cpu": "c", "isa": "native", "mixbits": "0", "date": "d", "file": "t.json"}
    return LatencyTable(
        **about, threads=2, batch=1, tuned=False, weight_bits=widths, activation_bits=widths, layers=layers,
        rest_ns=rest,
    )  # fmt: skip


# In whole milliseconds: 4 bits are the fastest of layer a, and wide activations of layer c.
MS = 1_000_000
TIMES = {
    "a": [[3 * MS, 3 * MS, 5 * MS], [1 * MS, 2 * MS, 5 * MS], [4 * MS, 4 * MS, 4 * MS]],
    "b": [[2 * MS, 3 * MS, 4 * MS], [3 * MS, 3 * MS, 4 * MS], [4 * MS, 4 * MS, 4 * MS]],
    "c": [[9 * MS, 8 * MS, 1 * MS], [9 * MS, 8 * MS, 2 * MS], [9 * MS, 8 * MS, 3 * MS]],
}
TABLE = table(TIMES, rest=5 * MS)

times = st.lists(st.lists(st.integers(0, 9 * MS), min_size=3, max_size=3), min_size=3, max_size=3)


@st.composite
def tables(draw: st.DrawFn) -> LatencyTable:
    """Any times, in no order."""
    return table({op.name: draw(times) for op in PROFILE.ops}, rest=draw(st.integers(0, MS)))


def every(allowed: Choices) -> list[dict[str, int]]:
    sites = list(allowed.widths)
    return [dict(zip(sites, w, strict=True)) for w in product(*(allowed.widths[s] for s in sites))]


# --- the cost ----------------------------------------------------------------------------------------------------


@given(tables(), st.lists(st.sampled_from(WIDTHS), min_size=5, max_size=5))
def test_integers_and_tensors_agree_where_it_was_measured(measured, widths):
    bits = dict(zip((s.name for s in PROFILE.sites), widths, strict=True))
    tensors = {name: torch.tensor(float(b), dtype=torch.float64) for name, b in bits.items()}
    amount = measured.amount(PROFILE)

    ns = [layer.ns for layer in measured.layers]
    place = {name: WIDTHS.index(b) for name, b in bits.items()}
    by_hand = measured.rest_ns + sum(
        ns[i][place[op.weight]][place[op.input]] for i, op in enumerate(PROFILE.ops)
    )
    assert amount.of(bits) == by_hand / MS
    assert float(amount.of(tensors)) == pytest.approx(by_hand / MS, rel=FLOAT64, abs=FLOAT64)


@given(times, st.floats(2, 8), st.floats(2, 8))
def test_between_widths_a_time_lies_between_those_of_its_cell(values, weight, activation):
    lookup = Lookup(("w", "x"), (WIDTHS, WIDTHS), tuple(map(tuple, values)))
    found = float(lookup.amount(torch.tensor(weight, dtype=torch.float64), activation))

    row, column = (0 if bits < 4 else 1 for bits in (weight, activation))
    cell = [values[r][c] for r in (row, row + 1) for c in (column, column + 1)]
    slack = FLOAT64 * max(cell)
    assert min(cell) - slack <= found <= max(cell) + slack


def test_a_penalty_pulls_towards_the_wider_width_where_that_is_faster():
    weight = torch.tensor(3.0, requires_grad=True)

    TABLE.amount(PROFILE).of({"w0": weight, "w1": 2, "w2": 2, "x": 2, "y": 2}).backward()

    assert weight.grad is not None
    assert weight.grad.item() == pytest.approx((1 - 3) / 2)  # milliseconds a bit: 3 at 2 bits, 1 at 4


def test_a_table_of_one_width_has_no_slope():
    lookup = Lookup(("w", "x"), ((4,), (2, 8)), ((10, 40),))

    assert [lookup.amount(*bits) for bits in ((4, 2), (4, 8), (7.5, 5))] == [10, 40, 25.0]


def test_a_limit_on_latency_counts_the_rest_too():
    (limit,) = parse_budget("ms=13.0", TABLE).limits

    bits = dict.fromkeys((s.name for s in PROFILE.sites), 4)
    assert limit.used(PROFILE, bits) == 5 + 2 + 3 + 8
    assert (limit.cost, limit.asked, limit.unit) == ("ms", 13.0, "ms")
    assert format_amount("ms", 18.0) == "18.000 ms"


def test_ranges_of_latencies_are_read_without_a_table():
    assert budget_points("ms=2..3:3") == ("ms=2", "ms=2.5", "ms=3")


# --- errors ------------------------------------------------------------------------------------------------------


def test_a_limit_on_latency_without_a_table_says_how_to_make_one():
    with pytest.raises(ValueError, match=r"ms=3: a limit on latency needs a table.*mixbits profile"):
        parse_budget("ms=3")


def test_a_layer_that_was_not_measured_is_named():
    other = replace(PROFILE, ops=(*PROFILE.ops, Op("head", "linear", 10, "w2", "y", 1, 1)))

    with pytest.raises(ValueError, match=r"head: the latency table t\.json has no such layer"):
        TABLE.amount(other)


def test_a_layer_of_another_size_is_named():
    other = replace(PROFILE, ops=(replace(PROFILE.ops[0], macs=999), *PROFILE.ops[1:]))

    with pytest.raises(
        ValueError, match=r"a: the layer has 999 MACs, that of the latency table t\.json 1000"
    ):
        TABLE.amount(other)


@pytest.mark.parametrize("pin", ["w1", "x"])
def test_a_pair_of_widths_that_was_not_measured_is_named(pin):
    layer = {"w1": "b", "x": "a"}[pin]

    with pytest.raises(ValueError, match=f"{layer}: the latency table t.json has no time for"):
        check_feasible(PROFILE, parse_budget("ms=99", TABLE), choices(PROFILE, WIDTHS, WIDTHS, pins={pin: 5}))


@pytest.mark.parametrize(
    ("here", "message"),
    [
        (("other", "native", 2), "holds for the CPU 'c', this is 'other'"),
        (("c", "avx2", 2), "holds for the level of instructions 'native', this is 'avx2'"),
        (("c", "native", 1), "holds for 2 threads, this process may use 1 cores"),
    ],
    ids=["CPU", "instructions", "threads"],
)
def test_a_table_of_another_machine_is_refused(here, message):
    TABLE.check_machine("c", "native", 2)
    with pytest.raises(ValueError, match=message):
        TABLE.check_machine(*here)


def test_a_table_is_read_as_it_was_written(tmp_path: Path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps(TABLE.to_json()))

    assert read_latency(path).to_json() == TABLE.to_json()


def damaged(**changes) -> str:
    return json.dumps(TABLE.to_json() | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "not JSON": ("{", "cannot be read as a latency table"),
        "a list": ("[]", "not a mixbits-latency of version 1"),
        "newer": (damaged(version=2), "not a mixbits-latency of version 1"),
        "no widths": (damaged(weight_bits=None), "the latency table is damaged"),
        "unknown key": (damaged(more=1), "the latency table is damaged"),
        "a width too many": (damaged(weight_bits=[2, 4, 6, 8]), "the times of a are not one a pair"),
    }.values(),
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, text, message):
    path = tmp_path / "t.json"
    path.write_text(text)

    with pytest.raises(ValueError, match=message):
        read_latency(path)


def test_a_missing_table_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"there is no latency table .*none\.json"):
        read_latency(tmp_path / "none.json")


# --- solvers -----------------------------------------------------------------------------------------------------


@given(tables(), st.floats(0, 30), st.integers(75, 600))
def test_a_budget_is_feasible_if_and_only_if_some_choice_fits(measured, ms, weight_bytes):
    limits = (Limit("ms", ms, f"ms={ms}", measured), Limit("weights", weight_bytes, "weights"))
    budget, allowed = Budget(limits), choices(PROFILE, WIDTHS, WIDTHS)
    fitting = [bits for bits in every(allowed) if budget.fits(PROFILE, bits)]

    if fitting:
        check_feasible(PROFILE, budget, allowed)
    else:
        with pytest.raises(InfeasibleError):
            check_feasible(PROFILE, budget, allowed)


@given(tables(), st.floats(0, 1), st.integers(0, 99))
def test_the_integer_program_finds_the_least_harm_in_any_order_of_times(measured, share, seed):
    allowed = choices(PROFILE, WIDTHS, WIDTHS)
    reachable = [measured.amount(PROFILE).of(bits) for bits in every(allowed)]
    asked = min(reachable) + share * (max(reachable) - min(reachable))
    budget = Budget((Limit("ms", asked, "ms", measured),))
    draw = torch.Generator().manual_seed(seed)
    harm = {
        s.name: dict(zip(WIDTHS, torch.rand(3, generator=draw).tolist(), strict=True)) for s in PROFILE.sites
    }

    bits = least_harm(PROFILE, budget, allowed, harm)

    def total(bits):
        return sum(harm[name][width] for name, width in bits.items())

    assert budget.fits(PROFILE, bits)
    assert total(bits) == pytest.approx(
        min(total(other) for other in every(allowed) if budget.fits(PROFILE, other)), rel=FLOAT64
    )


@given(tables(), st.floats(0, 1), st.booleans(), st.lists(st.floats(1, 9), min_size=5, max_size=5))
def test_what_a_method_wished_is_brought_into_the_budget(measured, share, fill, wishes):
    allowed = choices(PROFILE, WIDTHS, WIDTHS)
    reachable = [measured.amount(PROFILE).of(bits) for bits in every(allowed)]
    budget = Budget(
        (Limit("ms", min(reachable) + share * (max(reachable) - min(reachable)), "ms", measured),)
    )
    wish = dict(zip((s.name for s in PROFILE.sites), wishes, strict=True))

    bits = fit(PROFILE, wish, budget, allowed, fill=fill)

    assert budget.fits(PROFILE, bits)
    rounded = {name: min((w for w in WIDTHS if w >= b), default=8) for name, b in wish.items()}
    if not fill and budget.fits(PROFILE, rounded):
        assert bits == rounded


def test_widths_beyond_the_narrowest_are_found_where_only_they_are_fast_enough():
    # The narrowest choice takes 5 + 3 + 2 + 9 ms; layer c is fast with wide activations alone.
    budget = parse_budget("ms=9.0", TABLE)
    allowed = choices(PROFILE, WIDTHS, WIDTHS)

    bits = fit(PROFILE, dict.fromkeys(allowed.widths, 2), budget, allowed, fill=False)

    assert budget.latency is not None
    assert budget.latency.used(PROFILE, bits) == 9.0  # 5 + 1 + 2 + 1
    assert (bits["w0"], bits["w1"], bits["x"], bits["y"]) == (4, 2, 2, 8)


def test_what_is_reachable_is_said_with_the_other_limits():
    budget = parse_budget("ms=8.9,act=3bit", TABLE)
    allowed = choices(PROFILE, WIDTHS, WIDTHS)

    with pytest.raises(
        InfeasibleError, match=r"ms=8\.9: at least 16\.000 ms within act=3bit, which is 7\.100 ms"
    ):
        check_feasible(PROFILE, budget, allowed)
