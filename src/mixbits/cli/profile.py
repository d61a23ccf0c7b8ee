"""``mixbits profile``: what a network is made of, what widths would cost, and what its engine takes here."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

from mixbits.core.budget import LATENCY, format_amount
from mixbits.core.cost import COSTS, find_cost, float_bits
from mixbits.core.grid import Grid
from mixbits.core.latency import LatencyTable
from mixbits.core.policy import Policy, read_policy
from mixbits.core.profile import Profile
from mixbits.core.program import Program
from mixbits.data.open import open_dataset
from mixbits.fit.stages import build_network
from mixbits.graph.quant_graph import QuantGraph, capture
from mixbits.lower.untrained import lower_untrained
from mixbits.runtime.latency import here, measure_latency, predicted_ms, regridded
from mixbits.runtime.memory import Memory
from mixbits.runtime.native import planned_memory
from mixbits.runtime.tune import tuned
from mixbits.train.method import usual_grid

UNIFORM = (8, 4, 2)  # bits shown beside float


@dataclass(frozen=True)
class ProfileNetwork:
    """List a network's sites and layers, and what widths cost."""

    network: str  # module:function or file.py:function
    data: str = ""  # data set whose inputs the network takes; or give --input-shape
    input_shape: tuple[int, ...] = ()  # of one sample, for example 3 32 32
    weights: str = ""  # trained weights, to check that they fit
    policy: Path | None = None  # also show the cost of this policy
    costs: tuple[str, ...] = ()  # also show these, for example bitfusion_cycles_8x8
    json: Path | None = None  # write the profile here
    latency: Path | None = None  # time every layer at every pair of widths, and write the table here
    weight_bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)  # that are timed
    activation_bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    threads: int = 1  # of the runs that are timed, and whose memory is planned
    batch: int = 1  # samples of such a run
    tune: bool = False  # choose kernels by measurement, as `mixbits run --tune` does


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
    graph = capture(model, torch.zeros(2, *shape))
    profile = graph.profile
    table = _measured(graph, chosen) if chosen.latency else None
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 140)
    console.print(_sites(profile))
    if table is not None:
        console.print(_times(table))
    policies = {} if chosen.policy is None else {chosen.policy.name: _policy(profile, chosen.policy)}
    console.print(_costs(profile, policies, chosen, table))
    console.print(_memory(graph, policies, chosen))
    for path, entry in ((chosen.json, profile), (chosen.latency, table)):
        if path is not None and entry is not None:
            path.write_text(json.dumps(entry.to_json(), indent=1) + "\n", encoding="utf-8")


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


def _measured(graph: QuantGraph, chosen: ProfileNetwork) -> LatencyTable:
    """The times of the network's layers."""
    profile = graph.profile

    def grid_of(site: str, bits: int) -> Grid:
        return usual_grid(profile.site(site), bits)

    return measure_latency(
        lower_untrained(graph),
        profile,
        grid_of,
        weight_bits=chosen.weight_bits,
        activation_bits=chosen.activation_bits,
        threads=chosen.threads,
        batch=chosen.batch,
        tune=chosen.tune,
        network=chosen.network,
        watch=lambda done, total: sys.stderr.write(f"timed round {done} of {total}\n"),
    )


def _times(table: LatencyTable) -> Table:
    """Every layer at equal widths of weights and activations, as far as they were timed."""
    both = [bits for bits in table.weight_bits if bits in table.activation_bits]
    title = f"microseconds on {table.cpu}, threads: {table.threads}, batch: {table.batch}"
    shown = Table(title=title, caption="weight bits x activation bits; the table has all pairs")
    shown.add_column("layer")
    for bits in both:
        shown.add_column(f"{bits}x{bits}", justify="right")
    places = [(table.weight_bits.index(bits), table.activation_bits.index(bits)) for bits in both]
    for layer in table.layers:
        shown.add_row(layer.name, *(f"{layer.ns[w][a] / 1e3:.1f}" for w, a in places))
    shown.add_row("all else", *(f"{table.rest_ns / 1e3:.1f}" for _ in places))
    return shown


def _policy(profile: Profile, path: Path) -> Policy:
    policy = read_policy(path)
    policy.check(profile)
    return policy


def _memory(graph: QuantGraph, policies: Mapping[str, Policy], chosen: ProfileNetwork) -> Table | str:
    """What the native engine will take, by width; in words why that cannot be said."""
    try:
        program = lower_untrained(graph)
        columns = {
            f"{bits} bits": _planned(
                program, {s.name: usual_grid(s, bits) for s in graph.profile.sites}, chosen
            )
            for bits in UNIFORM
        }
        columns |= {name: _planned(program, policy.grids, chosen) for name, policy in policies.items()}
        cpu, isa, _ = here()
    except ValueError as error:
        return f"memory of the native engine is not known: {error}"
    table = Table(
        title=f"bytes of the native engine, threads: {chosen.threads}, batch: {chosen.batch}",
        caption=f"with the kernels that are chosen by their estimates on {cpu}, level {isa}; values and "
        "scratch are of all threads",
    )
    table.add_column("memory")
    for name in columns:
        table.add_column(name, justify="right")
    for field in ("arenas", "scratch", "weights", "total"):
        table.add_row(field, *(f"{memory.to_json()[field]:,}" for memory in columns.values()))
    return table


def _planned(program: Program, grids: Mapping[str, Grid], chosen: ProfileNetwork) -> Memory:
    """At these grids; where kernels are chosen by measurement, with those."""
    at_grids = regridded(program, grids.__getitem__)
    choose = tuned(at_grids, threads=chosen.threads) if chosen.tune else None
    return planned_memory(at_grids, threads=chosen.threads, batch=chosen.batch, choose=choose)


def _costs(
    profile: Profile, policies: Mapping[str, Policy], chosen: ProfileNetwork, latency: LatencyTable | None
) -> Table:
    costs = dict(COSTS)
    for name in chosen.costs:
        found = find_cost(name)
        if found is None:
            raise ValueError(f"--costs: unknown cost {name!r}; known are {', '.join(COSTS)}")
        costs[name] = found
    columns = {"float32": float_bits(profile)}
    columns |= {f"{bits} bits": {site.name: bits for site in profile.sites} for bits in UNIFORM}
    columns |= {name: policy.bits for name, policy in policies.items()}
    table = Table(title="costs")
    table.add_column("cost")
    for name in columns:
        table.add_column(name, justify="right")
    for name, cost in costs.items():
        shown = (
            format_amount(name, cost.of(profile, bits)) if cost.holds(bits) else "-"
            for bits in columns.values()
        )
        table.add_row(name, *shown)
    if latency is not None:
        table.add_row(LATENCY, *(_milliseconds(latency, profile, bits) for bits in columns.values()))
    return table


def _milliseconds(latency: LatencyTable, profile: Profile, bits: Mapping[str, int]) -> str:
    try:
        return format_amount(LATENCY, predicted_ms(latency, profile, bits))
    except ValueError:  # widths that were not timed
        return "-"
