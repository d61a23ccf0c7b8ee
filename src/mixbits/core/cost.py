"""Costs: what a choice of widths uses. One definition each, for exact integers, gradients and solvers.

Widths are given as ``{site name: bits}``. With Python integers a cost is exact, byte for byte what the packed
file holds; with (differentiable) torch scalars the same sum is a penalty's argument, and bytes are not
rounded up; and its terms are what an integer program needs. A new cost is one function with the ``@cost``
line above it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

from mixbits.core.profile import Profile, Site

Bits: TypeAlias = Mapping[str, Any]  # int, or a scalar tensor
FLOAT_BITS = 32


def packed_bytes(elements: int, bits: Any) -> Any:
    """Bytes of a packed tensor: rounded up for integers, the straight line for tensors.

    >>> packed_bytes(3, 3), packed_bytes(16, 4)
    (2, 8)
    """
    return -(-elements * bits // 8) if isinstance(bits, int) else elements * bits / 8


@dataclass(frozen=True)
class Term:
    """A summand that depends on the widths of at most two sites.

    ``count`` times the product of the widths, or with ``packed`` the bytes of ``count`` values of one width.
    """

    sites: tuple[str, ...]
    count: int
    packed: bool = False

    def amount(self, *bits: Any) -> Any:
        """The term at these widths, one for each of ``sites``."""
        return packed_bytes(self.count, bits[0]) if self.packed else prod(bits, start=self.count)


@dataclass(frozen=True)
class Lookup:
    """A summand measured at pairs of widths of two sites: ``values[i][j]`` at ``widths[0][i], widths[1][j]``.

    A wider pair may have the smaller value. Integer widths that were measured give what was measured; between
    widths the value is bilinear, and beyond them it goes on as between the last two: it has a gradient
    everywhere.

    >>> Lookup(("w", "x"), ((2, 4), (2, 8)), ((10, 40), (30, 20))).amount(4, 2)
    30
    >>> Lookup(("w", "x"), ((2, 4), (2, 8)), ((10, 40), (30, 20))).amount(3, 5)
    25.0
    """

    sites: tuple[str, str]
    widths: tuple[tuple[int, ...], tuple[int, ...]]  # rising
    values: tuple[tuple[int, ...], ...]

    def amount(self, *bits: Any) -> Any:
        """The value at these widths, one for each of ``sites``."""
        rows, columns = self.widths
        if bits[0] in rows and bits[1] in columns and all(isinstance(b, int) for b in bits):
            return self.values[rows.index(bits[0])][columns.index(bits[1])]
        (row, below), (column, left) = (
            _between(b, known) for b, known in zip(bits, self.widths, strict=True)
        )
        upper, lower = self.values[row], self.values[min(row + 1, len(rows) - 1)]
        right = min(column + 1, len(columns) - 1)
        ends = [line[column] + left * (line[right] - line[column]) for line in (upper, lower)]
        return ends[0] + below * (ends[1] - ends[0])


def _between(bits: Any, widths: tuple[int, ...]) -> tuple[int, Any]:
    """The place of the width below ``bits``, and how far to the next it is (a share); one width is no way."""
    if len(widths) == 1:
        return 0, 0.0
    place = sum(bool(bits >= width) for width in widths[1:-1])
    return place, (bits - widths[place]) / (widths[place + 1] - widths[place])


@dataclass(frozen=True)
class Amount:
    """The largest of some sums, over a divisor: the form that every cost has."""

    sums: tuple[tuple[Term | Lookup, ...], ...]
    divisor: int = 1

    def of(self, bits: Bits) -> Any:
        """The amount at these widths."""
        largest = max(
            sum(term.amount(*(bits[site] for site in term.sites)) for term in terms) for terms in self.sums
        )
        return largest if self.divisor == 1 else largest / self.divisor


@dataclass(frozen=True)
class Cost:
    """A named cost, its unit (``bytes``, ``bit`` or ``bop``) and its terms for a network."""

    name: str
    unit: str
    amount: Callable[[Profile], Amount]

    def of(self, profile: Profile, bits: Bits) -> Any:
        """What these widths use of it: a Python number for integers, a tensor for tensors."""
        return self.amount(profile).of(bits)


COSTS: dict[str, Cost] = {}


def cost(name: str, unit: str) -> Callable[[Callable[[Profile], Amount]], Callable[[Profile], Amount]]:
    """Register a function as the cost ``name``."""

    def register(function: Callable[[Profile], Amount]) -> Callable[[Profile], Amount]:
        COSTS[name] = Cost(name, unit, function)
        return function

    return register


@cost("weights", "bytes")
def weight_bytes(profile: Profile) -> Amount:
    """Bytes of all packed weight tensors, as the file stores them; a weight read twice is stored once."""
    return Amount((tuple(_packed(site) for site in profile.weights),))


@cost("weight_bits", "bit")
def average_weight_bits(profile: Profile) -> Amount:
    """Mean width over all weight values (not over layers)."""
    return _average(profile.weights)


@cost("size", "bytes")
def size_bytes(profile: Profile) -> Amount:
    """Bytes of everything stored: packed weights, and in float32 scales, biases, steps and other constants.

    The file's header (names, shapes, the list of instructions) comes on top.
    """
    floats = Term((), FLOAT_BITS // 8 * profile.stored_floats)
    return Amount(((floats, *(_packed(site) for site in profile.weights)),))


@cost("bops", "bop")
def bops(profile: Profile) -> Amount:
    """Bit operations, MACs x weight bits x activation bits, over all layers, for one sample."""
    return Amount((tuple(Term((op.weight, op.input), op.macs) for op in profile.ops),))


@cost("act_max", "bytes")
def act_max_bytes(profile: Profile) -> Amount:
    """Bytes of the largest quantized activation that the network computes (its input is not counted)."""
    return Amount(tuple((_packed(site),) for site in computed_activations(profile)))


@cost("act_sum", "bytes")
def act_sum_bytes(profile: Profile) -> Amount:
    """Bytes of all quantized activations that the network computes (its input is not counted)."""
    return Amount((tuple(_packed(site) for site in computed_activations(profile)),))


@cost("act_bits", "bit")
def average_act_bits(profile: Profile) -> Amount:
    """Mean width over the values of all quantized activations that the network computes."""
    return _average(computed_activations(profile))


@cost("act_peak", "bytes")
def act_peak_bytes(profile: Profile) -> Amount:
    """Most bytes alive at once while the network runs: input, codes and float values, batch 1."""
    last = max(value.last for value in profile.values)
    return Amount(
        tuple(
            tuple(
                Term((), packed_bytes(value.elements, FLOAT_BITS))
                if value.site is None
                else Term((value.site,), value.elements, packed=True)
                for value in profile.values
                if value.first <= moment <= value.last
            )
            for moment in range(last + 1)
        )
    )


def computed_activations(profile: Profile) -> tuple[Site, ...]:
    """Activation sites except the network's input, which its caller owns; the input if there is no other."""
    return tuple(site for site in profile.activations if site.name != "input") or profile.activations


def float_bits(profile: Profile) -> dict[str, int]:
    """Widths of the unquantized network."""
    return {site.name: FLOAT_BITS for site in profile.sites}


def _packed(site: Site) -> Term:
    return Term((site.name,), site.elements, packed=True)


def _average(sites: tuple[Site, ...]) -> Amount:
    terms = tuple(Term((site.name,), site.elements) for site in sites)
    return Amount((terms,), divisor=sum(site.elements for site in sites))
