"""Compare: the cells of a matrix as ordinary runs, side by side in processes, and what came of them.

The processes are joblib's: :func:`engine` opens loky's, which work on this machine, or those of a Dask
cluster that shares the folder. Whatever stops a process, a cell is a run folder and goes on from there.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import joblib
import torch
from joblib.externals.loky.process_executor import BrokenProcessPool

import mixbits
from mixbits.fit.folder import RunFolder
from mixbits.fit.matrix import Cell, Matrix, Sweep, float_recipe
from mixbits.fit.recipe import AnyRecipe, flat, method_of, recipe_from_dict, to_dict
from mixbits.fit.stages import STAGES, Row, Run, check, opened
from mixbits.fit.summary import machine
from mixbits.fit.watching import Name, watching
from mixbits.fit.weights import read_tensors
from mixbits.methods import method_named
from mixbits.report.matrix import front
from mixbits.train.checkpoint import differences

FLOAT = ("float",)
TRAINED = (*FLOAT, "learn", "finetune")
PACKED = (*TRAINED, "lower", "check")
CLUSTER_SECONDS = 30  # to wait for a scheduler's answer
STOP = ".stop"  # a file of the matrix's folder that asks all processes to save and leave
FILES = {"compare": "comparison.json", "sweep": "sweep.json"}

Watch = Callable[[Row], None]
WatchOf = Callable[[str], Watch]  # from a cell's name to what gets its rows; picklable


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: ``error`` is empty unless it failed."""

    name: str
    stopped: bool = False
    error: str = ""
    trace: str = ""  # of an error that is not the user's


@contextmanager
def opened_matrix(matrix: Matrix, path: Path, *, resume: bool) -> Iterator[Run]:
    """Check everything that can be checked before work begins, then hold the folder, made or reopened.

    Gives the run of the first float network, which knows the data set and the sites.
    """
    folder = RunFolder(path)
    if not resume and path.exists() and any(path.iterdir()):
        if (path / "matrix.json").exists():
            raise ValueError(
                f"{path} already holds a {matrix.command}; go on with --resume, or choose another --out"
            )
        raise ValueError(f"{path} exists and is not empty; choose another --out")
    for cell, recipe in [*_floats(matrix), *((cell.name, cell.recipe) for cell in matrix.cells)]:
        if not (path / cell / "recipe.json").exists():
            continue
        other = differences(flat(RunFolder(path / cell).read_json("recipe.json")), flat(to_dict(recipe)))
        if other:
            raise ValueError(
                f"{path / cell} was started with other options: {other}; resume with the same "
                "ones, delete that folder to run it again, or choose another --out"
            )
    first, recipe = _floats(matrix)[0]
    run = Run(recipe, path / first, _ignore, threading.Event())
    for budget in matrix.budgets:
        next(cell for cell in matrix.cells if cell.budget == budget).recipe.target().choices(
            run.graph.profile
        )
    check(run, resume=True)
    with folder.locked():
        (path / STOP).unlink(missing_ok=True)
        folder.write_json("matrix.json", to_dict(matrix.recipe))
        with opened(run, resume=True):
            pass
        yield run


def run_matrix(
    matrix: Matrix,
    path: Path,
    watch: WatchOf,
    tell: Callable[[Outcome, int, int], None],
    stop: threading.Event,
    *,
    watchers: tuple[Name, ...] = (),
) -> dict[str, Outcome]:
    """Run every cell that is not done yet; the outcome of each, by its name.

    ``watch`` makes what is told of a cell; ``watchers`` get the metrics of each as its own run. The float
    network of each seed comes first, once. ``tell(outcome, done, total)`` is called as cells end.
    A cell that fails leaves the others alone. When ``stop`` is set, and when a process dies (the machine is
    out of memory, say), cells without an outcome are left to be resumed.
    """
    stages = PACKED if matrix.options.pack else TRAINED
    floats = {name: (recipe, path / name, "") for name, recipe in _floats(matrix)}
    cells = {cell.name: (cell.recipe, path / cell.name, _float_name(cell.seed)) for cell in matrix.cells}
    outcomes: dict[str, Outcome] = {}
    path, threads = path.absolute(), _threads(matrix)
    for runs, wanted in ((floats, FLOAT), (cells, stages)):
        for name, (_, _, shared) in runs.items():
            if shared in outcomes and outcomes[shared].error:
                outcomes[name] = Outcome(name, error=f"no float network: {outcomes[shared].error}")
        missing = {
            name: run
            for name, run in runs.items()
            if name not in outcomes and not all(_done(run[1], stage) for stage in wanted)
        }
        calls = [
            joblib.delayed(run_cell)(
                to_dict(recipe), path, name, shared, wanted, threads=threads, watch=watch, watchers=watchers
            )
            for name, (recipe, _, shared) in missing.items()
        ]
        parallel = joblib.Parallel(
            n_jobs=min(matrix.options.jobs, max(len(calls), 1)), return_as="generator_unordered"
        )
        done = len(runs) - len(calls)
        try:
            ended: Iterator[Any] = iter(parallel(calls))  # joblib's stubs do not know what a call returns
            for outcome in ended:
                outcomes[outcome.name] = outcome
                done += 0 if outcome.stopped else 1
                tell(outcome, done, len(runs))
        except BrokenProcessPool as error:
            tell(
                Outcome("a process", error=f"it ended without a word, out of memory perhaps ({error})"),
                done,
                len(runs),
            )
            break
        if stop.is_set():
            break
    return outcomes


