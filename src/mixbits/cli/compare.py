"""``mixbits compare``: methods x budgets x seeds."""

from __future__ import annotations

from mixbits.cli.matrix import run

ABOUT = (
    "Run methods and baselines at the same budgets, from the same float networks, for the same epochs, with "
    "several seeds; say what pays and whether that is established: comparison.json and comparison.html."
)


def main(arguments: list[str]) -> None:
    """Parse the options and run every cell that is not done yet."""
    run("compare", ABOUT, arguments)
