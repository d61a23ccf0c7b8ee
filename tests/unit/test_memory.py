"""Memory: what is planned from a program alone is what an engine allocates."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch

from lowered import LARGE, NETWORKS, lowered
from mixbits.core.grid import Grid, grid_from_json
from mixbits.core.program import Instruction, PackedWeight, Program
from mixbits.graph.quant_graph import put_
from mixbits.lower import lower
from mixbits.lower.untrained import lower_untrained
from mixbits.pack.bits import native_available
from mixbits.quant.quantizer import LearnedStep
from mixbits.runtime import Executor
from mixbits.runtime.latency import regridded
from mixbits.runtime.memory import Memory
from mixbits.runtime.native import planned_memory
from mixbits.train.method import usual_grid

pytestmark = pytest.mark.skipif(not native_available(), reason="built without the native extension")


def grids_of(program: Program) -> dict[str, Grid]:
    """The grid of every site."""
    grids = {name: weight.grid for name, weight in program.weights.items()}
    grids |= {s.name: grid_from_json(s.attrs["grid"]) for s in program.instructions if s.op == "quantize"}
    return grids


@lru_cache
def untrained(name: str) -> Program:
    return lower_untrained(lowered(name).graph)


def predicted(name: str, grids: dict[str, Grid], *, threads: int, batch: int) -> Memory:
    """As `mixbits profile` does it, which knows neither weights nor steps."""
    return planned_memory(regridded(untrained(name), grids.__getitem__), threads=threads, batch=batch)


def allocated(program: Program, *, threads: int, batch: int) -> Memory:
    """Counted in the engine once it has run."""
    executor = Executor(program, threads=threads, engine="native")
    assert executor.native is not None
    x = np.random.default_rng(0).standard_normal((batch, *program.input_shape)).astype(np.float32)
    executor(x)
    assert executor.memory(batch) == executor.native.allocated(batch)
    return executor.native.allocated(batch)


@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - LARGE.keys()))
def test_what_profile_predicts_is_what_is_allocated(name):
    program = lowered(name).program
    found = allocated(program, threads=2, batch=3)
    assert found == predicted(name, grids_of(program), threads=2, batch=3)
    assert min(found.arenas, found.scratch, found.weights) > 0


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(1, 1), (2, 2), (3, 7), (8, 8)])
@pytest.mark.parametrize("name", ["digits_cnn", "resnet20"])
def test_predictions_hold_at_every_width_and_number_of_threads(name, weight_bits, activation_bits, threads):
    network = lowered(name).graph.copy()
    widths = {"weight": weight_bits, "activation": activation_bits}
    grids = {site.name: usual_grid(site, widths[site.kind]) for site in network.profile.sites}
    put_(
        network,
        {site: LearnedStep(grid, torch.tensor(0.03), shared_by=1) for site, grid in grids.items()},
    )
    network.module.eval()
    found = allocated(lower(network), threads=threads, batch=2)
    assert found == predicted(name, grids, threads=threads, batch=2)


def test_each_thread_has_values_and_scratch_of_its_own_and_weights_are_shared():
    one, four = (planned_memory(lowered("digits_cnn").program, threads=threads) for threads in (1, 4))
    assert four == Memory(4 * one.arenas, 4 * one.scratch, one.weights)


def test_kernels_are_planned_with_the_form_that_they_want_weights_in():
    grids = {site.name: usual_grid(site, 2) for site in lowered("resnet20").graph.profile.sites}
    program = regridded(untrained("resnet20"), grids.__getitem__)
    plain = planned_memory(program, choose=lambda conv, layer, able: "direct_portable")
    assert plain.weights > 8 * program.weight_bytes  # two bytes a code of 2 bits
    assert plain.weights != planned_memory(program).weights


def test_programs_that_mix_samples_take_more_for_more_samples():
    steps = (
        Instruction("mean", "mean", ("input",), "mean", {"dims": [0], "keepdim": True}),
        Instruction("sub", "minus", ("input", "mean"), "minus", {}),
        Instruction("softmax", "shares", ("minus",), "shares", {"dim": 1}),
        Instruction("add", "sum", ("shares", "minus"), "sum", {}),
    )
    program = Program((50,), "sum", steps, {}, {})
    for batch in (1, 6, 40):
        assert allocated(program, threads=2, batch=batch) == planned_memory(program, threads=2, batch=batch)
    assert planned_memory(program, batch=40).arenas > planned_memory(program, batch=1).arenas


def test_a_damaged_weight_is_an_error_whatever_runs():
    program = lowered("digits_cnn").program
    name, weight = next((n, w) for n, w in program.weights.items() if len(w.grid.levels) < 2**w.grid.bits)
    damaged = PackedWeight(weight.shape, weight.grid, np.full_like(weight.packed, 255))
    broken = replace(program, weights={**program.weights, name: damaged})
    for engine in ("native", "reference", None):
        with pytest.raises(ValueError, match="has no level"):
            Executor(broken, engine=engine)
