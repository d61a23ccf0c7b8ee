"""A matrix of runs under a progress display: what ``mixbits compare`` and ``mixbits sweep`` share."""

from __future__ import annotations

import sys

from mixbits.cli.options import parse_matrix
from mixbits.cli.progress import lines
from mixbits.cli.session import stop_on_interrupt
from mixbits.fit.compare import STOP, Outcome, collect, engine, opened_matrix, run_matrix
from mixbits.fit.matrix import Command, matrix_of
from mixbits.fit.table import comparison_table
from mixbits.fit.watching import require
from mixbits.report.comparison import build_comparison
from mixbits.report.matrix import read_comparison
from mixbits.train.processes import launched


def run(command: Command, about: str, arguments: list[str]) -> None:
    """Parse the options, run every cell that is not done yet, print the table and write the page."""
    if launched():
        raise ValueError(
            f"mixbits {command} starts processes itself: give --jobs or --cluster, without a launcher"
        )
    recipe, session = parse_matrix(command, about, arguments)
    require(session.watch)
    out = session.out
    matrix = matrix_of(command, recipe)
    opened = opened_matrix(matrix, out, resume=session.resume)
    with opened as float_run, engine(matrix.options), stop_on_interrupt((out / STOP).touch) as stop:
        outcomes = run_matrix(matrix, out, lines, _say, stop, watchers=session.watch)
        written = collect(matrix, out, outcomes, float_run)
        page = build_comparison(written)
    comparison = read_comparison(written)
    sys.stdout.write(comparison_table(comparison))
    sys.stdout.write(f"{written}\n{page}\n")
    sys.stdout.flush()
    if stop.is_set():
        raise KeyboardInterrupt(f"Nothing is lost: go on with the same command and --resume ({out}).")
    missing = [cell for cell in comparison.cells if not cell.done]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(comparison.cells)} runs have no result, first {missing[0].folder}: "
            f"{missing[0].error or 'not finished'}. The others are kept; --resume tries again."
        )


def _say(outcome: Outcome, done: int, total: int) -> None:
    how = "stopped" if outcome.stopped else f"FAILED: {outcome.error}" if outcome.error else "done"
    sys.stderr.write(f"[{done}/{total}] {outcome.name}: {how}\n{outcome.trace}")
    sys.stderr.flush()
