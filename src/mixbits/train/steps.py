"""The one training loop, an iterator: the body of ``for step in steps(...)`` runs after each update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from mixbits.graph.quant_graph import QuantGraph, project_
from mixbits.quant.functional import saving_inputs_only
from mixbits.train.checkpoint import Checkpoint, fingerprint
from mixbits.train.norms import reestimate_batch_norm_, synchronized_norms
from mixbits.train.processes import ALONE, Processes
from mixbits.train.randomness import RandomStates, random_states, set_random_states
from mixbits.train.task import Task, evaluate

Schedule = Literal["cosine", "thirds", "two_drops", "constant"]
Watch = Callable[[Mapping[str, Any]], None]


class Stateful(Protocol):
    """Something with a state that a checkpoint can hold: an optimizer, a module."""

    def state_dict(self) -> dict[str, Any]:
        """The state, of tensors and plain values."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Put a state back."""
        ...


class DivergedError(ValueError):
    """The loss is no longer a number."""


@dataclass(frozen=True)
class Loop:
    """How loops run here: the machine, speed options, where to save and whom to tell; no part of a method.

    Several ``processes`` divide every batch among them; the main one saves and tells.
    """

    stage: str = "train"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    compile: bool = False  # torch.compile the training step
    bf16: bool = False  # autocast matrix products to bfloat16; rounding stays in float32
    checkpoint: Checkpoint | None = None
    watch: Watch = field(default=lambda row: None)
    processes: Processes = ALONE


DIFFERENT_BATCHES = (
    "the processes read different batches: give each of them the same data in the same order (no sampler "
    "that divides the data, no seed of its own); every batch is divided among the processes here"
)
DIFFERENT_NETWORKS = (
    "the processes' networks have become different: run them on machines of one kind with the same versions "
    "and threads, and draw nothing that depends on the process"
)
PLAIN_LOOP = Loop()  # on the CPU, nothing saved, nobody told


@dataclass(frozen=True)
class Step:
    """Where the loop stands after one update."""

    epoch: int
    index: int  # batch within the epoch
    progress: float  # 0 .. 1 over all epochs
    loss: float
    ends_epoch: bool


def learning_rate_factor(schedule: Schedule, progress: float) -> float:
    """Factor on the initial learning rate.

    ``thirds`` is MPDNN's 80/40/40 of 160 epochs: x1, x0.1 from the half, x0.01 from three quarters.
    ``two_drops`` is usual from scratch on CIFAR: x0.1 after 80 and x0.01 after 140 of 200 epochs.

    >>> learning_rate_factor("cosine", 0.5), learning_rate_factor("thirds", 0.6)
    (0.5, 0.1)
    """
    if schedule == "constant":
        return 1.0
    if schedule in ("thirds", "two_drops"):
        first, second = (0.5, 0.75) if schedule == "thirds" else (0.4, 0.7)
        return 1.0 if progress < first else 0.1 if progress < second else 0.01
    return round(0.5 * (1.0 + math.cos(math.pi * progress)), 12)


def steps(
    graph: QuantGraph,
    task: Task,
    optimizer: torch.optim.Optimizer,
    loop: Loop,
    *,
    epochs: int,
    schedule: Schedule = "cosine",
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    penalty: Callable[[Tensor], Tensor] | None = None,
    before_update: Callable[[], None] = lambda: None,
    measure: Callable[[], Mapping[str, Any]] = dict,
    estimate_norms: int = 0,
    keep: Mapping[str, Stateful] | None = None,
) -> Iterator[Step]:
    """Train ``graph`` in place for ``epochs``, yielding after every update with the gradients still readable.

    ``loss(inputs, outputs, targets)`` replaces the task's loss, ``penalty(loss)`` is added to it,
    ``before_update()`` runs between backward and update (to limit gradients), ``measure()`` adds fields to
    the rows given to ``loop.watch``, ``estimate_norms`` batches re-estimate batch-norm statistics of a copy
    before it is judged on held-out data, ``keep`` names what else is saved with the network and put back when
    resuming (another optimizer, a method's accumulators).

    Resumes from ``loop.checkpoint`` if it holds a state. Raises ``DivergedError`` when the loss is not
    finite, and ``KeyboardInterrupt`` after saving when the checkpoint's ``stop`` is set.
    """
    loop = _signed(loop, graph, task, optimizer, epochs=epochs, schedule=schedule)
    processes, checkpoint, batches = loop.processes, loop.checkpoint, len(task.train)
    keep, module = keep or {}, graph.module.to(loop.device)
    placed = graph.placed()
    epoch, first, totals, resumed_rng = _resume_(graph, task, optimizer, loop, keep)
    processes.spread_(module.state_dict().values())
    with synchronized_norms(module, processes):
        forward = torch.compile(module, dynamic=False) if loop.compile else module
        for number in range(epoch, epochs):
            module.train()
            for index, batch in enumerate(task.train.epoch(number, first, resumed_rng), first):
                done = number * batches + index
                _set_learning_rates_(optimizer, schedule, done / (epochs * batches))
                if index == first:
                    processes.check_same(batch, DIFFERENT_BATCHES)
                inputs, targets = (part.to(loop.device) for part in processes.part(batch))
                share = processes.share(inputs, batch)
                optimizer.zero_grad(set_to_none=True)
                with (
                    torch.autocast(loop.device.type, torch.bfloat16, enabled=loop.bf16),
                    saving_inputs_only(),
                ):
                    outputs = forward(inputs).float()
                value = task.loss(outputs, targets) if loss is None else loss(inputs, outputs, targets)
                value = value * share  # the mean over the processes is then that over the batch
                mean = processes.sum(value.detach()) / processes.count
                total = value if penalty is None else value + penalty(mean)
                total.backward()
                if not math.isfinite(mean.item()) or not math.isfinite(total.item()):
                    raise DivergedError(_diverged(loop, number, index))
                processes.average_(parameter.grad for parameter in module.parameters())
                before_update()
                optimizer.step()
                project_(placed)
                totals["loss"] += mean.item() * len(batch[0])
                totals["score"] += float(processes.sum(task.metric(outputs.detach(), targets)))
                totals["count"] += len(batch[0])
                ends = index == batches - 1
                yield Step(number, index, (done + 1) / (epochs * batches), mean.item(), ends)
                row = {
                    "stage": loop.stage,
                    "step": done + 1,
                    "steps": epochs * batches,
                    "epoch": round((done + 1) / batches, 4),
                    "loss": totals["loss"] / totals["count"],
                    "train_top1": 100.0 * totals["score"] / totals["count"],
                    "lr": optimizer.param_groups[0]["lr"],
                    "ends_epoch": ends,
                    **(measure() if ends or index % 10 == 0 else {}),
                }
                if ends:
                    processes.check_same(module.state_dict().values(), DIFFERENT_NETWORKS)
                    row["held_out_top1"] = _judged_(graph, task, loop, estimate_norms)
                    totals.update(loss=0.0, score=0.0, count=0)
                stopping, due = _asked(checkpoint, processes)
                loop.watch(row)  # before saving: what a checkpoint goes on from has been told
                if checkpoint is not None and (ends or stopping or due):
                    position = (number + 1, 0) if ends else (number, index + 1)
                    state = _state(graph, optimizer, position, totals, keep)
                    processes.once(partial(checkpoint.save, state))
                if stopping:
                    raise KeyboardInterrupt
            first, resumed_rng = 0, None
    module.eval()


