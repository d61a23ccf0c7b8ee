"""Time of a training step on ResNet-20: of the float network, at fixed widths, and while each method learns widths.

All trainings live in one process and take turns, one step each; a step is everything from one batch to the next: loss,
update and the method's own work. Each row is divided by the step at fixed widths of the same round. EBS updates twice in a
step, weights on one batch and strengths on another: its row is one update. What BMPQ does between epochs is not in it.

With ``--memory`` each training has a process of its own, and printed is how far its resident memory rises in a step above
what it holds between steps (Linux).

    python benchmarks/step_cost.py                    # ordinary steps in float32
    python benchmarks/step_cost.py --compile --bf16
    python benchmarks/step_cost.py --memory
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mixbits
from mixbits.core.grid import Uniform
from mixbits.core.policy import Policy
from mixbits.fit.summary import machine
from mixbits.methods import method_named
from mixbits.train.finetune import Finetune, finetune
from mixbits.train.method import Target, learn
from mixbits.train.steps import Loop, steps
from mixbits.train.task import make_task
from mixbits.zoo import resnet20

FLOAT, FIXED = "float", "fixed widths"
CANDIDATES = (2, 3, 4, 5, 6)
METHODS = {name: {"epochs": 1} for name in ("mpdnn", "sdq", "bmpq", "ddq", "ebs")}
UPDATES = {"ebs": 2}  # in one step of the loop
WARM_UP = 3  # steps of each training that are not counted
MIB = 2**10  # in KiB
# glibc gives freed blocks above this size back to the system, so that resident memory is memory in use.
FREED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536"}


class EnoughError(Exception):
    """Ends a training whose steps have been counted."""


class Turns:
    """Lets one training at a time do one step."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.seconds: dict[str, list[float]] = {}
        self.errors: list[BaseException] = []
        self.resident_kib = 0  # at the start of the last step
        self._may_go: dict[str, threading.Semaphore] = {}
        self._returned = threading.Semaphore(0)

    def watch(self, name: str, row: Mapping[str, Any]) -> None:
        """What the training's loop calls once before its first step and after each."""
        if "note" in row:
            return
        if "step" in row:
            self.seconds[name][-1] = time.perf_counter() - self.seconds[name][-1]
        if len(self.seconds[name]) == WARM_UP + self.rounds:
            raise EnoughError
        self._returned.release()
        self._may_go[name].acquire()
        self.resident_kib = own_memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the highest so far
        self.seconds[name].append(time.perf_counter())

    def run(self, trainings: Mapping[str, Callable[[Loop], object]], loop: Callable[..., Loop]) -> None:
        """Set the trainings up one after the other, then give each a step in turn."""

        def body(name: str) -> None:
            try:
                trainings[name](loop(watch=partial(self.watch, name)))
            except EnoughError:
                pass
            except BaseException as error:
                self.errors.append(error)
            self._returned.release()

        for name in trainings:
            self.seconds[name], self._may_go[name] = [], threading.Semaphore(0)
            threading.Thread(target=body, args=(name,), daemon=True).start()
            self._wait()
        for _ in range(WARM_UP + self.rounds):
            for name in trainings:
                self._may_go[name].release()
                self._wait()

    def _wait(self) -> None:
        self._returned.acquire()
        if self.errors:
            raise self.errors[0]


def own_memory(entry: str) -> int:
    """KiB of this process by an entry of Linux' ``status``: resident now (``VmRSS``) or at most (``VmHWM``)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry))


def main() -> None:
    """Print the table as Markdown."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--batch", type=int, default=128)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--compile", action="store_true")
    options.add_argument("--bf16", action="store_true")
    options.add_argument(
        "--trainings", nargs="*", choices=(FLOAT, FIXED, *METHODS), default=(FLOAT, FIXED, *METHODS)
    )
    options.add_argument("--memory", action="store_true")
    options.add_argument("--rise", action="store_true", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    about = (
        f"ResNet-20, batch {chosen.batch}, {chosen.threads} threads, compile {chosen.compile}, bf16 {chosen.bf16}, "
        f"torch {torch.__version__}; machine: {machine()}; date: {time.strftime('%Y-%m-%d')}"
    )
    if chosen.memory:
        print_memory(chosen.trainings, about)
        return
    turns = Turns(chosen.rounds)
    run(turns, chosen)
    if chosen.rise:
        print(own_memory("VmHWM") - turns.resident_kib)
    else:
        print_time(turns, about)


def print_memory(trainings: list[str], about: str) -> None:
    """A Markdown table of memory, a process a row."""
    print(f"{about}\n\n| training | MiB in a step | of float |\n|---|---|---|")
    passed_on = [word for word in sys.argv[1:] if word in ("--compile", "--bf16")]
    rises: dict[str, float] = {}
    for name in trainings:
        command = [sys.executable, __file__, *passed_on, "--rounds", "1", "--rise", "--trainings", name]
        environment = {**os.environ, **FREED_AT_ONCE}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        rises[name] = int(done.stdout) / MIB
        print(
            f"| {name} | {rises[name]:.0f} | {rises[name] / rises.get(FLOAT, rises[name]):.2f} |", flush=True
        )


def run(turns: Turns, chosen: argparse.Namespace) -> None:
    """Let the chosen trainings take their turns."""
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    graph = mixbits.capture(resnet20(), torch.zeros(2, 3, 32, 32))
    count = 2 * (WARM_UP + chosen.rounds + 1) * chosen.batch
    images = np.random.default_rng(0).normal(size=(count, 3, 32, 32)).astype(np.float32)
    arrays = images, np.arange(count) % 10
    task = make_task(arrays, arrays, arrays, batch_size=chosen.batch)
    policy = Policy({site.name: Uniform(3, site.signed) for site in graph.profile.sites})
    target = Target(mixbits.parse_budget("weights=3bit,act=3bit"), CANDIDATES, CANDIDATES)

    def train_float(loop: Loop) -> None:
        network = graph.copy()
        optimizer = torch.optim.SGD(network.network_parameters(), 0.01, 0.9, weight_decay=1e-4)
        for _ in steps(network, task, optimizer, loop, epochs=1):
            pass

    trainings: dict[str, Callable[[Loop], object]] = {
        FLOAT: train_float,
        FIXED: lambda loop: finetune(graph, policy, task, Finetune(epochs=1), loop),
    }
    for name, options in METHODS.items():
        method = method_named(name)(**options)
        trainings[name] = partial(lambda method, loop: learn(method, graph, task, target, loop), method)
    asked = {name: trainings[name] for name in chosen.trainings}
    turns.run(asked, partial(Loop, compile=chosen.compile, bf16=chosen.bf16))


def print_time(turns: Turns, about: str) -> None:
    """A Markdown table of the time of a step."""
    counted = {
        name: [seconds / UPDATES.get(name, 1) for seconds in all_of[WARM_UP:]]
        for name, all_of in turns.seconds.items()
    }
    print(
        f"{about}\n\n| training | ms a step: minimum, median of {turns.rounds} | of fixed widths | of float |\n"
        "|---|---|---|---|"
    )
    for name, seconds in counted.items():
        ratios = [
            statistics.median(mine / other for mine, other in zip(seconds, counted[base], strict=True))
            for base in (FIXED, FLOAT)
            if base in counted
        ]
        least, middle = 1000 * min(seconds), 1000 * statistics.median(seconds)
        columns = " | ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"| {name} | {least:.0f}, {middle:.0f} | {columns} |")


if __name__ == "__main__":
    main()