@contextmanager
def engine(options: Sweep) -> Iterator[None]:
    """The processes in which :func:`run_matrix` runs cells: of this machine, or of a Dask cluster.

    Raises ``ValueError`` for a scheduler that does not answer, for workers that would run cells in threads of
    one process, and when workers die again and again; ``ImportError`` without the extra ``cluster``.
    """
    if not options.cluster:
        threads = threads_of(options.jobs)
        with (
            joblib.parallel_config(backend="loky", inner_max_num_threads=threads, initializer=begin_worker),
            warnings.catch_warnings(),
        ):
            # loky replaces a process that has grown between two runs, and says so as of a fault.
            warnings.filterwarnings("ignore", "A worker stopped while some jobs were given")
            yield
        return
    try:
        from distributed import Client, KilledWorker  # noqa: PLC0415  one machine needs none
    except ImportError as error:
        raise ImportError("--cluster needs Dask: pip install 'mixbits[cluster]'") from error
    try:
        client: Any = Client(options.cluster, timeout=CLUSTER_SECONDS)
    except OSError as error:
        raise ValueError(
            f"--cluster {options.cluster}: no scheduler answers ({error}); start one with `dask scheduler`"
        ) from None
    with client, joblib.parallel_config(backend="dask"):
        if any(threads > 1 for threads in client.nthreads().values()):
            raise ValueError(
                f"--cluster {options.cluster}: a worker there runs several cells in one process, where they "
                "share random numbers; start `dask worker` with --nthreads 1, and with --nworkers for more"
            )
        try:
            yield
        except KilledWorker as error:
            raise ValueError(
                f"--cluster {options.cluster}: workers died again and again, out of memory perhaps "
                f"({error}); what was done is kept, --resume goes on"
            ) from None


def _threads(matrix: Matrix) -> int:
    """Of one cell; workers of a cluster may be many on a machine, which nobody tells."""
    if matrix.recipe.threads:
        return matrix.recipe.threads
    return 1 if matrix.options.cluster else threads_of(matrix.options.jobs)


