"""The choice of kernels: measured, kept in a file, and without effect on results."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mixbits.core.grid import Uniform
from mixbits.core.program import Program
from mixbits.graph.quant_graph import capture
from mixbits.lower.untrained import lower_untrained
from mixbits.pack.bits import native_available
from mixbits.runtime.ceilings import MIXES, ceiling
from mixbits.runtime.executor import Executor
from mixbits.runtime.latency import regridded
from mixbits.runtime.native import Native
from mixbits.runtime.steps import speed
from mixbits.runtime.tune import cache_path, key, machine

pytestmark = pytest.mark.skipif(not native_available(), reason="built without the native extension")
if native_available():
    from mixbits import _native

SAMPLE = (8, 12, 12)
CONVOLUTIONS = 4  # different ones in the program


@cache
def program() -> Program:
    """Five layers of which the second and third are equal, at widths that several kernels take."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(8, 24, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(24 * 36, 10)),
    )
    graph = capture(model.eval(), torch.zeros(2, *SAMPLE))
    signed = {site.name: site.signed for site in graph.profile.sites}
    return regridded(lower_untrained(graph), lambda site: Uniform(2, signed[site]))


def images(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, *SAMPLE)).astype(np.float32)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of choices, in a folder of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return cache_path()


def entries(kept: Path) -> dict[str, dict[str, float]]:
    return json.loads(kept.read_text())["machines"][machine(1)]


def layers_of(native: Native | None) -> list[str]:
    assert native is not None
    return [ran.what for ran in native.plan.ran if ran.macs]


@pytest.mark.parametrize("seed", range(8))
def test_results_do_not_depend_on_the_choice(seed):
    draw, x = random.Random(seed), images()
    native = Native(program(), choose=lambda conv, layer, kernels: draw.choice(kernels))

    expected = Executor(program(), engine="reference")(x)

    assert np.array_equal(native.run(x, np.empty_like(expected)), expected)


def test_measured_choices_are_kept_and_give_the_same_results(kept: Path):
    x = images()
    plain = Executor(program(), engine="native")

    tuned = Executor(program(), tune=True, engine="native")

    assert np.array_equal(tuned(x), plain(x))
    assert len(entries(kept)) == CONVOLUTIONS  # the two equal layers share one
    assert all(us > 0 for measured in entries(kept).values() for us in measured.values())
    fastest = {min(measured, key=measured.__getitem__) for measured in entries(kept).values()}
    assert set(layers_of(tuned.native)) == fastest


def test_what_is_kept_is_not_measured_again(kept: Path):
    Executor(program(), tune=True, engine="native")
    document = json.loads(kept.read_text())
    for measured in document["machines"][machine(1)].values():  # another order than any measurement gives
        measured.update({name: float(index) for index, name in enumerate(sorted(measured))})
    kept.write_text(json.dumps(document))
    before = kept.read_bytes()

    tuned = Executor(program(), tune=True, engine="native")

    assert kept.read_bytes() == before
    wanted = {min(measured) for measured in entries(kept).values()}
    assert set(layers_of(tuned.native)) == wanted


def test_a_kernel_that_was_not_measured_is(kept: Path):
    Executor(program(), tune=True, engine="native")
    complete = {conv: set(measured) for conv, measured in entries(kept).items()}
    document = json.loads(kept.read_text())
    conv = next(iter(complete))
    document["machines"][machine(1)][conv].popitem()
    document["machines"]["another machine"] = {conv: {"its_kernel": 1.0}}
    kept.write_text(json.dumps(document))

    Executor(program(), tune=True, engine="native")

    assert {conv: set(measured) for conv, measured in entries(kept).items()} == complete
    assert json.loads(kept.read_text())["machines"]["another machine"] == {conv: {"its_kernel": 1.0}}


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "mixbits-kernels", "version": 2, "machines": {}}'])
def test_a_file_that_cannot_be_read_is_said_and_written_anew(kept: Path, text):
    kept.parent.mkdir(parents=True)
    kept.write_text(text)

    with pytest.warns(UserWarning, match=r"kernels\.json: cannot be read .*measured again"):
        Executor(program(), tune=True, engine="native")

    assert len(entries(kept)) == CONVOLUTIONS


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mixbits").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    with pytest.warns(UserWarning) as warned:
        tuned = Executor(program(), tune=True, engine="native")

    assert any("cannot be kept" in str(warning.message) for warning in warned)
    assert np.array_equal(tuned(images()), Executor(program(), engine="native")(images()))


def test_a_relative_folder_for_caches_is_not_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")

    assert cache_path() == Path.home() / ".cache" / "mixbits" / "kernels.json"


def test_threads_and_levels_are_measured_apart(monkeypatch: pytest.MonkeyPatch):
    names = {machine(1), machine(2)}
    monkeypatch.setenv("MIXBITS_ISA", "portable")

    assert len({*names, machine(1)}) == 3


def test_every_field_of_a_convolution_tells_it_from_others():
    conv = _native.Conv()
    before = key(conv)
    for name in [name for name in dir(conv) if not name.startswith("_")]:
        other = _native.Conv()
        setattr(other, name, getattr(conv, name) + 1)
        assert key(other) != before, name


@pytest.mark.parametrize(("threads", "count"), [(1, 1), (1, 3), (2, 1), (2, 5)])
def test_every_step_has_a_time_whatever_threads_and_samples(threads, count):
    executor = Executor(program(), threads=threads, engine="native")

    ran = speed(executor, images(count))

    assert (ran["engine"], ran["threads"], ran["batch"]) == ("native", threads, count)
    assert ran["ms"] > 0
    assert all(step["us"] > 0 for step in ran["steps"])
    assert [step["kernel"] for step in ran["steps"] if step["macs"]] == layers_of(executor.native)


def test_bytes_moved_are_inputs_outputs_and_weights():
    executor = Executor(program(), engine="native")
    assert executor.native is not None
    convs: dict[str, _native.Conv] = {}
    Native(
        program(),
        choose=lambda conv, layer, names: convs.setdefault(layer, conv) and names[0],
    )

    one, two = (speed(executor, images(count))["steps"] for count in (1, 2))

    for step in one:
        if step["name"].startswith("2 "):  # bytes in, bytes out
            assert step["bytes"] == 2 * 8 * 12 * 12 + _native.weight_bytes(step["kernel"], convs["2"])
    assert [step["bytes"] for step in two] == [2 * step["bytes"] for step in one]


def test_the_reference_has_a_speed_and_no_steps():
    ran = speed(Executor(program(), engine="reference"), images(1))

    assert (ran["engine"], ran["steps"]) == ("reference", [])
    assert ran["ms"] > 0


def test_every_ceiling_that_a_kernel_here_has_can_be_measured():
    conv = _native.Conv()
    conv.w_bits, conv.a_max, conv.kh, conv.kw = 2, 3, 3, 3
    for name, usable, _ in _native.kernels():
        if usable and name in MIXES:
            assert MIXES[name][0] in _native.ceilings()
            most = ceiling(name, conv)
            assert most is not None
            assert most > 0
    assert ceiling("direct_portable", conv) is None
