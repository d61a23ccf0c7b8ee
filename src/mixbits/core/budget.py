"""Budgets: limits on costs, in the units that people write.

``weights=70.1KiB,act_max=8.1KiB`` or ``bops=0.5G`` or ``weights=4.0bit`` (an average width) or ``ms=3.0`` (a
latency, by a table of what was measured) or ``bitfusion_cycles=1M``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mixbits.core.cost import COSTS, Amount, Cost, find_cost
from mixbits.core.latency import LatencyTable
from mixbits.core.profile import Profile

# kB is 1000 bytes and KiB 1024. The papers' "kB" of weights is KiB.
UNITS: dict[str, dict[str, float]] = {
    "bytes": {"B": 1, "kB": 1e3, "KB": 1e3, "KiB": 2**10, "MB": 1e6, "MiB": 2**20, "GB": 1e9, "GiB": 2**30},
    "bit": {"bit": 1, "bits": 1},
    "ms": {"": 1, "ms": 1},
    "bop": {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "BOP": 1, "MBOP": 1e6, "GBOP": 1e9, "TBOP": 1e12},
    "cycle": {"": 1, "k": 1e3, "M": 1e6, "G": 1e9},
    "fJ": {"fJ": 1, "pJ": 1e3, "nJ": 1e6, "uJ": 1e9, "mJ": 1e12},
}
LATENCY = "ms"  # the limit whose cost is a table's, and its unit
# `weights=4bit` limits another cost than `weights=70KiB`.
AVERAGES = {"weights": "weight_bits", "act": "act_bits"}


@dataclass(frozen=True)
class Limit:
    """One limit: the cost's name, the most that may be used, the user's words."""

    cost: str
    asked: float
    text: str
    table: LatencyTable | None = None  # of a limit on latency

    @property
    def unit(self) -> str:
        """Unit of what is asked and used: ``bytes``, ``bit``, ``bop``, ``cycle``, ``fJ`` or ``ms``."""
        return unit_of(self.cost)

    def amount(self, profile: Profile) -> Amount:
        """The cost's terms for a network; ``ValueError`` if the table is another network's."""
        return _cost(self.cost).amount(profile) if self.table is None else self.table.amount(profile)

    def used(self, profile: Profile, bits: Mapping[str, Any]) -> Any:
        """What ``bits`` uses of this cost."""
        return self.amount(profile).of(bits)


@dataclass(frozen=True)
class Budget:
    """Limits that must all hold."""

    limits: tuple[Limit, ...]

    def fits(self, profile: Profile, bits: Mapping[str, int]) -> bool:
        """Whether every limit holds for these widths."""
        return not self.exceeded(profile, bits)

    def exceeded(self, profile: Profile, bits: Mapping[str, int]) -> list[Limit]:
        """The limits that these widths break."""
        return [limit for limit in self.limits if limit.used(profile, bits) > limit.asked]

    @property
    def latency(self) -> Limit | None:
        """The limit on latency, if any. It alone may be met by wider sites and not by narrower ones."""
        return next((limit for limit in self.limits if limit.table is not None), None)

    @property
    def in_steps(self) -> bool:
        """Whether a narrower site may use no less of a limit: narrowing one at a time is then no search."""
        return any(limit.table is not None or _cost(limit.cost).operands for limit in self.limits)

    def __str__(self) -> str:
        return ",".join(limit.text for limit in self.limits)


def unit_of(cost: str) -> str:
    """Unit of a cost's amounts: ``bytes``, ``bit``, ``bop``, ``cycle``, ``fJ`` or ``ms``."""
    return LATENCY if cost == LATENCY else _cost(cost).unit


def _cost(name: str) -> Cost:
    found = find_cost(name)
    if found is None:
        raise ValueError(f"unknown cost {name!r}; known are {', '.join(COSTS)}")
    return found


def parse_budget(text: str, latency: LatencyTable | None = None) -> Budget:
    """The budget written as ``name=value`` pairs with commas between; ``ms=`` is read from ``latency``.

    >>> [(limit.cost, limit.asked) for limit in parse_budget("weights=70KiB, bops=0.5G").limits]
    [('weights', 71680.0), ('bops', 500000000.0)]
    >>> parse_budget("weights=4.0bit").limits[0].cost
    'weight_bits'
    """
    limits = _limits(text)
    for limit in limits:
        if limit.cost == LATENCY and latency is None:
            raise ValueError(
                f"{limit.text}: a limit on latency needs a table of what was measured; write one with "
                "`mixbits profile NETWORK ... --latency table.json` and give --latency table.json"
            )
    return Budget(tuple(replace(x, table=latency) if x.cost == LATENCY else x for x in limits))


def _limits(text: str) -> tuple[Limit, ...]:
    limits = tuple(_parse_limit(part.strip()) for part in text.split(",") if part.strip())
    if not limits:
        raise ValueError("the budget is empty; write for example weights=70KiB,act_max=8KiB")
    names = [limit.cost for limit in limits]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"the budget limits {', '.join(sorted(twice))} twice; give each limit once")
    return limits


