"""A network that applies one convolution twice: one weight, two places in the graph."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mixbits.zoo.init import he_init_


class SharedCNN(nn.Module):
    """``shared`` is applied at 16 x 16 and again at 8 x 8, each time with batch norm of its own."""

    def __init__(self, *, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False)
        self.bn_stem = nn.BatchNorm2d(32)
        self.shared = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.bn2 = nn.BatchNorm2d(32)
        self.linear = nn.Linear(32, num_classes)
        he_init_(self)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 3, 32, 32] to logits [n, num_classes]."""
        x = F.relu(self.bn_stem(self.stem(x)))
        x = F.max_pool2d(F.relu(self.bn1(self.shared(x))), 2)
        x = F.relu(self.bn2(self.shared(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def shared_cnn(*, num_classes: int = 10) -> nn.Module:
    """A small network for 32 x 32 images whose second and third convolution are one module."""
    return SharedCNN(num_classes=num_classes)
