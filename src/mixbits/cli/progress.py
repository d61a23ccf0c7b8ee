"""Progress: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

Row = Mapping[str, Any]
QUIET_SECONDS = 20.0  # between plain lines within an epoch
NAMES = {
    "float": "train float",
    "uniform": "uniform widths",
    "learn": "learn widths",
    "finetune": "finetune",
}


def words(row: Row) -> str:
    """The figures of a row.

    >>> row = {"loss": 0.5, "train_top1": 90.0, "avg_weight_bits": 2.5, "avg_act_bits": 4.0}
    >>> words({**row, "used": {"weights": 1.03}})
    'loss 0.500  train 90.0 %  W 2.50 bit  A 4.00 bit  weights 103 % of limit'
    """
    parts = []
    if "loss" in row:
        parts.append(f"loss {row['loss']:.3f}")
    if "train_top1" in row:
        parts.append(f"train {row['train_top1']:.1f} %")
    if "held_out_top1" in row:
        parts.append(f"held out {row['held_out_top1']:.1f} %")
    if "avg_weight_bits" in row:
        parts += [f"W {row['avg_weight_bits']:.2f} bit", f"A {row['avg_act_bits']:.2f} bit"]
    parts += [f"{name} {100 * share:.0f} % of limit" for name, share in row.get("used", {}).items()]
    return "  ".join(parts)


@contextmanager
def progress() -> Iterator[Callable[[Row], None]]:
    """A function to give rows to, for as long as the run lasts."""
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description:<15}"),
            BarColumn(bar_width=24),
            TextColumn("epoch {task.fields[epoch]:.2f}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        with Progress(*columns, console=Console(stderr=True)) as bars:
            yield _bar(bars)
    else:
        yield lines()


def _bar(bars: Progress) -> Callable[[Row], None]:
    known: dict[str, Any] = {}
    figures: dict[str, dict[str, Any]] = {}

    def show(row: Row) -> None:
        stage: str = row["stage"]
        if "note" in row:
            bars.console.print(f"{NAMES.get(stage, stage)}: {row['note']}")
        if "steps" not in row:
            return
        if stage not in known:
            known[stage] = bars.add_task(NAMES.get(stage, stage), total=row["steps"], epoch=0.0, figures="")
            figures[stage] = {}
        shown = ("loss", "train_top1", "held_out_top1", "avg_weight_bits", "avg_act_bits", "used")
        figures[stage].update({key: row[key] for key in shown if key in row})
        text = words(figures[stage])
        bars.update(known[stage], completed=row["step"], total=row["steps"], epoch=row["epoch"], figures=text)

    return show


def lines(run: str = "") -> Callable[[Row], None]:
    """A function that writes rows as plain lines, with the name of the run if there are several."""
    last = [0.0]
    prefix = f"{run}: " if run else ""

    def show(row: Row) -> None:
        stage = f"{prefix}{NAMES.get(row['stage'], row['stage'])}"
        if "note" in row:
            sys.stderr.write(f"{stage}: {row['note']}\n")
        elif row.get("resumed_step"):
            sys.stderr.write(f"{stage}: going on after step {row['resumed_step']}\n")
        elif "steps" in row and (row["ends_epoch"] or time.monotonic() - last[0] > QUIET_SECONDS):
            last[0] = time.monotonic()
            sys.stderr.write(f"{stage}: epoch {row['epoch']:.2f}  {words(row)}\n")
        sys.stderr.flush()

    return show
