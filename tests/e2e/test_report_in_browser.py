"""The report of a realistic run, opened in a browser without a network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mixbits.core.cost import packed_bytes
from mixbits.report import build_report

CHARTS = 8  # budget, widths of weights and of activations, where the bits go, four training curves
VIEWS = [((1400, 2400), "light"), ((900, 2400), "dark")]  # px, theme
DARK = "--blink-settings=preferredColorScheme=0"
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # a container has no user namespaces
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # offline
    "--enable-logging=stderr",
    "--v=0",
)


def test_browser_draws_every_chart_without_an_error(browser: str, report: Path, tmp_path: Path) -> None:
    dom, log = run_browser(browser, "--dump-dom", report.as_uri(), profile=tmp_path / "profile")

    assert dom.rstrip().endswith("</html>")
    assert dom.count("<svg") == len(re.findall(r'<svg[^>]* role="img"', dom)) == CHARTS
    assert console(log) == []


@pytest.mark.parametrize(("window", "theme"), VIEWS, ids=["1400px light", "900px dark"])
def test_browser_paints_the_report(
    browser: str, report: Path, tmp_path: Path, window: tuple[int, int], theme: str
) -> None:
    picture = tmp_path / "report.png"
    options = [f"--screenshot={picture}", f"--window-size={window[0]},{window[1]}"]
    options += [DARK] if theme == "dark" else []

    _, log = run_browser(browser, *options, report.as_uri(), profile=tmp_path / "profile")

    with Image.open(picture) as image:
        assert image.size == window
        grey = np.asarray(image.convert("L")).astype(int)
    paper = np.bincount(grey.ravel()).argmax()
    assert (paper > 128) == (theme == "light")
    inked = np.abs(grey - paper) > 64
    for quarter in np.array_split(inked, 4):  # text and charts from top to bottom, with space between
        assert 0.005 < quarter.mean() < 0.4
    assert console(log) == []


def test_an_error_in_a_page_would_be_noticed(browser: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<!DOCTYPE html><script>console.error('something broke')</script>", encoding="utf-8")

    _, log = run_browser(browser, "--dump-dom", page.as_uri(), profile=tmp_path / "profile")

    assert "something broke" in "".join(console(log))


@pytest.fixture
def browser() -> str:
    """The installed Chromium or Chrome."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        reason = "no chromium, chromium-browser or google-chrome on the PATH: install one to run this test"
        if os.environ.get("MIXBITS_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a ResNet-20 run."""
    return build_report(write_resnet_run(tmp_path_factory.mktemp("resnet20") / "run"))


def run_browser(browser: str, *options: str, profile: Path) -> tuple[str, str]:
    """What the browser prints and what it logs."""
    command = [browser, *FLAGS, f"--user-data-dir={profile}", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, done.stderr


def console(log: str) -> list[str]:
    """The lines that the page itself caused: script errors, blocked resources, console messages."""
    return [line for line in log.splitlines() if "CONSOLE" in line]


def write_resnet_run(run: Path, *, blocks: int = 3, changed: int = 0, uniform: bool = True) -> Path:
    """The files of a run on a CIFAR ResNet with ``blocks`` blocks a stage: 3 is ResNet-20, 10 has 124 sites.

    ``changed`` sites are stored at another width than assigned.
    """
    run.mkdir()
    rng = np.random.default_rng(0)
    sites, instructions = resnet_sites(rng, blocks=blocks)
    for site in rng.choice(np.array(sites, dtype=object), size=changed, replace=False):
        site["stored_bits"] = site["assigned_bits"] + 1
    mixed = costs({site["site"]: site["assigned_bits"] for site in sites}, sites, instructions)
    three = costs({site["site"]: 3 for site in sites}, sites, instructions)
    float32 = costs({site["site"]: 32 for site in sites}, sites, instructions)
    used = {"weights": mixed["weight_bytes"], "act_max": mixed["act_max_bytes"]}
    asked = {"weights": 1.013 * used["weights"], "act_max": used["act_max"]}
    budget = ",".join(f"{name}={value / 1024:.1f}KiB" for name, value in asked.items())
    summary = {
        "format": "mixbits-summary",
        "version": 1,
        "mixbits": "0.1.0",
        "method": "mpdnn",
        "network": f"mixbits.zoo:resnet{6 * blocks + 2}",
        "dataset": "cifar10",
        "budget": budget,
        "seed": 0,
        "epochs": {"learn": 4, "finetune": 6, "uniform": 10},
        "started": "2026-11-21T12:00:00",
        "machine": "2 x AMD EPYC, torch 2.13.0",
        "float": float32 | {"top1": 91.73, "held_out_top1": 91.92, "seconds": 0.0},
        "uniform": three | {"top1": 90.41, "held_out_top1": 90.66, "seconds": 1874.2} if uniform else None,
        "mixed": mixed | {"top1": 91.02, "held_out_top1": 91.24, "seconds": 2011.9},
        "limits": [
            {
                "limit": name,
                "unit": "bytes",
                "text": f"{name}={asked[name] / 1024:.1f}KiB",
                "asked": asked[name],
                "used": used[name],
                "uniform_used": three[f"{name.removesuffix('s')}_bytes"] if uniform else None,
            }
            for name in asked
        ],
        "artifact_bytes": mixed["size_bytes"] + 9120,
        "sites": sites,
        "runtime": {
            "top1": 91.01,
            "images": 10000,
            "same_prediction_as_training_graph": 9997,
            "seconds": 31.4,
        },
        "instructions": instructions,
    }
    (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    lines = [json.dumps(line) for line in metric_lines(rng, uniform=uniform)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return run


def resnet_sites(
    rng: np.random.Generator, *, blocks: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Sites and instructions of a CIFAR ResNet with parameter-free shortcuts."""
    layers = [
        ("conv1", 3, 16, 32, "input", 3 * 32 * 32)
    ]  # name, channels in and out, side, what it reads, values
    before, values, channels = "relu", 16 * 32 * 32, 16
    for stage, (outputs, side) in enumerate(((16, 32), (32, 16), (64, 8)), start=1):
        for block in range(blocks):
            prefix = f"layer{stage}.{block}"
            inner = outputs * side * side
            layers.append((f"{prefix}.conv1", channels, outputs, side, before, values))
            layers.append((f"{prefix}.conv2", outputs, outputs, side, f"{prefix}/relu", inner))
            before, values, channels = f"{prefix}/relu.1", inner, outputs
    weights, activations, instructions = [], [], []
    for name, inputs, outputs, side, source, count in layers:
        elements = inputs * outputs * 9
        weights.append(learned(rng, f"{name}.weight", "weight", elements, elements * side * side))
        activations.append(learned(rng, source, "activation", count, None))
        instructions.append(instruction("conv2d", name, weights[-1], activations[-1], elements * side * side))
        if name.endswith("conv2"):
            instructions.append(instruction("add", name.replace(".conv2", "/add"), None, None, 0))
    weights.append(learned(rng, "linear.weight", "weight", 640, 640))
    activations.append(learned(rng, "flatten", "activation", 64, None))
    instructions.append(instruction("mean", "mean", None, None, 0))
    instructions.append(instruction("linear", "linear", weights[-1], activations[-1], 640))
    return weights + activations, instructions


def learned(
    rng: np.random.Generator, name: str, kind: str, elements: int, macs: int | None
) -> dict[str, Any]:
    asked = float(np.clip(rng.normal(3.2 + 12 / np.log2(elements) ** 1.2, 1.1), 1.6, 8))
    assigned = int(np.clip(round(asked), 2, 8))
    sign = "signed narrow" if kind == "weight" else "unsigned"
    return {
        "site": name,
        "kind": kind,
        "elements": elements,
        "asked_bits": asked if name != "input" else None,
        "assigned_bits": assigned if name != "input" else 8,
        "stored_bits": assigned if name != "input" else 8,
        "grid": f"{assigned} bit {sign}",
        "macs": macs,
        "runs_as": f"integer conv2d {assigned}x4" if kind == "weight" else "codes of the next layer",
    }


def instruction(
    op: str, name: str, weight: dict[str, Any] | None, activation: dict[str, Any] | None, macs: int
) -> dict[str, Any]:
    return {
        "op": op,
        "name": name,
        "arithmetic": "integer" if weight else "float",
        "weight_bits": weight["assigned_bits"] if weight else None,
        "activation_bits": activation["assigned_bits"] if activation else None,
        "macs": macs,
        "accumulator_bits": 18 if weight else None,
    }


def costs(
    widths: dict[str, int], sites: list[dict[str, Any]], instructions: list[dict[str, Any]]
) -> dict[str, Any]:
    weights = [site for site in sites if site["kind"] == "weight"]
    activations = [site for site in sites if site["kind"] == "activation"]
    sizes = {site["site"]: packed_bytes(site["elements"], widths[site["site"]]) for site in sites}
    computed = [sizes[site["site"]] for site in activations if site["site"] != "input"]
    layers = [step for step in instructions if step["macs"]]
    pairs = [(widths[w["site"]], widths[a["site"]]) for w, a in zip(weights, activations, strict=True)]
    return {
        "weight_bytes": sum(sizes[site["site"]] for site in weights),
        "avg_weight_bits": mean_width(weights, widths),
        "avg_act_bits": mean_width(activations[1:], widths),
        "bops": sum(step["macs"] * w * a for step, (w, a) in zip(layers, pairs, strict=True)),
        "act_max_bytes": max(computed),
        "act_sum_bytes": sum(computed),
        "act_peak_bytes": 2 * max(computed),
        "size_bytes": sum(sizes[site["site"]] for site in weights) + 6300,
        "widths": widths,
    }


def mean_width(sites: list[dict[str, Any]], widths: dict[str, int]) -> float:
    total = sum(site["elements"] for site in sites)
    return sum(site["elements"] * widths[site["site"]] for site in sites) / total


def metric_lines(rng: np.random.Generator, *, uniform: bool) -> list[dict[str, Any]]:
    lines = []
    stages = {"uniform": (10, 0.0), "learn": (4, 0.0), "finetune": (6, 4.0)}
    for stage, (epochs, start) in stages.items():
        for quarter in range(1, 4 * epochs + 1):
            if stage == "uniform" and not uniform:
                continue
            epoch = quarter / 4
            done = (start + epoch) / 10
            over = float(np.exp(-2.2 * epoch)) if stage == "learn" else 0.0
            gap = 2.5 if stage == "uniform" else 1.9
            lines.append(
                {
                    "stage": stage,
                    "epoch": epoch,
                    "loss": float(0.12 + 0.3 * np.exp(-3 * done) + rng.normal(0, 0.012)),
                    "train_top1": float(96.5 - gap * np.exp(-2 * done) - gap + rng.normal(0, 0.35)),
                    "held_out_top1": float(92 - gap * np.exp(-3 * done) - gap / 3 + rng.normal(0, 0.15))
                    if quarter % 4 == 0
                    else None,
                    "avg_weight_bits": 3.0 if stage == "uniform" else 3.4 + 4.6 * over,
                    "avg_act_bits": 3.0 if stage == "uniform" else 4.2 + 3.8 * over,
                    "used": {"weights": 0.985 + 1.3 * over, "act_max": 1.0 + 0.9 * over},
                    "lr": 0.05 * (1 - done),
                }
            )
    return lines
