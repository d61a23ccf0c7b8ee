"""``mixbits finetune``."""

from __future__ import annotations

from mixbits.cli.stage import run_stage


def main(arguments: list[str]) -> None:
    """Run this stage of a run."""
    run_stage(
        "finetune",
        "Train a network at the widths of its folder's policy.json, or of --policy.",
        ("float", "finetune"),
        arguments,
    )
