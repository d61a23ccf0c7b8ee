"""Latency as a latency table predicts it and as it is measured, for random widths of a network.

    mixbits profile --network mixbits.zoo:resnet20 --input-shape 3 32 32 --latency table.json
    python benchmarks/latency.py table.json

Every site draws its width among those of the table, by itself; weights are random codes. A prediction is the sum of the
layers' times and of the rest; a measurement the fastest of all calls, in rounds that give each policy a turn. Threads,
batch and choice of kernels are the table's. The table must be of this machine.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch

from mixbits.core.grid import Grid
from mixbits.core.latency import read_latency
from mixbits.fit.stages import build_network
from mixbits.fit.summary import machine
from mixbits.graph.quant_graph import capture
from mixbits.lower.untrained import lower_untrained
from mixbits.runtime.executor import Executor
from mixbits.runtime.latency import here, predicted_ms, regridded
from mixbits.runtime.steps import repeats_for, seconds_of
from mixbits.train.method import full_grid

SECONDS = 0.05  # of a turn
WANTED = 0.10  # relative: how near a prediction should be


def main() -> None:
    """Print a table, a row a policy."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("table", type=Path)
    options.add_argument("--input-shape", type=int, nargs="+", default=[3, 32, 32])
    options.add_argument("--policies", type=int, default=12)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    table = read_latency(chosen.table)
    table.check_machine(*here())
    torch.set_num_threads(1)
    graph = capture(build_network(table.network, classes=10), torch.zeros(2, *chosen.input_shape))
    profile, program = graph.profile, lower_untrained(graph)
    rng = np.random.default_rng(chosen.seed)
    policies: list[dict[str, int]] = []
    executors: list[Executor] = []
    for _ in range(chosen.policies):
        bits = {
            site.name: int(rng.choice(table.weight_bits if site.kind == "weight" else table.activation_bits))
            for site in profile.sites
        }
        grids: dict[str, Grid] = {site.name: full_grid(site, bits[site.name]) for site in profile.sites}
        policies.append(bits)
        timed = regridded(program, grids.__getitem__)
        executors.append(Executor(timed, threads=table.threads, tune=table.tuned, engine="native"))
    x = rng.standard_normal((table.batch, *chosen.input_shape)).astype(np.float32)
    least = [float("inf")] * len(executors)
    for _ in range(chosen.rounds):
        for index, executor in enumerate(executors):
            taken = seconds_of(executor, x, repeats_for(executor, x, SECONDS))
            least[index] = min(least[index], *taken)
    print(
        f"{table.network}; table of {table.date}: {table.threads} threads, batch {table.batch}, tuned: {table.tuned}"
    )
    print(
        f"{machine()}; {time.strftime('%Y-%m-%d')}; load average {os.getloadavg()[0]:.1f}; {chosen.rounds} rounds\n"
    )
    print("| policy | W bits | A bits | predicted, ms | measured, ms | predicted / measured |")
    print("|---|---|---|---|---|---|")
    ratios: list[float] = []
    for number, (bits, seconds) in enumerate(zip(policies, least, strict=True)):
        predicted = predicted_ms(table, profile, bits)
        ratios.append(predicted / (1e3 * seconds))
        means = [
            np.mean([bits[site.name] for site in sites]) for sites in (profile.weights, profile.activations)
        ]
        print(
            f"| {number} | {means[0]:.2f} | {means[1]:.2f} | {predicted:.4f} | {1e3 * seconds:.4f} | {ratios[-1]:.3f} |"
        )
    off = max(abs(ratio - 1) for ratio in ratios)
    verdict = "within" if off <= WANTED else "NOT within"
    print(f"\nfarthest off: {100 * off:.1f} %, {verdict} {100 * WANTED:.0f} %")


if __name__ == "__main__":
    main()
