"""What a run left on disk, as checked plain data: ``summary.json`` and ``metrics.jsonl``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

FORMAT = "mixbits-summary"
VERSION = 1  # the newest version that this file reads
STAGES = ("uniform", "learn", "finetune")  # the trainings that are compared
KINDS = ("weight", "activation")
REMEDY = "Give the folder that a run of mixbits wrote, or run it again."


@dataclass(frozen=True)
class Network:
    """Accuracy and costs of one of the networks that are compared: float, uniform or mixed."""

    top1: float | None = None  # percent of the test set
    held_out_top1: float | None = None  # percent of the part of the training set that is not trained on
    weight_bytes: float | None = None
    avg_weight_bits: float | None = None
    avg_act_bits: float | None = None
    bops: float | None = None  # MACs x weight bits x activation bits, one sample
    act_max_bytes: float | None = None
    act_sum_bytes: float | None = None
    act_peak_bytes: float | None = None
    size_bytes: float | None = None
    seconds: float | None = None  # training time
    widths: Mapping[str, float] = field(default_factory=dict)  # bits of each site


@dataclass(frozen=True)
class Limit:
    """One limit of the budget and what the two networks use of it."""

    limit: str  # name of the cost
    unit: str | None = None  # of the three numbers: bytes, bit, bop, cycle, fJ or ms
    text: str | None = None  # as the user wrote it
    asked: float | None = None
    used: float | None = None
    uniform_used: float | None = None


@dataclass(frozen=True)
class Site:
    """A quantized tensor: the width that was learned, that was chosen and that the packed file has."""

    site: str
    kind: str  # weight or activation
    elements: float | None = None
    asked_bits: float | None = None  # learned, before rounding
    assigned_bits: float | None = None  # in the policy
    stored_bits: float | None = None  # in the packed file
    grid: str | None = None
    macs: float | None = None
    runs_as: str | None = None

    @property
    def differs(self) -> bool:
        """Whether the packed file has another width than the policy."""
        return None not in (self.assigned_bits, self.stored_bits) and self.assigned_bits != self.stored_bits


@dataclass(frozen=True)
class Instruction:
    """One step of the packed program."""

    op: str
    name: str
    arithmetic: str | None = None  # integer or float
    weight_bits: float | None = None
    activation_bits: float | None = None
    macs: float | None = None
    accumulator_bits: float | None = None


@dataclass(frozen=True)
class Runtime:
    """The packed file, run by the runtime and compared with the training graph."""

    top1: float | None = None
    training_graph_top1: float | None = None  # of the same images
    images: float | None = None
    same_prediction_as_training_graph: float | None = None
    seconds: float | None = None
    engine: str | None = None  # native or reference
    threads: float | None = None
    batch: float | None = None  # samples of the run that was timed
    ms: float | None = None  # of that run
    predicted_ms: float | None = None  # by the latency table that the budget was read from


@dataclass(frozen=True)
class Memory:
    """Bytes that the native engine takes for that run, planned and allocated."""

    arenas: float | None = None  # values between steps, of all threads
    scratch: float | None = None  # of all threads
    weights: float | None = None  # as kernels read them
    total: float | None = None


@dataclass(frozen=True)
class Step:
    """One step of that run: what it computes, by which kernel, and its time."""

    name: str
    kernel: str | None = None  # or the operation
    weight_bits: float | None = None
    input_bits: float | None = None
    bytes: float | None = None  # moved: inputs, outputs and weights
    us: float | None = None


@dataclass(frozen=True)
class Epochs:
    """Length of each stage."""

    learn: float | None = None
    finetune: float | None = None
    uniform: float | None = None


@dataclass(frozen=True)
class Summary:
    """``summary.json``; None stands for what the run does not know."""

    mixbits: str | None = None
    method: str | None = None
    network: str | None = None
    dataset: str | None = None
    budget: str | None = None
    seed: float | None = None
    started: str | None = None
    machine: str | None = None
    artifact_bytes: float | None = None
    epochs: Epochs = field(default_factory=Epochs)
    float_: Network = field(default_factory=Network)
    uniform: Network | None = None  # None: not run
    mixed: Network = field(default_factory=Network)
    limits: tuple[Limit, ...] = ()
    sites: tuple[Site, ...] = ()
    runtime: Runtime | None = None
    memory: Memory | None = None  # of the runtime
    steps: tuple[Step, ...] = ()  # of the runtime
    instructions: tuple[Instruction, ...] = ()


@dataclass(frozen=True)
class Metric:
    """One line of ``metrics.jsonl``."""

    stage: str
    epoch: float  # counted from the start of the stage
    loss: float | None = None
    train_top1: float | None = None  # percent
    held_out_top1: float | None = None  # percent
    avg_weight_bits: float | None = None
    avg_act_bits: float | None = None
    used: Mapping[str, float] = field(default_factory=dict)  # fraction of each limit, by its name
    lr: float | None = None


def read_summary(path: Path) -> Summary:
    """The summary of a run; unknown keys are skipped, missing ones are unknown."""
    entry = read_document(path, FORMAT, VERSION)
    where = str(path)
    parts = {
        "epochs": one(Epochs, entry.get("epochs"), f"{where}: epochs") or Epochs(),
        "float_": one(Network, entry.get("float"), f"{where}: float") or Network(),
        "uniform": one(Network, entry.get("uniform"), f"{where}: uniform"),
        "mixed": one(Network, entry.get("mixed"), f"{where}: mixed") or Network(),
        "limits": many(Limit, entry.get("limits"), f"{where}: limits"),
        "sites": many(Site, entry.get("sites"), f"{where}: sites"),
        "runtime": one(Runtime, entry.get("runtime"), f"{where}: runtime"),
        "memory": one(Memory, (entry.get("runtime") or {}).get("memory"), f"{where}: runtime: memory"),
        "steps": many(Step, (entry.get("runtime") or {}).get("steps"), f"{where}: runtime: steps"),
        "instructions": many(Instruction, entry.get("instructions"), f"{where}: instructions"),
    }
    for site in parts["sites"]:
        if site.kind not in KINDS:
            fact = f"{site.site}: kind must be one of {KINDS}, found {site.kind!r}"
            raise ValueError(f"{where}: {fact}. {REMEDY}")
    return Summary(**checked(Summary, entry, where, skip=frozenset(parts)), **parts)


def read_document(path: Path, form: str, newest: int) -> dict[str, Any]:
    """The JSON object in a file, which must say that it is of this format and no newer than ``newest``."""
    try:
        entry = _loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file. {REMEDY}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}). {REMEDY}") from error
    if not isinstance(entry, dict) or entry.get("format") != form:
        found = repr(entry.get("format")) if isinstance(entry, dict) else "no JSON object"
        raise ValueError(f"{path}: the format must be {form!r}, found {found}. {REMEDY}")
    version = entry.get("version")
    if not isinstance(version, int) or version < 1:
        raise ValueError(f"{path}: the version must be a whole number from 1, found {version!r}. {REMEDY}")
    if version > newest:
        raise ValueError(
            f"{path}: version {version} is newer than this mixbits reads ({newest}). Upgrade mixbits, or "
            "build the report with the version that wrote the run."
        )
    return entry


def read_metrics(path: Path) -> tuple[Metric, ...]:
    """The training steps that a run recorded in ``STAGES``.

    Lines of other stages (the float network's training, say) are skipped, and so is a last line that was cut
    off while it was written.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file. {REMEDY}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error}). {REMEDY}") from error
    metrics = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            entry = _loads(line.decode("utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            if number == len(lines):  # no line end follows: the process was stopped while it wrote
                break
            raise ValueError(f"{where} is not JSON ({error}). Delete the line, or run it again.") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("stage"), str):
            raise ValueError(f"{where} must be an object with a stage. Delete the line, or run it again.")
        if entry["stage"] in STAGES:
            metrics.append(Metric(**checked(Metric, entry, where)))
    return tuple(metrics)


def _loads(text: str) -> Any:
    return json.loads(text, parse_constant=lambda _: None)  # NaN and Infinity: not known


T = TypeVar("T")


def one(kind: type[T], entry: Any, where: str) -> T | None:
    """The JSON object ``entry`` as a ``kind``; None for null."""
    return None if entry is None else kind(**checked(kind, entry, where))


def many(kind: type[T], entries: Any, where: str) -> tuple[T, ...]:
    """The JSON list ``entries`` of objects, each as a ``kind``; null is an empty list."""
    if entries is None:
        return ()
    if not isinstance(entries, list):
        raise ValueError(f"{where} must be a list, found {type(entries).__name__}. {REMEDY}")
    return tuple(kind(**checked(kind, entry, f"{where}[{i}]")) for i, entry in enumerate(entries))


def checked(kind: type, entry: Any, where: str, *, skip: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The fields of ``kind`` that the JSON object ``entry`` has, each of its declared type."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be an object, found {type(entry).__name__}. {REMEDY}")
    return {
        f.name: _READ[str(f.type)](entry.get(f.name), f"{where}: {f.name}")
        for f in fields(kind)
        if f.name not in skip
    }


def _number(value: Any, where: str) -> float | None:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where} must be a number or null, found {value!r}. {REMEDY}")
    return value


def _known_number(value: Any, where: str) -> float:
    number = _number(value, where)
    if number is None:
        raise ValueError(f"{where} must be a number, found {value!r}. {REMEDY}")
    return number


def _text(value: Any, where: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where} must be a text or null, found {value!r}. {REMEDY}")
    return value


def _known_text(value: Any, where: str) -> str:
    text = _text(value, where)
    if not text:
        raise ValueError(f"{where} must be a text, found {value!r}. {REMEDY}")
    return text


def _claim(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{where} must be true or false, found {value!r}. {REMEDY}")
    return value


def _numbers(value: Any, where: str) -> dict[str, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, found {value!r}. {REMEDY}")
    read = {key: _number(item, f"{where}: {key}") for key, item in value.items()}
    return {key: number for key, number in read.items() if number is not None}


# From the type that a field declares to the function that reads it.
_READ: dict[str, Callable[[Any, str], Any]] = {
    "float | None": _number,
    "float": _known_number,
    "str | None": _text,
    "str": _known_text,
    "Mapping[str, float]": _numbers,
    "bool": _claim,
}
