"""The smallest network here, for 8 x 8 grey digits: trains in seconds."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class DigitsCNN(nn.Module):
    """Stem, residual block at 8 x 8, max-pool, two convolutions at 4 x 4, average pool, linear layer."""

    def __init__(self, *, num_classes: int) -> None:
        super().__init__()
        self.stem = _conv_bn_relu(1, 16)
        self.conv1 = _conv_bn_relu(16, 16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.pool = nn.MaxPool2d(2)
        self.conv3 = _conv_bn_relu(16, 32)
        self.conv4 = _conv_bn_relu(32, 32)
        self.linear = nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 1, 8, 8] to logits [n, num_classes]."""
        x = self.stem(x)
        x = F.relu(x + self.bn2(self.conv2(self.conv1(x))))
        x = self.conv4(self.conv3(self.pool(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def digits_cnn(*, num_classes: int = 10) -> nn.Module:
    """Five 3x3 convolutions and a linear layer, 18,896 weights, for the ``digits`` data set.

    >>> sum(p.numel() for p in digits_cnn().parameters() if p.ndim > 1)
    18896
    """
    return DigitsCNN(num_classes=num_classes)


def _conv_bn_relu(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )
