"""Integer program: the widths of least harm within a budget, exactly.

Sites whose widths are multiplied, or do harm together, are a class of the knapsack in
:mod:`mixbits.search.knapsack`; what may be chosen for a class are all combinations of its sites' widths.
Where those are too many (an activation with many readers, harm between any two layers), or the knapsack's
proof takes too long, branch and cut (HiGHS) solves the program with one binary variable a site and width, and
a product of two widths as a variable a pair of widths whose sums over either width are that width's variable.
"""

# pyright: basic
# scipy has no types.

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from math import floor, prod

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp  # pyright: ignore[reportMissingTypeStubs]
from scipy.sparse import csr_array  # pyright: ignore[reportMissingTypeStubs]

from mixbits.core.budget import Budget, format_amount
from mixbits.core.cost import Lookup
from mixbits.core.profile import Profile
from mixbits.search import greedy, knapsack
from mixbits.search.greedy import Choices, InfeasibleError

SiteHarm = Mapping[str, Mapping[int, float]]  # site -> width -> harm
PairHarm = Mapping[tuple[str, str], Mapping[tuple[int, int], float]]  # two sites -> their widths -> harm
Table = dict[tuple[int, ...], NDArray[np.float64]]  # groups -> a value for each of their widths
Row = tuple[dict[tuple[int, ...], NDArray[np.int64]], int]  # the same in integers, and what their sum may be

MOST_OPTIONS = (
    3_000  # combinations of widths in one class: an activation that three weights read, at 7 widths
)
PROVED = 1e-9  # relative: harm this near its bound is least
MOST_NODES = 5_000  # of branch and cut


class UnprovedWarning(UserWarning):
    """The widths meet the budget, but others may do less harm, by no more than the warning says."""


@dataclass(frozen=True)
class _Program:
    """Groups of sites by number: their widths, harm tables, rows of limits."""

    widths: list[tuple[int, ...]]
    harm: Table
    rows: list[Row]

    def classes(self) -> list[tuple[int, ...]]:
        """Groups that share a table of two groups, together."""
        belongs = {number: {number} for number in range(len(self.widths))}
        for table in [self.harm, *(row for row, _ in self.rows)]:
            for one, *others in table:
                for other in others:
                    joined = belongs[one] | belongs[other]
                    belongs.update(dict.fromkeys(joined, joined))
        return sorted({tuple(sorted(joined)) for joined in belongs.values()})


def least_harm(
    profile: Profile, budget: Budget, allowed: Choices, harm: SiteHarm, pairs: PairHarm | None = None
) -> dict[str, int]:
    """Widths of least total harm that meet every limit, to the byte.

    ``harm`` gives a site's harm at each of its allowed widths (sites it lacks do none), ``pairs`` harm that
    depends on two sites at once. Of widths that do equal harm (to a relative 1e-12) those are taken that use
    less of the limits that can be broken, then narrower ones in the order of the sites' names; so the order
    of sites does not matter. Raises ``InfeasibleError`` if no choice fits, naming the limit, and
    ``ValueError`` for harm that is not finite.
    :class:`UnprovedWarning` says so where the search was given up before the proof.
    """
    check_feasible(profile, budget, allowed)
    groups = sorted(tuple(sorted(group)) for group in allowed.groups)
    program = _program(profile, budget, allowed, groups=groups, harm=harm, pairs=pairs or {})
    chosen = _by_knapsack(program)
    if chosen is None:
        chosen = _by_branch_and_cut(program)
    bits = {site: width for group, width in zip(groups, chosen, strict=True) for site in group}
    if not budget.fits(profile, bits):
        raise AssertionError("the integer program and the costs disagree")
    return {site.name: bits[site.name] for site in profile.sites}


def check_feasible(profile: Profile, budget: Budget, allowed: Choices) -> None:
    """Raise ``InfeasibleError`` unless some choice fits, saying what is reachable.

    Narrower sites use less of everything but time, so of latency the least within the other limits is found.
    ``ValueError`` if its table lacks a pair of widths.
    """
    latency = budget.latency
    if latency is None:
        greedy.check_feasible(profile, budget, allowed)
        return
    assert latency.table is not None
    latency.table.check(profile, allowed.widths)
    others = Budget(tuple(limit for limit in budget.limits if limit is not latency))
    pairs: dict[tuple[str, str], dict[tuple[int, int], float]] = {}
    for term in latency.amount(profile).sums[0]:
        if isinstance(term, Lookup):
            times = pairs.setdefault(term.sites, {})
            for widths in product(allowed.widths[term.sites[0]], allowed.widths[term.sites[1]]):
                times[widths] = times.get(widths, 0.0) + term.amount(*widths)
    fastest = least_harm(profile, others, allowed, {}, pairs)
    least = latency.used(profile, fastest)
    if least > latency.asked:
        within = f" within {others}" if others.limits else ""
        reachable, above = (format_amount(latency.cost, ms) for ms in (least, least - latency.asked))
        raise InfeasibleError(
            f"the budget cannot be met with these candidates and pins:\n  {latency.text}: at least "
            f"{reachable}{within}, which is {above} above\n"
            "  Ask for more, allow other candidates, or drop a pin."
        )


