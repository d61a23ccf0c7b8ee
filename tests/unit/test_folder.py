"""Run folders: one run at a time, whole files, and a wrong resume that is refused with what differs."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mixbits.core.files import whole_file
from mixbits.core.grid import Uniform
from mixbits.core.policy import Policy
from mixbits.fit.recipe import recipe_from_dict
from mixbits.fit.stages import Run, opened
from mixbits.zoo import digits_cnn

ENTRIES = {
    "network": "mixbits.zoo:digits_cnn",
    "data": "digits",
    "budget": "weights=3bit",
    "method": "uniform",
}


def weights(path: Path, seed: int) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        save_file(digits_cnn().state_dict(), path)
    return str(path)


def a_run(path: Path, **options) -> Run:
    return Run(recipe_from_dict({**ENTRIES, **options}, "test"), path, lambda row: None, threading.Event())


def test_of_runs_that_begin_in_one_folder_at_once_one_gets_it(tmp_path):
    entries = {"weights": weights(tmp_path / "w.safetensors", 0)}
    runs = [a_run(tmp_path / "out", **entries) for _ in range(4)]
    ready, done = threading.Barrier(len(runs)), threading.Barrier(len(runs))
    refused: list[str] = []

    for run in runs:
        assert run.graph and run.task.train  # made beforehand, so that all begin together

    def begin(run: Run) -> None:
        ready.wait()
        try:
            with opened(run, resume=False):
                run.folder.append_row({"stage": "float"})
                done.wait(60)
        except ValueError as error:
            refused.append(str(error))
            done.wait(60)

    threads = [threading.Thread(target=begin, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(refused) == len(runs) - 1
    assert all("in use by another mixbits process" in words or "already holds" in words for words in refused)
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == '{"stage": "float"}\n'


def test_a_folder_of_something_else_is_left_as_it_is(tmp_path):
    (tmp_path / "thesis.tex").touch()

    with (
        pytest.raises(ValueError, match="is not the folder of a mixbits run"),
        opened(a_run(tmp_path, weights=weights(tmp_path / "w.safetensors", 0)), resume=True),
    ):
        pass

    assert {path.name for path in tmp_path.iterdir()} == {"thesis.tex", "w.safetensors"}


def refusal(saved: Run, resumed: Run, *policies: Policy | None) -> str:
    """What a stage of the second run says to a checkpoint of the first."""
    before, after = policies or (None, None)
    (saved.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    for run, policy in ((saved, before), (resumed, after)):
        checkpoint = run.loop("finetune", policy).checkpoint
        assert checkpoint is not None
        if run is saved:
            checkpoint.save({})
            assert checkpoint.load() == ({}, "")
            continue
        with pytest.raises(ValueError, match="belongs to another run") as refused:
            checkpoint.load()
    return str(refused.value)


def test_a_checkpoint_of_other_options_weights_data_or_widths_is_refused_with_what_differs(tmp_path):
    file = tmp_path / "w.safetensors"
    entries = {"weights": weights(file, 0)}
    run = a_run(tmp_path / "out", **entries)
    again = a_run(tmp_path / "out", **entries, finetune={"lr": 0.5})
    assert "finetune.lr is 0.01 there and 0.5 here" in refusal(run, again)

    weights(file, 1)
    assert "the float network is " in refusal(run, a_run(tmp_path / "out", **entries))

    swapped, source = tmp_path / "swapped", tmp_path / "data.py"
    source.write_text(
        "import dataclasses, pathlib, mixbits.data.digits\n"
        "def digits():\n    data = mixbits.data.digits.load_digits()\n"
        f"    swapped = pathlib.Path({str(swapped)!r}).exists()\n"
        "    return dataclasses.replace(data, train=data.test) if swapped else data\n"
    )
    entries |= {"data": f"{source}:digits"}
    run = a_run(tmp_path / "out", **entries)
    assert run.contents
    swapped.touch()
    assert "the data is 1437 + 360 samples" in refusal(run, a_run(tmp_path / "out", **entries))

    grids = [{site.name: Uniform(b, site.signed) for site in run.graph.profile.sites} for b in (3, 4)]
    assert "the policy is " in refusal(run, run_like(run), Policy(grids[0]), Policy(grids[1]))


def run_like(run: Run) -> Run:
    other = Run(run.recipe, run.folder.path, lambda row: None, threading.Event())
    other.dataset, other.graph = run.dataset, run.graph
    return other


def test_a_file_that_could_not_be_written_whole_leaves_the_old_one(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"old")
    (tmp_path / ".file.tmp").symlink_to("/dev/full")

    with pytest.raises(OSError, match="No space left"), whole_file(file, alone=True) as target:
        target.write(b"new")

    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_bytes() == b"old"


def test_what_a_killed_process_left_is_written_over(tmp_path):
    (tmp_path / ".file.tmp").write_bytes(b"half")

    with whole_file(tmp_path / "file", alone=True) as target:
        target.write(b"whole")

    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_a_network_that_cannot_be_packed_is_refused_before_training(tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Hardshrink(), nn.Flatten(), nn.Linear(144, 10))\n"
    )
    run = a_run(tmp_path / "run", network=f"{tmp_path}/net.py:net")
    with (
        pytest.raises(ValueError, match=r"^1/.*: no instruction for "),
        opened(run, resume=False),
    ):
        pass
    assert not (tmp_path / "run").exists()
