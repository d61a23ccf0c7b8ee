"""Memory and time of EBS's search step on ResNet-20, for any number of candidate widths.

Peak memory: each row is a process of its own that does three steps (forward, backward, update) on random images; printed
is how far its resident memory rose above what it was before the first step, and the bytes that the forward pass saved for
the backward pass. ``float`` and ``learned step`` are the network without quantizers and with finetuning's; ``autograd`` is
the same mixture of five candidates written with ordinary operations, which keep every candidate.

Time: CPU seconds of the networks' training steps, in turns within one process, minimum and median of each.

    python benchmarks/ebs_memory.py --batch 128
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mixbits
from mixbits.core.grid import Uniform
from mixbits.core.policy import Policy
from mixbits.fit.summary import machine
from mixbits.graph.quant_graph import QuantGraph, put_
from mixbits.methods.ebs import EBS, Mixture
from mixbits.quant.functional import round_half_even
from mixbits.quant.quantizer import Quantizer
from mixbits.train.finetune import place_policy
from mixbits.train.steps import PLAIN_LOOP
from mixbits.train.task import make_task
from mixbits.zoo import resnet20

MIB = 2**20
# glibc gives freed blocks above this size back to the system, so that resident memory is memory in use.
FREED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536"}
CANDIDATES = {
    "1 candidate": (3,),
    "2 candidates": (2, 3),
    "5 candidates": (1, 2, 3, 4, 5),
    "8 candidates": tuple(range(1, 9)),
}
ROWS = ("float", "learned step", *CANDIDATES, "autograd, 5 candidates")


class OrdinaryMixture(Quantizer):
    """The mixture as a sum of quantized copies, each kept by autograd."""

    def __init__(self, mixture: Mixture) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(self, x: Tensor) -> Tensor:
        """The mixture of ``x``."""
        clip, strengths = self.mixture.learning_clip(), self.mixture.strengths
        low = -1.0 if self.mixture.signed else 0.0
        unit = (torch.clamp(x / clip, low, 1.0) - low) / (1.0 - low)
        copies = [round_half_even(unit * top) / top for top in strengths.top_codes.unbind()]
        mixed = sum(share * copy for share, copy in zip(strengths.shares().unbind(), copies, strict=True))
        return clip * ((1.0 - low) * mixed + low)

    bits, freeze, project_ = Mixture.bits, Mixture.freeze, Mixture.project_


def network(row: str, batch: int) -> QuantGraph:
    """The network of a row in training mode."""
    torch.manual_seed(0)
    graph = mixbits.capture(resnet20(), torch.zeros(2, 3, 32, 32))
    images = np.random.default_rng(0).normal(size=(2 * batch, 3, 32, 32)).astype(np.float32)
    arrays = images, np.arange(2 * batch) % 10
    task = make_task(arrays, arrays, arrays, batch_size=batch)
    if row == "learned step":
        grids = {site.name: Uniform(3, site.signed) for site in graph.profile.sites}
        graph = place_policy(graph, Policy(grids), task.train)
    elif row != "float":
        widths = CANDIDATES[row.removeprefix("autograd, ")]
        target = mixbits.Target(mixbits.parse_budget("weights=8bit"), widths, widths)
        EBS()._place_(graph, task.train, target, PLAIN_LOOP.device)
    if row.startswith("autograd"):
        ordinary = {
            site: OrdinaryMixture(q) for site, q in graph.quantizers.items() if isinstance(q, Mixture)
        }
        put_(graph, ordinary)
    graph.module.train()
    return graph


def step(graph: QuantGraph, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor) -> None:
    """Forward, backward, update."""
    optimizer.zero_grad(set_to_none=True)
    F.cross_entropy(graph(inputs), targets).backward()
    optimizer.step()


def saved_bytes(network: nn.Module, inputs: Tensor) -> int:
    """Bytes of the distinct tensors that a forward pass saves for backward, parameters left out."""
    known = {p.untyped_storage().data_ptr() for p in network.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = network(inputs)
    total = sum(storages.values())
    del out
    return total


def resident_bytes() -> int:
    """Resident memory of this process now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def measure(row: str, batch: int) -> None:
    """Print the peak above the start and the saved bytes of one row: the body of a subprocess."""
    graph = network(row, batch)
    optimizer = torch.optim.SGD(graph.module.parameters(), 0.01, 0.9)
    inputs, targets = torch.randn(batch, 3, 32, 32), torch.arange(batch) % 10
    before, peak, done = resident_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], resident_bytes())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(3):
        step(graph, optimizer, inputs, targets)
    done.set()
    watcher.join()
    print(peak[0] - before, saved_bytes(graph.module, inputs))


def main() -> None:
    """Print both tables as Markdown."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--batch", type=int, default=128)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--parts", nargs="+", choices=("memory", "time"), default=["memory", "time"])
    options.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    if chosen.row:
        measure(chosen.row, chosen.batch)
        return
    print(
        f"ResNet-20, batch {chosen.batch}, one thread; machine: {machine()}; date: {time.strftime('%Y-%m-%d')}\n"
    )
    if "memory" in chosen.parts:
        print_memory(chosen.batch)
    if "time" in chosen.parts:
        print_time(chosen.batch, chosen.rounds)


def print_memory(batch: int) -> None:
    """A Markdown table of memory, a process a row."""
    print("| network | peak above start, MiB | saved for backward, MiB |\n|---|---|---|")
    for row in ROWS:
        command = [sys.executable, __file__, "--batch", str(batch), "--row", row]
        environment = {**os.environ, **FREED_AT_ONCE}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        peak, saved = (int(word) / MIB for word in done.stdout.split())
        print(f"| {row} | {peak:.1f} | {saved:.1f} |", flush=True)
    print()


def print_time(batch: int, rounds: int) -> None:
    """A Markdown table of the time of a step, networks in turns; CPU time, so that a busy machine counts less."""
    graphs = {row: network(row, batch) for row in ("float", "learned step", *CANDIDATES)}
    optimizers = {row: torch.optim.SGD(graph.module.parameters(), 0.01, 0.9) for row, graph in graphs.items()}
    inputs, targets = torch.randn(batch, 3, 32, 32), torch.arange(batch) % 10
    seconds: dict[str, list[float]] = {row: [] for row in graphs}
    for _ in range(rounds + 1):  # the first warms up
        for row, graph in graphs.items():
            began = time.process_time()
            step(graph, optimizers[row], inputs, targets)
            seconds[row].append(time.process_time() - began)
    print(f"| network | CPU s a step: minimum, median of {rounds} | of the learned step's |\n|---|---|---|")
    usual = min(seconds["learned step"][1:])
    for row, all_of in seconds.items():
        best, middle = min(all_of[1:]), statistics.median(all_of[1:])
        print(f"| {row} | {best:.3f}, {middle:.3f} | {best / usual:.2f} |")


if __name__ == "__main__":
    main()
