"""``mixbits methods``."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import tyro

from mixbits.methods import find_methods


@dataclass(frozen=True)
class Methods:
    """List the methods that learn widths, a name a line with its paper."""


def main(arguments: list[str]) -> None:
    """Print the list."""
    tyro.cli(Methods, prog="mixbits methods", args=arguments)
    for name, method in find_methods().items():
        sys.stdout.write(f"{name:<12} {method.paper}\n")
