"""Profile: what a network is made of, as plain data: sites, quantizable operations, values in memory."""

from __future__ import annotations

import difflib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast


@dataclass(frozen=True)
class Site:
    """A tensor that can be quantized: a weight, or an activation (shape without the batch dimension)."""

    name: str
    kind: Literal["weight", "activation"]
    shape: tuple[int, ...]
    signed: bool  # False where every value is >= 0, after a ReLU for example
    readers: tuple[str, ...]  # names of the operations that read it

    @property
    def elements(self) -> int:
        """Number of values, for one input sample."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Op:
    """One multiply-accumulate operation: a convolution or a linear layer."""

    name: str
    kind: str  # "conv2d", "conv1d" or "linear"
    macs: int  # multiply-accumulates for one input sample
    weight: str  # site
    input: str  # site
    channels: int  # output channels
    reduction: int  # products summed into one output
    groups: int = 1  # of output channels that read inputs of their own


@dataclass(frozen=True)
class Value:
    """A tensor that exists in memory while instructions ``first .. last`` run, for one input sample.

    With a ``site`` it is stored as codes of that site's width, without one as float32.
    """

    name: str
    elements: int
    site: str | None
    first: int
    last: int


@dataclass(frozen=True)
class Profile:
    """Sites, operations, values in memory and stored float constants of one captured network."""

    input_shape: tuple[int, ...]  # without the batch dimension
    sites: tuple[Site, ...]
    ops: tuple[Op, ...]
    values: tuple[Value, ...]
    stored_floats: int  # float32 constants beside the weights: scales, biases, steps, of float operations

    def site(self, name: str) -> Site:
        """The site of that name; the error of an unknown one lists the nearest names."""
        for site in self.sites:
            if site.name == name:
                return site
        raise unknown_site(name, [site.name for site in self.sites])

    @property
    def weights(self) -> tuple[Site, ...]:
        """Weight sites."""
        return tuple(site for site in self.sites if site.kind == "weight")

    @property
    def activations(self) -> tuple[Site, ...]:
        """Activation sites, the network's input among them."""
        return tuple(site for site in self.sites if site.kind == "activation")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, read back by :func:`profile_from_json`."""
        return {"format": "mixbits-profile", "version": 1, **asdict(self)}


def unknown_site(name: str, known: list[str]) -> ValueError:
    """The error for a site name that the network does not have."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:3]
    return ValueError(
        f"unknown site {name!r}: the network has no such tensor. Did you mean {', '.join(map(repr, near))}? "
        "`mixbits profile` lists all sites."
    )


def _field(value: Any) -> Any:
    """A JSON value with its list as the tuple that it was written from."""
    return tuple(cast("list[Any]", value)) if isinstance(value, list) else value


def profile_from_json(text: str) -> Profile:
    """The profile of a JSON text written from :meth:`Profile.to_json`."""
    entry = json.loads(text)
    if entry.get("format") != "mixbits-profile" or entry.get("version") != 1:
        raise ValueError("not a mixbits profile of version 1")

    def rows(kind: type, key: str) -> tuple[Any, ...]:
        return tuple(kind(**{k: _field(v) for k, v in row.items()}) for row in entry[key])

    return Profile(
        tuple(entry["input_shape"]),
        rows(Site, "sites"),
        rows(Op, "ops"),
        rows(Value, "values"),
        entry["stored_floats"],
    )
