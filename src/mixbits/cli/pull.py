"""``mixbits pull``."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro

from mixbits.core.program import Program


@dataclass(frozen=True)
class Pull:
    """Fetch a model that was shared with `mixbits push`, check it, and say what it is."""

    repo: tyro.conf.Positional[str]  # owner/name
    out: Path  # folder to write, new or empty
    revision: str | None = None  # branch, tag or commit


def main(arguments: list[str]) -> None:
    """Fetch, check, describe."""
    chosen = tyro.cli(Pull, prog="mixbits pull", args=arguments)
    from mixbits.integrations import hub  # here, so that --help works without the extra

    program = hub.pull(chosen.repo, chosen.out, revision=chosen.revision)
    sys.stdout.write(f"{chosen.out / hub.MODEL}: {describe(program)}\n")


def describe(program: Program) -> str:
    """What a packed model is, in a line."""
    widths = Counter(weight.grid.bits for weight in program.weights.values())
    weights = ", ".join(f"{count} of {bits} bits" for bits, count in sorted(widths.items()))
    shape = " x ".join(map(str, program.input_shape))
    return (
        f"inputs of {shape}, made for {program.about.get('dataset', 'unknown data')}; "
        f"{program.weight_bytes} bytes of weights ({weights}), {len(program.instructions)} instructions"
    )
