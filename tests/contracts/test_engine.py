"""The native engine gives the reference's values: any program, batch, threads, kernels and instruction sets."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from mixbits import zoo
from mixbits.core.check import check
from mixbits.core.grid import Codebook, Grid, Uniform, grid_to_json, quantize
from mixbits.core.program import Instruction, PackedWeight, Program
from mixbits.graph.quant_graph import capture, put_
from mixbits.lower import lower
from mixbits.pack.artifact import write_program
from mixbits.pack.bits import native_available, pack
from mixbits.quant.quantizer import LearnedStep
from mixbits.runtime import Executor
from mixbits.runtime.kernels import bytes_of
from mixbits.runtime.layout import Buffer, lay_out, reshaped_strides
from mixbits.runtime.native import Native
from mixbits.runtime.simplify import separable
from mixbits.train.method import full_grid
from programs import LIMIT, SAMPLE, random_program
from strategies import UNIFORM_GRIDS

pytestmark = pytest.mark.skipif(not native_available(), reason="built without the native extension")
if native_available():
    from mixbits import _native

# Sums of floats and transcendental functions are float64 rounded once; another order or another library moves
# a value across a tie once in many millions.
ONCE_ROUNDED = 1.2e-7


def outcome(run):
    """Values, or the words of the error."""
    try:
        return run()
    except ValueError as error:
        return str(error)


def assert_alike(found, wanted) -> None:
    if isinstance(wanted, str):
        assert found == wanted
        return
    finite = np.isfinite(wanted)
    np.testing.assert_allclose(found[finite], wanted[finite], rtol=ONCE_ROUNDED, atol=1e-14)


@pytest.mark.parametrize("seed", range(8))
def test_random_programs_compute_what_the_reference_computes(seed):
    program, rng = random_program(seed), np.random.default_rng(seed)
    for index, step in enumerate(program.instructions):
        until = replace(program, output=step.output, instructions=program.instructions[: index + 1])
        try:
            check(until, max_elements=LIMIT)
        except ValueError:
            continue  # its output is not batch first
        engine, reference = Native(until), Executor(until, max_elements=LIMIT, engine="reference")
        for batch in (1, 3):
            x = rng.standard_normal((batch, *SAMPLE)).astype(np.float32)
            wanted = outcome(lambda: reference(x))  # noqa: B023  called at once
            out = np.empty(() if isinstance(wanted, str) else wanted.shape, np.float32)
            assert_alike(outcome(lambda: engine.run(x, out)), wanted)  # noqa: B023


def quantized(network: torch.nn.Module, shape: tuple[int, ...], seed: int) -> Program:
    """A network with random widths, 1 to 8 bits."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    graph = capture(network.eval(), torch.randn(2, *shape))
    put_(
        graph,
        {
            site.name: LearnedStep(
                full_grid(site, bits := draw.choice([1, 1, 2, 2, 3, 4, 5, 8])),
                torch.tensor(draw.uniform(1, 3) / 2**bits * (0.3 if site.kind == "weight" else 1)),
                shared_by=1,
            )
            for site in graph.profile.sites
        },
    )
    graph.module.eval()
    return lower(graph)