def _program(
    profile: Profile,
    budget: Budget,
    allowed: Choices,
    *,
    groups: list[tuple[str, ...]],
    harm: SiteHarm,
    pairs: PairHarm,
) -> _Program:
    number_of = {site: number for number, group in enumerate(groups) for site in group}
    widths = [allowed.widths[group[0]] for group in groups]

    def place(*sites: str) -> tuple[tuple[int, ...], list[tuple[int, ...]], tuple[int, ...]]:
        """Numbers of the groups of some sites in rising order, the sites' widths at each place, the shape."""
        numbers = tuple(sorted({number_of[site] for site in sites}))
        combined = product(*(widths[number] for number in numbers))
        order = [numbers.index(number_of[site]) for site in sites]
        places = [tuple(combination[index] for index in order) for combination in combined]
        return numbers, places, tuple(len(widths[number]) for number in numbers)

    tables: Table = {}
    summands: list[tuple[tuple[str, ...], dict[tuple[int, ...], float]]] = []
    summands += [((site,), {(w,): value for w, value in harm[site].items()}) for site in sorted(harm)]
    summands += [(sites, {**pairs[sites]}) for sites in sorted(pairs)]
    for sites, table in summands:
        numbers, places, shape = place(*sites)
        values = np.array([table[w] for w in places], np.float64).reshape(shape)
        if not np.isfinite(values).all():
            raise ValueError(f"the harm of {', '.join(sites)} is not finite at every allowed width")
        tables[numbers] = tables.get(numbers, np.zeros(shape)) + values
    rows: list[Row] = []
    for limit in budget.limits:
        amount = limit.amount(profile)
        for terms in amount.sums:
            row: dict[tuple[int, ...], NDArray[np.int64]] = {}
            room = _most(limit.asked, amount.divisor)
            for term in terms:
                numbers, places, shape = place(*term.sites)
                if not term.sites:
                    room -= term.amount()
                    continue
                values = np.array([term.amount(*w) for w in places], np.int64).reshape(shape)
                row[numbers] = row.get(numbers, np.zeros(shape, np.int64)) + values
            most = sum(int(values.max()) for values in row.values())
            if most > room:
                rows.append((row, room))
    return _Program(widths, tables, rows)


def _most(asked: float, divisor: int) -> int:
    """The largest integer that over ``divisor`` is no more than ``asked``."""
    most = floor(asked * divisor)
    while most / divisor > asked:
        most -= 1
    while (most + 1) / divisor <= asked:
        most += 1
    return most


def _by_knapsack(program: _Program) -> list[int] | None:
    """The widths of every group, or None if classes have too many options or the proof takes too long."""
    classes = program.classes()
    shapes = [tuple(len(program.widths[number]) for number in groups) for groups in classes]
    if any(prod(shape) > MOST_OPTIONS for shape in shapes):
        return None
    class_of = {number: index for index, groups in enumerate(classes) for number in groups}
    harm = [np.zeros(shape) for shape in shapes]
    cost = [np.zeros((len(program.rows), *shape), np.int64) for shape in shapes]

    def add(total: NDArray[np.float64] | NDArray[np.int64], numbers: tuple[int, ...], values: object) -> None:
        groups = classes[class_of[numbers[0]]]
        shape = [len(program.widths[number]) if number in numbers else 1 for number in groups]
        total += np.reshape(values, shape)  # type: ignore[operator]

    for numbers, values in program.harm.items():
        add(harm[class_of[numbers[0]]], numbers, values)
    for index, (row, _) in enumerate(program.rows):
        for numbers, values in row.items():
            add(cost[class_of[numbers[0]]][index], numbers, values)
    options = [
        knapsack.Options(h.ravel(), c.reshape(len(program.rows), h.size).T.copy())
        for h, c in zip(harm, cost, strict=True)
    ]
    try:
        chosen = knapsack.solve(options, np.array([room for _, room in program.rows], np.int64))
    except knapsack.TooManyError:
        return None
    bits: dict[int, int] = {}
    for groups, shape, option in zip(classes, shapes, chosen, strict=True):
        for number, place in zip(groups, np.unravel_index(option, shape), strict=True):
            bits[number] = program.widths[number][int(place)]
    return [bits[number] for number in range(len(bits))]


