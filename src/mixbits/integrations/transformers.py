"""Hugging Face Trainer: a callback that drives a training. Needs the extra ``mixbits[transformers]``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixbits.train.training import Training

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        "mixbits.integrations.transformers needs Transformers: pip install 'mixbits[transformers]'"
    ) from error


class Logits(nn.Module):
    """An image classifier of Transformers as a network that can be captured: a tensor in, its logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Images, float ``[n, channels, height, width]``, to logits ``[n, classes]``."""
        return self.model(pixel_values=x).logits


class QuantizedModel(nn.Module):
    """The network of a training as ``Trainer`` wants a model: columns of a batch in, loss and logits out."""

    def __init__(
        self, training: Training[Any], loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    ) -> None:
        super().__init__()
        self.network, self._loss = training.module, loss
        self.last_loss: Tensor | None = None  # of the last batch, for trainings that need it

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """``{"logits": ...}``, and ``"loss"`` where there are labels."""
        logits = self.network(pixel_values)
        if labels is None:
            return {"logits": logits}
        loss = self._loss(logits.float(), labels)
        self.last_loss = loss.detach()
        return {"loss": loss, "logits": logits}


class QuantizationCallback(TrainerCallback):
    """Drives a training whose ``module`` is, or is a part of, the trainer's model.

    Checkpoints of the trainer hold the training, as the network's state dict does. The Trainer clips
    gradients before the penalty's are added.
    """

    def __init__(self, training: Training[Any]) -> None:
        self.training = training

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module | None = None,
        **others: Any,
    ) -> None:
        """Refuse what would go wrong later: a network that is elsewhere, float16."""
        if model is None or not any(module is self.training.module for module in model.modules()):
            raise ValueError(
                "the Trainer's model does not hold the network of the training: give it "
                "model=QuantizedModel(training), or a model of yours with training.module in it"
            )
        if args.fp16:
            raise ValueError(
                "fp16=True: steps of quantizers need unscaled gradients; use bf16=True or neither of them"
            )

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module | None = None,
        **others: Any,
    ) -> None:
        """All gradients are there."""
        self.training.before_update(model.last_loss if isinstance(model, QuantizedModel) else None)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: torch.optim.Optimizer,
        **others: Any,
    ) -> None:
        """The optimizer has stepped."""
        self.training.after_update(optimizer)
