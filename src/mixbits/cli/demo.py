"""``mixbits demo``: the main job on embedded data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from mixbits.cli.session import Session, run_stages
from mixbits.fit.recipe import read_toml, recipe_from_dict

RECIPE = Path(__file__).with_name("demo.toml")


@dataclass(frozen=True)
class Demo:
    """Train a small network on handwritten digits, learn its widths at equal bytes, pack, run and report."""

    out: Path = Path("runs/demo")  # folder of the run
    resume: bool = False  # go on with the run in that folder


def main(arguments: list[str]) -> None:
    """Fit the demo's recipe."""
    chosen = tyro.cli(Demo, prog="mixbits demo", args=arguments)
    run_stages(recipe_from_dict(read_toml(RECIPE), str(RECIPE)), Session(chosen.out, chosen.resume))
