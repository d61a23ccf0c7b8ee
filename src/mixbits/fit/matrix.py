"""Matrix: the runs of a comparison, methods x budgets x seeds, of equal epochs and from equal starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mixbits.core.budget import budget_points
from mixbits.fit.recipe import AnyRecipe, Recipe, build, method_of, recipe_from_dict, recipe_type, to_dict
from mixbits.methods import find_methods, method_named
from mixbits.train.method import Method

Command = Literal["compare", "sweep"]
ANY_BUDGET = (
    "weights=32bit"  # a run's recipe has a budget; the one that only trains the float network needs none
)


@dataclass(frozen=True)
class Sweep:
    """Options of ``mixbits sweep``."""

    budgets: str = (
        ""  # with ; between them, or ranges such as weights=2bit..4bit:5; empty: the recipe's budget
    )
    seeds: int = 1  # how many, from the recipe's seed on
    epochs: int = 0  # of every run, learning and finetuning together; 0: those of the recipe's method
    learn_epochs: int = 0  # of them to learn widths, for methods that train to learn; 0: each method's own
    jobs: int = 1  # runs at the same time, each in its own process
    cluster: str = ""  # address of a Dask scheduler, whose workers run instead and share the folder
    pack: bool = False  # also pack every model and check that it runs the same


@dataclass(frozen=True)
class Compare(Sweep):
    """Options of ``mixbits compare``."""

    seeds: int = 3  # how many, from the recipe's seed on
    methods: str = ""  # with commas between them; empty: every method; baselines are always included


OPTIONS: dict[Command, type[Sweep]] = {"compare": Compare, "sweep": Sweep}


@dataclass(frozen=True)
class Cell:
    """One run of the matrix; its folder is its name."""

    method: str
    budget: str
    seed: int
    recipe: AnyRecipe

    @property
    def name(self) -> str:
        """Folder of the run within that of the matrix, and what people are told."""
        return f"{self.method}/{self.budget}/seed{self.seed}"


@dataclass(frozen=True)
class Matrix:
    """What ``compare`` or ``sweep`` will run."""

    command: Command
    recipe: AnyRecipe  # of all methods, with the options of the command under its name
    methods: tuple[str, ...]
    budgets: tuple[str, ...]
    seeds: tuple[int, ...]
    epochs: int  # of every cell
    cells: tuple[Cell, ...]  # seed by seed: a matrix that is stopped early still compares

    @property
    def options(self) -> Sweep:
        """The options of the command."""
        return getattr(self.recipe, self.command)


def matrix_type(command: Command, method: str, methods: Sequence[str]) -> type:
    """The class of recipes for a matrix: the options of all its methods, and of the command."""
    options = OPTIONS[command]
    return dataclasses.make_dataclass(
        "MatrixRecipe",
        [(command, options, field(default_factory=options))],
        bases=(recipe_type(method, methods),),
        frozen=True,
        namespace={"__doc__": Recipe.__doc__},
    )


def matrix_recipe(command: Command, entries: dict[str, Any], methods: Sequence[str], where: str) -> AnyRecipe:
    """The recipe of parsed TOML or JSON for a matrix; errors name ``where`` and the option."""
    kind = matrix_type(command, str(entries.get("method", Recipe.method)), methods)
    return build(kind, entries, where)


def compared_methods(asked: str) -> tuple[str, ...]:
    """The methods of a comparison: baselines first, then those asked for, or all.

    Raises ``ValueError`` for a method that does not exist.
    """
    found = find_methods()
    names = [name.strip() for name in asked.split(",") if name.strip()] or list(found)
    for name in names:
        method_named(name)
    baselines = sorted((name for name in found if found[name].baseline), key=lambda name: name != "uniform")
    return tuple(dict.fromkeys([*baselines, *names]))


def epoch_split(own: int, total: int, common: int = 0) -> tuple[int, int]:
    """Epochs of learning widths and of training at them, which make ``total`` for every method.

    ``own`` is the method's option; ``common`` replaces it, if it is not 0, for methods that train to learn.

    >>> epoch_split(3, 10), epoch_split(3, 10, common=4), epoch_split(0, 10, common=4)
    ((3, 7), (4, 6), (0, 10))
    """
    learning = (common or own) if own else 0
    if learning > total:
        raise ValueError(
            f"{learning} of {total} epochs are to learn widths; give more --epochs, or fewer to learn with "
            "--learn-epochs or the method's own option"
        )
    return learning, total - learning


def matrix_of(command: Command, recipe: AnyRecipe) -> Matrix:
    """The cells that a recipe with the command's options asks for; raises ``ValueError`` for bad ones."""
    options: Sweep = getattr(recipe, command)
    if options.seeds < 1 or options.jobs < 1:
        raise ValueError("--seeds and --jobs must be 1 or more")
    methods = compared_methods(options.methods) if isinstance(options, Compare) else (recipe.method,)
    if options.epochs < 0 or options.learn_epochs < 0:
        raise ValueError("--epochs and --learn-epochs must be 0 or more")
    budgets = budget_points(options.budgets or recipe.budget)
    seeds = tuple(range(recipe.seed, recipe.seed + options.seeds))
    epochs = options.epochs or method_of(recipe).epochs + recipe.finetune.epochs
    if not recipe.train:
        training = [name for name in methods if getattr(recipe, name).epochs]
        if training:
            raise ValueError(
                f"--no-train leaves out what trains to learn widths ({', '.join(training)}): "
                + ("give --methods sensitivity" if command == "compare" else "give --method sensitivity")
            )
        epochs = 0
    cells = tuple(
        Cell(method, budget, seed, cell_recipe(recipe, method, budget, seed, options=options, epochs=epochs))
        for seed in seeds
        for budget in budgets
        for method in methods
    )
    return Matrix(command, recipe, methods, budgets, seeds, epochs, cells)


def cell_recipe(
    recipe: AnyRecipe, method: str, budget: str, seed: int, *, options: Sweep, epochs: int
) -> AnyRecipe:
    """The recipe of one cell: an ordinary one, without a uniform baseline of its own."""
    entries = _common(recipe)
    own: Method = getattr(recipe, method)
    try:
        learning, tuning = epoch_split(own.epochs, epochs, options.learn_epochs)
    except ValueError as error:
        raise ValueError(f"{method}: {error}") from None
    entries |= {"method": method, "budget": budget, "seed": seed, "baseline": False}
    entries["finetune"] |= {"epochs": tuning}
    entries[method] = {**to_dict(own), "epochs": learning}
    return recipe_from_dict(entries, f"{method}, {budget}")


def float_recipe(recipe: AnyRecipe, seed: int) -> AnyRecipe:
    """The recipe of the run that trains or measures the float network, which all cells of a seed share."""
    entries = {**_common(recipe), "method": "uniform", "budget": ANY_BUDGET, "seed": seed, "baseline": False}
    return recipe_from_dict(entries, "float")


def _common(recipe: AnyRecipe) -> dict[str, Any]:
    """The entries that belong to no method."""
    names = {entry.name for entry in dataclasses.fields(Recipe)}
    return {name: value for name, value in to_dict(recipe).items() if name in names}
