"""Processes that are killed at random moments: what is resumed gives the result of what was not interrupted."""

from __future__ import annotations

import json
import multiprocessing.forkserver
import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

import killable
from killable import RESULT, STARTED, train

KILLS = 3
DEADLINE = 60.0  # seconds that a process may take

# Bilevel with draws, accumulators of an integer program, learned ranges; the other methods are slow tests.
METHODS = [
    pytest.param("ebs", {"mixing": "gumbel"}, id="ebs"),
    pytest.param("bmpq", {"interval": 0.25, "warmup": 0.0}, id="bmpq"),
    pytest.param("mpdnn", {}, id="mpdnn"),
    pytest.param("ddq", {}, id="ddq", marks=pytest.mark.slow),
    pytest.param("sdq", {}, id="sdq", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes that are forked from one that has imported everything and started no thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killable"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(killable.__file__).parent), *sys.path]))
        multiprocessing.forkserver.ensure_running()
    return context


def begun(processes: Any, method: str, options: dict[str, object], folder: Path) -> BaseProcess:
    folder.mkdir(exist_ok=True)
    (folder / STARTED).unlink(missing_ok=True)
    process = processes.Process(target=train, args=(method, options, folder))
    process.start()
    end = time.monotonic() + DEADLINE
    while process.is_alive() and not (folder / STARTED).exists():
        assert time.monotonic() < end
        time.sleep(0.002)
    return process


def finished(process: BaseProcess) -> None:
    process.join(DEADLINE)
    assert process.exitcode == 0


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_a_run_that_is_killed_again_and_again_gives_the_uninterrupted_result(
    processes, tmp_path, method, options
):
    whole = begun(processes, method, options, tmp_path / "whole")
    began = time.monotonic()
    finished(whole)
    lasts = time.monotonic() - began

    moments = random.Random(os.urandom(8))
    killed = 0
    for _ in range(KILLS):
        process = begun(processes, method, options, tmp_path / "killed")
        process.join(moments.uniform(0.0, lasts / 2))  # some kills come before the first step is saved
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            killed += process.exitcode == -signal.SIGKILL
    finished(begun(processes, method, options, tmp_path / "killed"))

    assert killed > 0
    first, second = (torch.load(tmp_path / name / RESULT, weights_only=True) for name in ("whole", "killed"))
    assert second["policy"] == first["policy"]
    assert all(torch.equal(second["network"][name], value) for name, value in first["network"].items())


FIT = [
    *("--network", "mixbits.zoo:digits_cnn", "--data", "digits", "--budget", "weights=3bit,act=4bit"),
    *(
        "--float-training.epochs",
        "4",
        "--float-training.lr",
        "0.05",
        "--finetune.epochs",
        "4",
        "--threads",
        "1",
    ),
]


def rows(folder: Path) -> list[dict[str, Any]]:
    """The metrics without the times, which differ."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ebs", "bmpq", "mpdnn", "ddq", "sdq"])
def test_a_command_that_is_killed_until_it_ends_leaves_the_uninterrupted_files(tmp_path, method):
    options = ["--method", method, f"--{method}.epochs", "4"]

    def fit(folder: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "mixbits.cli.main", "fit", *FIT, *options, "--resume"]
        return subprocess.Popen([*command, "--out", str(folder)], stderr=subprocess.DEVNULL)

    began = time.monotonic()
    assert fit(tmp_path / "whole").wait() == 0
    lasts = time.monotonic() - began

    moments, killed = random.Random(os.urandom(8)), 0
    for _ in range(8):
        process = fit(tmp_path / "killed")
        try:
            process.wait(moments.uniform(0.2, 0.6) * lasts)
        except subprocess.TimeoutExpired:
            process.kill()
            killed += process.wait() == -signal.SIGKILL
    if not (tmp_path / "killed" / "report.html").exists():
        assert fit(tmp_path / "killed").wait() == 0

    assert killed > 0
    for name in ("policy.json", "finetuned.safetensors", "model.mixbits"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
