"""ResNet-18 for 224 x 224 images (He et al. 2016, "Deep Residual Learning", table 1)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mixbits.zoo.init import he_init_

STAGES = (64, 128, 256, 512)  # channels; two blocks each


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them: a strided 1x1 convolution where the shape changes."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.downsample = nn.Sequential()
        if stride > 1 or channels_in != channels_out:
            self.downsample.append(nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False))
            self.downsample.append(nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        """[n, C_in, H, W] to [n, C_out, H / stride, W / stride]."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.downsample(x))


class ResNet18(nn.Module):
    """A 7x7 stem of stride 2, max-pool, four stages, global average pool, linear layer.

    The state dict has the keys of torchvision's ``resnet18``.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, STAGES[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(STAGES[0])
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = STAGES[0]
        for i, width in enumerate(STAGES):
            first = BasicBlock(channels, width, stride=1 if i == 0 else 2)
            self.add_module(f"layer{i + 1}", nn.Sequential(first, BasicBlock(width, width, stride=1)))
            channels = width
        self.fc = nn.Linear(channels, num_classes)
        he_init_(self)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 3, H, W] to logits [n, num_classes]."""
        out = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for i in range(len(STAGES)):
            out = self.get_submodule(f"layer{i + 1}")(out)
        return self.fc(F.adaptive_avg_pool2d(out, 1).flatten(1))


def resnet18_imagenet(*, num_classes: int = 1000) -> nn.Module:
    """ResNet-18 for ImageNet at 224 x 224: 11,678,912 weights and 1.814G MACs at 1000 classes.

    >>> sum(p.numel() for p in resnet18_imagenet().parameters() if p.ndim > 1)
    11678912
    """
    return ResNet18(num_classes)
