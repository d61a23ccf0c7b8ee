"""Recipe: every option of a run, one definition for the command line, TOML files and the JSON of a run."""

from __future__ import annotations

import dataclasses
import json
import tomllib
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mixbits.core.budget import parse_budget
from mixbits.core.latency import read_latency
from mixbits.methods import find_methods, method_named
from mixbits.train.finetune import Finetune
from mixbits.train.method import Method, Target
from mixbits.train.steps import Schedule


@dataclass(frozen=True)
class FloatTraining:
    """Training of the float network, for recipes that start without weights."""

    epochs: int = 0  # 0: the network comes trained, by --weights or from its own function
    lr: float = 0.1  # initial learning rate
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Schedule = "cosine"


@dataclass(frozen=True)
class Recipe:
    """Options of a run.

    Attributes:
        network: module:function or file.py:function, called without arguments.
        data: digits, cifar10:DIR, mnist:DIR, imagefolder:DIR, module:function or file.py:function.
        budget: Limits, such as weights=70KiB,act_max=8KiB or weights=4bit, bitfusion_cycles=1M or ms=3.0.
        latency: Table that ms= is read from, by `mixbits profile --latency`; states threads and batch.
        latency_elsewhere: The table is of another machine, where the network is to run.
        method: See `mixbits methods`.
        weights: Trained weights of the network: safetensors or a state dict.
        start: What learning starts from: the float network, or untrained values.
        seed: Of everything that is drawn.
        batch_size: Training images of one step.
        held_out: Fraction of the training data that decides and is not trained on.
        train_images: Trained on, of those not held out; 0: all; else a fixed part, classes in proportion.
        weight_bits: Candidates for weights.
        activation_bits: Candidates for activations.
        pins: Sites whose width is given.
        ties: Groups of sites that share one width, each written site+site.
        mean: Normalization a channel; empty: the data set's.
        std: Normalization a channel; empty: the data set's.
        train: --no-train only chooses widths and good values, from calibration images.
        images: Calibration images, from the training data, without labels.
        baseline: Also train the uniform-width network under the same budget.
        device: cpu or cuda.
        threads: Of torch on the CPU; 0: torch's choice.
        compile: torch.compile the training step (needs g++ on the CPU).
        bf16: Train matrix products in bfloat16.
        check_images: Test images that the packed model runs, compared with the training graph.
        float_training: Training of the float network, for recipes that start without weights.
        finetune: Training at the learned widths.
    """

    network: str = ""
    data: str = ""
    budget: str = ""
    latency: str = ""
    latency_elsewhere: bool = False
    method: str = "mpdnn"
    weights: str = ""
    start: Literal["trained", "scratch"] = "trained"
    seed: int = 0
    batch_size: int = 128
    held_out: float = 0.1
    train_images: int = 0
    weight_bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    activation_bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    pins: dict[str, int] = field(default_factory=dict[str, int])
    ties: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    train: bool = True
    images: int = 256
    baseline: bool = True
    device: str = "cpu"
    threads: int = 0
    compile: bool = False
    bf16: bool = False
    check_images: int = 2000
    float_training: FloatTraining = field(default_factory=FloatTraining)
    finetune: Finetune = field(default_factory=Finetune)

    def target(self) -> Target:
        """Budget, candidates, ties and pins."""
        ties = [tuple(site.strip() for site in group.split("+")) for group in self.ties]
        table = read_latency(Path(self.latency)) if self.latency else None
        budget = parse_budget(self.budget, table)
        return Target(budget, self.weight_bits, self.activation_bits, ties, self.pins)


COMMAND_TABLES = ("compare", "sweep")  # options of a command that runs many recipes, not of a run

# A recipe with the options of one method as the field of the method's name.
AnyRecipe = Any


def recipe_type(method: str, others: Sequence[str] = ()) -> type:
    """The class of recipes for a method: :class:`Recipe` with the method's own options under its name.

    The options of ``others`` are there too, for recipes that compare methods.
    """
    options = [(name, method_named(name)) for name in dict.fromkeys((method, *others))]
    return dataclasses.make_dataclass(
        "Recipe",
        [("method", str, method), *((name, kind, field(default_factory=kind)) for name, kind in options)],
        bases=(Recipe,),
        frozen=True,
        namespace={"__doc__": Recipe.__doc__},
    )


def method_of(recipe: AnyRecipe) -> Method:
    """The method with its options."""
    return getattr(recipe, recipe.method)


def own_entries(
    entries: dict[str, Any], methods: Sequence[str], tables: Sequence[str] = ()
) -> dict[str, Any]:
    """Entries without the tables of other methods and other commands, which one recipe may hold too."""
    others = {*find_methods(), *COMMAND_TABLES} - {*methods, *tables}
    return {name: value for name, value in entries.items() if name not in others}


def recipe_from_dict(entries: dict[str, Any], where: str) -> AnyRecipe:
    """The recipe of parsed TOML or JSON; errors name ``where`` and the option."""
    kind = recipe_type(str(entries.get("method", Recipe.method)))
    return build(kind, entries, where)


def read_toml(path: Path) -> dict[str, Any]:
    """The options in a TOML file, not checked yet."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"recipe {path} does not exist") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path} is not valid TOML: {error}") from None


def to_dict(recipe: AnyRecipe) -> dict[str, Any]:
    """Plain JSON of a recipe."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def flat(entries: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options of nested tables by the names that the command line gives them.

    >>> flat({"seed": 0, "finetune": {"lr": 0.1}})
    {'seed': 0, 'finetune.lr': 0.1}
    """
    options: dict[str, Any] = {}
    for name, value in entries.items():
        options |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return options


def build(kind: type, entries: dict[str, Any], where: str) -> Any:
    """A dataclass of options from parsed TOML or JSON; errors name ``where`` and the option."""
    types = typing.get_type_hints(kind)
    fields = {f.name for f in dataclasses.fields(kind)}
    unknown = sorted(set(entries) - fields)
    if unknown:
        raise ValueError(f"{where}: unknown option {unknown[0]!r}; known are {', '.join(sorted(fields))}")
    values = {
        name: build(types[name], value, f"{where}, [{name}]")
        if dataclasses.is_dataclass(types[name]) and isinstance(value, dict)
        else _convert(value, types[name], f"{where}: {name}")
        for name, value in entries.items()
    }
    return kind(**values)


def _convert(value: Any, kind: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(item, arguments[0], where) for item in value)
    if origin is dict and isinstance(value, dict):
        return {_convert(k, arguments[0], where): _convert(v, arguments[1], where) for k, v in value.items()}
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise ValueError(f"{where} must be one of {', '.join(map(str, arguments))}, got {value!r}")
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise ValueError(f"{where} must be {getattr(kind, '__name__', kind)}, got {value!r}")
