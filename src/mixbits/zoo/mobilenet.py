"""MobileNetV2 (Sandler et al. 2018), for 224 and for 32 pixels, and a relative with squeeze-and-excite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from mixbits.zoo.init import he_init_

EXCITE_DIVISOR = 4  # squeeze-and-excite narrows to a quarter of the channels, as MobileNetV3


@dataclass(frozen=True)
class Stage:
    """A row of the paper's table 2: inverted residuals of one width."""

    expand: int  # hidden channels per input channel (t)
    width: int  # output channels (c)
    blocks: int  # (n)
    stride: int  # of the first block (s)


STAGES_224 = (
    Stage(1, 16, 1, 1),
    Stage(6, 24, 2, 2),
    Stage(6, 32, 3, 2),
    Stage(6, 64, 4, 2),
    Stage(6, 96, 3, 1),
    Stage(6, 160, 3, 2),
    Stage(6, 320, 1, 1),
)
# At 32 pixels the stem and the second stage keep the resolution: the last maps are 4 x 4 instead of 1 x 1.
STAGES_32 = (STAGES_224[0], Stage(6, 24, 2, 1), *STAGES_224[2:])
STAGES_SE = (Stage(1, 16, 1, 1), Stage(4, 24, 2, 2), Stage(4, 40, 2, 2), Stage(4, 80, 2, 2))


class SqueezeExcite(nn.Module):
    """Each channel times a gate in [0, 1] computed from the means of all channels (Hu et al. 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // EXCITE_DIVISOR, 1)
        self.fc2 = nn.Conv2d(channels // EXCITE_DIVISOR, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[n, C, H, W] to the same shape."""
        gate = F.adaptive_avg_pool2d(x, 1)
        gate = F.hardsigmoid(self.fc2(F.relu(self.fc1(gate))))
        return x * gate


class InvertedResidual(nn.Module):
    """1x1 expansion (unless ``expand`` is 1), 3x3 depthwise, 1x1 projection; a residual add if they fit."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        expand: int,
        stride: int,
        excite: bool,
        activation: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        hidden = channels_in * expand
        self.residual = stride == 1 and channels_in == channels_out
        self.conv = nn.Sequential()
        if expand > 1:
            self.conv.append(_conv_bn(channels_in, hidden, 1, activation=activation))
        self.conv.append(_conv_bn(hidden, hidden, 3, stride=stride, groups=hidden, activation=activation))
        if excite:
            self.conv.append(SqueezeExcite(hidden))
        self.conv.append(nn.Conv2d(hidden, channels_out, 1, bias=False))
        self.conv.append(nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        """[n, C_in, H, W] to [n, C_out, H / stride, W / stride]."""
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNet(nn.Module):
    """Stem, stages of inverted residuals, a 1x1 head, global average pool, dropout and a linear layer.

    The state dict has the keys of torchvision's ``mobilenet_v2``.
    """

    def __init__(
        self,
        stages: tuple[Stage, ...],
        *,
        stem: int,
        stem_stride: int,
        head: int,
        dropout: float,
        num_classes: int,
        excite: bool = False,
        activation: Callable[[], nn.Module] = nn.ReLU6,
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(_conv_bn(3, stem, 3, stride=stem_stride, activation=activation))
        channels = stem
        for stage in stages:
            for block in range(stage.blocks):
                self.features.append(
                    InvertedResidual(
                        channels,
                        stage.width,
                        expand=stage.expand,
                        stride=stage.stride if block == 0 else 1,
                        excite=excite,
                        activation=activation,
                    )
                )
                channels = stage.width
        self.features.append(_conv_bn(channels, head, 1, activation=activation))
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(head, num_classes))
        he_init_(self)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 3, H, W] to logits [n, num_classes]."""
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


def mobilenet_v2(*, num_classes: int = 1000) -> nn.Module:
    """MobileNetV2 for ImageNet at 224 x 224: 3,469,760 weights and 300.77M MACs.

    >>> sum(p.numel() for p in mobilenet_v2().parameters() if p.ndim > 1)
    3469760
    """
    return MobileNet(STAGES_224, stem=32, stem_stride=2, head=1280, dropout=0.2, num_classes=num_classes)


def mobilenet_v2_cifar(*, num_classes: int = 10) -> nn.Module:
    """MobileNetV2 for 32 x 32 images: strides of the stem and the second stage are 1."""
    return MobileNet(STAGES_32, stem=32, stem_stride=1, head=1280, dropout=0.2, num_classes=num_classes)


def mobilenet_se(*, num_classes: int = 10) -> nn.Module:
    """A small mobile network for 32 x 32 images with squeeze-and-excite and hard-swish in every block.

    Built from the parts of MobileNetV3 (Howard et al. 2019), not one of its published networks.
    """
    return MobileNet(
        STAGES_SE,
        stem=16,
        stem_stride=1,
        head=256,
        dropout=0.1,
        num_classes=num_classes,
        excite=True,
        activation=nn.Hardswish,
    )


def _conv_bn(
    channels_in: int,
    channels_out: int,
    kernel: int,
    *,
    activation: Callable[[], nn.Module],
    stride: int = 1,
    groups: int = 1,
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(
            channels_in, channels_out, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False
        ),
        nn.BatchNorm2d(channels_out),
        activation(),
    )
