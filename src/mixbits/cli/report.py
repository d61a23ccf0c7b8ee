"""``mixbits report``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from mixbits.report import build_report


@dataclass(frozen=True)
class Report:
    """Write report.html of a run, from its JSON files."""

    folder: tyro.conf.Positional[Path]  # folder of the run


def main(arguments: list[str]) -> None:
    """Build the page and say where it is."""
    chosen = tyro.cli(Report, prog="mixbits report", args=arguments)
    sys.stdout.write(f"{build_report(chosen.folder)}\n")
