"""``mixbits push``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Push:
    """Share a finished run on the Hugging Face Hub: policy, packed model, recipe, card of figures."""

    run: tyro.conf.Positional[Path]  # folder of the run
    repo: tyro.conf.Positional[str]  # owner/name; made if it is new
    private: bool = False  # if it is new
    dry_run: Path | None = None  # only write the files that would be shared into this folder


def main(arguments: list[str]) -> None:
    """Share, and say where."""
    chosen = tyro.cli(Push, prog="mixbits push", args=arguments)
    from mixbits.integrations import hub  # here, so that --help works without the extra

    if chosen.dry_run is None:
        sys.stdout.write(f"{hub.push(chosen.run, chosen.repo, private=chosen.private)}\n")
        return
    chosen.dry_run.mkdir(parents=True, exist_ok=True)
    for name, content in hub.shared_files(chosen.run, chosen.repo).items():
        (chosen.dry_run / name).write_bytes(content)
        sys.stdout.write(f"{chosen.dry_run / name}: {len(content)} bytes\n")
