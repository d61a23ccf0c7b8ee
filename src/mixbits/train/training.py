"""Training: a network whose quantizers are trained with it, as an object that any loop can drive."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, fx, nn

from mixbits.graph.quant_graph import QuantGraph, project_
from mixbits.train.checkpoint import differences
from mixbits.train.processes import processes_here
from mixbits.train.steps import DivergedError, Loop, Schedule, Stateful, steps
from mixbits.train.task import Task

Result = TypeVar("Result")
KEPT = "mixbits_training"  # the submodule whose state is that of the training


NOT_AVERAGED = (
    "the networks of the processes are different after an update: their gradients are not averaged. Wrap "
    "training.module, as it is after begin_learning or begin_finetuning, in DistributedDataParallel (or give "
    "it to accelerator.prepare) and train what that returns"
)


def nothing(*_: Any) -> None:
    """What most trainings do around an update."""


@dataclass(eq=False)
class Training(Generic[Result]):
    """Everything of quantization-aware training but the loop.

    A loop trains ``module`` like any other network, with an optimizer of ``groups``, and calls
    :meth:`before_update` and :meth:`after_update` around the optimizer's step; gradient accumulation,
    autocast, clipping and schedules are its own business. :meth:`finish` gives the result. The state is part
    of ``module.state_dict()`` (see :meth:`attach_`), so whoever saves the network saves the training.

    The other fields are what one kind of training adds: ``penalty(loss)`` a term of the loss that depends on
    the network and perhaps the value of the task's loss, but not on a batch, so that its gradient is taken
    once an update; ``on_gradients()`` sees all gradients of an update; ``on_update(optimizer, done)`` follows
    it; ``measure()`` adds fields to rows of metrics; ``keep`` has states besides the network's. ``identity``
    tells this training from others by name.
    """

    graph: QuantGraph
    groups: list[dict[str, Any]]  # parameter groups, with weight decay where it belongs
    conclude: Callable[[], Result]
    penalty: Callable[[Tensor], Tensor] | None = None
    needs_loss: bool = False  # the penalty depends on the value of the task's loss
    on_gradients: Callable[[], None] = nothing
    on_update: Callable[[torch.optim.Optimizer, int], None] = nothing
    measure: Callable[[], Mapping[str, Any]] = dict
    keep: Mapping[str, Stateful] = field(default_factory=dict)
    estimate_norms: int = 0  # batches that estimate batch-norm statistics before held-out data are judged
    identity: Mapping[str, Any] = field(default_factory=dict)
    planned: int = 0  # updates that the training reckons with; 0: any number
    updates: int = 0  # done so far
    _checked: bool = False

    @property
    def module(self) -> fx.GraphModule:
        """The network to train, quantizers in place."""
        return self.graph.module

    def before_update(self, loss: Tensor | float | None = None) -> None:
        """All gradients of an update are there, unscaled: add the penalty's, then do what is to be done.

        ``loss`` is the value of the task's loss, a scalar, for trainings whose penalty depends on it (DDQ's).
        Call this once an update, however many batches it has, and before gradients are clipped. Where
        several processes train (torch's process group), it is the mean of theirs that counts.

        Raises ``ValueError`` if a loss is needed and not given, and for quantizers that were cast to another
        type than float32.
        """
        self._check_types()
        if self.needs_loss and loss is None:
            raise ValueError("the penalty is a factor of the task's loss: call before_update(loss)")
        if self.penalty is not None:
            value = self.penalty(self._mean(loss) if self.needs_loss else torch.zeros(()))
            if not math.isfinite(value.item()):
                raise DivergedError(
                    f"the penalty became infinite or not a number in update {self.updates + 1}; lower the "
                    "learning rate or use more bits"
                )
            if value.requires_grad:
                value.backward()
        self.on_gradients()

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer has stepped: put quantizers back into their legal set and follow the update.

        Raises ``ValueError`` for an optimizer of another network, and where the networks of several processes
        have become different in the first update; warns of weight decay on parameters of quantizers that
        should have none.
        """
        if not self._checked:
            self._check_optimizer(optimizer)
            processes_here().check_same(self.module.parameters(), NOT_AVERAGED)
            self._checked = True
        project_(self.graph.placed())
        self.count_update(optimizer)

    def count_update(self, optimizer: torch.optim.Optimizer) -> None:
        """The same for a loop that has projected the quantizers itself."""
        self.updates += 1
        self.on_update(optimizer, self.updates)

    def finish(self) -> Result:
        """The result; warns if there were fewer updates than planned."""
        if self.updates < self.planned:
            warnings.warn(
                f"{self.updates} of {self.planned} updates are done: widths may not have come down to the "
                "budget by training, and are then narrowed to fit it",
                stacklevel=2,
            )
        if KEPT in self.module._modules:
            self.module.delete_submodule(KEPT)
        return self.conclude()

    def attach_(self) -> None:
        """Make the state of this training a part of the network's state dict, until it is finished.

        The network is then in training mode, where some trainers leave it as it comes.
        """
        self.module.add_module(KEPT, _Kept(self))
        self.module.train()

    def state_dict(self) -> dict[str, Any]:
        """What is kept besides the network: identity, updates done, states of the method."""
        kept = {name: part.state_dict() for name, part in self.keep.items()}
        return {"identity": dict(self.identity), "updates": self.updates, "kept": kept}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Put a state back; raises ``ValueError`` naming what differs if it is another training's."""
        other = differences(state_dict["identity"], self.identity)
        if other:
            raise ValueError(
                f"the checkpoint belongs to another training: {other}; begin the one that it was saved from"
            )
        self.updates = state_dict["updates"]
        for name, part in self.keep.items():
            part.load_state_dict(state_dict["kept"][name])

    def _mean(self, loss: Tensor | float | None) -> Tensor:
        """The mean over processes of the task's loss."""
        processes = processes_here()
        value = torch.as_tensor(loss).detach().to(self.graph.network_parameters()[0].device)
        return processes.sum(value) / processes.count

    def _check_types(self) -> None:
        for site, quantizer in self.graph.quantizers.items():
            for name, value in quantizer.named_parameters():
                if value.dtype != torch.float32:
                    raise ValueError(
                        f"{site}: its {name} was cast to {value.dtype}, which cannot hold small changes of a "
                        "step; keep the network in float32 and use autocast (bf16-mixed, not bf16-true)"
                    )

    def _check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        decay = {
            id(p): group.get("weight_decay", 0.0) for group in optimizer.param_groups for p in group["params"]
        }
        if not any(id(p) in decay for group in self.groups for p in group["params"]):
            raise ValueError(
                "the optimizer trains none of the network's parameters: make it from training.groups, or "
                "after training.module has been put in its place"
            )
        wanted = [p for group in self.groups if not group.get("weight_decay") for p in group["params"]]
        if any(decay.get(id(p)) for p in wanted):
            warnings.warn(
                "the optimizer decays parameters of quantizers, which shrinks their ranges; make it from "
                "training.groups, which have weight decay where it belongs",
                stacklevel=3,
            )


class _Kept(nn.Module):
    """A training's state as one tensor of bytes: every format that holds tensors holds it."""

    def __init__(self, training: Training[Any]) -> None:
        super().__init__()
        self._of = training

    def get_extra_state(self) -> Tensor:
        """The state, uint8 ``[bytes]``."""
        file = io.BytesIO()
        torch.save(self._of.state_dict(), file)
        return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Put a state back."""
        file = io.BytesIO(state.cpu().numpy().tobytes())
        self._of.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return nn.Module()  # a copy of the network is not what is trained


def drive(
    training: Training[Result],
    task: Task,
    optimizer: torch.optim.Optimizer,
    loop: Loop,
    *,
    epochs: int,
    schedule: Schedule,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Result:
    """The result of a training in our own loop; ``loss`` as in :func:`~mixbits.train.steps.steps`."""
    for _ in steps(
        training.graph,
        task,
        optimizer,
        loop,
        epochs=epochs,
        schedule=schedule,
        loss=loss,
        penalty=training.penalty,
        before_update=training.on_gradients,
        measure=training.measure,
        estimate_norms=training.estimate_norms,
        keep={"training": training},
    ):
        training.count_update(optimizer)
    return training.finish()
