"""The page: what it holds, what it escapes, and that it is the same every time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

from mixbits.report import build_report
from mixbits.report.svg import THEME

HOSTILE = '<script>alert(\'x\')</script>&"$x$ style="fill: #ffffff" 层'


def site(name: str, kind: str, **changes: Any) -> dict[str, Any]:
    entry = {
        "site": name,
        "kind": kind,
        "elements": 432,
        "asked_bits": 4.3,
        "assigned_bits": 4,
        "stored_bits": 4,
    }
    return entry | {"grid": "4 bit", "macs": 442368, "runs_as": "integer conv2d 4x8"} | changes


def limit(**changes: Any) -> dict[str, Any]:
    entry = {"limit": "weights", "unit": "bytes", "asked": 71782.4, "used": 71000, "uniform_used": 67084}
    return entry | changes


def summary(**changes: Any) -> dict[str, Any]:
    network = {"top1": 90.0, "weight_bytes": 71000, "avg_weight_bits": 3.9, "bops": 6e8, "seconds": 10.0}
    return {
        "format": "mixbits-summary",
        "version": 1,
        "mixbits": "0.1.0",
        "method": "mpdnn",
        "network": "mixbits.zoo:resnet20",
        "budget": "weights=70.1KiB",
        "seed": 0,
        "epochs": {"learn": 2, "finetune": 3, "uniform": 5},
        "started": "2026-11-21T12:00:00",
        "float": network | {"top1": 91.0},
        "uniform": network | {"top1": 89.0, "widths": {"a.weight": 4, "a/relu": 4}},
        "mixed": network,
        "limits": [limit()],
        "sites": [site("a.weight", "weight"), site("a/relu", "activation")],
        "instructions": [
            {"op": "conv2d", "name": "a", "arithmetic": "integer", "weight_bits": 4, "activation_bits": 8}
            | {"macs": 99},
            {"op": "gelu", "name": "b/gelu", "arithmetic": "float", "macs": 1},
        ],
    } | changes  # fmt: skip


METRICS = [
    {"stage": "uniform", "epoch": 1.0, "loss": 0.5, "train_top1": 80.0, "held_out_top1": 79.0},
    {"stage": "learn", "epoch": 0.5, "loss": 0.6, "avg_weight_bits": 6.0, "used": {"weights": 1.5}},
    {"stage": "learn", "epoch": 2.0, "loss": 0.5, "avg_weight_bits": 4.0, "used": {"weights": 1.0}},
    {"stage": "finetune", "epoch": 1.0, "loss": 0.4, "train_top1": 85.0, "held_out_top1": 84.0},
]


def page(folder: Path, entry: dict[str, Any] | None = None, metrics: list[dict[str, Any]] = METRICS) -> str:
    (folder / "summary.json").write_text(json.dumps(entry or summary()), encoding="utf-8")
    lines = "".join(json.dumps(line) + "\n" for line in metrics)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    return build_report(folder).read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Every start tag with its attributes, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def labels(self) -> list[str]:
        return [attributes["aria-label"] or "" for tag, attributes in self.tags if tag == "svg"]


def test_the_page_holds_every_part_in_order(tmp_path: Path) -> None:
    text = page(tmp_path)

    headings = re.findall(r"<h[12]>(.*?)</h[12]>", text)
    assert headings == [
        "mixbits.zoo:resnet20", "The networks compared", "Cost against budget", "Width of every site",
        "Where the bits go", "Training", "What was asked and what runs", "Instructions of the packed file",
        "What really ran", "Where this comes from",
    ]  # fmt: skip
    labels = Elements(text).labels()
    assert [label.split(".")[0] for label in labels] == [
        "Cost against budget", "Weights", "Activations", "Where the bits go",
        "Loss", "Accuracy", "Average width", "Use of the limits",
    ]  # fmt: skip
    assert text.count('role="img"') == len(labels)
    assert text.count("<caption>") == text.count("<table")


def test_float_operations_are_named_with_the_share_of_integer_work(tmp_path: Path) -> None:
    text = Elements(page(tmp_path)).text

    assert (
        "Of 100 MACs, 99.0 % run as integer arithmetic. 1 of 2 instructions uses float arithmetic: " in text
    )
    assert "b/gelu (gelu)." in text


def test_what_really_ran_is_listed_with_kernels_times_and_bytes(tmp_path: Path) -> None:
    steps = [
        {"name": "input", "kernel": "quantize", "weight_bits": None, "input_bits": None, "bytes": 512, "us": 10.0},
        {"name": "a + a/relu", "kernel": "dot_avx2", "weight_bits": 4, "input_bits": 8, "bytes": 3072, "us": 30.0},
    ]  # fmt: skip
    ran = {"engine": "native", "threads": 2, "batch": 1, "ms": 0.0425, "predicted_ms": 0.0431, "steps": steps}
    ran["memory"] = {"arenas": 2048, "scratch": 1536, "weights": 1024, "total": 4608}

    text = page(tmp_path, summary(runtime=ran))

    shown = " ".join(Elements(text).text.split())
    assert "0.0425 ms a run of 1 sample, native engine, 2 threads; its steps add up to 0.04 ms" in shown
    assert "the latency table predicted 0.0431 ms." in shown
    assert (
        "Memory of the engine: 4.5 KiB, of which 2.0 KiB are values between steps and 1.5 KiB scratch"
        in shown
    )
    row = re.search(r"<tr><th[^>]*>a \+ a/relu</th>(.*?)</tr>", text, re.DOTALL)
    assert row is not None
    assert re.findall(r"<td[^>]*>(.*?)</td>", row[1]) == ["dot_avx2", "4", "8", "30.0", "75.0 %", "3.0"]


def test_a_run_on_the_reference_has_a_time_and_no_steps(tmp_path: Path) -> None:
    ran = {"engine": "reference", "threads": 1, "batch": 1, "ms": 12.5, "predicted_ms": None, "steps": []}

    assert "12.5 ms a run of 1 sample on the reference engine, whose steps are not timed." in " ".join(
        Elements(page(tmp_path, summary(runtime=ran))).text.split()
    )


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    text = page(tmp_path)

    assert "://" not in text
    assert not {tag for tag, _ in Elements(text).tags} & {"script", "link", "img", "iframe", "object"}
    assert all(link.startswith("#") for link in re.findall(r'href="([^"]*)"', text))


def test_ids_are_unique_and_every_reference_has_its_id(tmp_path: Path) -> None:
    text = page(tmp_path)

    ids = re.findall(r'\sid="([^"]*)"', text)
    used = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', text)
    assert len(ids) == len(set(ids))
    assert {first or second for first, second in used} <= set(ids)


def test_colours_of_charts_follow_the_theme(tmp_path: Path) -> None:
    svg = "".join(re.findall(r"<svg.*?</svg>", page(tmp_path), flags=re.DOTALL))

    assert len({light for light, _ in THEME.values()}) == len(THEME)
    assert re.sub(r"var\(--[a-z0-9-]+, #[0-9a-f]{6}\)", "", svg).count("#") == svg.count('"#') + svg.count(
        "(#"
    )


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    first = page(tmp_path)

    assert page(tmp_path) == first
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "metrics.jsonl",
        "report.html",
        "summary.json",
    ]


def test_matplotlib_settings_of_the_user_change_nothing(tmp_path: Path) -> None:
    first = page(tmp_path)
    with mpl.rc_context({"lines.linewidth": 9.0, "svg.fonttype": "path", "font.size": 30.0}):
        before = dict(mpl.rcParams)
        assert page(tmp_path) == first
        assert dict(mpl.rcParams) == before


@pytest.mark.parametrize(
    "place", ["site", "network", "method", "budget", "limit", "instruction", "machine", "metric"]
)
def test_hostile_text_is_shown_and_not_run(tmp_path: Path, place: str) -> None:
    entry = summary()
    metrics = METRICS
    if place == "site":
        entry["sites"] = [site(HOSTILE, "weight", grid=HOSTILE, runs_as=HOSTILE, stored_bits=5)] * 2
    elif place == "limit":
        entry["limits"] = [limit(limit=HOSTILE, unit=HOSTILE)]
    elif place == "instruction":
        entry["instructions"] = [{"op": HOSTILE, "name": HOSTILE, "arithmetic": HOSTILE, "macs": 5}]
    elif place == "metric":
        metrics = [*METRICS, {"stage": "learn", "epoch": 2.0, "used": {HOSTILE: 1.0}}]
    else:
        entry[place] = HOSTILE

    text = page(tmp_path, entry, metrics)

    parsed = Elements(text)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert HOSTILE in parsed.text or place in {"limit", "metric"}  # these two only stand in charts, shortened
    assert text.count("<svg") == text.count("</svg>")
    if place == "site":
        assert (
            '&amp;"$x$ style="fill: #ffffff" 层</text>' in text
        )  # in a chart: neither a formula nor a colour


def test_a_site_stored_at_another_width_is_warned_about(tmp_path: Path) -> None:
    changed = site("b.weight", "weight", assigned_bits=3, stored_bits=8)

    text = page(tmp_path, summary(sites=[site("a.weight", "weight"), changed]))

    warning = re.search(r'<div class="warning".*?</div>', text, flags=re.DOTALL)
    assert warning
    assert "1 of 2 sites is stored at another width than assigned." in warning[0]
    assert "b.weight" in warning[0]
    assert text.count('<tr class="differs">') == 1
    assert "1 stored at another width than assigned" in Elements(text).labels()[1]


def test_a_run_without_a_difference_has_no_warning(tmp_path: Path) -> None:
    text = page(tmp_path)

    assert '<div class="warning"' not in text
    assert '<tr class="differs">' not in text


def test_a_run_without_a_uniform_network_leaves_its_column_out(tmp_path: Path) -> None:
    limits = [limit(uniform_used=None)]

    text = page(tmp_path, summary(uniform=None, limits=limits), METRICS[1:])

    assert '<th scope="col" class="uniform">' not in text
    assert "Uniform widths were not run" in text
    assert not any("uniform" in label for label in Elements(text).labels() if label.startswith("Loss"))


@pytest.mark.parametrize("count", [6, 120])
def test_every_site_is_in_the_charts_and_in_the_tables(tmp_path: Path, count: int) -> None:
    names = [f"layer{i}.conv.weight" for i in range(count // 2)] + [
        f"layer{i}/relu" for i in range(count // 2)
    ]
    sites = [site(name, "weight" if "weight" in name else "activation") for name in names]

    text = page(tmp_path, summary(sites=sites))

    svg = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert [name for name in names if f">{name}</text>" not in svg] == []
    assert [name for name in names if f'<th scope="row" class="name">{name}</th>' not in text] == []
    panels = [label for label in Elements(text).labels() if label.startswith(("Weights", "Activations"))]
    assert len(panels) == (2 if count == 6 else 4)


def test_a_long_name_is_shortened_in_a_chart_and_whole_in_its_tip(tmp_path: Path) -> None:
    name = "features.denseblock4.denselayer32.conv2.weight"

    text = page(tmp_path, summary(sites=[site(name, "weight")]))

    assert f">…{name[-35:]}</text>" in text
    assert f"<title>{name}</title>" in text


def test_an_almost_empty_run_still_has_a_page(tmp_path: Path) -> None:
    text = page(tmp_path, {"format": "mixbits-summary", "version": 1}, [])

    assert "No training step is recorded." in text
    assert "<svg" not in text


def test_unknown_numbers_are_drawn_as_unknown(tmp_path: Path) -> None:
    unknown = {"asked_bits": None, "assigned_bits": None, "stored_bits": None, "elements": None, "macs": None}
    limits = [limit(asked=None, used=None, uniform_used=None)]
    metrics = [{"stage": "learn", "epoch": 1.0, "loss": None, "used": {"weights": None}}]

    text = page(tmp_path, summary(sites=[site("a", "weight", **unknown)], limits=limits), metrics)

    assert "not known" in text
    assert "nan" not in text.lower().replace("nano", "")


def test_fine_tuning_is_drawn_behind_learning(tmp_path: Path) -> None:
    text = page(tmp_path)

    loss = next(
        svg for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL) if 'aria-label="Loss.' in svg
    )
    assert ">learn</text>" in loss
    assert ">finetune</text>" in loss
    assert ">5</text>" in loss  # the axis ends at 2 + 3 epochs, where uniform training ends too


def test_a_failed_build_leaves_the_older_report(tmp_path: Path) -> None:
    older = page(tmp_path)
    (tmp_path / "summary.json").write_text("{}", encoding="utf-8")

    with pytest.raises(ValueError, match=r"summary\.json: the format must be"):
        build_report(tmp_path)

    assert (tmp_path / "report.html").read_text(encoding="utf-8") == older


def test_the_report_needs_no_torch() -> None:
    code = (
        "import sys, mixbits.report; sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
