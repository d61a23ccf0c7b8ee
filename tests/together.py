"""What several processes do together, as a script for ``torchrun``; without it, what one process does alone."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from mixbits.core.budget import parse_budget
from mixbits.data.digits import load_digits
from mixbits.graph.quant_graph import capture
from mixbits.methods import method_named
from mixbits.train.checkpoint import Checkpoint
from mixbits.train.finetune import Finetune, finetune
from mixbits.train.method import Target, begin_learning, learn
from mixbits.train.norms import synchronized_norms
from mixbits.train.processes import ALONE, Processes, join_processes, processes_here
from mixbits.train.steps import Loop, steps
from mixbits.train.task import SampleBatches, Task, task_of

METHODS: dict[str, dict[str, Any]] = {
    "mpdnn": {},
    "bmpq": {"interval": 0.5, "warmup": 0.0},
    # Adam moves every strength by the same in the first steps: ties, which the last bit of a sum decides.
    "ebs": {"mixing": "gumbel", "epochs": 4},
    "ddq": {},
    "sdq": {},
}
EPOCHS, BATCH = 2, 30
TARGET = Target(parse_budget("weights=3bit,act=4bit"))
NORM_BATCH = 5  # samples: the parts of two processes differ


def network() -> nn.Module:
    torch.default_generator.manual_seed(5)
    convolution = nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False)
    last = nn.Conv2d(8, 12, 3, padding=1, bias=False)
    features = [convolution, nn.BatchNorm2d(8), nn.ReLU(), last, nn.BatchNorm2d(12), nn.ReLU()]
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(192, 10))


GRAPH = capture(network(), torch.zeros(2, 1, 8, 8))
TASK = task_of(load_digits(), batch_size=BATCH, held_out=0.05, train_images=4 * BATCH)
WHOLE = next(iter(replace(TASK.train, batch_size=4 * BATCH, training=False).epoch(0)))


def learned(name: str, loop: Callable[[str], Loop]) -> dict[str, Any]:
    """Widths learned by a method, the network trained at them, and what it was judged to be."""
    torch.default_generator.manual_seed(1)
    rows: list[dict[str, Any]] = []
    method = replace(method_named(name)(), **{"epochs": EPOCHS, **METHODS[name]})
    policy, result = learn(method, GRAPH, TASK, TARGET, replace(loop("learn"), watch=rows.append))
    network = finetune(
        result.graph, policy, TASK, Finetune(epochs=1, norm_batches=2), loop("finetune"), start=result.frozen
    )
    asked = {site: float(bits) for site, bits in result.bits.items()}
    judged = [row["held_out_top1"] for row in rows if row.get("ends_epoch")]
    return {
        "policy": policy.to_json(),
        "asked": asked,
        "state": network.module.state_dict(),
        "held out": judged,
    }


def in_a_loop(name: str, accelerator: Accelerator | None = None) -> dict[str, Any]:
    """The recipe of docs/trainers.md, with every update on the same samples however many processes."""
    torch.default_generator.manual_seed(1)
    count = accelerator.num_processes if accelerator else 1
    method = replace(method_named(name)(), **{"epochs": EPOCHS, **METHODS[name]})
    training = begin_learning(method, GRAPH, WHOLE[0], TARGET, updates=4 * EPOCHS)
    optimizer: Any = torch.optim.SGD(training.groups, lr=0.01, momentum=0.9)
    loader: Any = DataLoader(TensorDataset(*WHOLE), batch_size=BATCH // count)
    network: Any = training.module
    with synchronized_norms(training.module, processes_here()):
        if accelerator:
            network, optimizer, loader = accelerator.prepare(network, optimizer, loader)
        for _ in range(EPOCHS):
            for inputs, targets in loader:
                loss = F.cross_entropy(network(inputs), targets)
                loss.backward()
                training.before_update(loss)
                optimizer.step()
                training.after_update(optimizer)
                optimizer.zero_grad()
    policy, result = training.finish()
    return {"policy": policy.to_json(), "state": result.graph.module.state_dict()}


def normalized(processes: Processes = ALONE) -> dict[str, Tensor]:
    """What a batch norm gives and learns in a batch that does not divide evenly."""
    torch.default_generator.manual_seed(2)
    batch = torch.randn(NORM_BATCH, 3, 4) * 2 + 5, torch.randn(NORM_BATCH, 3, 4)
    holder = nn.Sequential(nn.BatchNorm1d(3))
    norm: Any = holder[0]
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1.0, -2.0]))
    with synchronized_norms(holder, processes):
        inputs, wanted = processes.part(batch)
        inputs.requires_grad_()
        output = holder(inputs)
        loss = (output * wanted).mean() * processes.share(inputs, batch)
        loss.backward()
        processes.average_([norm.weight.grad, norm.bias.grad])
    assert holder[0] is norm
    mean = processes.sum(loss) / processes.count
    to_input = torch.zeros_like(batch[0])
    begin = processes.rank * NORM_BATCH // processes.count
    to_input[begin : begin + len(inputs)] = inputs.grad / processes.count
    return {
        "loss": mean.detach(),
        "to weight": norm.weight.grad,
        "to bias": norm.bias.grad,
        "to input": processes.sum(to_input),
        "running mean": norm.running_mean,
        "running variance": norm.running_var,
        "batches": norm.num_batches_tracked,
    }


def refused(processes: Processes) -> dict[str, str]:
    """The messages of what several processes must not do."""
    wrapped = DistributedDataParallel(network())
    graph = GRAPH.copy()
    graph.module = DistributedDataParallel(graph.module)  # type: ignore[assignment]

    def unwrapped() -> None:
        training = begin_learning(method_named("mpdnn")(), GRAPH, WHOLE[0], TARGET, updates=2)
        optimizer = torch.optim.SGD(training.groups, lr=0.01)
        loss = training.module(processes.part(WHOLE)[0]).square().mean()
        loss.backward()
        training.before_update(loss)
        optimizer.step()
        training.after_update(optimizer)

    def trained(task: Task) -> None:
        optimizer = torch.optim.SGD(GRAPH.copy().module.parameters(), lr=0.1)
        next(iter(steps(GRAPH.copy(), task, optimizer, Loop(processes=processes), epochs=1)))

    def in_main_only() -> None:
        assert processes.main
        raise OSError("no space left")

    own = replace(TASK, train=replace(TASK.train, seed=processes.rank))
    single = replace(TASK, train=SampleBatches(TASK.train.samples, 1, training=True))
    attempts = {
        "captured after wrapping": lambda: capture(wrapped, torch.zeros(2, 1, 8, 8)),
        "begun after wrapping": lambda: begin_learning(
            method_named("mpdnn")(), graph, WHOLE[0], TARGET, updates=1
        ),
        "never wrapped": unwrapped,
        "other batches": lambda: trained(own),
        "too small a batch": lambda: trained(single),
        "an error of the main process": lambda: processes.once(in_main_only),
    }
    said: dict[str, str] = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except (ValueError, OSError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def killed(processes: Processes, folder: Path) -> None:
    """The last process is killed while widths are learned, after every step was saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's; the command line saves first, too
    calls = 0

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 6 and not processes.main:
            os.kill(os.getpid(), signal.SIGKILL)
        return F.cross_entropy(outputs, targets)

    torch.default_generator.manual_seed(1)
    method = replace(method_named("mpdnn")(), epochs=EPOCHS)
    learn(method, GRAPH, replace(TASK, loss=loss), TARGET, saved(folder, processes)("learn"))


def saved(folder: Path, processes: Processes = ALONE) -> Callable[[str], Loop]:
    """Loops that save after every step."""
    return lambda stage: Loop(
        stage, checkpoint=Checkpoint(folder / f"{stage}.pt", every_seconds=0), processes=processes
    )


def main(what: str, folder: Path) -> None:
    torch.set_num_threads(1)
    processes = join_processes()
    if what == "killed":
        killed(processes, folder)
        return
    accelerator = Accelerator(cpu=True)
    result = {
        **{name: learned(name, lambda stage: Loop(stage, processes=processes)) for name in METHODS},
        "a loop with mpdnn": in_a_loop("mpdnn", accelerator),
        "a loop with ddq": in_a_loop("ddq", accelerator),
        "a loop with ebs": in_a_loop("ebs", accelerator),
        "normalized": normalized(processes),
        "refused": refused(processes),
    }
    torch.save(result, folder / f"{processes.rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
