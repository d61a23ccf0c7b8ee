"""``mixbits run``: a packed model on data. Nothing here imports torch."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from mixbits.data.dataset import with_normalization
from mixbits.data.open import open_dataset
from mixbits.runtime.executor import Executor


@dataclass(frozen=True)
class RunModel:
    """Run a packed model on the test part of a data set and print its accuracy."""

    model: tyro.conf.Positional[Path]  # a .mixbits file
    data: str  # digits, cifar10:DIR, imagefolder:DIR, module:function or file.py:function
    images: int = 0  # how many test images; 0: all
    batch_size: int = 200


def main(arguments: list[str]) -> None:
    """Load, run, count."""
    chosen = tyro.cli(RunModel, prog="mixbits run", args=arguments)
    executor = Executor.from_file(chosen.model)
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
        f"{1000 * seconds / count:.3f} ms an image on the NumPy reference runtime, "
        f"{executor.program.weight_bytes} bytes of weights\n"
    )