def _by_branch_and_cut(program: _Program) -> list[int]:
    """The widths of every group by HiGHS; what breaks a limit within its tolerance is cut off."""
    columns: dict[tuple[int, ...], int] = {}  # groups and the places of their widths -> variable
    rows: list[tuple[dict[int, float], float, float]] = []
    for number, widths in enumerate(program.widths):
        chosen = {columns.setdefault((number, place), len(columns)): 1.0 for place in range(len(widths))}
        rows.append((chosen, 1.0, 1.0))
    binaries = len(columns)
    pairs = [numbers for table in [program.harm, *(row for row, _ in program.rows)] for numbers in table]
    for one, two in dict.fromkeys(numbers for numbers in pairs if len(numbers) == 2):
        firsts, seconds = range(len(program.widths[one])), range(len(program.widths[two]))
        new = {(a, b): columns.setdefault((one, two, a, b), len(columns)) for a in firsts for b in seconds}
        rows += [({**{new[a, b]: 1.0 for b in seconds}, columns[one, a]: -1.0}, 0.0, 0.0) for a in firsts]
        rows += [({**{new[a, b]: 1.0 for a in firsts}, columns[two, b]: -1.0}, 0.0, 0.0) for b in seconds]

    def entries(table: Mapping[tuple[int, ...], NDArray[np.float64] | NDArray[np.int64]]) -> dict[int, float]:
        return {
            columns[(*numbers, *place)]: float(value)
            for numbers, values in table.items()
            for place, value in np.ndenumerate(values)
        }

    for row, room in program.rows:
        scale = max(float(max(values.max() for values in row.values())), 1.0)
        rows.append(({column: v / scale for column, v in entries(row).items()}, -np.inf, room / scale))
    objective = np.zeros(len(columns))
    for column, value in entries(program.harm).items():
        objective[column] = value
    # HiGHS stops within 1e-6 of the bound, whatever the scale.
    scale = 1e4 / (float(np.abs(objective).max(initial=0.0)) or 1.0)
    integrality = np.zeros(len(columns))
    integrality[:binaries] = 1
    while True:
        with _silence():
            solved = milp(
                objective * scale,
                integrality=integrality,
                bounds=Bounds(0, 1),
                constraints=_constraint(rows, len(columns)),
                options={"mip_rel_gap": 0.0, "node_limit": MOST_NODES},
            )
        if solved.x is None:
            raise RuntimeError(f"the integer program found no widths: {solved.message}")
        places = [
            int(np.argmax([solved.x[columns[number, place]] for place in range(len(widths))]))
            for number, widths in enumerate(program.widths)
        ]
        if all(_used(row, places) <= room for row, room in program.rows):
            break
        rows.append(
            ({columns[number, place]: 1.0 for number, place in enumerate(places)}, -np.inf, len(places) - 1.0)
        )
    gap = float(solved.fun - solved.mip_dual_bound)
    if gap > max(PROVED * abs(float(solved.fun)), 2e-6):
        warnings.warn(
            f"the integer program was given up after {MOST_NODES} nodes: other widths may do less harm, by "
            f"at most {gap / scale:.3g} of {float(solved.fun) / scale:.6g} ({gap / abs(solved.fun):.1e})",
            UnprovedWarning,
            stacklevel=3,
        )
    return [widths[place] for widths, place in zip(program.widths, places, strict=True)]


def _used(row: Mapping[tuple[int, ...], NDArray[np.int64]], places: list[int]) -> int:
    return sum(int(values[tuple(places[number] for number in numbers)]) for numbers, values in row.items())


def _constraint(rows: list[tuple[dict[int, float], float, float]], columns: int) -> LinearConstraint:
    counts = np.cumsum([0, *(len(entries) for entries, _, _ in rows)])
    where = np.fromiter((column for entries, _, _ in rows for column in entries), np.int64)
    values = np.fromiter((value for entries, _, _ in rows for value in entries.values()), np.float64)
    matrix = csr_array((values, where, counts), shape=(len(rows), columns))
    low, high = ([row[place] for row in rows] for place in (1, 2))
    return LinearConstraint(matrix, low, high)  # pyright: ignore[reportArgumentType]


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing on the process's standard output: HiGHS prints debugging there, whatever its options."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "wb") as nothing:  # noqa: PTH123
            os.dup2(nothing.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
