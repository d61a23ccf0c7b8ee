"""One stage at a time: what ``mixbits learn``, ``finetune`` and ``lower`` share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro

from mixbits.cli.options import parse_recipe
from mixbits.cli.session import Session, run_stages
from mixbits.core.policy import read_policy
from mixbits.fit.folder import RunFolder
from mixbits.fit.recipe import recipe_from_dict
from mixbits.fit.watching import Name
from mixbits.train.processes import join_processes


@dataclass(frozen=True)
class Existing:
    """Options of a stage in the folder of a run that exists."""

    out: Path  # folder of the run
    policy: Path | None = None  # train at this policy instead of the folder's
    watch: tuple[Name, ...] = ()  # where metrics go besides metrics.jsonl


def run_stage(command: str, about: str, stages: tuple[str, ...], arguments: list[str]) -> None:
    """Run stages in a run's folder, by its recipe, or start a new run from a recipe on the command line."""
    if any(word in ("-h", "--help") for word in arguments) or any(
        word.endswith(".toml") for word in arguments
    ):
        run_stages(*parse_recipe(command, about, arguments), stages)
        return
    chosen = tyro.cli(Existing, prog=f"mixbits {command}", description=about, args=arguments)
    folder = RunFolder(chosen.out)
    recipe = recipe_from_dict(folder.read_json("recipe.json"), str(folder / "recipe.json"))
    if chosen.policy is not None:
        join_processes(recipe.device, bf16=recipe.bf16).once(partial(_use_policy, folder, chosen.policy))
    run_stages(recipe, Session(chosen.out, resume=True, watch=chosen.watch), stages)


def _use_policy(folder: RunFolder, policy: Path) -> None:
    """Put a policy into the folder and forget what was made with the one before."""
    with folder.locked():
        folder.write_json("policy.json", read_policy(policy).to_json())
        for stage in ("finetune", "lower", "check"):
            (folder / "stages" / f"{stage}.json").unlink(missing_ok=True)
            for checkpoint in (folder / "checkpoints").glob(f"{stage}*.pt"):
                checkpoint.unlink()
