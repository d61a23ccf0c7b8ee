"""``mixbits fit``: all stages of a run."""

from __future__ import annotations

import sys

from mixbits.cli.options import parse_recipe
from mixbits.cli.session import run_stages

ABOUT = (
    "Learn the widths of a trained network within a budget, train at them, pack the model and report on it."
)


def main(arguments: list[str]) -> None:
    """Parse the options and run every stage that is not done yet."""
    run_stages(*parse_recipe("fit", ABOUT, arguments))
    sys.stdout.flush()
