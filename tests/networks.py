"""Small networks with the odd parts of real ones. All take [n, 3, 12, 12]."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Classifier(nn.Module):
    """Features, their mean over all pixels, a linear layer."""

    def __init__(self, features: nn.Module, channels: int) -> None:
        super().__init__()
        self.features = features
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def conv(channels_in: int, channels_out: int, kernel: int | tuple[int, int] = 3) -> nn.Sequential:
    layer = nn.Conv2d(channels_in, channels_out, kernel, padding="same", bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(channels_out), nn.ReLU())


class Functional(nn.Module):
    """A network whose forward is a function of its layers."""

    def __init__(self, forward, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._function(self, x)


def dense() -> nn.Module:
    """Concatenation, and pre-activation batch norms that fold into nothing."""

    class Layer(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(channels)
            self.conv = nn.Conv2d(channels, 4, 3, padding=1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)

    return Classifier(nn.Sequential(nn.Conv2d(3, 8, 3), Layer(8), Layer(12), nn.AvgPool2d(2), Layer(16)), 20)


def branches() -> nn.Module:
    """Inception: branches of different windows, one an average pool with padding, one a max-pool."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        parts = [self.one(x), self.wide(x), self.pool(pooled), F.max_pool2d(x, 3, 1, 1)]
        return self.head(F.adaptive_avg_pool2d(torch.cat(parts, 1), (3, 2)).flatten(1))

    wide = nn.Sequential(conv(8, 4, (1, 5)), conv(4, 4, (5, 1)))
    head = nn.Linear(20 * 6, 5)
    return Functional(forward, stem=conv(3, 8), one=conv(8, 4, 1), wide=wide, pool=conv(8, 4, 1), head=head)


def grouped() -> nn.Module:
    """Groups, dilation, 'same' padding of an even window, a depthwise multiplier, functional pads."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.relu(self.even(F.pad(x, (1, 0, 2, 1))))
        x = F.relu(self.dilated(F.pad(x, (2, 2, 2, 2), mode="reflect")))
        return self.head(F.relu(self.multiplier(F.max_pool2d(x, 3, 2, 1, ceil_mode=True))).mean((2, 3)))

    return Functional(
        forward,
        even=nn.Conv2d(3, 8, 4, padding="same"),
        dilated=nn.Conv2d(8, 12, 3, dilation=2, groups=4),
        multiplier=nn.Conv2d(12, 24, 3, padding=1, stride=2, groups=12),
        head=nn.Linear(24, 5),
    )


def shuffled() -> nn.Module:
    """ShuffleNet: half of the channels pass, halves are mixed through views."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        kept, used = x.chunk(2, 1)
        x = torch.cat([kept, self.branch(used)], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(self.last(F.channel_shuffle(x, 4)).mean((2, 3)))

    depthwise = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(4))
    branch = nn.Sequential(conv(4, 4, 1), depthwise, conv(4, 4, 1))
    return Functional(forward, stem=conv(3, 8), branch=branch, last=conv(8, 8, 1), head=nn.Linear(8, 5))


def residual_without_relu() -> nn.Module:
    """Linear bottlenecks, a layer on a sum, a scaled sum, a batch norm after a pool."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + 0.5 * self.one(x)
        x = torch.sub(self.norm(F.max_pool2d(x, 2)), self.two(F.max_pool2d(x, 2)), alpha=2)
        return 3 - self.head(x.mean((2, 3))) / 7

    return Functional(
        forward,
        stem=nn.Conv2d(3, 8, 3, stride=2, padding=1),
        one=nn.Conv2d(8, 8, 3, padding=1),
        norm=nn.BatchNorm2d(8),
        two=nn.Conv2d(8, 8, 1),
        head=nn.Linear(8, 5),
    )


def unet() -> nn.Module:
    """Down, up again by nearest, bilinear and pixel shuffle, with skips."""

    def forward(self: Any, x: Tensor) -> Tensor:
        top = self.down1(x)
        middle = self.down2(F.max_pool2d(top, 2))
        bottom = self.down3(F.avg_pool2d(middle, 2))
        up = F.interpolate(bottom, scale_factor=2, mode="nearest")
        up = self.up1(torch.cat([up, middle], 1))
        smooth = F.interpolate(up, size=(12, 12), mode="bilinear", align_corners=False)
        sharp = F.pixel_shuffle(self.up2(up), 2)
        return self.head(torch.cat([smooth, sharp, top], 1)).amax((2, 3))

    return Functional(
        forward,
        down1=conv(3, 8),
        down2=conv(8, 8),
        down3=conv(8, 8),
        up1=conv(16, 8),
        up2=conv(8, 16),
        head=nn.Conv2d(20, 5, 1),
    )


def activations() -> nn.Module:
    """One layer after each activation function."""
    functions = [
        *(
            nn.ReLU6(),
            nn.Hardtanh(-0.5, 2.0),
            nn.Hardswish(),
            nn.Hardsigmoid(),
            nn.SiLU(),
            nn.Sigmoid(),
            nn.Tanh(),
        ),
        *(
            nn.GELU(),
            nn.GELU("tanh"),
            nn.ELU(0.7),
            nn.SELU(),
            nn.CELU(0.5),
            nn.LeakyReLU(0.1),
            nn.Softplus(2),
        ),
        *(nn.Mish(), nn.PReLU(), nn.PReLU(4), nn.Softmax(1), nn.LogSoftmax(1)),
    ]
    layers = [part for function in functions for part in (nn.Conv2d(4, 4, 1), function)]
    return Classifier(nn.Sequential(nn.Conv2d(3, 4, 3), *layers), 4)


def scalars() -> nn.Module:
    """Arithmetic on values, and constants of the network."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.two(torch.sqrt(x.square() + 1) - x.abs().clamp(min=0.1).log() + torch.exp(-x.abs()))
        x = self.three(
            torch.rsqrt(x * x + 2) * torch.maximum(x, x.sin()) + (x.abs() + 1) ** 0.3 + self.offset
        )
        return self.head(torch.stack([x.sum((2, 3)), x.amax((2, 3))], 2).flatten(1))

    network = Functional(
        forward,
        conv=nn.Conv2d(3, 4, 3),
        two=nn.Conv2d(4, 4, 1),
        three=nn.Conv2d(4, 4, 1),
        head=nn.Linear(8, 5),
    )
    network.offset = nn.Parameter(torch.linspace(-1, 1, 4).reshape(4, 1, 1))
    return network


