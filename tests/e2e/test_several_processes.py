"""Several processes under ``torchrun``: what they learn together is what one process learns from the same batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import together
from mixbits.train.processes import Processes
from mixbits.train.steps import Loop
from together import METHODS, in_a_loop, learned, normalized, saved

DEADLINE = 900.0  # seconds for processes on a machine that does other things, too
# Float32 sums in another order differ in their last bits; a value at the edge between two levels then falls on
# the other one and moves what it is a part of by a step. Over a dozen updates that stays below this, relative
# to the largest value of a tensor.
OTHER_ORDER = 4e-3
ONE_WEIGHT = 5e-2  # what one weight of a channel's 72 on another level does to the channel's statistics
SUMS = 1e-5  # the same without any rounding to levels


def launched(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The script as ``torchrun`` runs it in two processes of one thread each."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(together.__file__).parent), *sys.path]),
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, together.__file__, *map(str, arguments)]
    return subprocess.run(
        command, env=environment, stderr=subprocess.PIPE, text=True, check=False, timeout=DEADLINE
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes has to say about everything."""
    folder = tmp_path_factory.mktemp("two")
    process = launched("all", folder)
    assert process.returncode == 0, process.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def farthest(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of any tensor, relative to its largest value."""
    assert one.keys() == other.keys()
    return max(
        float((value - other[name]).abs().max() / value.abs().max().clamp_min(1e-3))
        for name, value in one.items()
        if value.is_floating_point() and value.numel()
    )


def parted(result: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters, and batch norms' statistics."""
    state = result["state"]
    statistics = {name: value for name, value in state.items() if "running_" in name}
    return {name: value for name, value in state.items() if name not in statistics}, statistics


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_learn_the_policy_of_one_and_nearly_its_weights(two, method):
    alone = learned(method, Loop)

    assert two[0][method]["policy"] == alone["policy"]
    assert two[0][method]["asked"] == pytest.approx(alone["asked"], rel=OTHER_ORDER)
    (parameters, statistics), (others, others_statistics) = parted(alone), parted(two[0][method])
    assert farthest(parameters, others) < OTHER_ORDER
    assert farthest(statistics, others_statistics) < ONE_WEIGHT


@pytest.mark.parametrize("method", METHODS)
def test_both_processes_end_with_the_same_bits(two, method):
    first, second = (result[method] for result in two)

    assert first["policy"] == second["policy"]
    assert all(torch.equal(value, second["state"][name]) for name, value in first["state"].items())
    assert first["held out"]
    assert second["held out"] == []  # only the main process tells


@pytest.mark.parametrize("method", ["mpdnn", "ddq", "ebs"])
def test_a_loop_of_the_users_on_accelerate_learns_what_one_process_learns(two, method):
    alone = in_a_loop(method)

    for result in two:
        found = result[f"a loop with {method}"]
        assert found["policy"] == alone["policy"]
        assert farthest(alone["state"], found["state"]) < OTHER_ORDER


def test_a_batch_norm_over_uneven_parts_is_that_over_the_batch(two):
    alone = normalized()

    for result in two:
        assert farthest(alone, result["normalized"]) < SUMS
        assert result["normalized"]["batches"] == alone["batches"]


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        ("captured after wrapping", "CaptureError: the network is in DistributedDataParallel already"),
        ("begun after wrapping", "then wrap training.module"),
        ("never wrapped", "their gradients are not averaged. Wrap training.module"),
        ("other batches", "the processes read different batches"),
        ("too small a batch", "a batch of 1 samples cannot be divided among 2 processes"),
        ("an error of the main process", "no space left"),
    ],
)
def test_what_would_go_wrong_silently_is_an_error_in_every_process(two, attempt, message):
    assert all(message in result["refused"][attempt] for result in two)


def test_a_killed_process_ends_the_run_with_its_reason_and_one_process_can_go_on(tmp_path):
    process = launched("killed", tmp_path)
    options = saved(tmp_path)("learn").checkpoint
    alone = learned("mpdnn", Loop)
    continued = learned("mpdnn", lambda stage: Loop(stage, checkpoint=options if stage == "learn" else None))

    assert process.returncode != 0
    assert "another process of this training has ended or cannot be reached" in process.stderr
    assert continued["policy"] == alone["policy"]
    assert farthest(alone["state"], continued["state"]) < OTHER_ORDER


@given(size=st.integers(0, 40), count=st.integers(1, 9))
def test_parts_are_the_batch_divided_as_evenly_as_it_can_be(size, count):
    batch = torch.arange(size), torch.arange(size) + 1

    parts = [Processes(rank, count).part(batch) for rank in range(count)]

    for place, whole in enumerate(batch):
        assert torch.equal(torch.cat([part[place] for part in parts]), whole)
    sizes = [len(inputs) for inputs, _ in parts]
    assert max(sizes) - min(sizes) <= 1
    if size >= count:
        shares = [Processes(rank, count).share(part[0], batch) for rank, part in enumerate(parts)]
        assert np.mean(shares) == pytest.approx(1.0)
