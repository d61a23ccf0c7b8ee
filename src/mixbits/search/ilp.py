"""Integer program: the widths of least harm within a budget, exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from mixbits.core.budget import Budget
from mixbits.core.cost import COSTS, Term
from mixbits.core.profile import Profile
from mixbits.search.greedy import Choices, check_feasible

SiteHarm = Mapping[str, Mapping[int, float]]  # site -> width -> harm
PairHarm = Mapping[tuple[str, str], Mapping[tuple[int, int], float]]  # two sites -> their widths -> harm
SLACK = 1e-9  # relative: a limit that floating-point sums meet


@dataclass
class _Rows:
    """Rows of a sparse matrix with their bounds."""

    entries: list[dict[int, float]] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)

    def add(self, entries: dict[int, float], low: float, high: float) -> None:
        self.entries.append(entries)
        self.low.append(low)
        self.high.append(high)

    def constraint(self, columns: int) -> LinearConstraint:
        counts = np.cumsum([0, *(len(row) for row in self.entries)])
        where = np.fromiter((column for row in self.entries for column in row), np.int64)
        values = np.fromiter((value for row in self.entries for value in row.values()), np.float64)
        matrix = csr_array((values, where, counts), shape=(len(self.entries), columns))
        return LinearConstraint(matrix, self.low, self.high)


def least_harm(
    profile: Profile, budget: Budget, allowed: Choices, harm: SiteHarm, pairs: PairHarm | None = None
) -> dict[str, int]:
    """Widths of least total harm that meet every limit.

    ``harm`` gives a site's harm at each of its allowed widths (sites it lacks do none), ``pairs`` harm that
    depends on two sites at once. Raises ``InfeasibleError`` if no choice fits, naming the limit.

    One binary variable a site (or group of tied sites) and width; a product of two widths, as in bit
    operations, is a variable a pair of widths whose sums over either width are that width's variable.
    """
    check_feasible(profile, budget, allowed)
    columns: dict[object, int] = {}
    group_of = {site: number for number, group in enumerate(allowed.groups) for site in group}
    rows = _Rows()
    for number, group in enumerate(allowed.groups):
        widths = allowed.widths[group[0]]
        chosen = {columns.setdefault((number, width), len(columns)): 1.0 for width in widths}
        rows.add(chosen, 1.0, 1.0)
    binaries = len(columns)

    def pair_column(one: str, other: str, widths: tuple[int, int]) -> int:
        """The variable of two widths; the rows that tie a new one to its sites are added."""
        first, second = group_of[one], group_of[other]
        if first == second:
            return columns[first, widths[0]]
        if (first, second, *widths) not in columns:
            firsts, seconds = allowed.widths[one], allowed.widths[other]
            for a, b in product(firsts, seconds):
                columns[first, second, a, b] = len(columns)
            for a in firsts:
                together = {columns[first, second, a, b]: 1.0 for b in seconds}
                rows.add({**together, columns[first, a]: -1.0}, 0.0, 0.0)
            for b in seconds:
                together = {columns[first, second, a, b]: 1.0 for a in firsts}
                rows.add({**together, columns[second, b]: -1.0}, 0.0, 0.0)
        return columns[first, second, *widths]

    def options(term: Term) -> dict[int, float]:
        """Amount of a term for each variable."""
        if len(term.sites) == 1:
            (site,) = term.sites
            return {columns[group_of[site], w]: float(term.amount(w)) for w in allowed.widths[site]}
        one, other = term.sites
        same = group_of[one] == group_of[other]
        return {
            pair_column(one, other, (a, b)): float(term.amount(a, b))
            for a, b in product(allowed.widths[one], allowed.widths[other])
            if not same or a == b
        }

    for limit in budget.limits:
        amount = COSTS[limit.cost].amount(profile)
        for terms in amount.sums:
            entries: dict[int, float] = {}
            room = limit.asked * amount.divisor
            scale = max(room, 1.0)
            for term in terms:
                if not term.sites:
                    room -= float(term.amount())
                    continue
                for column, value in options(term).items():
                    entries[column] = entries.get(column, 0.0) + value / scale
            rows.add(entries, -np.inf, room / scale * (1.0 + SLACK))
    weight: dict[int, float] = {}
    for site, table in harm.items():
        for width in allowed.widths[site]:
            column = columns[group_of[site], width]
            weight[column] = weight.get(column, 0.0) + table[width]
    for (one, other), table in (pairs or {}).items():
        for widths in product(allowed.widths[one], allowed.widths[other]):
            if group_of[one] == group_of[other] and widths[0] != widths[1]:
                continue
            column = pair_column(one, other, widths)
            weight[column] = weight.get(column, 0.0) + table[widths]
    objective = np.zeros(len(columns))
    for column, value in weight.items():
        objective[column] = value
    largest = float(np.abs(objective).max(initial=0.0)) or 1.0
    integrality = np.zeros(len(columns))
    integrality[:binaries] = 1
    solved = milp(
        objective / largest,
        integrality=integrality,
        bounds=Bounds(0, 1),
        constraints=rows.constraint(len(columns)),
        options={"mip_rel_gap": 0.0},
    )
    if solved.x is None:
        raise RuntimeError(f"the integer program found no widths: {solved.message}")
    bits: dict[str, int] = {}
    for number, group in enumerate(allowed.groups):
        widths = allowed.widths[group[0]]
        best = max(widths, key=lambda width: solved.x[columns[number, width]])
        bits.update(dict.fromkeys(group, best))
    return bits