NETWORKS = {
    "resnet20": zoo.resnet20,
    "mobilenet_v2_cifar": zoo.mobilenet_v2_cifar,
    "mobilenet_se": zoo.mobilenet_se,
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", range(3))
def test_networks_of_random_widths_equal_the_reference(name, seed):
    program = quantized(NETWORKS[name](), (3, 32, 32), seed)
    x = np.random.default_rng(seed).standard_normal((2, 3, 32, 32)).astype(np.float32)
    wanted = Executor(program, engine="reference")(x)
    assert len(np.unique(wanted)) >= 10
    np.testing.assert_array_equal(Executor(program, engine="native")(x), wanted)


@pytest.fixture(scope="module")
def small() -> Program:
    return quantized(zoo.digits_cnn(), (1, 8, 8), 5)


def images(count: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((count, 1, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_results_do_not_depend_on_threads(small, threads, count):
    wanted = Executor(small, engine="reference")(images(count))
    np.testing.assert_array_equal(Executor(small, threads=threads)(images(count)), wanted)


def test_results_do_not_depend_on_the_kernel():
    program = quantized(zoo.resnet20(), (3, 32, 32), 11)
    x = np.random.default_rng(1).standard_normal((1, 3, 32, 32)).astype(np.float32)
    wanted = Executor(program, engine="reference")(x)
    used = set[str]()
    for seed in range(6):
        draw = random.Random(seed)
        engine = Native(program, choose=lambda conv, layer, able: draw.choice(list(able)))  # noqa: B023
        used.update(ran.what for ran in engine.plan.ran)
        np.testing.assert_array_equal(engine.run(x, np.empty(wanted.shape, np.float32)), wanted)
    takes_part = {name for name, usable, _ in _native.kernels() if usable and "depthwise" not in name}
    assert takes_part <= used


def test_callers_at_the_same_time_get_their_own_results(small):
    executor, x = Executor(small, threads=2), images(16)
    wanted = executor(x)
    wrong: list[int] = []

    def call(index: int) -> None:
        found = [executor(x[index : index + 1])[0] for _ in range(50)]
        wrong.extend(index for logits in found if not np.array_equal(logits, wanted[index]))

    callers = [threading.Thread(target=call, args=(index,)) for index in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


LEVELS = ["portable", "avx2", "avx512", "avx512vnni", "avx512popcnt", "avx512vbmi", "native"]
RUN = """
import sys, numpy as np
from mixbits.runtime import Executor
executor = Executor.from_file(sys.argv[1])
assert executor.engine == "native"
np.save(sys.argv[3], executor(np.load(sys.argv[2])))
print(*sorted({ran.what for ran in executor.native.plan.ran}))
"""


@pytest.mark.parametrize("level", LEVELS)
def test_one_file_gives_the_same_output_on_every_level(level, tmp_path):
    program = quantized(zoo.mobilenet_v2_cifar(), (3, 32, 32), 2)
    write_program(program, tmp_path / "model.mixbits")
    x = np.random.default_rng(3).standard_normal((2, 3, 32, 32)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    ran = subprocess.run(
        [sys.executable, "-c", RUN, *(tmp_path / name for name in ("model.mixbits", "x.npy", "y.npy"))],
        env={**os.environ, "MIXBITS_ISA": level},
        capture_output=True,
        text=True,
        check=False,
    )
    if "does not have it" in ran.stderr:
        pytest.skip(f"this CPU has no {level}")
    assert ran.returncode == 0, ran.stderr
    wanted = Executor(program, engine="reference")(x)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), wanted)
    levels = {name: isa for name, _, isa in _native.kernels()}
    used = {levels[name] for name in ran.stdout.split() if name in levels}
    below = {"native": LEVELS}.get(level, [*LEVELS[: min(LEVELS.index(level), 3)], level])
    assert used <= set(below)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("limits", [(0, 6), (-1.5, 1.0), (0.7, None), (None, -0.2), (9, 10)], ids=str)
@pytest.mark.parametrize("signed", [False, True])
def test_limits_of_a_layer_hold_in_every_rounding(bits, limits, signed):
    """Limits within the grid's range, at its ends, and beyond; also where padding has no level of its own."""
    rng = np.random.default_rng(bits)
    weight = Uniform(4, True)
    codes = rng.integers(0, 16, 17 * 3 * 9).astype(np.uint8)
    low, high = limits
    layer = {"weight": "w", "scale": "scale", "bias": "bias", "stride": [1, 1], "padding": [[1, 1], [1, 0]]}
    program = Program(
        (3, 5, 6),
        "flat",
        (
            rounded("codes", "input", Uniform(3, True, "bipolar")),
            Instruction("conv2d", "conv", ("codes",), "sums", {**layer, "dilation": [1, 1], "groups": 1}),
            Instruction("clamp", "clamp", ("sums",), "limited", {"low": low, "high": high}),
            rounded("out", "limited", Uniform(bits, signed, "bipolar" if signed and bits == 1 else "full")),
            Instruction("reshape", "flat", ("out",), "flat", {"shape": [-1, 17 * 25]}),
        ),
        {"w": PackedWeight((17, 3, 3, 3), weight, pack(codes, 4))},
        {
            "step": np.float32(0.11),
            "scale": rng.uniform(0.01, 0.05, 17).astype(np.float32),
            "bias": rng.normal(0, 1, 17).astype(np.float32),
        },
    )
    x = rng.standard_normal((2, 3, 5, 6)).astype(np.float32)
    wanted = Executor(program, engine="reference")(x)
    np.testing.assert_array_equal(Executor(program, engine="native")(x), wanted)


def rounded(name: str, source: str, grid: Grid) -> Instruction:
    return Instruction("quantize", name, (source,), name, {"grid": grid_to_json(grid), "step": "step"})


@pytest.mark.parametrize("engine", ["native", None])
def test_what_is_asked_for_wrongly_is_refused_and_not_run_more_slowly(small, monkeypatch, engine):
    with pytest.raises(ValueError, match="threads is 1 or more, not 0"):
        Executor(small, engine=engine, threads=0)
    monkeypatch.setenv("MIXBITS_ISA", "avx9")
    with pytest.raises(ValueError, match="MIXBITS_ISA: it names no level"):
        Executor(small, engine=engine)


# --- rounding ---------------------------------------------------------------------------------------------


def rounding_program(grid: Grid, step: float) -> Program:
    """Values to codes and back."""
    codes = Instruction(
        "quantize", "codes", ("input",), "codes", {"grid": grid_to_json(grid), "step": "step"}
    )
    flat = Instruction("reshape", "flat", ("codes",), "flat", {"shape": [-1, 4096]})
    return Program((4096,), "flat", (codes, flat), {}, {"step": np.float32(step)})


GRIDS = [*UNIFORM_GRIDS, Codebook(2, (-7, -1, 0, 5)), Codebook(4, (0, 1, 2, 4, 8, 16, 32, 64, 128, 255))]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rounding_is_that_of_a_division_at_every_threshold(grid):
    rng = np.random.default_rng(len(grid.levels))
    for step in np.float32([1.0, 0.1, 1 / 3, 3e-5, 7.77, *np.exp(rng.uniform(-9, 3, 6))]):
        edges = np.asarray(grid.levels, np.float32)
        near = np.concatenate([(edges[1:] + edges[:-1]) / 2 * step, edges * step, [0, -0.0]]).astype(
            np.float32
        )
        values = [near]
        for _ in range(3):
            values += [np.nextafter(values[-1], np.float32(np.inf))]
        values += [near * np.float32(1 - 1e-7), rng.normal(0, 100, 300).astype(np.float32) * step]
        values += [np.float32([3e38, -3e38, 1e-40, -1e-40])]
        x = np.resize(np.concatenate(values), (1, 4096)).astype(np.float32)
        x[~np.isfinite(x)] = 0
        program = rounding_program(grid, step)
        found = Executor(program, engine="native")(x)
        with np.errstate(over="ignore"):
            wanted = edges[quantize(x, step, grid)] * step
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("level", ["portable", "avx2"])
def test_roundings_of_lower_levels_pass_the_same_tests(level):
    names = "division_at_every_threshold or not_a_number or (random_widths and resnet20)"
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", names],
        env={**os.environ, "MIXBITS_ISA": level},
        capture_output=True,
        text=True,
        check=False,
    )
    if "does not have it" in ran.stdout:
        pytest.skip(f"this CPU has no {level}")
    assert ran.returncode == 0, ran.stdout


def test_what_is_not_a_number_is_refused_with_the_name_of_the_layer(small):
    bias = next(name for name in small.constants if name.endswith("/bias"))
    lost = {bias: np.full_like(small.constants[bias], np.nan)}
    program = replace(small, constants={**small.constants, **lost})
    native_words, words = (
        outcome(lambda engine=engine: Executor(program, engine=engine)(images(2)))
        for engine in ("native", "reference")
    )
    assert native_words == words
    assert "not a number" in words


# --- the plan ---------------------------------------------------------------------------------------------


def test_buffers_that_live_at_the_same_time_do_not_overlap():
    draw = random.Random(1)
    for _ in range(50):
        buffers = [
            Buffer(64 * draw.randint(1, 9), first := draw.randrange(20), first + draw.randrange(5))
            for _ in range(30)
        ]
        size = lay_out(buffers)
        for one in buffers:
            assert one.offset + one.size <= size
            for other in buffers:
                if one is not other and one.first <= other.last and other.first <= one.last:
                    assert one.offset + one.size <= other.offset or other.offset + other.size <= one.offset


def test_reshaped_strides_see_the_same_elements():
    draw = random.Random(2)
    for _ in range(300):
        shape = [draw.choice([1, 2, 3, 4, 6]) for _ in range(draw.randint(1, 4))]
        array = np.arange(np.prod(shape)).reshape(shape).transpose(draw.sample(range(len(shape)), len(shape)))
        wanted = [draw.choice([1, 2, 3, 4, 6, 12]) for _ in range(draw.randint(1, 4))]
        if np.prod(wanted) != array.size:
            continue
        strides = reshaped_strides(array.shape, [s // array.itemsize for s in array.strides], wanted)
        if strides is not None:
            seen = np.lib.stride_tricks.as_strided(array, wanted, [s * array.itemsize for s in strides])
            np.testing.assert_array_equal(seen, array.reshape(wanted))


def test_programs_that_mix_samples_run_as_whole_batches():
    mean = Instruction("mean", "mean", ("input",), "mean", {"dims": [0], "keepdim": True})
    minus = Instruction("sub", "minus", ("input", "mean"), "minus", {})
    program = Program((5,), "minus", (mean, minus), {}, {})
    assert not separable(program)
    x = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
    for batch in (6, 2, 1):
        wanted = Executor(program, engine="reference")(x[:batch])
        np.testing.assert_array_equal(Executor(program, engine="native")(x[:batch]), wanted)


def test_storage_of_codes_is_a_byte_and_has_level_zero_where_the_grid_has():
    for grid in GRIDS:
        storage = bytes_of(grid)
        assert (storage.zero is None) == (0 not in range(grid.level_min, grid.level_max + 1, storage.scale))
        stored = (np.asarray(grid.levels) - storage.offset) / storage.scale
        assert stored.min() == 0
        assert stored.max() == storage.largest <= 255
        assert np.array_equal(stored, stored.astype(np.uint8))
    assert bytes_of(Uniform(8, True, "bipolar")).largest == 255
