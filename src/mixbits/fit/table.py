"""Table: the result of a run in a terminal."""

from __future__ import annotations

from typing import Any

from mixbits.core.budget import format_amount


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
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    for limit in summary["limits"]:
        asked, used = (format_amount(limit["limit"], limit[key]) for key in ("asked", "used"))
        verdict = "met" if limit["used"] <= limit["asked"] else "NOT MET"
        lines.append(f"limit {limit['text']}: {used} of {asked}, {verdict}")
    ran = summary["runtime"]
    lines.append(
        f"packed model, run without torch on {ran['images']} test images: {ran['top1']:.2f} %, "
        f"{ran['same_prediction_as_training_graph']} predictions as in training"
    )
    return "\n".join(lines) + "\n"
