"""He et al.'s initialisation, for the convolutional networks."""

from __future__ import annotations

from torch import nn


def he_init_(model: nn.Module) -> None:
    """Draw the weight of every convolution of ``model`` from N(0, 2 / fan_out); zero its bias.

    He et al. 2015, "Delving Deep into Rectifiers", section 2.2, backward case. Linear and batch-norm layers
    keep PyTorch's defaults. As those, the draws come from PyTorch's global generator.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
