"""What a comparison or a sweep left on disk, as checked plain data, and the statistics over its seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy.special import stdtr, stdtrit

from mixbits.report.read import Limit, Network, Site, checked, many, read_document

FORMAT = "mixbits-comparison"
VERSION = 1  # the newest version that this file reads
CONFIDENCE = 0.95
LEAST_SEEDS = 3  # two differences that happen to be equal must not establish anything


@dataclass(frozen=True)
class Cell:
    """One run: a method at a budget with a seed."""

    method: str
    budget: str
    seed: float
    status: str  # done, failed or unfinished
    folder: str | None = None
    error: str | None = None
    policy: str | None = None  # path of its policy within the folder of the comparison
    seconds_learn: float | None = None
    seconds_finetune: float | None = None
    network: Network = field(default_factory=Network)
    limits: tuple[Limit, ...] = ()

    @property
    def done(self) -> bool:
        """Whether there is a result."""
        return self.status == "done"


@dataclass(frozen=True)
class Compared:
    """A method of the comparison."""

    method: str
    baseline: bool  # what the others must beat
    paper: str | None = None
    finetuning: str | None = None  # its options of finetuning that are not the recipe's
    learn_epochs: float | None = None
    finetune_epochs: float | None = None

    @property
    def epochs(self) -> float | None:
        """Of training in total."""
        if self.learn_epochs is None or self.finetune_epochs is None:
            return None
        return self.learn_epochs + self.finetune_epochs


@dataclass(frozen=True)
class Float:
    """The float network of one seed."""

    seed: float
    network: Network = field(default_factory=Network)


@dataclass(frozen=True)
class Group:
    """The runs of one method at one budget that have a result, in the order of their seeds."""

    method: str
    budget: str
    cells: tuple[Cell, ...]
    asked: int  # how many seeds were to run

    def values(self, read: Callable[[Cell], float | None]) -> list[float]:
        """A figure of every run that knows it."""
        return [value for cell in self.cells if (value := read(cell)) is not None]

    def mean(self, read: Callable[[Cell], float | None]) -> float | None:
        """Its mean over the seeds."""
        values = self.values(read)
        return fmean(values) if values else None

    @property
    def top1(self) -> float | None:
        """Mean top-1 of the test set after the last epoch, percent."""
        return self.mean(top1)

    @property
    def spread(self) -> float | None:
        """Standard deviation of top-1 over the seeds (n - 1); None for fewer than two."""
        values = self.values(top1)
        return stdev(values) if len(values) > 1 else None

    def shares(self) -> dict[str, float]:
        """Mean used fraction of every limit, by its cost."""
        names = dict.fromkeys(limit.limit for cell in self.cells for limit in cell.limits)
        found = {name: self.mean(lambda cell, name=name: _share(cell, name)) for name in names}
        return {name: share for name, share in found.items() if share is not None}


@dataclass(frozen=True)
class Paired:
    """Differences in top-1 between two methods, seed by seed, in points."""

    n: int
    mean: float
    half: float | None  # half the width of the mean's confidence interval (Student's t); None for one seed
    chance: float = 1.0  # of so large a mean, to either side, where there is no difference (Student's t)

    @property
    def established(self) -> bool:
        """Whether the interval leaves out zero, from enough seeds."""
        return self.n >= LEAST_SEEDS and self.half is not None and abs(self.mean) > self.half


@dataclass(frozen=True)
class Comparison:
    """``comparison.json`` or ``sweep.json``; None stands for what is not known."""

    command: str | None = None
    mixbits: str | None = None
    network: str | None = None
    dataset: str | None = None
    started: str | None = None
    machine: str | None = None
    epochs: float | None = None  # of training, of every run
    train_images: float | None = None  # 0: all that are not held out
    test_images: float | None = None
    threads: float | None = None  # of each process
    methods: tuple[Compared, ...] = ()
    budgets: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    sites: tuple[Site, ...] = ()
    floats: tuple[Float, ...] = ()
    cells: tuple[Cell, ...] = ()

    @property
    def baselines(self) -> tuple[Compared, ...]:
        """Methods that the others must beat."""
        return tuple(method for method in self.methods if method.baseline)

    @property
    def learned(self) -> tuple[Compared, ...]:
        """The others."""
        return tuple(method for method in self.methods if not method.baseline)

    def group(self, method: str, budget: str) -> Group:
        """The runs of a method at a budget."""
        chosen = tuple(
            cell for cell in self.cells if cell.done and cell.method == method and cell.budget == budget
        )
        return Group(method, budget, chosen, len(self.seeds))

    @property
    def float_top1(self) -> float | None:
        """Mean top-1 of the float networks."""
        known = [entry.network.top1 for entry in self.floats if entry.network.top1 is not None]
        return fmean(known) if known else None


def top1(cell: Cell) -> float | None:
    """Percent of the test set, after the last epoch."""
    return cell.network.top1


def paired(one: Group, other: Group) -> Paired | None:
    """``one - other`` over the seeds that both have; None if there is none."""
    theirs = {cell.seed: top1(cell) for cell in other.cells}
    pairs = [(top1(cell), theirs.get(cell.seed)) for cell in one.cells]
    differences = [mine - their for mine, their in pairs if mine is not None and their is not None]
    n = len(differences)
    if not n:
        return None
    mean = fmean(differences)
    if n == 1:
        return Paired(n, mean, None)
    error = stdev(differences) / math.sqrt(n)
    chance = 2 * float(stdtr(n - 1, -abs(mean) / error)) if error else float(mean == 0)
    return Paired(n, mean, float(stdtrit(n - 1, 0.5 + CONFIDENCE / 2)) * error, chance)


def same_widths(one: Group, other: Group) -> int:
    """In how many runs of the first the widths are those of the second with the same seed."""
    theirs = {cell.seed: cell.network.widths for cell in other.cells}
    return sum(
        bool(cell.network.widths) and cell.network.widths == theirs.get(cell.seed) for cell in one.cells
    )


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, score) that no other beats: none costs no more and scores no less.

    Equal points are all on the front. By rising cost.

    >>> front([(2.0, 90.0), (1.0, 88.0), (3.0, 89.0), (1.0, 87.0)])
    [1, 0]
    """
    kept = [
        index
        for index, (cost, score) in enumerate(points)
        if not any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in points)
    ]
    return sorted(kept, key=lambda index: points[index])


