"""ResNet-20 on CIFAR-10 quantized without training: top-1 and CPU seconds, uniform and mixed widths, 8-bit activations.

The figures of `mixbits fit --no-train`, at several budgets in one process. All 20 layers are counted. Peers measured on
the same network before the project began are printed beside.

    python benchmarks/quick_path.py --data cifar10:DIR --weights resnet20_cifar10.safetensors
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import mixbits
from mixbits import zoo
from mixbits.core.cost import COSTS
from mixbits.core.policy import Policy
from mixbits.data.open import open_dataset
from mixbits.fit.summary import machine
from mixbits.fit.weights import load_weights_
from mixbits.search.greedy import choices
from mixbits.search.ilp import least_harm
from mixbits.train.calibrate import calibrate, calibration_images, observe_float, sensitivity
from mixbits.train.method import full_grid
from mixbits.train.task import task_of

CPU = torch.device("cpu")
PEERS = """Peers at about 4.0 / 3.0 bits: Sony MCT 2.6.1 91.14 / 79.27 (9 CPU s of search), NVIDIA ModelOpt 0.47 85.40 / 25.47,
uniform with `max` steps 85.22 / 41.25, onnxruntime int4 weights per channel 87.42 / -."""


def main() -> None:
    """Run the table and print it as Markdown."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--data", required=True)
    options.add_argument("--weights", required=True, type=Path)
    options.add_argument("--images", type=int, default=256)
    options.add_argument("--bits", type=float, nargs="+", default=[4.0, 3.0, 2.5, 2.137])
    options.add_argument("--seeds", type=int, default=3, help="different calibration images")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    print(f"machine: {machine()}; date: {time.strftime('%Y-%m-%d')}; {chosen.images} images\n")
    print(
        "| seed | widths | weights, bit | KiB | top-1, % | CPU s: observe + sensitivity + solve + calibrate |"
    )
    print("|---|---|---|---|---|---|")
    model = zoo.resnet20()
    load_weights_(model, chosen.weights)
    graph = mixbits.capture(model.eval(), torch.zeros(2, 3, 32, 32))
    pins = {site.name: 8 for site in graph.profile.activations}
    allowed = choices(graph.profile, range(2, 9), (8,), pins=pins)
    for seed in range(chosen.seeds):
        task = task_of(open_dataset(chosen.data), seed=seed)
        if seed == 0:
            print(
                f"| - | float | 32 | 1048.19 | {mixbits.evaluate(graph.module, task, task.test, CPU)['top1']:.2f} | - |"
            )
        images = calibration_images(task.train, chosen.images, CPU)
        began = time.process_time()
        observed = observe_float(graph, images)
        seen = time.process_time()
        harm = sensitivity(graph, observed, allowed)
        scored = time.process_time()
        for bits in chosen.bits:
            for name in ("mixed", "uniform") if bits == int(bits) else ("mixed",):
                start = time.process_time()
                widths = {site.name: int(bits) for site in graph.profile.weights}
                if name == "mixed":
                    widths = least_harm(
                        graph.profile, mixbits.parse_budget(f"weights={bits}bit"), allowed, harm
                    )
                solved = time.process_time()
                grids = {s.name: full_grid(s, {**pins, **widths}[s.name]) for s in graph.profile.sites}
                network = calibrate(graph, Policy(grids), images, observed)
                done = time.process_time()
                top1 = mixbits.evaluate(network.module, task, task.test, CPU)["top1"]
                kib = COSTS["weights"].of(graph.profile, {**pins, **widths}) / 1024
                search = [seen - began, scored - seen, solved - start, done - solved]
                seconds = " + ".join(f"{part:.1f}" for part in search) + f" = {sum(search):.1f}"
                print(f"| {seed} | {name} | {bits} | {kib:.2f} | {top1:.2f} | {seconds} |", flush=True)
    print(f"\n{PEERS}")


if __name__ == "__main__":
    main()
