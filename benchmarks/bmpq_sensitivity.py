"""Do bit gradients choose better widths than size alone? BMPQ from scratch on handwritten digits.

``digits_cnn`` from random weights, widths set while training, then training at those widths, for each way to rank layers:
``bit_gradient``, ``equal`` (all alike), ``inverse_size`` (1 / number of weights); and, with widths given from the first step
on, ``reversed`` (the bit gradients of the same seed, most sensitive layers narrowest) and ``random`` (a random choice that no
site could widen). All have the same budget, epochs and start. Printed are means over the seeds with their range.

    python benchmarks/bmpq_sensitivity.py --seeds 4 --epochs 8 --budget weights=2.5bit --weights 2 4 --activations 4
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace

import torch

import mixbits
from mixbits.data import load_digits
from mixbits.fit.summary import machine
from mixbits.graph.quant_graph import QuantGraph
from mixbits.methods.bmpq import BMPQ, one_activation_width, solve
from mixbits.search.fit import fit
from mixbits.train.finetune import Finetune, finetune
from mixbits.train.method import Target, learn
from mixbits.train.steps import Loop
from mixbits.train.task import task_of
from mixbits.zoo import digits_cnn

CPU = torch.device("cpu")
LR, WEIGHT_DECAY = 0.05, 5e-4


def untrained(seed: int) -> QuantGraph:
    """The network of a seed before any training."""
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        return mixbits.capture(digits_cnn(), torch.zeros(2, 1, 8, 8))


def trained(
    method: BMPQ, target: Target, seed: int
) -> tuple[dict[str, float], dict[str, int], dict[str, float]]:
    """Test loss and accuracy, widths, and the last sensitivities."""
    task, seen = task_of(load_digits(), batch_size=64, seed=seed), {}

    def watch(row: Mapping[str, object]) -> None:
        seen.update(row)

    policy, learned = learn(method, untrained(seed), task, target, Loop(watch=watch))
    network = finetune(
        learned.graph,
        policy,
        task,
        Finetune(epochs=method.epochs, lr=LR, weight_decay=WEIGHT_DECAY),
        start=learned.frozen,
    )
    return mixbits.evaluate(network.module, task, task.test, CPU), policy.bits, seen["sensitivity"]


def main() -> None:
    """Run the table and print it as Markdown."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seeds", type=int, default=4)
    options.add_argument("--epochs", type=int, default=8, help="while widths are set; as many follow")
    options.add_argument("--budget", default="weights=2.5bit")
    options.add_argument("--weights", type=int, nargs="+", default=[2, 4])
    options.add_argument("--activations", type=int, nargs="+", default=[4])
    options.add_argument("--value", choices=["concave", "linear"], default="concave")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    target = Target(mixbits.parse_budget(chosen.budget), chosen.weights, chosen.activations)
    base = BMPQ(
        epochs=chosen.epochs,
        lr=LR,
        weight_decay=WEIGHT_DECAY,
        schedule="constant",
        interval=1.0,
        warmup=1.0,
        value=chosen.value,
    )
    found: dict[str, list[dict[str, float]]] = {}
    last_widths: dict[str, str] = {}

    def note(name: str, result: dict[str, float], bits: Mapping[str, int], graph: QuantGraph) -> None:
        found.setdefault(name, []).append(result)
        last_widths[name] = " ".join(str(bits[site.name]) for site in graph.profile.weights)

    for seed in range(chosen.seeds):
        graph = untrained(seed)
        allowed = one_activation_width(graph.profile, target, target.choices(graph.profile))
        given = {}
        for sensitivity in ("bit_gradient", "equal", "inverse_size"):
            result, bits, ranked = trained(replace(base, sensitivity=sensitivity), target, seed)
            note(sensitivity, result, bits, graph)
            if sensitivity == "bit_gradient":
                upside_down = {site: 1.0 / value for site, value in ranked.items()}
                given["reversed"] = solve(
                    graph.profile, target, allowed, upside_down, concave=base.value == "concave"
                )
        draw = random.Random(seed)
        wish = {site: draw.choice(widths) for site, widths in allowed.widths.items()}
        given["random"] = fit(graph.profile, wish, target.budget, allowed)
        for name, pins in given.items():
            pinned = Target(target.budget, chosen.weights, chosen.activations, pins=pins)
            result, bits, _ = trained(base, pinned, seed)
            note(name, result, bits, graph)
    print(
        f"machine: {machine()}; date: {time.strftime('%Y-%m-%d')}; seeds: {chosen.seeds}; "
        f"epochs: {chosen.epochs} + {chosen.epochs}; budget: {target.budget}; candidates: "
        f"{chosen.weights}, {chosen.activations}\n"
    )
    print("| sensitivity | test top-1, % | test loss | weight widths of the last seed |")
    print("|---|---|---|---|")
    for name, results in found.items():
        top1, loss = ([result[key] for result in results] for key in ("top1", "loss"))
        print(
            f"| {name} | {statistics.mean(top1):.2f} ({min(top1):.2f} to {max(top1):.2f}) | "
            f"{statistics.mean(loss):.4f} ({min(loss):.4f} to {max(loss):.4f}) | {last_widths[name]} |"
        )
    print(f"\n{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
