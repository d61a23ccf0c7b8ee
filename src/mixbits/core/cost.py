"""Costs: what a choice of widths uses. One definition each, for exact integers, gradients and solvers.

Widths are given as ``{site name: bits}``. With Python integers a cost is exact, byte for byte what the packed
file holds; with (differentiable) torch scalars the same sum is a penalty's argument, and bytes are not
rounded up; and its terms are what an integer program needs. A new cost is one function with the ``@cost``
line above it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, TypeAlias

from mixbits.core import bitfusion
from mixbits.core.profile import Op, Profile, Site

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
    everywhere. With ``rounds_up``, integer widths between have the value of the next wider ones, and
    all below the narrowest have its value.

    >>> Lookup(("w", "x"), ((2, 4), (2, 8)), ((10, 40), (30, 20))).amount(4, 2)
    30
    >>> Lookup(("w", "x"), ((2, 4), (2, 8)), ((10, 40), (30, 20))).amount(3, 5)
    25.0
    >>> Lookup(("w", "x"), ((2, 4), (2, 8)), ((10, 40), (30, 20)), rounds_up=True).amount(3, 5)
    20
    """

    sites: tuple[str, str]
    widths: tuple[tuple[int, ...], tuple[int, ...]]  # rising
    values: tuple[tuple[int, ...], ...]
    rounds_up: bool = False

    def amount(self, *bits: Any) -> Any:
        """The value at these widths, one for each of ``sites``."""
        rows, columns = self.widths
        if self.rounds_up and all(isinstance(b, int) for b in bits):
            bits = tuple(
                _next(b, known, site) for b, known, site in zip(bits, self.widths, self.sites, strict=True)
            )
        if bits[0] in rows and bits[1] in columns and all(isinstance(b, int) for b in bits):
            return self.values[rows.index(bits[0])][columns.index(bits[1])]
        (row, below), (column, left) = (
            _between(b, known, flat_below=self.rounds_up) for b, known in zip(bits, self.widths, strict=True)
        )
        upper, lower = self.values[row], self.values[min(row + 1, len(rows) - 1)]
        right = min(column + 1, len(columns) - 1)
        ends = [line[column] + left * (line[right] - line[column]) for line in (upper, lower)]
        return ends[0] + below * (ends[1] - ends[0])


def _next(bits: int, widths: tuple[int, ...], site: str) -> int:
    """The least of ``widths`` that is no less than ``bits``."""
    if bits > widths[-1]:
        raise ValueError(f"{site}: {bits} bits are more than the {widths[-1]} that this cost knows")
    return min(width for width in widths if width >= bits)


def _between(bits: Any, widths: tuple[int, ...], *, flat_below: bool) -> tuple[int, Any]:
    """The place of the width below ``bits``, and how far to the next it is (a share); one width is no way.

    With ``flat_below``, nor is what lies below the narrowest.
    """
    if len(widths) == 1:
        return 0, 0.0
    if flat_below and bool(bits < widths[0]):
        return 0, 0.0 * bits  # of the kind that `bits` is: a tensor has a gradient, of zero
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
    """A named cost, its unit (``bytes``, ``bit``, ``bop``, ``cycle`` or ``fJ``) and its terms for a network.

    With ``operands``, hardware that has operands of these widths only takes others as the next wider ones,
    and none beyond the widest.
    """

    name: str
    unit: str
    amount: Callable[..., Amount]  # of a profile
    operands: tuple[int, ...] = ()

    def of(self, profile: Profile, bits: Bits) -> Any:
        """What these widths use of it: a Python number for integers, a tensor for tensors."""
        return self.amount(profile).of(bits)

    def holds(self, bits: Mapping[str, int]) -> bool:
        """Whether there are operands of these widths."""
        return not self.operands or max(bits.values()) <= self.operands[-1]


COSTS: dict[str, Cost] = {}


def cost(
    name: str, unit: str, operands: tuple[int, ...] = ()
) -> Callable[[Callable[..., Amount]], Callable[..., Amount]]:
    """Register a function as the cost ``name``."""

    def register(function: Callable[..., Amount]) -> Callable[..., Amount]:
        COSTS[name] = Cost(name, unit, function, operands)
        return function

    return register


def find_cost(name: str) -> Cost | None:
    """The cost of that name, if there is one; ``bitfusion_cycles_8x4`` is on an array of 8 rows, 4 columns.

    >>> find_cost("bops").unit, find_cost("bitfusion_cycles_8x4").unit, find_cost("bitfusion_cycles_8x0")
    ('bop', 'cycle', None)
    """
    match = re.fullmatch(r"(bitfusion_[a-z]+)_([1-9][0-9]*)x([1-9][0-9]*)", name)
    if not match or match[1] not in COSTS:
        return COSTS.get(name)
    array = bitfusion.Array(int(match[2]), int(match[3]))
    known = COSTS[match[1]]
    return replace(known, name=name, amount=partial(known.amount, array=array))


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

    The file's header (names, shapes, the list of instructions) comes on top, and less than 64 bytes a tensor
    with which data starts at multiples of 64.
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


@cost("bitfusion_cycles", "cycle", bitfusion.OPERANDS)
def bitfusion_cycles(profile: Profile, array: bitfusion.Array = bitfusion.PAPER) -> Amount:
    """Cycles of all layers on an array of Bit Fusion, for one sample; waiting for memory is not counted."""
    return _by_operands(profile, lambda op, w, a: bitfusion.cycles(op, array, w, a))


@cost("bitfusion_energy", "fJ", bitfusion.OPERANDS)
def bitfusion_energy(profile: Profile, array: bitfusion.Array = bitfusion.PAPER) -> Amount:
    """Femtojoules of all layers on Bit Fusion, for one sample: its array's and its DRAM's.

    Every layer reads its weights and its input from DRAM once, and an input that the network computes is
    written once. Buffers on the chip are not counted, nor is what no layer reads.
    """
    elements = {site.name: site.elements for site in profile.sites}
    first = {op.input: op.name for op in reversed(profile.ops) if op.input != "input"}  # that reads it

    def energy(op: Op, weight_bits: int, input_bits: int) -> int:
        moved = elements[op.input] * (2 if first.get(op.input) == op.name else 1)
        return bitfusion.energy_fj(
            op, array, weight_bits, input_bits, weights=elements[op.weight], moved=moved
        )

    return _by_operands(profile, energy)


def _by_operands(profile: Profile, value: Callable[[Op, int, int], int]) -> Amount:
    """A sum over layers of what Bit Fusion takes at each pair of widths that it has."""
    widths = bitfusion.OPERANDS
    return Amount(
        (
            tuple(
                Lookup(
                    (op.weight, op.input),
                    (widths, widths),
                    tuple(tuple(value(op, w, a) for a in widths) for w in widths),
                    rounds_up=True,
                )
                for op in profile.ops
            ),
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