def threads_of(jobs: int) -> int:
    """A process's share of the cores.

    >>> threads_of(10_000)
    1
    """
    return max(1, joblib.cpu_count() // jobs)


def begin_worker() -> None:
    """What each process does first: leave Ctrl-C to the main process, and not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def leave_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def run_cell(
    entries: dict[str, Any],
    root: Path,
    name: str,
    shared: str,
    stages: Sequence[str],
    *,
    threads: int,
    watch: WatchOf,
    watchers: tuple[Name, ...] = (),
) -> Outcome:
    """Run the stages of one cell that are not done, from the float network of the run ``shared`` if given."""
    if (root / STOP).exists():
        return Outcome(name, stopped=True)
    torch.set_num_threads(threads)
    stop, told = threading.Event(), [watch(name)]

    def look(row: Row) -> None:
        if (root / STOP).exists():
            stop.set()
        for tell in told:
            tell(row)

    try:
        run = Run(recipe_from_dict(entries, name), root / name, look, stop)
        watched_by = watching(watchers, root / name, flat(entries), run=f"{root.name}/{name}")
        with opened(run, resume=True), watched_by as also:
            told.append(also)
            if shared:
                _adopt_float_(run, RunFolder(root / shared))
            for stage in stages:
                if (root / STOP).exists():
                    return Outcome(name, stopped=True)
                STAGES[stage](run)
    except KeyboardInterrupt:
        return Outcome(name, stopped=True)
    except (ValueError, OSError) as error:
        return Outcome(name, error=str(error))
    except Exception as error:  # a fault of one method must not lose the others' runs
        return Outcome(name, error=f"{type(error).__name__}: {error}", trace=traceback.format_exc())
    finally:
        if entries["compile"]:
            torch.compiler.reset()  # or the next cell counts as a recompilation of this one
    return Outcome(name)


def collect(matrix: Matrix, path: Path, outcomes: dict[str, Outcome], run: Run) -> Path:
    """Write what the cells reached to the matrix's JSON file; ``run`` is what :func:`opened_matrix` gave."""
    folder = RunFolder(path)
    seeds = [seed for seed in matrix.seeds if _done(path / _float_name(seed), "float")]
    floats = [{"seed": seed, **_network(path / _float_name(seed), "float")} for seed in seeds]
    entry = {
        "format": "mixbits-comparison",
        "version": 1,
        "mixbits": mixbits.__version__,
        "command": matrix.command,
        "network": matrix.recipe.network,
        "dataset": run.dataset.name,
        "train_images": matrix.recipe.train_images,
        "test_images": len(run.dataset.test),
        "epochs": matrix.epochs,
        "started": run.folder.read_json("started.json"),
        "machine": machine(),
        "threads": _threads(matrix),
        "seeds": list(matrix.seeds),
        "budgets": list(matrix.budgets),
        "methods": [_method(matrix, name) for name in matrix.methods],
        "sites": [
            {"site": site.name, "kind": site.kind, "elements": site.elements}
            for site in run.graph.profile.sites
        ],
        "floats": floats,
        "cells": [_cell(cell, path, outcomes.get(cell.name)) for cell in matrix.cells],
    }
    entry["fronts"] = {cost: _front(entry["cells"], cost) for cost in ("weight_bytes", "bops")}
    folder.write_json(FILES[matrix.command], entry)
    return path / FILES[matrix.command]


def _front(cells: list[dict[str, Any]], cost: str) -> list[dict[str, str]]:
    """Method and budget of the points, means over the seeds, that no other beats; by rising cost."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in cells:
        if cell["status"] == "done":
            groups.setdefault((cell["method"], cell["budget"]), []).append(cell)
    names = list(groups)
    points = [(fmean(c[cost] for c in group), fmean(c["top1"] for c in group)) for group in groups.values()]
    return [{"method": names[index][0], "budget": names[index][1]} for index in front(points)]


def _method(matrix: Matrix, name: str) -> dict[str, Any]:
    recipe = next(cell.recipe for cell in matrix.cells if cell.method == name)
    method, asked = method_named(name), to_dict(recipe.finetune)
    tuned = method_of(recipe).finetuning(recipe.finetune)
    own = {option: value for option, value in to_dict(tuned).items() if value != asked[option]}
    return {
        "method": name,
        "paper": method.paper,
        "baseline": method.baseline,
        "learn_epochs": method_of(recipe).epochs,
        "finetune_epochs": tuned.epochs if recipe.train else 0,
        "finetuning": ", ".join(f"{option} {value}" for option, value in own.items()) or None,
    }


def _cell(cell: Cell, path: Path, outcome: Outcome | None) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "method": cell.method,
        "budget": cell.budget,
        "seed": cell.seed,
        "folder": cell.name,
        "status": "unfinished",
        "error": None,
    }
    if outcome is not None and outcome.error:
        return {**entry, "status": "failed", "error": outcome.error, "trace": outcome.trace or None}
    if not _done(path / cell.name, "finetune"):
        return entry
    network = _network(path / cell.name, "finetune")
    learning = RunFolder(path / cell.name).read_json("stages/learn.json")["seconds"]
    limits = [
        {
            "limit": limit.cost,
            "unit": limit.unit,
            "text": limit.text,
            "asked": limit.asked,
            "used": network["costs"][limit.cost],
        }
        for limit in cell.recipe.target().budget.limits
    ]
    return {
        **entry,
        "status": "done",
        **network,
        "seconds_learn": learning,
        "seconds_finetune": round(network["seconds"] - learning, 1),
        "limits": limits,
        "policy": f"{cell.name}/policy.json",
    }


def _network(path: Path, stage: str) -> dict[str, Any]:
    return RunFolder(path).read_json(f"stages/{stage}.json")


def _adopt_float_(run: Run, shared: RunFolder) -> None:
    """Take over the float network of another run; a kill between the two files is no harm in this order."""
    if not run.done("float"):
        run.folder.write_bytes("float.safetensors", (shared / "float.safetensors").read_bytes())
        run.graph.module.load_state_dict(read_tensors(run.folder / "float.safetensors"))
        run.finish("float", shared.read_json("stages/float.json"))


def _floats(matrix: Matrix) -> list[tuple[str, AnyRecipe]]:
    return [(_float_name(seed), float_recipe(matrix.recipe, seed)) for seed in matrix.seeds]


def _float_name(seed: int) -> str:
    return f"float/seed{seed}"


def _done(path: Path, stage: str) -> bool:
    return (path / "stages" / f"{stage}.json").exists()


def _ignore(row: Row) -> None:
    pass
