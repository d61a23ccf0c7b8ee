"""Watchers: what real TensorBoard, Weights & Biases and MLflow have on the disk after a run, offline."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from mixbits.fit.watching import watching

pytestmark = pytest.mark.filterwarnings("default")  # of the watchers' own packages

OPTIONS = {"network": "mixbits.zoo:digits_cnn", "finetune.lr": 0.01}


def rows(first: int, last: int) -> list[dict[str, Any]]:
    """A stage that begins after step ``first``, with a row at every step and figures at every second."""
    told: list[dict[str, Any]] = [{"stage": "learn", "resumed_step": first}]
    for step in range(first + 1, last + 1):
        row = {"stage": "learn", "step": step, "steps": 8, "loss": 1.0 / step, "ends_epoch": False}
        told.append(row if step % 2 else {**row, "avg_weight_bits": 3.0, "used": {"weights": 0.5}})
    return told


def watch(name: Any, folder: Path, told: list[dict[str, Any]]) -> None:
    with watching((name,), folder, OPTIONS) as watcher:
        for row in told:
            watcher(row)


def test_tensorboard_shows_every_step_once_after_a_resume(tmp_path):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    watch("tensorboard", tmp_path, rows(0, 6))
    watch("tensorboard", tmp_path, rows(4, 8))  # killed after step 6, saved after step 4

    events = loader.EventAccumulator(str(tmp_path / "tensorboard" / "learn"))
    events.Reload()

    assert sorted(events.Tags()["scalars"]) == ["avg_weight_bits", "loss", "used/weights"]
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6, 8]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([1 / 2, 1 / 4, 1 / 6, 1 / 8])


def test_mlflow_goes_on_in_the_same_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # versions that would rather have a data base
    folder = tmp_path / "digits"
    folder.mkdir()
    watch("mlflow", folder, rows(0, 4))
    watch("mlflow", folder, rows(4, 8))

    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("mixbits").experiment_id])
    assert (run.info.run_name, run.info.status) == ("digits", "FINISHED")
    assert run.data.params == {name: str(value) for name, value in OPTIONS.items()}
    losses = client.get_metric_history(run.info.run_id, "learn/loss")
    assert [metric.step for metric in losses] == [2, 4, 6, 8]
    assert [metric.value for metric in losses] == pytest.approx([1 / 2, 1 / 4, 1 / 6, 1 / 8])


def test_an_mlflow_that_cannot_be_reached_is_said_with_the_remedy(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://at.all")

    with pytest.raises(ValueError, match=r"--watch mlflow: no run could be begun.*set MLFLOW_TRACKING_URI"):
        watch("mlflow", tmp_path, rows(0, 2))


def log_records(content: bytes) -> Iterator[bytes]:
    """Records of a file in the format of LevelDB's logs, which a ``.wandb`` file is after its own 7 bytes.

    Blocks of 32 KiB hold pieces: | crc : 4 | length : 2 | whole, first, middle or last : 1 | content |
    """
    position, pieces = 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        pieces += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield pieces
            pieces = b""


def history(file: Path) -> list[dict[str, Any]]:
    from wandb.proto.wandb_internal_pb2 import Record  # noqa: PLC0415

    found = []
    for content in log_records(file.read_bytes()):
        record = Record()
        record.ParseFromString(content)
        items = record.history.item
        found.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return [entry for entry in found if "learn/loss" in entry]


def test_weights_and_biases_writes_a_run_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    watch("wandb", tmp_path, rows(0, 4))

    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    end = time.monotonic() + 60  # a service of theirs writes the file, and may be behind
    while len(logged := history(file)) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    assert [(entry["learn/step"], entry["learn/loss"]) for entry in logged] == [(2, 0.5), (4, 0.25)]
    assert file.name == f"run-{(tmp_path / '.wandb-run').read_text()}.wandb"


@pytest.mark.parametrize(
    ("name", "package"), [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow")]
)
def test_a_missing_extra_is_an_error_with_the_command_that_installs_it(name, package, tmp_path):
    code = (
        f"import sys, pathlib; sys.modules[{package!r}] = None\nfrom mixbits.fit.watching import watching\n"
        f"with watching(({name!r},), pathlib.Path({str(tmp_path)!r}), {{}}): pass"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert run.returncode == 1
    assert f"pip install 'mixbits[{name}]'" in run.stderr.splitlines()[-1]


def test_nobody_watches_unless_asked(tmp_path):
    seen: list[Mapping[str, Any]] = []
    with watching((), tmp_path, OPTIONS) as watcher:
        watcher({"stage": "learn", "resumed_step": 0})

    assert seen == []
    assert list(tmp_path.iterdir()) == []
