"""Options: a recipe from a TOML file and the command line, by one definition."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from mixbits.fit.recipe import AnyRecipe, Recipe, read_toml, recipe_from_dict, recipe_type, to_dict


def parse_recipe(command: str, about: str, arguments: list[str]) -> tuple[AnyRecipe, Path, bool]:
    """The recipe (options given here win over the TOML file), the run's folder, and whether to resume."""
    toml = next((word for word in arguments if word.endswith(".toml") and not word.startswith("-")), "")
    entries = read_toml(Path(toml)) if toml else {}
    default = "sensitivity" if "--no-train" in arguments else Recipe.method
    method = _given(arguments, "--method") or str(entries.get("method", default))
    if method != entries.get("method"):
        entries = {**entries, "method": method}
    base = recipe_from_dict(entries, toml or "options")
    kind = dataclasses.make_dataclass(
        "Options",
        [
            ("toml", Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE.toml")], ""),
            ("out", Annotated[Path, tyro.conf.arg(help="folder of the run")], Path("runs/fit")),
            ("resume", Annotated[bool, tyro.conf.arg(help="go on with the run in that folder")], False),
        ],
        bases=(recipe_type(method),),
        frozen=True,
    )
    start = kind(**{f.name: getattr(base, f.name) for f in dataclasses.fields(base)}, toml=toml)
    chosen: Any = tyro.cli(kind, prog=f"mixbits {command}", description=about, args=arguments, default=start)
    recipe = recipe_type(method)(**{f.name: getattr(chosen, f.name) for f in dataclasses.fields(base)})
    return recipe_from_dict(to_dict(recipe), "options"), chosen.out, chosen.resume


def _given(arguments: list[str], option: str) -> str:
    """The value of an option that decides which other options exist."""
    for place, word in enumerate(arguments):
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
        if word == option and place + 1 < len(arguments):
            return arguments[place + 1]
    return ""