def read_comparison(path: Path) -> Comparison:
    """The comparison in a file; unknown keys are skipped, missing ones are unknown."""
    entry, where = read_document(path, FORMAT, VERSION), str(path)
    own = frozenset({"network", "limits"})
    cells = []
    for index, cell in enumerate(entry.get("cells") or ()):
        place = f"{where}: cells[{index}]"
        network = Network(**checked(Network, cell, place))
        limits = many(Limit, cell.get("limits"), f"{place}: limits")
        cells.append(Cell(**checked(Cell, cell, place, skip=own), network=network, limits=limits))
    floats = [
        Float(cell["seed"], Network(**checked(Network, cell, f"{where}: floats[{index}]")))
        for index, cell in enumerate(entry.get("floats") or ())
    ]
    parts: dict[str, Any] = {
        "methods": many(Compared, entry.get("methods"), f"{where}: methods"),
        "budgets": tuple(entry.get("budgets") or ()),
        "seeds": tuple(entry.get("seeds") or ()),
        "sites": many(Site, entry.get("sites"), f"{where}: sites"),
        "floats": tuple(floats),
        "cells": tuple(cells),
    }
    return Comparison(**checked(Comparison, entry, where, skip=frozenset(parts)), **parts)


def _share(cell: Cell, name: str) -> float | None:
    for limit in cell.limits:
        if limit.limit == name and limit.used is not None and limit.asked:
            return limit.used / limit.asked
    return None
