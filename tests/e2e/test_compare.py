"""``mixbits compare`` and ``mixbits sweep`` as a user meets them: all methods, a kill, Ctrl-C, a failed run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed import LocalCluster

from mixbits.cli.main import main
from mixbits.methods import find_methods

RECIPE = """
network = "mixbits.zoo:digits_cnn"
data = "digits"
budget = "weights=3bit,act=4bit"
batch_size = 32
train_images = 320
pins = { input = 8 }
threads = 1
[float_training]
epochs = 8
lr = 0.05
[finetune]
epochs = 1
lr = 0.02
[compare]
seeds = 1
epochs = 2
learn_epochs = 1
[sweep]
epochs = 2
learn_epochs = 1
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "quick.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def everything(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All methods at one budget; mpdnn is made to fail."""
    out = tmp_path_factory.mktemp("compare") / "all"
    assert main(["compare", str(recipe), "--out", str(out), "--mpdnn.lr", "1e30"]) == 2
    return out


def test_every_method_is_compared_and_one_that_fails_leaves_the_others_alone(everything: Path) -> None:
    cells = {cell["method"]: cell for cell in result(everything)["cells"]}
    assert set(cells) == set(find_methods())
    assert [name for name, cell in cells.items() if cell["status"] == "failed"] == ["mpdnn"]
    assert "infinite or not a number" in cells["mpdnn"]["error"]
    others = [cell for name, cell in cells.items() if name != "mpdnn"]
    assert {cell["status"] for cell in others} == {"done"}
    for cell in others:
        assert [limit["limit"] for limit in cell["limits"]] == ["weight_bits", "act_bits"]
        assert all(limit["used"] <= limit["asked"] for limit in cell["limits"]), cell["method"]
        assert cell["seconds_finetune"] > 0
        assert (everything / cell["policy"]).exists()


def test_all_methods_start_from_the_same_float_network(everything: Path) -> None:
    shared = (everything / "float/seed0/float.safetensors").read_bytes()
    copies = [
        path.read_bytes() for path in everything.rglob("float.safetensors") if "float/seed0" not in str(path)
    ]
    assert copies == [shared] * len(find_methods())
    (trained,) = result(everything)["floats"]
    uniform = next(cell for cell in result(everything)["cells"] if cell["method"] == "uniform")
    first = json.loads((everything / uniform["folder"] / "metrics.jsonl").read_text().splitlines()[0])
    assert trained["top1"] > 70  # of ten classes
    assert first["loss"] < 1.5  # ln(10) = 2.3 from an untrained network


def test_the_page_tells_of_the_failed_run(everything: Path) -> None:
    page = (everything / "comparison.html").read_text()
    assert "Runs that failed" in page
    assert page.count('role="img"') == 2
    before = (everything / "comparison.html").read_bytes()
    assert main(["report", str(everything)]) == 0
    assert (everything / "comparison.html").read_bytes() == before


def test_a_cell_is_an_ordinary_run(everything: Path) -> None:
    cell = everything / "uniform/weights=3bit,act=4bit/seed0"
    assert main(["lower", "--out", str(cell)]) == 0
    assert (cell / "model.mixbits").exists()


def test_resuming_with_other_options_names_the_run(
    everything: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(recipe), "--out", str(everything)]) == 2
    assert "already holds a compare; go on with --resume" in capsys.readouterr().err
    assert main(["compare", str(recipe), "--out", str(everything), "--resume"]) == 2
    message = capsys.readouterr().err
    assert "mpdnn/weights=3bit,act=4bit/seed0 was started with other options" in message


