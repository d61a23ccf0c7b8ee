"""Latency, measured: every layer of a network at every pair of widths, with the kernels that will run.

The network runs as a whole, all its weights at one width and all its activations at another, and each layer
is timed where it will run: with what runs along with it (residual, limits, rounding), with weights as cold as
its neighbours leave them. What a run takes beside its layers depends little on widths: it is their median.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

import mixbits
from mixbits.core.grid import Grid, grid_to_json
from mixbits.core.latency import LatencyTable, LayerTimes
from mixbits.core.profile import Profile
from mixbits.core.program import PackedWeight, Program
from mixbits.pack.bits import native_available, pack
from mixbits.runtime.executor import Executor
from mixbits.runtime.native import check_native
from mixbits.runtime.steps import repeats_for, seconds_of
from mixbits.runtime.tune import isa_level

if TYPE_CHECKING or native_available():
    from mixbits import _native

ROUNDS = 5  # in each of which every pair of widths has its turn, so that a disturbance hits all
SECONDS = 0.02  # of a turn, for the steps and again for the whole
NS = 1e9  # in a second

Pair = tuple[int, int]  # weight bits, activation bits


def here() -> tuple[str, str, int]:
    """CPU model, level of instructions and cores of this process: what a table holds for."""
    check_native(1)
    return _native.cpu_model(), isa_level(), cores()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def regridded(program: Program, grid_of: Callable[[str], Grid]) -> Program:
    """The same instructions with every site on another grid, and random codes as weights: good for timing."""
    rng = np.random.default_rng(0)
    weights: dict[str, PackedWeight] = {}
    for name, weight in program.weights.items():
        grid = grid_of(name)
        codes = rng.integers(0, len(grid.levels), int(np.prod(weight.shape)), np.uint8)
        weights[name] = PackedWeight(weight.shape, grid, pack(codes, grid.bits))
    steps = tuple(
        replace(step, attrs={**step.attrs, "grid": grid_to_json(grid_of(step.name))})
        if step.op == "quantize"
        else step
        for step in program.instructions
    )
    return replace(program, instructions=steps, weights=weights)


def measure_latency(
    program: Program,
    profile: Profile,
    grid_of: Callable[[str, int], Grid],
    *,
    weight_bits: Sequence[int],
    activation_bits: Sequence[int],
    threads: int = 1,
    batch: int = 1,
    tune: bool = False,
    network: str = "",
    watch: Callable[[int, int], object] = lambda done, total: None,
) -> LatencyTable:
    """The table of a network that was lowered at any widths; ``grid_of(site, bits)`` is a site's grid.

    ``watch`` gets the number of rounds done and of all. Raises ``ValueError`` where the engine cannot run it.
    """
    cpu, isa, _ = here()
    rows, columns = sorted(set(weight_bits)), sorted(set(activation_bits))
    pairs = list(product(rows, columns))
    x = np.random.default_rng(0).standard_normal((batch, *program.input_shape)).astype(np.float32)
    layers: dict[str, dict[Pair, float]] = {op.name: {} for op in profile.ops}  # least seconds
    kernels: dict[str, dict[Pair, str]] = {op.name: {} for op in profile.ops}
    whole: dict[Pair, float] = {}
    for turn, (w, a) in enumerate(pairs * ROUNDS, start=1):
        widths = {site.name: w if site.kind == "weight" else a for site in profile.sites}
        grids = {site: grid_of(site, bits) for site, bits in widths.items()}
        executor = Executor(
            regridded(program, grids.__getitem__), threads=threads, tune=tune, engine="native"
        )
        assert executor.native is not None
        repeats = repeats_for(executor, x, SECONDS)
        taken: dict[str, float] = {}
        for ran, seconds in executor.native.steps(x, repeats):
            name = ran.names[0] if ran.names else ""
            if name in layers:
                taken[name] = taken.get(name, 0.0) + seconds
                if ran.macs:
                    kernels[name][w, a] = ran.what
        for name, seconds in taken.items():
            layers[name][w, a] = min(seconds, layers[name].get((w, a), seconds))
        least = min(seconds_of(executor, x, repeats))
        whole[w, a] = min(least, whole.get((w, a), least))
        if turn % len(pairs) == 0:
            watch(turn // len(pairs), ROUNDS)
    rest = median(whole[pair] - sum(times[pair] for times in layers.values()) for pair in pairs)
    return LatencyTable(
        network=network,
        cpu=cpu,
        isa=isa,
        threads=threads,
        batch=batch,
        tuned=tune,
        weight_bits=tuple(rows),
        activation_bits=tuple(columns),
        layers=tuple(
            LayerTimes(
                op.name,
                op.macs,
                tuple(tuple(round(NS * layers[op.name][w, a]) for a in columns) for w in rows),
                tuple(tuple(kernels[op.name][w, a] for a in columns) for w in rows),
            )
            for op in profile.ops
        ),
        rest_ns=max(round(NS * rest), 0),
        mixbits=mixbits.__version__,
        date=time.strftime("%Y-%m-%d"),
    )


def predicted_ms(table: LatencyTable, profile: Profile, bits: Mapping[str, int]) -> float:
    """Milliseconds of a run at these widths; ``ValueError`` for a pair that the table lacks."""
    table.check(profile, {site: (width,) for site, width in bits.items()})
    return table.amount(profile).of(bits)