def written_with_others() -> nn.Module:
    """Operations that become several instructions, and nearest neighbours at an odd ratio."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.glu(self.instance(self.stem(x)), 1)
        y = self.two(F.normalize(x, dim=1).repeat(1, 2, 1, 1))
        y = F.interpolate(F.logsigmoid(self.three(y)), size=(9, 11), mode="nearest")
        y = self.rms(y) - y.unfold(3, 2, 2).amin(4).min(3, keepdim=True)[0]
        scores = torch.einsum("bchw,bdhw->bcd", y, y)
        rest = [x.var((2, 3)), x.std((2, 3), correction=0)]
        return self.head(torch.cat([scores.flatten(1), *rest], 1))

    return Functional(
        forward,
        stem=nn.Conv2d(3, 8, 3),
        instance=nn.InstanceNorm2d(8, affine=True),
        two=nn.Conv2d(8, 4, 1),
        three=nn.Conv2d(4, 4, 3, stride=2),
        rms=nn.RMSNorm(11),
        head=nn.Linear(24, 5),
    )


def sequence() -> nn.Module:
    """1-d convolutions over the rows of an image, with 1-d pools and norms."""
    layers = nn.Sequential(
        nn.Flatten(2),
        nn.Conv1d(3, 8, 5, stride=2, padding=2),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(8, 8, 3, dilation=2, padding="same", groups=2),
        nn.GroupNorm(2, 8),
        nn.AvgPool1d(3, 2),
        nn.Conv1d(8, 8, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(2),
    )
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 5))


def perceptron() -> nn.Module:
    """Linear layers with batch norm and dropout."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(432, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(16, 16, bias=False),
        nn.BatchNorm1d(16, affine=False),
        nn.Tanh(),
        nn.Linear(16, 5),
    )


def class_token() -> nn.Module:
    """A transformer of torch's own layers, with a class token and learned positions."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.encoder(x)[:, 0])

    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True, activation="gelu")
    network = Functional(forward, patches=nn.Conv2d(3, 16, 4, 4), encoder=layer, head=nn.Linear(16, 5))
    network.token, network.positions = (
        nn.Parameter(torch.randn(1, 1, 16)),
        nn.Parameter(torch.randn(1, 10, 16)),
    )
    return network


def windows() -> nn.Module:
    """Swin: attention written with matmul, in windows folded into the batch, rolled by half a window."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)  # [n, 6, 6, 16]
        n = x.shape[0]
        y = torch.roll(self.norm(x), (-1, -1), (1, 2))
        y = y.view(n, 2, 3, 2, 3, 16).permute(0, 1, 3, 2, 4, 5).reshape(-1, 9, 16)
        q, k, v = self.qkv(y).reshape(-1, 9, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = torch.softmax(q @ k.transpose(-2, -1) * 8**-0.5 + self.bias, -1) @ v
        y = self.proj(y.transpose(1, 2).reshape(-1, 9, 16))
        y = y.view(n, 2, 2, 3, 3, 16).permute(0, 1, 3, 2, 4, 5).reshape(n, 6, 6, 16)
        return self.head((x + torch.roll(y, (1, 1), (1, 2))).mean((1, 2)))

    network = Functional(
        forward,
        stem=nn.Conv2d(3, 16, 2, 2),
        norm=nn.LayerNorm(16),
        qkv=nn.Linear(16, 48),
        proj=nn.Linear(16, 16),
        head=nn.Linear(16, 5),
    )
    network.bias = nn.Parameter(torch.randn(2, 9, 9))
    return network


def convnext() -> nn.Module:
    """Channels last for the linear layers, a learned scale of the residual."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.narrow(F.gelu(self.wide(y)))
        return self.head((x + y.permute(0, 3, 1, 2)).mean([-2, -1]))

    network = Functional(
        forward,
        stem=nn.Conv2d(3, 8, 2, 2),
        depthwise=nn.Conv2d(8, 8, 5, padding=2, groups=8),
        norm=nn.LayerNorm(8),
        wide=nn.Linear(8, 16),
        narrow=nn.Linear(16, 8),
        head=nn.Linear(8, 5),
    )
    network.scale = nn.Parameter(torch.rand(8))
    return network


ODD_NETWORKS = (
    activations,
    branches,
    class_token,
    convnext,
    dense,
    grouped,
    perceptron,
    residual_without_relu,
    scalars,
    sequence,
    shuffled,
    unet,
    windows,
    written_with_others,
)
