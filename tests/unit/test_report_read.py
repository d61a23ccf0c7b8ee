"""Reading what a run left on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mixbits.report.read import Metric, read_metrics, read_summary

SUMMARY = {"format": "mixbits-summary", "version": 1}


def write_summary(folder: Path, entry: Any) -> Path:
    path = folder / "summary.json"
    path.write_text(json.dumps(entry), encoding="utf-8")
    return path


def write_metrics(folder: Path, text: str) -> Path:
    path = folder / "metrics.jsonl"
    path.write_bytes(text.encode("utf-8"))
    return path


def test_unknown_keys_are_skipped_and_missing_ones_are_unknown(tmp_path: Path) -> None:
    path = write_summary(
        tmp_path, SUMMARY | {"colour": "red", "mixed": {"top1": 90.5, "speed": 3}, "uniform": None}
    )

    summary = read_summary(path)

    assert summary.mixed.top1 == 90.5
    assert summary.mixed.bops is None
    assert summary.uniform is None
    assert summary.method is None
    assert summary.sites == ()


@pytest.mark.parametrize(
    ("number", "read"), [("NaN", None), ("Infinity", None), ("1e999", None), ("null", None), ("90.5", 90.5)]
)
def test_a_number_that_is_not_finite_is_unknown(tmp_path: Path, number: str, read: float | None) -> None:
    path = tmp_path / "summary.json"
    path.write_text(f'{{"format": "mixbits-summary", "version": 1, "mixed": {{"top1": {number}}}}}')

    assert read_summary(path).mixed.top1 == read


@pytest.mark.parametrize(
    ("entry", "fact"),
    [
        ([], "format must be 'mixbits-summary', found no JSON object"),
        ({"version": 1}, "format must be 'mixbits-summary', found None"),
        ({"format": "other", "version": 1}, "format must be 'mixbits-summary', found 'other'"),
        ({"format": "mixbits-summary"}, "version must be a whole number"),
        ({"format": "mixbits-summary", "version": 2}, "version 2 is newer than this mixbits reads.*Upgrade"),
        (SUMMARY | {"mixed": 3}, "mixed must be an object, found int"),
        (SUMMARY | {"mixed": {"top1": "90 %"}}, "mixed: top1 must be a number or null, found '90 %'"),
        (SUMMARY | {"mixed": {"top1": True}}, "mixed: top1 must be a number or null, found True"),
        (SUMMARY | {"mixed": {"widths": [1]}}, "mixed: widths must be an object"),
        (SUMMARY | {"method": 3}, "method must be a text or null, found 3"),
        (SUMMARY | {"sites": {}}, "sites must be a list, found dict"),
        (SUMMARY | {"sites": [{"kind": "weight"}]}, r"sites\[0\]: site must be a text, found None"),
        (SUMMARY | {"sites": [{"site": "a", "kind": "bias"}]}, "a: kind must be one of .* found 'bias'"),
    ],
    ids=[
        "no object", "no format", "other format", "no version", "newer version", "number for an object",
        "text for a number", "boolean for a number", "list for widths", "number for a text",
        "object for a list", "site without a name", "unknown kind",
    ],
)  # fmt: skip
def test_a_wrong_summary_is_refused_with_file_and_fact(tmp_path: Path, entry: Any, fact: str) -> None:
    path = write_summary(tmp_path, entry)

    with pytest.raises(ValueError, match=rf"summary\.json: .*{fact}"):
        read_summary(path)


def test_a_missing_summary_is_named_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"summary\.json: there is no such file\. Give the folder that a run"
    ):
        read_summary(tmp_path / "summary.json")


def test_missing_metrics_are_named_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"metrics\.jsonl: there is no such file\. Give the folder that a run"
    ):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_summary_that_is_not_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text('{"format": "mixbits-')

    with pytest.raises(ValueError, match=r"summary\.json: cannot be read as JSON"):
        read_summary(path)


@pytest.mark.parametrize("cut", range(1, len('{"stage": "learn", "epoch": 2.0, "note": "é"}'.encode())))
def test_a_last_line_cut_anywhere_is_skipped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    last = '{"stage": "learn", "epoch": 2.0, "note": "é"}'.encode()
    path.write_bytes(b'{"stage": "learn", "epoch": 1.0, "loss": 0.5}\n' + last[:cut])

    assert read_metrics(path) == (Metric("learn", 1.0, loss=0.5),)


def test_a_last_line_without_a_line_end_counts_if_it_is_whole(tmp_path: Path) -> None:
    path = write_metrics(tmp_path, '{"stage": "learn", "epoch": 1.0}\n\n{"stage": "finetune", "epoch": 0.5}')

    assert [metric.stage for metric in read_metrics(path)] == ["learn", "finetune"]


def test_a_broken_line_before_the_last_is_refused_with_its_number(tmp_path: Path) -> None:
    path = write_metrics(
        tmp_path, '{"stage": "learn", "epoch": 1.0}\n{"stage"\n{"stage": "learn", "epoch": 2.0}\n'
    )

    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 is not JSON .*Delete the line"):
        read_metrics(path)


@pytest.mark.parametrize(
    ("line", "fact"),
    [
        ('{"stage": 3, "epoch": 1.0}', "line 1 must be an object with a stage"),
        ('{"epoch": 1.0}', "line 1 must be an object with a stage"),
        ('{"stage": "learn"}', "line 1: epoch must be a number"),
        ("null", "line 1 must be an object with a stage"),
    ],
    ids=["stage is no text", "no stage", "no epoch", "null"],
)
def test_a_wrong_line_is_refused_with_its_number(tmp_path: Path, line: str, fact: str) -> None:
    with pytest.raises(ValueError, match=rf"metrics\.jsonl: {fact}"):
        read_metrics(write_metrics(tmp_path, f"{line}\n"))


def test_the_float_networks_own_training_is_left_out(tmp_path: Path) -> None:
    path = write_metrics(tmp_path, '{"stage": "float", "step": 3}\n{"stage": "learn", "epoch": 1.0}\n')

    assert [metric.stage for metric in read_metrics(path)] == ["learn"]
