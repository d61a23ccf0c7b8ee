"""``mixbits sweep``: one method over many budgets."""

from __future__ import annotations

from mixbits.cli.matrix import run

ABOUT = (
    "Run one method at many budgets: a front of accuracy against cost and a policy for each point, in "
    "sweep.json and sweep.html."
)


def main(arguments: list[str]) -> None:
    """Parse the options and run every cell that is not done yet."""
    run("sweep", ABOUT, arguments)
