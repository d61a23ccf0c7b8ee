"""Options: a recipe from a TOML file and the command line, by one definition."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from mixbits.cli.session import Session
from mixbits.fit.matrix import OPTIONS, Command, compared_methods, matrix_recipe
from mixbits.fit.recipe import AnyRecipe, Recipe, own_entries, read_toml, recipe_from_dict, to_dict
from mixbits.fit.watching import Name

WATCH = Annotated[tuple[Name, ...], tyro.conf.arg(help="where metrics go besides metrics.jsonl")]


def parse_recipe(command: str, about: str, arguments: list[str]) -> tuple[AnyRecipe, Session]:
    """The recipe (options given here win over the TOML file) and how it is run."""
    toml, entries = _entries(arguments)
    entries = own_entries(entries, [entries["method"]])
    base = recipe_from_dict(entries, toml or "options")
    recipe, chosen = _parse(command, about, arguments, base, toml=toml, out="fit")
    session = Session(chosen.out, chosen.resume, chosen.watch)
    return recipe_from_dict(to_dict(recipe), "options"), session


def parse_matrix(command: Command, about: str, arguments: list[str]) -> tuple[AnyRecipe, Session]:
    """The same for a matrix of runs: the options of all its methods, and of the command without a prefix."""
    toml, entries = _entries(arguments)
    methods = (str(entries["method"]),)
    if command == "compare":
        asked = _given(arguments, "--methods") or str(entries.get("compare", {}).get("methods", ""))
        methods = compared_methods(asked)
    entries = own_entries(entries, [*methods, entries["method"]], [command])
    base = matrix_recipe(command, entries, methods, toml or "options")
    kind = Annotated[OPTIONS[command], tyro.conf.arg(name="")]
    recipe, chosen = _parse(
        command,
        about,
        arguments,
        base,
        toml=toml,
        out=command,
        more=((command, kind, getattr(base, command)),),
    )
    recipe = matrix_recipe(command, to_dict(recipe), methods, "options")
    return recipe, Session(chosen.out, chosen.resume, chosen.watch)


def _entries(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """The TOML file on the command line and what it says, with the method in effect."""
    toml = next((word for word in arguments if word.endswith(".toml") and not word.startswith("-")), "")
    entries = read_toml(Path(toml)) if toml else {}
    default = "sensitivity" if "--no-train" in arguments else Recipe.method
    method = _given(arguments, "--method") or str(entries.get("method", default))
    return toml, {**entries, "method": method}


def _parse(
    command: str,
    about: str,
    arguments: list[str],
    base: AnyRecipe,
    *,
    toml: str,
    out: str,
    more: Sequence[tuple[str, Any, Any]] = (),
) -> tuple[AnyRecipe, Any]:
    """``base`` with what the command line says, and all that it says.

    ``more``: further options, or options of the recipe that are shown in another way; name, type, default.
    """
    kind = dataclasses.make_dataclass(
        "Options",
        [
            ("toml", Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE.toml")], ""),
            ("out", Annotated[Path, tyro.conf.arg(help="folder of the run")], Path("runs") / out),
            ("resume", Annotated[bool, tyro.conf.arg(help="go on with the run in that folder")], False),
            ("watch", WATCH, ()),
            *more,
        ],
        bases=(type(base),),
        frozen=True,
    )
    start = kind(**{f.name: getattr(base, f.name) for f in dataclasses.fields(base)}, toml=toml)
    chosen: Any = tyro.cli(kind, prog=f"mixbits {command}", description=about, args=arguments, default=start)
    recipe = type(base)(**{f.name: getattr(chosen, f.name) for f in dataclasses.fields(base)})
    return recipe, chosen


def _given(arguments: list[str], option: str) -> str:
    """The value of an option that decides which other options exist."""
    for place, word in enumerate(arguments):
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
        if word == option and place + 1 < len(arguments):
            return arguments[place + 1]
    return ""
