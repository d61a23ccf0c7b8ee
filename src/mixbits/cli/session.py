"""Session: the stages of a run under a progress display, with Ctrl-C that saves."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from mixbits.cli.progress import progress
from mixbits.fit.recipe import AnyRecipe, flat, to_dict
from mixbits.fit.stages import STAGES, Run, opened
from mixbits.fit.summary import write_summary
from mixbits.fit.table import table
from mixbits.fit.watching import Name, Row, Watch, watching
from mixbits.report import build_report

WORDS = {
    "float": "float network",
    "uniform": "baseline of uniform widths",
    "learn": "learning widths",
    "finetune": "training at the learned widths",
    "lower": "packing",
    "check": "running the packed model",
}


@contextmanager
def stop_on_interrupt(also: Callable[[], None] = lambda: None) -> Iterator[threading.Event]:
    """An event set by the first Ctrl-C, so that the loop saves and leaves; the second one stops at once.

    ``also`` is called with the first.
    """
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        also()
        sys.stderr.write("\nstopping after this step; Ctrl-C again to stop at once\n")

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass(frozen=True)
class Session:
    """What is no part of a recipe: where a run is kept, whether it goes on, and who watches."""

    out: Path
    resume: bool
    watch: tuple[Name, ...] = ()


def run_stages(recipe: AnyRecipe, session: Session, stages: Iterable[str] = tuple(STAGES)) -> None:
    """Run stages that are not done yet; after all of them write summary and report, and print the table."""
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    out = session.out
    with stop_on_interrupt() as stop, progress() as show:
        watchers: list[Watch] = [show]

        def watch(row: Row) -> None:
            for each in watchers:
                each(row)

        run = Run(recipe, out, watch, stop)
        with opened(run, resume=session.resume), watching(session.watch, out, flat(to_dict(recipe))) as also:
            watchers.append(also)
            try:
                for stage in stages:
                    if not run.done(stage):
                        sys.stderr.write(f"[{WORDS[stage]}]\n")
                    STAGES[stage](run)
                    if stop.is_set():
                        raise KeyboardInterrupt
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"Nothing is lost: go on with the same command and --resume ({out})."
                ) from None
            if all(run.done(stage) for stage in STAGES if stage != "uniform"):
                summary = write_summary(run)
                report = build_report(out)
                sys.stdout.write(table(summary))
                sys.stdout.write(f"packed model: {out / 'model.mixbits'}\nreport: {report}\n")
