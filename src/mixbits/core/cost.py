"""Costs: what a choice of widths uses. One formula each, for two number types.

Widths are given as ``{site name: bits}``. With Python integers a cost is exact, byte for byte what the packed
file holds; with (differentiable) torch scalars the same sum is a penalty's argument, and bytes are not
rounded up. A new cost is one function with the ``@cost`` line above it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from mixbits.core.profile import Profile

Bits: TypeAlias = Mapping[str, Any]  # int, or a scalar tensor
FLOAT_BITS = 32


@dataclass(frozen=True)
class Cost:
    """A named cost, its unit (``bytes``, ``bit`` or ``bop``) and its function."""

    name: str
    unit: str
    of: Callable[[Profile, Bits], Any]


COSTS: dict[str, Cost] = {}


def cost(name: str, unit: str) -> Callable[[Callable[[Profile, Bits], Any]], Callable[[Profile, Bits], Any]]:
    """Register a function as the cost ``name``."""

    def register(function: Callable[[Profile, Bits], Any]) -> Callable[[Profile, Bits], Any]:
        COSTS[name] = Cost(name, unit, function)
        return function

    return register


def packed_bytes(elements: int, bits: Any) -> Any:
    """Bytes of a packed tensor: rounded up for integers, the straight line for tensors.

    >>> packed_bytes(3, 3), packed_bytes(16, 4)
    (2, 8)
    """
    return -(-elements * bits // 8) if isinstance(bits, int) else elements * bits / 8


@cost("weights", "bytes")
def weight_bytes(profile: Profile, bits: Bits) -> Any:
    """Bytes of all packed weight tensors, as the file stores them; a weight read twice is stored once."""
    return sum(packed_bytes(site.elements, bits[site.name]) for site in profile.weights)


@cost("weight_bits", "bit")
def average_weight_bits(profile: Profile, bits: Bits) -> Any:
    """Mean width over all weight values (not over layers)."""
    return sum(s.elements * bits[s.name] for s in profile.weights) / sum(s.elements for s in profile.weights)


@cost("size", "bytes")
def size_bytes(profile: Profile, bits: Bits) -> Any:
    """Bytes of everything stored: packed weights, and in float32 scales, biases, steps and other constants.

    The file's header (names, shapes, the list of instructions) comes on top.
    """
    return weight_bytes(profile, bits) + FLOAT_BITS // 8 * profile.stored_floats


@cost("bops", "bop")
def bops(profile: Profile, bits: Bits) -> Any:
    """Bit operations, MACs x weight bits x activation bits, over all layers, for one sample."""
    return sum(op.macs * bits[op.weight] * bits[op.input] for op in profile.ops)


@cost("act_max", "bytes")
def act_max_bytes(profile: Profile, bits: Bits) -> Any:
    """Bytes of the largest quantized activation that the network computes (its input is not counted)."""
    return max(packed_bytes(s.elements, bits[s.name]) for s in computed_activations(profile))


@cost("act_sum", "bytes")
def act_sum_bytes(profile: Profile, bits: Bits) -> Any:
    """Bytes of all quantized activations that the network computes (its input is not counted)."""
    return sum(packed_bytes(s.elements, bits[s.name]) for s in computed_activations(profile))


@cost("act_bits", "bit")
def average_act_bits(profile: Profile, bits: Bits) -> Any:
    """Mean width over the values of all quantized activations that the network computes."""
    sites = computed_activations(profile)
    return sum(s.elements * bits[s.name] for s in sites) / sum(s.elements for s in sites)


@cost("act_peak", "bytes")
def act_peak_bytes(profile: Profile, bits: Bits) -> Any:
    """Most bytes alive at once while the network runs: input, codes and float values, batch 1."""
    last = max(value.last for value in profile.values)
    return max(
        sum(
            packed_bytes(value.elements, FLOAT_BITS if value.site is None else bits[value.site])
            for value in profile.values
            if value.first <= moment <= value.last
        )
        for moment in range(last + 1)
    )


def computed_activations(profile: Profile) -> list[Any]:
    """Activation sites except the network's input, which its caller owns; the input if there is no other."""
    return [site for site in profile.activations if site.name != "input"] or list(profile.activations)


def float_bits(profile: Profile) -> dict[str, int]:
    """Widths of the unquantized network."""
    return {site.name: FLOAT_BITS for site in profile.sites}
