"""``mixbits run``: a packed model on data, and what really ran. Nothing here imports torch."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from mixbits.data.dataset import with_normalization
from mixbits.data.open import open_dataset
from mixbits.runtime.executor import Executor
from mixbits.runtime.steps import speed


@dataclass(frozen=True)
class RunModel:
    """Run a packed model on the test part of a data set and print its accuracy."""

    model: tyro.conf.Positional[Path]  # a .mixbits file
    data: str  # digits, cifar10:DIR, mnist:DIR, imagefolder:DIR, module:function or file.py:function
    images: int = 0  # how many test images; 0: all
    batch_size: int = 200
    threads: int = 1
    tune: bool = False  # measure which kernels are fastest here, once; results are the same
    steps: int = 0  # list what runs for so many images at once, with kernels and times
    json: Path | None = None  # write what is printed here


def main(arguments: list[str]) -> None:
    """Load, run, count."""
    chosen = tyro.cli(RunModel, prog="mixbits run", args=arguments)
    executor = Executor.from_file(chosen.model, threads=chosen.threads, tune=chosen.tune)
    about = executor.program.about
    dataset = open_dataset(chosen.data)
    if tuple(dataset.input_shape) != executor.program.input_shape:
        raise ValueError(
            f"{chosen.model} takes inputs of shape {executor.program.input_shape}, {chosen.data} has "
            f"{tuple(dataset.input_shape)}; use the data set that the model was made for "
            f"({about.get('dataset')})"
        )
    if about.get("mean") and about.get("std"):
        dataset = with_normalization(dataset, tuple(about["mean"]), tuple(about["std"]))
    count = min(chosen.images or len(dataset.test), len(dataset.test))
    correct, began = 0, time.perf_counter()
    for first in range(0, count, chosen.batch_size):
        inputs, targets = dataset.test.take(np.arange(first, min(first + chosen.batch_size, count)))
        correct += int((executor(inputs).argmax(-1) == targets).sum())
    seconds = time.perf_counter() - began
    sys.stdout.write(
        f"top-1 {100 * correct / count:.2f} % ({correct} of {count} test images of {dataset.name})\n"
        f"{1000 * seconds / count:.3f} ms an image on the {executor.engine} engine, data included, "
        f"{executor.program.weight_bytes} bytes of weights\n"
    )
    result: dict[str, Any] = {"top1": 100 * correct / count, "images": count}
    memory = executor.memory(chosen.batch_size)
    if memory is not None:
        sys.stdout.write(memory.words(chosen.threads) + "\n")
        result["memory"] = memory.to_json()
    if chosen.steps > 0:
        result |= speed(executor, dataset.test.take(np.arange(chosen.steps) % len(dataset.test))[0])
        Console(file=sys.stdout, width=None if sys.stdout.isatty() else 140).print(_steps(result))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _steps(ran: Mapping[str, Any]) -> Table:
    """What really ran, in order."""
    steps = ran["steps"]
    total = sum(step["us"] for step in steps)
    title = (
        f"{ran['engine']} engine, threads: {ran['threads']}, batch: {ran['batch']}, {ran['ms']:.3f} ms a run"
    )
    table = Table(title=title)
    for name in ("step", "kernel", "bits", "us", "share", "bytes moved"):
        table.add_column(name, justify="left" if name in ("step", "kernel") else "right")
    for step in steps:
        bits = f"{step['weight_bits']}x{step['input_bits']}" if step["weight_bits"] else ""
        share = f"{100 * step['us'] / total:.1f} %"
        table.add_row(step["name"], step["kernel"], bits, f"{step['us']:.1f}", share, f"{step['bytes']:,}")
    return table