def budget_points(text: str) -> tuple[str, ...]:
    """The budgets of a list with ``;`` between, a range ``a..b:n`` being n budgets with even steps.

    Ranges in one budget run together and must have the same n; a limit without a range stays.

    >>> budget_points("weights=4bit,act=4bit; weights=70KiB")
    ('weights=4bit,act=4bit', 'weights=70KiB')
    >>> budget_points("weights=2..3bit:3,act=4bit")
    ('weights=2bit,act=4bit', 'weights=2.5bit,act=4bit', 'weights=3bit,act=4bit')
    """
    points = tuple(point for part in text.split(";") if part.strip() for point in _points(part))
    if not points:
        raise ValueError(
            f"there is no budget in {text!r}; write for example weights=4bit or weights=2..4bit:5"
        )
    asked = [{(limit.cost, limit.asked) for limit in _limits(point)} for point in points]
    twice = [point for place, point in enumerate(points) if asked[place] in asked[:place]]
    if twice:
        raise ValueError(f"the budget {twice[0]} is asked for twice")
    return points


def _points(text: str) -> list[str]:
    limits = [_range(part.strip()) for part in text.split(",") if part.strip()]
    counts = {len(values) for values in limits if len(values) > 1}
    if len(counts) > 1:
        raise ValueError(
            f"the ranges in {text.strip()!r} have different numbers of points; give them the same"
        )
    count = max(counts, default=1)
    points = [",".join(values[place % len(values)] for values in limits) for place in range(count)]
    return [point.replace(" ", "") for point in points]  # they name folders


def _range(text: str) -> list[str]:
    """The points of ``name=a..b:n``, or the limit as it is."""
    if ".." not in text:
        return [text]
    number = r"([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)"
    match = re.fullmatch(rf"(\w+)\s*=\s*{number}\s*\.\.\s*{number}\s*:\s*([0-9]+)", text)
    if not match:
        raise ValueError(f"cannot read the range {text!r}; write for example weights=2bit..4bit:5")
    name, first, first_unit, last, unit, count = match.groups()
    if first_unit not in ("", unit):
        raise ValueError(f"the range {text!r} has two units; write both ends in the same one")
    points, low, high = int(count), float(first), float(last)
    if points < 2:
        raise ValueError(f"the range {text!r} needs two points or more")
    values = [low + (high - low) * place / (points - 1) for place in range(points)]
    return [f"{name}={value:.6g}{unit}" for value in values]


def _parse_limit(text: str) -> Limit:
    match = re.fullmatch(r"(\w+)\s*=\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)", text)
    if not match:
        raise ValueError(
            f"cannot read the limit {text!r}; write name=number and unit, for example weights=70KiB"
        )
    name, number, unit = match.groups()
    written = sorted({*COSTS, *AVERAGES, LATENCY} - set(AVERAGES.values()))
    if unit in UNITS["bit"] and name in AVERAGES:
        key = AVERAGES[name]
    elif name == LATENCY or (name not in AVERAGES.values() and find_cost(name) is not None):
        key = name
    elif name in AVERAGES:
        raise ValueError(f"{text}: {name!r} is an average width; write for example {name}=4bit")
    else:
        raise ValueError(f"unknown limit {name!r} in {text!r}; known are {', '.join(written)}")
    known = UNITS[unit_of(key)]
    if unit not in known:
        extra = " or bit (average width)" if key in AVERAGES else ""
        raise ValueError(
            f"unknown unit {unit!r} in {text!r}; {name} is given in "
            f"{', '.join(u or '(none)' for u in known)}{extra}"
        )
    try:
        value = float(number)
    except ValueError:
        raise ValueError(f"{number!r} in {text!r} is not a number") from None
    if not value > 0:
        raise ValueError(f"{text!r}: a limit must be above 0")
    return Limit(key, value * known[unit], text)


def format_amount(cost: str, amount: float) -> str:
    """An amount in a readable unit.

    >>> format_amount("weights", 71680), format_amount("bops", 5e8), format_amount("weight_bits", 3.25)
    ('70.00 KiB', '0.5000 GBOP', '3.250 bit')
    >>> format_amount("bops", 30000), format_amount("weight_bits", 0.0001)
    ('30.0000 kBOP', '0.0001 bit')
    """
    unit = unit_of(cost)
    if unit == "bytes":
        return (
            f"{amount:.0f} B"
            if amount < UNITS["bytes"]["KiB"]
            else f"{amount / UNITS['bytes']['KiB']:.2f} KiB"
        )
    if unit == LATENCY:
        return f"{amount:.3f} ms"
    if unit == "cycle":
        return f"{amount:,.0f} cycles"
    if unit == "fJ":
        return f"{amount / UNITS['fJ']['uJ']:.4f} uJ"
    if unit == "bit":
        return f"{amount:.3f} bit" if amount >= 0.1 or not amount else f"{amount:.3g} bit"
    name = next((name for name in ("G", "M", "k") if amount >= 0.1 * UNITS["bop"][name]), "")
    return f"{amount / UNITS['bop'][name]:.4f} {name}BOP" if name else f"{amount:.0f} BOP"
