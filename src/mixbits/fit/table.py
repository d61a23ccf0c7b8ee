"""Table: the result of a run, or of many, in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mixbits.core.budget import format_amount
from mixbits.report.comparison import float_row, rows
from mixbits.report.matrix import Comparison
from mixbits.report.versus import comparison_verdict

MARKS = {"good": "+", "bad": "!", "plain": " "}


def table(summary: dict[str, Any]) -> str:
    """Float, uniform and mixed beside each other, and every limit with what is used."""
    rows = [("", "top-1", "weights", "W bits", "A bits", "GBOP", "act max", "act sum", "seconds")]
    for name in ("float", "uniform", "mixed"):
        entry = summary[name]
        if entry is None:
            continue
        rows.append(
            (
                name,
                f"{entry['top1']:.2f} %",
                format_amount("weights", entry["weight_bytes"]),
                f"{entry['avg_weight_bits']:.3f}",
                f"{entry['avg_act_bits']:.3f}",
                f"{entry['bops'] / 1e9:.4f}",
                format_amount("act_max", entry["act_max_bytes"]),
                format_amount("act_sum", entry["act_sum_bytes"]),
                f"{entry['seconds']:.0f}",
            )
        )
    lines = _aligned(rows)
    for limit in summary["limits"]:
        asked, used = (format_amount(limit["limit"], limit[key]) for key in ("asked", "used"))
        verdict = "met" if limit["used"] <= limit["asked"] else "NOT MET"
        lines.append(f"limit {limit['text']}: {used} of {asked}, {verdict}")
    ran = summary["runtime"]
    beside = ran.get("training_graph_top1")  # folders of before lack it
    trained = "" if beside is None else f" (as trained {beside:.2f} %)"
    lines.append(
        f"packed model, run without torch on {ran['images']} test images: {ran['top1']:.2f} %{trained}, "
        f"{ran['same_prediction_as_training_graph']} predictions as in training"
    )
    return "\n".join(lines) + "\n"


def comparison_table(comparison: Comparison) -> str:
    """Every method at every budget, mean and spread over the seeds, and the verdict in words."""
    head = (
        "",
        "top-1 %, last epoch",
        "n",
        "vs uniform",
        "weights KiB",
        "W bits",
        "A bits",
        "GBOP",
        "act max KiB",
    )
    headings, general = comparison_verdict(comparison)
    lines: list[str] = []
    for heading in headings:
        table_rows = [float_row(comparison), *rows(comparison, heading.budget)]
        cells = [
            (
                row.name,
                row.top1,
                row.runs,
                row.against,
                *row.figures[:5],
                f"{row.seconds}",
                ", ".join(row.shares),
            )
            for row in table_rows
        ]
        lines += [
            f"budget {heading.budget}",
            *_aligned([(*head, "learn + finetune s", "used of limits"), *cells]),
        ]
        lines += [f"{MARKS[sentence.tone]} {sentence.text}" for sentence in heading.sentences] + [""]
    lines += [f"{MARKS[sentence.tone]} {sentence.text}" for sentence in general]
    return "\n".join(lines) + "\n"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
