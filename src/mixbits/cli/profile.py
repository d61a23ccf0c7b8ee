"""``mixbits profile``: what a network is made of and what widths would cost."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

from mixbits.core.budget import format_amount
from mixbits.core.cost import COSTS, float_bits
from mixbits.core.policy import read_policy
from mixbits.core.profile import Profile
from mixbits.data.open import open_dataset
from mixbits.fit.stages import build_network
from mixbits.graph.quant_graph import capture

UNIFORM = (8, 4, 2)  # bits shown beside float


@dataclass(frozen=True)
class ProfileNetwork:
    """List a network's sites and layers, and what widths cost."""

    network: str  # module:function or file.py:function
    data: str = ""  # data set whose inputs the network takes; or give --input-shape
    input_shape: tuple[int, ...] = ()  # of one sample, for example 3 32 32
    weights: str = ""  # trained weights, to check that they fit
    policy: Path | None = None  # also show the cost of this policy
    json: Path | None = None  # write the profile here


def main(arguments: list[str]) -> None:
    """Capture, print, and write JSON if asked."""
    chosen = tyro.cli(ProfileNetwork, prog="mixbits profile", args=arguments)
    if bool(chosen.data) == bool(chosen.input_shape):
        raise ValueError("give either --data or --input-shape, for example --input-shape 3 32 32")
    shape, classes = chosen.input_shape, 10
    if chosen.data:
        dataset = open_dataset(chosen.data)
        shape, classes = dataset.input_shape, len(dataset.classes)
    model = build_network(chosen.network, classes=classes, weights=chosen.weights)
    profile = capture(model, torch.zeros(2, *shape)).profile
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 140)
    console.print(_sites(profile))
    console.print(_costs(profile, chosen.policy))
    if chosen.json:
        chosen.json.write_text(json.dumps(profile.to_json(), indent=1) + "\n", encoding="utf-8")


def _sites(profile: Profile) -> Table:
    table = Table(title=f"{len(profile.sites)} sites")
    for name in ("site", "kind", "shape", "values", "read by", "MACs"):
        table.add_column(name, justify="right" if name in ("values", "MACs") else "left")
    macs = {op.weight: op.macs for op in profile.ops}
    for site in profile.sites:
        kind = site.kind if site.kind == "weight" else "signed" if site.signed else "unsigned"
        shape = " x ".join(map(str, site.shape))
        count = f"{macs[site.name]:,}" if site.name in macs else ""
        table.add_row(site.name, kind, shape, f"{site.elements:,}", ", ".join(site.readers), count)
    return table


def _costs(profile: Profile, policy: Path | None) -> Table:
    columns = {"float32": float_bits(profile)}
    columns |= {f"{bits} bits": {site.name: bits for site in profile.sites} for bits in UNIFORM}
    if policy is not None:
        chosen = read_policy(policy)
        chosen.check(profile)
        columns[policy.name] = chosen.bits
    table = Table(title="costs")
    table.add_column("cost")
    for name in columns:
        table.add_column(name, justify="right")
    for name, cost in COSTS.items():
        table.add_row(name, *(format_amount(name, cost.of(profile, bits)) for bits in columns.values()))
    return table
