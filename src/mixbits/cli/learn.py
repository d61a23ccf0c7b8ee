"""``mixbits learn``."""

from __future__ import annotations

from mixbits.cli.stage import run_stage


def main(arguments: list[str]) -> None:
    """Run this stage of a run."""
    run_stage(
        "learn",
        "Learn the widths of a network within a budget: writes policy.json.",
        ("float", "learn"),
        arguments,
    )