@pytest.mark.parametrize(
    ("stop_with", "jobs"),
    [
        pytest.param(signal.SIGINT, 2, id="ctrl-c"),
        pytest.param(signal.SIGKILL, 1, id="kill"),
        pytest.param(signal.SIGKILL, 2, id="kill, processes", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_comparison_resumes_to_the_uninterrupted_result(
    stop_with: signal.Signals, jobs: int, uninterrupted: Path, recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [*compare_mpdnn(recipe, out), "--jobs", str(jobs)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    metrics = out / "mpdnn/weights=3bit,act=4bit/seed0/metrics.jsonl"
    wait_for(lambda: metrics.exists() and '"learn"' in metrics.read_text(), process)
    process.send_signal(stop_with)
    process.wait(timeout=120)
    assert process.returncode == (130 if stop_with == signal.SIGINT else -signal.SIGKILL)
    if stop_with == signal.SIGINT:
        assert {cell["status"] for cell in result(out)["cells"]} & {"unfinished"}
    assert main([*compare_mpdnn(recipe, out)[3:], "--resume"]) == 0
    assert lasting(out) == lasting(uninterrupted)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Dask's own
def test_the_workers_of_a_cluster_give_the_result_of_this_machine(
    uninterrupted: Path, recipe: Path, tmp_path: Path
) -> None:
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        command = [*compare_mpdnn(recipe, tmp_path / "out")[3:], "--cluster", cluster.scheduler_address]
        assert main(command) == 0
    assert lasting(tmp_path / "out") == lasting(uninterrupted)


@pytest.mark.filterwarnings("default")
def test_workers_that_run_cells_in_threads_are_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as cluster:
        command = [*compare_mpdnn(recipe, tmp_path / "out")[3:], "--cluster", cluster.scheduler_address]
        assert main(command) == 2
    assert "start `dask worker` with --nthreads 1" in capsys.readouterr().err


@pytest.fixture(scope="module")
def uninterrupted(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compare") / "uninterrupted"
    assert main(compare_mpdnn(recipe, out)[3:]) == 0
    return out


def test_a_sweep_has_a_policy_for_every_point_and_those_who_watch_see_it(
    recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    points = ["--budgets", "weights=2bit..4bit:2,act=4bit", "--watch", "tensorboard"]
    assert main(["sweep", str(recipe), "--method", "uniform", *points, "--out", str(out)]) == 0
    watched = {path.relative_to(out).parts[:-1] for path in out.rglob("events.out.tfevents.*")}
    assert watched - {("float", "seed0", "tensorboard", "float")} == {
        ("uniform", budget, "seed0", "tensorboard", "finetune")
        for budget in ("weights=2bit,act=4bit", "weights=4bit,act=4bit")
    }
    swept = json.loads((out / "sweep.json").read_text())
    assert swept["budgets"] == ["weights=2bit,act=4bit", "weights=4bit,act=4bit"]
    assert [method["method"] for method in swept["methods"]] == ["uniform"]
    widths = [
        json.loads((out / cell["policy"]).read_text())["sites"]["linear.weight"]["bits"]
        for cell in swept["cells"]
    ]
    assert widths == [2, 4]
    scores = [cell["top1"] for cell in swept["cells"]]
    best = swept["budgets"] if scores[1] > scores[0] else swept["budgets"][:1]
    assert [point["budget"] for point in swept["fronts"]["weight_bytes"]] == best
    assert "uniform reaches" in (out / "sweep.html").read_text()


NETWORK = """
from torch import nn

def network():
    return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
"""


def test_what_changed_since_a_comparison_began_is_not_compared(tmp_path: Path) -> None:
    file, out = tmp_path / "small.py", tmp_path / "out"
    file.write_text(NETWORK)
    command = ["compare", "--network", f"{file}:network", "--data", "digits", "--train-images", "64"]
    command += ["--budget", "weights=3bit", "--float-training.epochs", "1", "--seeds", "1", "--out", str(out)]
    command += ["--no-train", "--methods", "sensitivity"]
    assert main(command) == 0
    assert result(out)["epochs"] == 0
    assert {entry["finetune_epochs"] for entry in result(out)["methods"]} == {0}
    assert main([*command, "--resume"]) == 0

    file.write_text(NETWORK.replace("ReLU", "Hardswish"))
    again = [sys.executable, "-m", "mixbits.cli.main", *command, "--resume"]
    ended = subprocess.run(again, check=False, capture_output=True, text=True)

    assert ended.returncode == 2
    assert "was started with something else: the network changed since" in ended.stderr


BAD = {
    "infeasible budget": (["--budgets", "weights=1KiB"], "cannot be met"),
    "unknown method": (["--methods", "magic"], "unknown method 'magic'"),
    "bad range": (["--budgets", "weights=2bit..4bit"], "cannot read the range"),
    "too many epochs to learn": (["--learn-epochs", "5"], "5 of 2 epochs are to learn widths"),
    "negative epochs": (["--epochs", "4", "--learn-epochs", "-2"], "--learn-epochs must be 0 or more"),
    "no training": (
        ["--no-train"],
        "leaves out what trains to learn widths (bmpq, ddq, ebs, mpdnn, sdq): give --methods",
    ),
    "no seeds": (["--seeds", "0"], "--seeds and --jobs must be 1 or more"),
    "too many images": (["--train-images", "100000"], "100000 training images are asked for"),
}


@pytest.mark.parametrize(("arguments", "words"), BAD.values(), ids=BAD)
def test_bad_input_ends_in_one_message_and_leaves_nothing(
    arguments: list[str], words: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["compare", str(recipe), "--out", str(out), *arguments]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert "Traceback" not in message
    assert not out.exists()


def compare_mpdnn(recipe: Path, out: Path) -> list[str]:
    """Longer than the others, so that there is time to interrupt it."""
    options = ["--methods", "mpdnn", "--epochs", "6", "--learn-epochs", "4", "--out", str(out)]
    return [sys.executable, "-m", "mixbits.cli.main", "compare", str(recipe), *options]


def result(out: Path) -> dict[str, Any]:
    return json.loads((out / "comparison.json").read_text())


def lasting(out: Path) -> list[dict[str, Any]]:
    """The cells without what the clock says."""
    return [
        {key: value for key, value in cell.items() if "seconds" not in key} for cell in result(out)["cells"]
    ]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 240
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
