"""Table 1 of Uhlich et al. 2020, reproduced small: which parametrization trains best, without any limit.

Handwritten digits, ``digits_cnn``, weights and activations quantized, MPDNN's quantizers only (no finetuning), each
parametrization at each learning rate from random and from trained float weights. Printed is the mean test error of the
last epoch over the seeds with its spread, and how many runs diverged.

    python benchmarks/mpdnn_parametrizations.py --seeds 3 --epochs 15
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import mixbits
from mixbits.data import load_digits
from mixbits.fit.summary import machine
from mixbits.graph.quant_graph import QuantGraph
from mixbits.methods.mpdnn import MPDNN
from mixbits.train.norms import reestimate_batch_norm_
from mixbits.train.steps import PLAIN_LOOP, DivergedError, steps
from mixbits.train.task import Task, task_of
from mixbits.zoo import digits_cnn

CPU = torch.device("cpu")
UNLIMITED = mixbits.parse_budget("weights=8bit")  # every width that can be packed fits
DIVERGED = 100.0 * 9 / 10  # error in percent that a diverged run counts with: chance


def float_network(seed: int, task: Task, epochs: int) -> QuantGraph:
    """The float network of a seed, trained for ``epochs``."""
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        graph = mixbits.capture(digits_cnn(), torch.zeros(2, 1, 8, 8))
    optimizer = torch.optim.SGD(graph.module.parameters(), 0.05, 0.9, weight_decay=5e-4)
    for _ in steps(graph, task, optimizer, PLAIN_LOOP, epochs=epochs):
        pass
    return graph


def error(graph: QuantGraph, task: Task, *, parametrization: str, lr: float, epochs: int) -> float:
    """Test error in percent after training with one parametrization."""
    method = MPDNN(epochs=epochs, lr=lr, parametrization=parametrization)  # type: ignore[arg-type]  a choice of argparse
    try:
        learned = method.learn(graph.copy(), task, mixbits.Target(UNLIMITED), PLAIN_LOOP)
    except DivergedError:
        return DIVERGED
    reestimate_batch_norm_(learned.graph, task.train, 20, CPU)
    return 100.0 - mixbits.evaluate(learned.graph.module.eval(), task, task.test, CPU)["top1"]


def main() -> None:
    """Run the table and print it as Markdown."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--epochs", type=int, default=15)
    options.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.03, 0.01])
    chosen = options.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    print(
        f"machine: {machine()}; date: {time.strftime('%Y-%m-%d')}; seeds: {chosen.seeds}; epochs: {chosen.epochs}\n"
    )
    print("| parametrization | lr | random start, error % | float start, error % | diverged |")
    print("|---|---|---|---|---|")
    for parametrization in ("u1", "u2", "u3", "p1", "p2", "p3"):
        for lr in chosen.rates:
            columns, diverged = [], 0
            for float_epochs in (0, 15):
                errors = []
                for seed in range(chosen.seeds):
                    task = task_of(load_digits(), batch_size=64, seed=seed)
                    graph = float_network(seed, task, float_epochs)
                    errors.append(
                        error(graph, task, parametrization=parametrization, lr=lr, epochs=chosen.epochs)
                    )
                diverged += sum(value == DIVERGED for value in errors)
                columns.append(f"{statistics.mean(errors):.2f} ({min(errors):.2f} to {max(errors):.2f})")
            print(f"| {parametrization} | {lr} | {columns[0]} | {columns[1]} | {diverged} |", flush=True)
    print(f"\n{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
