"""The page of a realistic comparison, opened in a browser without a network."""

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

from mixbits.report.comparison import build_comparison

CHARTS = 2  # accuracy against bytes and against bit operations
VIEWS = [((1400, 2600), "light"), ((900, 2600), "dark")]  # px, theme
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
METHODS = {  # points above uniform, and whether it is a baseline
    "uniform": (0.0, True),
    "random": (-0.9, True),
    "reversed": (-1.6, True),
    "mpdnn": (0.7, False),
    "ebs": (0.25, False),
    "sensitivity": (-0.4, False),
}
BUDGETS = {"weights=2bit,act=4bit": 2, "weights=3bit,act=4bit": 3, "weights=4bit,act=4bit": 4}
SEEDS = (0, 1, 2)


def test_browser_draws_both_charts_without_an_error(browser: str, page: Path, tmp_path: Path) -> None:
    dom, log = run_browser(browser, "--dump-dom", page.as_uri(), profile=tmp_path / "profile")

    assert dom.rstrip().endswith("</html>")
    assert dom.count("<svg") == len(re.findall(r'<svg[^>]* role="img"', dom)) == CHARTS
    assert console(log) == []


@pytest.mark.parametrize(("window", "theme"), VIEWS, ids=["1400px light", "900px dark"])
def test_browser_paints_the_comparison(
    browser: str, page: Path, tmp_path: Path, window: tuple[int, int], theme: str
) -> None:
    picture = tmp_path / "page.png"
    options = [f"--screenshot={picture}", f"--window-size={window[0]},{window[1]}"]
    options += [DARK] if theme == "dark" else []

    _, log = run_browser(browser, *options, page.as_uri(), profile=tmp_path / "profile")

    with Image.open(picture) as image:
        assert image.size == window
        grey = np.asarray(image.convert("L")).astype(int)
    paper = np.bincount(grey.ravel()).argmax()
    assert (paper > 128) == (theme == "light")
    inked = np.abs(grey - paper) > 64
    for quarter in np.array_split(inked, 4):  # text and charts from top to bottom, with space between
        assert 0.005 < quarter.mean() < 0.4
    assert console(log) == []


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
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of methods x budgets x seeds on a network of 44 sites, with one failed run."""
    path = tmp_path_factory.mktemp("compared") / "comparison.json"
    path.write_text(json.dumps(comparison()), encoding="utf-8")
    return build_comparison(path)


def run_browser(browser: str, *options: str, profile: Path) -> tuple[str, str]:
    """What the browser prints and what it logs."""
    command = [browser, *FLAGS, f"--user-data-dir={profile}", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


def console(log: str) -> list[str]:
    """The lines that the page itself caused: script errors, blocked resources, console messages."""
    return [line for line in log.splitlines() if "CONSOLE" in line]


def comparison() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    sites = [
        {
            "site": f"layer{1 + i // 8}.{i // 2 % 4}.conv{1 + i % 2}{end}",
            "kind": kind,
            "elements": 2000 + 900 * i,
        }
        for kind, end in (("weight", ".weight"), ("activation", "/relu"))
        for i in range(22)
    ]
    cells = [
        cell(rng, method, budget, seed, sites) for seed in SEEDS for budget in BUDGETS for method in METHODS
    ]
    cells[-1] = {key: cells[-1][key] for key in ("method", "budget", "seed", "folder")} | {
        "status": "failed",
        "error": "finetune: the loss became infinite or not a number in epoch 3, batch 17.",
    }
    return {
        "format": "mixbits-comparison",
        "version": 1,
        "mixbits": "0.1.0",
        "command": "compare",
        "network": "mixbits.zoo:resnet20",
        "dataset": "cifar10",
        "train_images": 0,
        "test_images": 10000,
        "epochs": 10,
        "started": "2026-11-21T12:00:00",
        "machine": "2 x AMD EPYC, torch 2.13.0",
        "threads": 1,
        "seeds": list(SEEDS),
        "budgets": list(BUDGETS),
        "methods": [
            {
                "method": name,
                "baseline": baseline,
                "paper": f"what {name} is, its authors 2020, arXiv 2001.00001",
                "learn_epochs": 0 if baseline else 3,
                "finetune_epochs": 10 if baseline else 7,
            }
            for name, (_, baseline) in METHODS.items()
        ],
        "sites": sites,
        "floats": [{"seed": seed, "top1": 91.73, "seconds": 0.0} | costs(sites, [32] * 44) for seed in SEEDS],
        "cells": cells,
    }


def cell(
    rng: np.random.Generator, method: str, budget: str, seed: int, sites: list[dict[str, Any]]
) -> dict[str, Any]:
    base = BUDGETS[budget]
    wished = np.full(44, base) if method == "uniform" else np.clip(base + rng.integers(-2, 3, 44), 2, 8)
    widths = [int(width) for width in wished]
    widths[22:] = [4 if method == "uniform" else int(rng.integers(3, 6)) for _ in range(22)]
    used = costs(sites, widths)
    top1 = 91.5 - 12 / base**2 + METHODS[method][0] + 0.4 * seed + rng.normal(0, 0.1)
    return {
        "method": method,
        "budget": budget,
        "seed": seed,
        "folder": f"{method}/{budget}/seed{seed}",
        "policy": f"{method}/{budget}/seed{seed}/policy.json",
        "status": "done",
        "error": None,
        "top1": round(float(top1), 2),
        "widths": dict(zip((site["site"] for site in sites), widths, strict=True)),
        "seconds": 800.0,
        "seconds_learn": 0.2 if METHODS[method][1] else 260.0,
        "seconds_finetune": 800.0 if METHODS[method][1] else 560.0,
        "limits": [
            {"limit": "weight_bits", "unit": "bit", "text": f"weights={base}bit", "asked": float(base)}
            | {"used": base * (0.93 if method == "ebs" else 1.0)},
            {"limit": "act_bits", "unit": "bit", "text": "act=4bit", "asked": 4.0, "used": 4.0},
        ],
        **used,
    }


def costs(sites: list[dict[str, Any]], widths: list[int]) -> dict[str, float]:
    sizes = [site["elements"] * width / 8 for site, width in zip(sites, widths, strict=True)]
    elements = [site["elements"] for site in sites]
    return {
        "weight_bytes": sum(sizes[:22]),
        "avg_weight_bits": 8 * sum(sizes[:22]) / sum(elements[:22]),
        "avg_act_bits": 8 * sum(sizes[22:]) / sum(elements[22:]),
        "bops": sum(1e4 * n * w * a for n, w, a in zip(elements, widths[:22], widths[22:], strict=False)),
        "act_max_bytes": max(sizes[22:]),
        "act_sum_bytes": sum(sizes[22:]),
    }