def _set_learning_rates_(optimizer: torch.optim.Optimizer, schedule: Schedule, progress: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * learning_rate_factor(schedule, progress)


def _judged_(graph: QuantGraph, task: Task, loop: Loop, estimate_norms: int) -> float:
    """Top-1 in percent on held-out data; leaves the network in training mode."""
    if estimate_norms:
        graph = graph.copy()
        reestimate_batch_norm_(graph, task.train, estimate_norms, loop.device, loop.processes)
    graph.module.eval()
    judgement = evaluate(graph, task, task.held_out, loop.device, loop.processes)
    graph.module.train()
    return judgement["top1"]


def _signed(
    loop: Loop, graph: QuantGraph, task: Task, optimizer: torch.optim.Optimizer, **options: Any
) -> Loop:
    """The loop, with what is known here of network, data and options in its checkpoint's signature."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    if not loop.processes.main:
        loop = replace(loop, watch=lambda row: None)
    if loop.checkpoint is None:
        return loop
    shapes = [f"{name} {tuple(value.shape)}" for name, value in graph.module.state_dict().items()]
    plain = int | float | str
    groups = [
        {name: value for name, value in group.items() if isinstance(value, plain) and name != "lr"}
        for group in optimizer.param_groups
    ]
    signature = {
        **loop.checkpoint.signature,
        **options,
        "batches of an epoch": len(task.train),
        "the network": fingerprint(graph.module.code, *shapes),
        "the optimizer": f"{type(optimizer).__name__} {groups}",
    }
    return replace(loop, checkpoint=replace(loop.checkpoint, signature=signature))


def _asked(checkpoint: Checkpoint | None, processes: Processes) -> list[bool]:
    """Whether any process was asked to stop, and whether the main one's clock says it is time to save."""
    if checkpoint is None:
        return [False, False]
    return processes.any(checkpoint.stop.is_set(), processes.main and checkpoint.due())


def _state(
    graph: QuantGraph,
    optimizer: torch.optim.Optimizer,
    position: tuple[int, int],
    totals: dict[str, Any],
    keep: Mapping[str, Stateful],
) -> dict[str, Any]:
    epoch, first = position
    return {
        "module": graph.module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": epoch,
        "first": first,
        "totals": dict(totals),
        "rng": random_states(),
        "kept": {name: part.state_dict() for name, part in keep.items()},
    }


def _resume_(
    graph: QuantGraph,
    task: Task,
    optimizer: torch.optim.Optimizer,
    loop: Loop,
    keep: Mapping[str, Stateful],
) -> tuple[int, int, dict[str, Any], RandomStates | None]:
    """Epoch, first batch, running sums and random states to go on with; the start without a checkpoint."""
    state, note = loop.processes.once(loop.checkpoint.load) if loop.checkpoint else (None, "")
    if note:
        loop.watch({"stage": loop.stage, "note": note})
    done = state["epoch"] * len(task.train) + state["first"] if state else 0
    loop.watch({"stage": loop.stage, "resumed_step": done})
    if state is None:
        return 0, 0, {"loss": 0.0, "score": 0.0, "count": 0}, None
    graph.module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    for name, part in keep.items():
        part.load_state_dict(state["kept"][name])
    set_random_states(state["rng"])
    return state["epoch"], state["first"], state["totals"], state["rng"]


def _diverged(loop: Loop, epoch: int, index: int) -> str:
    kept = f" The last good state is kept in {loop.checkpoint.path}." if loop.checkpoint else ""
    return (
        f"{loop.stage}: the loss became infinite or not a number in epoch {epoch + 1}, batch {index + 1}. "
        f"Lower the learning rate (for example --{loop.stage}.lr) or use more bits.{kept}"
    )
