"""Residual networks for 32 x 32 images (He et al. 2016, "Deep Residual Learning", section 4.2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mixbits.zoo.init import he_init_


class PadShortcut(nn.Module):
    """Option A: every second pixel, and zero channels added equally on both sides. No parameters."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.pad = (channels_out - channels_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        """[n, C_in, H, W] to [n, C_out, H / 2, W / 2]."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """[n, C_in, H, W] to [n, C_out, H / stride, W / stride]."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class ResNet(nn.Module):
    """A 3x3 stem, stages of basic blocks (stride 2 from the second on), global average pool, linear layer."""

    def __init__(
        self, blocks: tuple[int, ...], widths: tuple[int, ...], *, pad_shortcuts: bool, num_classes: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stages = [f"layer{i + 1}" for i in range(len(blocks))]
        channels = widths[0]
        for i, (name, count, width) in enumerate(zip(self.stages, blocks, widths, strict=True)):
            stage = nn.Sequential()
            for block in range(count):
                stride = 2 if i > 0 and block == 0 else 1
                shortcut: nn.Module = nn.Identity()
                if channels != width and pad_shortcuts:
                    shortcut = PadShortcut(channels, width)
                elif channels != width:
                    shortcut = nn.Sequential(
                        nn.Conv2d(channels, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width)
                    )
                stage.append(BasicBlock(channels, width, stride, shortcut))
                channels = width
            self.add_module(name, stage)
        self.linear = nn.Linear(channels, num_classes)
        he_init_(self)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 3, 32, 32] to logits [n, num_classes]."""
        out = F.relu(self.bn1(self.conv1(x)))
        for name in self.stages:
            out = self.get_submodule(name)(out)
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


def resnet20(*, num_classes: int = 10) -> nn.Module:
    """ResNet-20 with option-A shortcuts, for CIFAR: 268,336 weights and 40.55M MACs at 10 classes.

    >>> sum(p.numel() for p in resnet20().parameters() if p.ndim > 1)
    268336
    """
    return ResNet((3, 3, 3), (16, 32, 64), pad_shortcuts=True, num_classes=num_classes)


def resnet32(*, num_classes: int = 10) -> nn.Module:
    """ResNet-32 with option-A shortcuts, for CIFAR."""
    return ResNet((5, 5, 5), (16, 32, 64), pad_shortcuts=True, num_classes=num_classes)


def resnet56(*, num_classes: int = 10) -> nn.Module:
    """ResNet-56 with option-A shortcuts, for CIFAR."""
    return ResNet((9, 9, 9), (16, 32, 64), pad_shortcuts=True, num_classes=num_classes)


def resnet18(*, num_classes: int = 10) -> nn.Module:
    """ResNet-18 as it is used on CIFAR: a 3x3 stem without pooling, 1x1 convolutions as shortcuts.

    The blocks are those of the ImageNet network; its 7x7 stem, max-pool and names of the shortcuts are not.
    """
    return ResNet((2, 2, 2, 2), (64, 128, 256, 512), pad_shortcuts=False, num_classes=num_classes)
