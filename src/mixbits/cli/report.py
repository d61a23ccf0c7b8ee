"""``mixbits report``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from mixbits.report import build_report
from mixbits.report.comparison import build_comparison

COMPARISONS = ("comparison.json", "sweep.json")


@dataclass(frozen=True)
class Report:
    """Write the page of a run, a comparison or a sweep, from its JSON files."""

    folder: tyro.conf.Positional[Path]  # folder of the run, comparison or sweep


def main(arguments: list[str]) -> None:
    """Build the page and say where it is."""
    chosen = tyro.cli(Report, prog="mixbits report", args=arguments)
    compared = [path for name in COMPARISONS if (path := chosen.folder / name).exists()]
    pages = [build_comparison(path) for path in compared] or [build_report(chosen.folder)]
    sys.stdout.write("".join(f"{page}\n" for page in pages))
