"""``mixbits lower``."""

from __future__ import annotations

from mixbits.cli.stage import run_stage


def main(arguments: list[str]) -> None:
    """Run this stage of a run."""
    run_stage(
        "lower",
        "Pack the trained network of a run into model.mixbits and check that it runs the same.",
        ("lower", "check"),
        arguments,
    )
