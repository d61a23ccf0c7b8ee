"""Session: the stages of a run under a progress display, with Ctrl-C that saves."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from mixbits.cli.progress import progress
from mixbits.fit.recipe import AnyRecipe, flat, to_dict
from mixbits.fit.stages import STAGES, TRAINING, Run, opened
from mixbits.fit.summary import write_summary
from mixbits.fit.table import table
from mixbits.fit.watching import Name, Row, Watch, watching
from mixbits.report import build_report
from mixbits.train.processes import LostProcessError, join_processes

WORDS = {
    "float": "float network",
    "uniform": "baseline of uniform widths",
    "learn": "learning widths",
    "finetune": "training at the learned widths",
    "lower": "packing",
    "check": "running the packed model",
}


@contextmanager
def stop_on_interrupt(
    also: Callable[[], None] = lambda: None, signals: Sequence[signal.Signals] = (signal.SIGINT,)
) -> Iterator[threading.Event]:
    """An event set by the first Ctrl-C, so that the loop saves and leaves; the second one stops at once.

    ``also`` is called with the first. ``signals`` are those that are taken for Ctrl-C.
    """
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        also()
        sys.stderr.write("\nstopping after this step; Ctrl-C again to stop at once\n")

    before = {number: signal.signal(number, handle) for number in signals}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Session:
    """What is no part of a recipe: where a run is kept, whether it goes on, and who watches."""

    out: Path
    resume: bool
    watch: tuple[Name, ...] = ()


def run_stages(recipe: AnyRecipe, session: Session, stages: Sequence[str] = tuple(STAGES)) -> None:
    """Run stages that are not done yet; after all of them write summary and report, and print the table.

    Started by ``torchrun`` or ``accelerate launch``, its processes train together; the main one does the
    rest, while the others have left.
    """
    processes = join_processes(recipe.device, bf16=recipe.bf16)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    out, main = session.out, processes.main
    # A launcher ends its processes by SIGTERM.
    signals = (signal.SIGINT, signal.SIGTERM) if processes.count > 1 else (signal.SIGINT,)
    with stop_on_interrupt(signals=signals) as stop, progress() as show:
        watchers: list[Watch] = [show]

        def watch(row: Row) -> None:
            for each in watchers:
                each(row)

        run = Run(recipe, out, watch, stop, processes)
        watched_by = watching(session.watch if main else (), out, flat(to_dict(recipe)))
        with opened(run, resume=session.resume), watched_by as also:
            watchers.append(also)
            try:
                together = [stage for stage in stages if stage in TRAINING]
                _run(run, together)
                if not main:
                    return
                with processes.apart():
                    _run(run, [stage for stage in stages if stage not in together])
                    _conclude(run)
            except (KeyboardInterrupt, LostProcessError) as ended:
                kept = f"Nothing is lost: go on with the same command and --resume ({out})."
                said = [str(ended), kept] if isinstance(ended, LostProcessError) else [kept]
                raise type(ended)(". ".join(said)) from None


def _run(run: Run, stages: Iterable[str]) -> None:
    for stage in stages:
        if not run.done(stage) and run.processes.main:
            sys.stderr.write(f"[{WORDS[stage]}]\n")
        STAGES[stage](run)
        if any(run.processes.any(run.stop.is_set())):
            raise KeyboardInterrupt


def _conclude(run: Run) -> None:
    """When every stage is done: summary, report and table."""
    if all(run.done(stage) for stage in STAGES if stage != "uniform"):
        summary = write_summary(run)
        report = build_report(run.folder.path)
        sys.stdout.write(table(summary))
        sys.stdout.write(f"packed model: {run.folder / 'model.mixbits'}\nreport: {report}\n")
