"""The command line as a user meets it: the main job, bad input, Ctrl-C and resuming."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

from mixbits.cli.main import main
from mixbits.data.open import open_dataset
from mixbits.fit.recipe import Recipe
from mixbits.fit.stages import network_of
from mixbits.graph.quant_graph import capture
from mixbits.pack.artifact import read_program
from mixbits.pack.bits import native_available
from mixbits.runtime.latency import here
from mixbits.runtime.native import planned_memory
from mixbits.zoo import digits_cnn

QUICK = [
    *("--network", "mixbits.zoo:digits_cnn", "--data", "digits", "--float-training.epochs", "2"),
    *("--float-training.lr", "0.05", "--mpdnn.epochs", "2", "--finetune.epochs", "2", "--pins", "input", "8"),
    *("--threads", "1"),
]
BUDGET = ["--budget", "weights=3bit,act_max=384B"]
native = pytest.mark.skipif(not native_available(), reason="built without the native extension")


def fit(out: Path, *extra: str) -> int:
    return main(["fit", *QUICK, *BUDGET, "--out", str(out), *extra])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "digits"
    assert fit(out) == 0
    return out


def test_fit_leaves_every_file_that_the_readme_names(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    wanted = {"recipe.json", "policy.json", "metrics.jsonl", "summary.json", "model.mixbits", "report.html"}
    assert wanted <= names
    assert any((finished / "checkpoints").iterdir())


def test_every_limit_asked_is_met_in_the_packed_file(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    program = read_program(finished / "model.mixbits")
    assert [limit["limit"] for limit in summary["limits"]] == ["weight_bits", "act_max"]
    assert all(limit["used"] <= limit["asked"] for limit in summary["limits"])
    assert program.weight_bytes == summary["mixed"]["weight_bytes"]
    assert program.size_bytes == summary["mixed"]["size_bytes"]
    assert summary["artifact_bytes"] == (finished / "model.mixbits").stat().st_size


def test_summary_holds_float_uniform_and_mixed_with_the_same_keys(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    wanted = {
        *("top1", "weight_bytes", "avg_weight_bits", "bops"),
        *("act_max_bytes", "act_sum_bytes", "seconds"),
    }
    for name in ("float", "uniform", "mixed"):
        assert wanted <= set(summary[name]), name
    assert summary["uniform"]["avg_weight_bits"] == 3.0
    assert all(site["assigned_bits"] == site["stored_bits"] for site in summary["sites"])


def test_widths_are_chosen_without_training(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "quick"
    arguments = [
        "--network",
        "mixbits.zoo:digits_cnn",
        "--data",
        "digits",
        "--budget",
        "weights=4bit,act=6bit",
    ]
    weights = ["--weights", str(finished / "float.safetensors")]

    assert main(["fit", "--no-train", *arguments, *weights, "--out", str(out)]) == 0

    summary = json.loads((out / "summary.json").read_text())
    assert (summary["method"], summary["epochs"]) == (
        "sensitivity",
        {"learn": 0, "finetune": 0, "uniform": 0},
    )
    assert all(limit["used"] <= limit["asked"] for limit in summary["limits"])
    assert summary["mixed"]["top1"] > summary["float"]["top1"] - 5
    ran = summary["runtime"]
    differ = ran["images"] - ran["same_prediction_as_training_graph"]
    assert differ <= 1
    assert abs(ran["top1"] - ran["training_graph_top1"]) <= 100 * differ / ran["images"]


def test_a_method_that_trains_is_refused_without_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(tmp_path / "run", "--no-train", "--method", "mpdnn") == 2

    assert "with --no-train use --method sensitivity" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@native
def test_latency_is_a_limit_like_any_other(finished: Path, tmp_path: Path) -> None:
    network = ["--network", "mixbits.zoo:digits_cnn", "--data", "digits"]
    widths = ["--weight-bits", "2", "4", "8", "--activation-bits", "2", "8"]
    table, out = tmp_path / "table.json", tmp_path / "run"
    assert main(["profile", *network, *widths, "--latency", str(table)]) == 0
    times = json.loads(table.read_text())
    slowest = sum(max(map(max, layer["ns"])) for layer in times["layers"]) + times["rest_ns"]
    fastest = sum(min(map(min, layer["ns"])) for layer in times["layers"]) + times["rest_ns"]
    assert 0 < fastest <= slowest
    assert all(name for layer in times["layers"] for line in layer["kernels"] for name in line)
    asked = ["--budget", f"ms={slowest / 1e6:.9f},weights=4bit", "--latency", str(table)]

    weights = ["--weights", str(finished / "float.safetensors")]
    arguments = [*network, *widths, *asked, *weights, "--mpdnn.epochs", "1", "--finetune.epochs", "1"]
    assert main(["fit", *arguments, "--out", str(out)]) == 0

    summary = json.loads((out / "summary.json").read_text())
    (limit, _), ran = summary["limits"], summary["runtime"]
    assert (limit["limit"], limit["unit"]) == ("ms", "ms")
    assert 0 < limit["used"] <= limit["asked"]
    assert ran["predicted_ms"] == limit["used"]
    assert (ran["engine"], ran["threads"], ran["batch"]) == ("native", 1, 1)
    policy = {site["site"]: site["assigned_bits"] for site in summary["sites"]}
    layers = {step["name"].split(" ")[0]: step for step in ran["steps"] if step["macs"]}
    assert layers["conv2"]["weight_bits"] == policy["conv2.weight"]
    assert all(step["us"] > 0 and step["bytes"] > 0 for step in ran["steps"])
    assert "What really ran" in (out / "report.html").read_text()
    assert layers["conv2"]["kernel"] in (out / "report.html").read_text()


@native
@pytest.mark.parametrize(
    ("changes", "more", "words"),
    [
        ({"cpu": "Another CPU"}, [], ["Another CPU", "--latency-elsewhere"]),
        ({"isa": "neon"}, [], ["'neon'", "level of instructions"]),
        ({"threads": 10_000}, [], ["10000 threads"]),
        ({"layers": []}, [], ["stem.0: the latency table", "no such layer"]),
        ({}, ["--pins", "conv2.weight", "8"], ["conv2", "no time for 8-bit weights"]),
        ({"cpu": "Another CPU"}, ["--latency-elsewhere", "--pins", "linear.weight", "8"], ["linear", "8-bit weights"]),
    ],
    ids=["CPU", "instructions", "threads", "layers", "widths", "elsewhere"],
)  # fmt: skip
def test_a_latency_table_that_does_not_fit_is_refused(
    changes: dict[str, object],
    more: list[str],
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cpu, isa, _ = here()
    profile = capture(digits_cnn(), torch.zeros(2, 1, 8, 8)).profile
    layers = [{"name": op.name, "macs": op.macs, "ns": [[1000]], "kernels": [["k"]]} for op in profile.ops]
    entry = {
        "format": "mixbits-latency",
        "version": 1,
        "network": "mixbits.zoo:digits_cnn",
        "cpu": cpu,
        "isa": isa,
        "threads": 1,
        "batch": 1,
        "tuned": False,
        "weight_bits": [4],
        "activation_bits": [4],
        "rest_ns": 0,
        "mixbits": "0.1.0",
        "date": "2026-11-21",
        "layers": layers,
    }
    (tmp_path / "table.json").write_text(json.dumps(entry | changes))
    arguments = ["--network", "mixbits.zoo:digits_cnn", "--data", "digits", "--float-training.epochs", "1"]
    widths = ["--weight-bits", "4", "--activation-bits", "4"]
    budget = ["--budget", "ms=1", "--latency", str(tmp_path / "table.json")]

    assert main(["fit", *arguments, *widths, *budget, *more, "--out", str(tmp_path / "out")]) == 2

    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert not (tmp_path / "out").exists()


@native
def test_run_lists_what_really_ran(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "run.json"
    model = str(finished / "model.mixbits")

    assert (
        main(["run", model, "--data", "digits", "--images", "40", "--steps", "2", "--json", str(result)]) == 0
    )

    ran, printed = json.loads(result.read_text()), capsys.readouterr().out
    assert (ran["images"], ran["batch"]) == (40, 2)
    memory = planned_memory(read_program(finished / "model.mixbits"), batch=2)
    assert ran["memory"] == memory.to_json()
    assert memory.words(threads=1) in printed
    for step in ran["steps"]:
        assert step["kernel"] in printed
        assert f"{step['bytes']:,}" in printed


@native
def test_bench_lists_every_kernel_that_takes_a_layer(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--layers", "64x8x8", "--pairs", "2x2", "--kernels", "a", "--rounds", "1"]

    assert main(["bench", "kernels", *options]) == 0

    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| 64x8x8")]
    assert "direct_portable" in {row[2] for row in rows}
    assert all(float(row[3]) > 0 for row in rows)


def test_bench_says_what_it_can_measure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 2
    assert "mixbits bench kernels" in capsys.readouterr().err


def test_packed_model_predicts_what_the_training_graph_predicts(finished: Path) -> None:
    ran = json.loads((finished / "summary.json").read_text())["runtime"]
    # Of 360 images: float32 sums of the training graph may round a tie the other way.
    rounding_ties_allowed = 1
    assert ran["images"] - ran["same_prediction_as_training_graph"] <= rounding_ties_allowed


def test_run_does_not_import_torch(finished: Path) -> None:
    code = (
        "import sys; from mixbits.cli.main import main; "
        f"arguments = ['run', {str(finished / 'model.mixbits')!r}, '--data', 'digits', '--images', '40']; "
        "assert main(arguments) == 0; "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "of 40 test images of digits" in done.stdout


def test_stages_one_by_one_give_the_result_of_fit(finished: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "quick.toml"
    recipe.write_text(
        'network = "mixbits.zoo:digits_cnn"\ndata = "digits"\nbudget = "weights=3bit,act_max=384B"\n'
        "threads = 1\npins = { input = 8 }\n[float_training]\nepochs = 2\nlr = 0.05\n"
        "[mpdnn]\nepochs = 2\n[finetune]\nepochs = 2\n"
    )
    out = tmp_path / "staged"
    assert main(["learn", str(recipe), "--out", str(out)]) == 0
    assert main(["finetune", "--out", str(out)]) == 0
    assert main(["lower", "--out", str(out)]) == 0
    assert main(["report", str(out)]) == 0
    assert (out / "model.mixbits").read_bytes() == (finished / "model.mixbits").read_bytes()


def test_finetune_takes_a_policy_written_by_hand(finished: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "quick.toml"
    recipe.write_text(
        'network = "mixbits.zoo:digits_cnn"\ndata = "digits"\nbudget = "weights=5bit"\nthreads = 1\n'
        "[float_training]\nepochs = 1\nlr = 0.05\n[mpdnn]\nepochs = 1\n[finetune]\nepochs = 1\n"
    )
    out, mine = tmp_path / "out", tmp_path / "mine.json"
    policy = json.loads((finished / "policy.json").read_text())
    policy["sites"]["linear.weight"]["bits"] = 5
    mine.write_text(json.dumps(policy))
    assert main(["learn", str(recipe), "--out", str(out)]) == 0
    assert main(["finetune", "--out", str(out), "--policy", str(mine)]) == 0
    assert main(["lower", "--out", str(out)]) == 0
    assert read_program(out / "model.mixbits").weights["linear.weight"].grid.bits == 5


BAD = {
    "infeasible budget": (
        ["--budget", "weights=1KiB"],
        ["cannot be met", "weights=1KiB", "4.61 KiB", "18.45 KiB"],
    ),
    "unknown unit": (["--budget", "weights=70KiX"], ["unknown unit 'KiX'", "KiB"]),
    "latency without a table": (["--budget", "ms=3"], ["ms=3", "mixbits profile", "--latency table.json"]),
    "missing table": (
        ["--budget", "ms=3", "--latency", "/no/such/table.json"],
        ["there is no latency table /no/such/table.json"],
    ),
    "unknown limit": (["--budget", "wieghts=70KiB"], ["unknown limit 'wieghts'", "weights"]),
    "unknown pin": (
        [*BUDGET, "--pins", "stem.weight", "8"],
        ["unknown site 'stem.weight'", "'stem.0.weight'", "mixbits profile"],
    ),
    "unknown method": ([*BUDGET, "--method", "magic"], ["unknown method 'magic'", "mpdnn"]),
    "missing data": ([*BUDGET, "--data", "cifar10:/no/such/folder"], ["/no/such/folder"]),
    "missing weights": ([*BUDGET, "--weights", "/no/such/file.safetensors"], ["/no/such/file.safetensors"]),
    "unknown network": ([*BUDGET, "--network", "mixbits.zoo:digits_cn"], ["digits_cn", "digits_cnn"]),
    "no cuda": ([*BUDGET, "--device", "cuda:9"], ["no CUDA device", "--device cpu"]),
    "missing recipe": (["missing.toml"], ["recipe missing.toml does not exist"]),
}


@pytest.mark.parametrize(("arguments", "words"), BAD.values(), ids=BAD)
def test_bad_input_ends_in_one_message_and_leaves_nothing(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in str(words) and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    out = tmp_path / "out"
    assert main(["fit", *QUICK, "--out", str(out), *arguments]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert "Traceback" not in message
    assert not out.exists()


def test_unknown_option_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--bugdet", "weights=3bit"])
    assert stopped.value.code == 2
    assert "--budget" in capsys.readouterr().err


def test_weights_that_do_not_fit_name_the_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = digits_cnn().state_dict()
    state["linear.weight"] = torch.zeros(7, 32)
    del state["stem.0.weight"]
    save_file(state, tmp_path / "w.safetensors")
    assert fit(tmp_path / "out", "--weights", str(tmp_path / "w.safetensors")) == 2
    message = capsys.readouterr().err
    assert "missing stem.0.weight" in message
    assert "linear.weight has shape (7, 32), the network needs (10, 32)" in message


def test_weights_that_would_run_code_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(digits_cnn(), tmp_path / "model.pt")  # a whole pickled module, not a state dict
    assert fit(tmp_path / "out", "--weights", str(tmp_path / "model.pt")) == 2
    assert "cannot be loaded safely" in capsys.readouterr().err


def test_network_that_cannot_be_captured_names_the_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "branching.py"
    source.write_text(
        "from torch import nn\n\n\nclass Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.fc = nn.Linear(64, 10)\n\n    def forward(self, x):\n        if x.sum() > 0:\n"
        "            x = -x\n        return self.fc(x.flatten(1))\n\n\ndef net():\n    return Net()\n"
    )
    assert fit(tmp_path / "out", "--network", f"{source}:net") == 2
    message = capsys.readouterr().err
    assert f"{source}, line 10: if x.sum() > 0:" in message
    assert "torch.where" in message


def test_folder_of_another_run_is_not_touched(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "summary.json").read_bytes()
    assert fit(finished) == 2
    assert "--resume" in capsys.readouterr().err
    assert fit(finished, "--resume", "--seed", "1") == 2
    assert "other options" in capsys.readouterr().err
    assert (finished / "summary.json").read_bytes() == before


def test_folder_in_use_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys, pathlib; from mixbits.fit.folder import RunFolder\n"
        "with RunFolder(pathlib.Path(sys.argv[1])).locked():\n    print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(finished)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert fit(finished, "--resume") == 2
        assert "in use by another mixbits process" in capsys.readouterr().err
    finally:
        holder.communicate("")


def test_loss_that_is_not_a_number_keeps_the_last_good_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert fit(out, "--finetune.lr", "1e30") == 2
    message = capsys.readouterr().err
    assert "infinite or not a number" in message
    assert "lr" in message
    assert "Traceback" not in message
    assert (out / "stages" / "float.json").exists()


def test_damaged_model_is_refused(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = tmp_path / "model.mixbits"
    damaged.write_bytes((finished / "model.mixbits").read_bytes()[:-100])
    assert main(["run", str(damaged), "--data", "digits"]) == 2
    assert str(damaged) in capsys.readouterr().err


def predictions(model: Path, images: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    run = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run
    return run(None, {"input": images})[0].argmax(-1)


@pytest.mark.parametrize("options", [[], ["--for", "onnxruntime"]], ids=["any", "onnxruntime"])
def test_exported_model_predicts_what_the_trained_network_predicts_for_every_test_image(
    options: list[str], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model.onnx"
    assert main(["export", str(finished), "--to", "onnx", "--out", str(out), *options]) == 0
    printed = capsys.readouterr().out
    assert f"{out}: {out.stat().st_size} bytes\n- weights: " in printed
    test = open_dataset("digits").test
    images, _ = test.take(np.arange(len(test)))
    with torch.no_grad():
        expected = network_of(finished)(torch.from_numpy(images)).argmax(-1).numpy()
    assert (predictions(out, images) == expected).all()


def test_export_for_fpga_tools(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model.onnx"
    arguments = ["export", str(finished), "--to", "qonnx", "--power-of-two", "--out", str(out)]
    assert main(arguments) == 0
    assert "powers of two" in capsys.readouterr().out
    assert {"IntQuant"} == {n.op_type for n in onnx.load(out).graph.node if n.domain.startswith("qonnx")}


def test_export_for_hls4ml(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model.onnx"
    assert main(["export", str(finished), "--to", "hls4ml", "--out", str(out)]) == 0
    assert "channels last" in capsys.readouterr().out
    assert {"Quant", "Conv"} <= {node.op_type for node in onnx.load(out).graph.node}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN/nothing", "--to", "onnx"], "no such file"),
        (["RUN/stages", "--to", "onnx"], "holds no model.mixbits; finish the run"),
        (["RUN/recipe.json", "--to", "onnx"], "recipe.json"),
        (["RUN", "--to", "qonnx", "--for", "onnxruntime"], "--for and --smallest are for --to onnx"),
        (["RUN", "--to", "onnx", "--power-of-two"], "are for --to qonnx"),
        (["RUN", "--to", "torchao", "--smallest", "8"], "--for and --smallest are for --to onnx"),
        (["RUN/model.mixbits", "--to", "qonnx", "--power-of-two"], "is no power of two"),
    ],
    ids=["missing", "not-a-run", "not-a-model", "for", "power-of-two", "torchao", "packed"],
)
def test_what_cannot_be_exported_is_one_message(
    arguments: list[str],
    message: str,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "model.onnx"
    arguments = [word.replace("RUN", str(finished)) for word in arguments]
    assert main(["export", *arguments, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_export_without_its_extra_says_what_to_install(finished: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['onnx_ir'] = None; from mixbits.cli.main import main; sys.exit(main())"
    arguments = ["export", str(finished), "--to", "onnx", "--out", str(tmp_path / "model.onnx")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "pip install 'mixbits[onnx]'" in done.stderr


def test_disk_that_fills_up_is_said_and_the_run_goes_on_later(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mixbits.cli.main", "fit", *QUICK, *BUDGET, "--out", str(out)]
    limit = 100_000  # bytes a file may have: smaller than the first checkpoint

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=small_files)
    assert done.returncode == 2, done.stderr
    assert "could not be written" in done.stderr
    assert "--resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(out.rglob("*.tmp"))
    assert subprocess.run([*command, "--resume"], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("stop_with", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_interrupted_run_resumes_to_the_uninterrupted_result(
    stop_with: signal.Signals, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mixbits.cli.main", "fit", *QUICK, *BUDGET, "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: '"stage": "uniform"' in read(out / "metrics.jsonl"), process)
    process.send_signal(stop_with)
    _, errors = process.communicate(timeout=60)
    assert not (out / "summary.json").exists()
    if stop_with == signal.SIGINT:
        assert process.returncode == 130
        assert "--resume" in errors
        assert "Traceback" not in errors
    assert subprocess.run([*command, "--resume"], capture_output=True, check=False).returncode == 0
    assert (out / "model.mixbits").read_bytes() == (finished / "model.mixbits").read_bytes()
    assert without_seconds(out) == without_seconds(finished)


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.01)


def without_seconds(out: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in read(out / "metrics.jsonl").splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_environment_variable_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "MIXBITS_TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown unit"):
        main(["fit", *QUICK, "--budget", "weights=1x"])


def test_help_says_what_every_option_is(capsys: pytest.CaptureFixture[str]) -> None:
    sentences = dict(re.findall(r"^\s+(\w+): (.*)\.$", Recipe.__doc__ or "", re.MULTILINE))
    assert set(sentences) == {option.name for option in fields(Recipe)}

    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--help"])

    words = " ".join(line.strip("│ ") for line in capsys.readouterr().out.splitlines())
    assert [name for name, sentence in sentences.items() if sentence not in words] == []
