"""Lightning: a callback that drives a training. Needs the extra ``mixbits[lightning]``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixbits.train.training import Training

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        "mixbits.integrations.lightning needs Lightning: pip install 'mixbits[lightning]'"
    ) from error


class QuantizationCallback(Callback):
    """Drives a training whose ``module`` stands where the ``LightningModule`` had its network.

    Checkpoints of the trainer hold the training, as the network's state dict does. Gradients are clipped
    after the penalty's are added.
    """

    def __init__(self, training: Training[Any]) -> None:
        super().__init__()
        self.training = training
        self._loss: Tensor | None = None
        self._stepping: torch.optim.Optimizer | None = None  # between an optimizer's step and what follows it

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what would go wrong later: a network that is elsewhere, float16, optimization by hand."""
        if not any(module is self.training.module for module in pl_module.modules()):
            raise ValueError(
                f"{type(pl_module).__name__} does not hold the network of the training: put training.module "
                "where its network was (self.model = training.module) before fitting"
            )
        if str(trainer.precision).startswith(("16", "transformer", "bf16-true")):
            raise ValueError(
                f"precision={trainer.precision!r}: steps of quantizers need float32 parameters and unscaled "
                "gradients; use '32-true' or 'bf16-mixed'"
            )
        if not pl_module.automatic_optimization:
            raise ValueError(
                "with optimization by hand call training.before_update(loss) and "
                "training.after_update(optimizer) around optimizer.step() yourself, without the callback"
            )

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Remember the loss as it was before it was divided among accumulated batches."""
        self._loss = loss.detach() * trainer.accumulate_grad_batches

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """All gradients are there."""
        self.training.before_update(self._loss)
        self._stepping = optimizer

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The optimizer has stepped, unless gradients are still being accumulated."""
        if self._stepping is not None:
            self.training.after_update(self._stepping)
            self._stepping = None
