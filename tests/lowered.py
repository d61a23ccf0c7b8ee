"""Networks with random parameters and a random grid on every site, lowered; and the law they are held to."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import nn

from mixbits import zoo
from mixbits.core.grid import Codebook, Grid, Uniform
from mixbits.core.program import Program
from mixbits.graph.quant_graph import QuantGraph, capture, put_
from mixbits.lower import lower
from mixbits.pack.bits import unpack
from mixbits.quant.observe import Recorder, mse_step
from mixbits.quant.quantizer import LearnedStep, Quantizer
from mixbits.zoo.mobilenet import STAGES_32, MobileNet, Stage
from mixbits.zoo.vgg import STAGES, VGG
from mixbits.zoo.vit import ViT
from networks import ODD_NETWORKS

SHORT = tuple(Stage(stage.expand, stage.width // 2, 2, stage.stride) for stage in STAGES_32[1:5])
REST = {"dropout": 0.2, "num_classes": 10}
ZOO = {
    "digits_cnn": ((1, 8, 8), zoo.digits_cnn),
    "mobilenet_se": ((3, 32, 32), zoo.mobilenet_se),
    "mobilenet_v2_short": ((3, 32, 32), lambda: MobileNet(SHORT, stem=16, stem_stride=2, head=64, **REST)),
    "resnet20": ((3, 32, 32), zoo.resnet20),
    "shared_cnn": ((3, 32, 32), zoo.shared_cnn),
    "vgg16_narrow": (
        (3, 32, 32),
        lambda: VGG(tuple(tuple(width // 8 for width in stage) for stage in STAGES), num_classes=10),
    ),
    "vit_short": (
        (3, 32, 32),
        lambda: ViT(image=32, patch=4, width=96, depth=2, heads=3, hidden=192, num_classes=10),
    ),
}
LARGE = {"mobilenet_v2_cifar": ((3, 32, 32), zoo.mobilenet_v2_cifar), "vit_tiny": ((3, 32, 32), zoo.vit_tiny)}
NETWORKS = ZOO | {network.__name__: ((3, 12, 12), network) for network in ODD_NETWORKS} | LARGE


@dataclass(frozen=True)
class Lowered:
    graph: QuantGraph
    program: Program
    x: np.ndarray  # two samples


@lru_cache
def lowered(name: str) -> Lowered:
    shape, network = NETWORKS[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((2, *shape), generator=generator)
    graph = quantized(network(), x, generator)
    return Lowered(graph, lower(graph, about={"network": name}), x.numpy())


def quantized(network: nn.Module, x: torch.Tensor, generator: torch.Generator) -> QuantGraph:
    """The network with random parameters, and a quantizer of random width and fitting step on every site."""
    randomize_(network, generator)
    graph = capture(network, x)
    graph.module.eval()
    recorders = {site.name: Recorder(1) for site in graph.profile.sites}
    put_(graph, recorders)
    with torch.no_grad():
        graph(x)
    draw, placed = random.Random(0), {}
    for site in graph.profile.sites:
        if site.kind == "weight":
            grid, weight = draw_grid(draw, signed=True), graph.weight(site.name).detach()
            step = mse_step(weight.flatten(1)[:, :32], grid)  # of part of a row: quick, and clips the rest
            if draw.random() < 0.2:  # one step for the whole tensor
                step = step.mean()
            step = step.reshape(-1, *(1,) * (weight.dim() - 1)) if step.dim() else step
        else:
            grid = draw_grid(draw, signed=site.signed)
            step = mse_step(recorders[site.name].values()[None, ::16], grid)[0]
        placed[site.name] = LearnedStep(grid, step, shared_by=site.elements)
    put_(graph, placed)
    graph.module.eval()
    return graph


@torch.no_grad()
def randomize_(network: nn.Module, generator: torch.Generator) -> None:
    for name, parameter in network.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, (1.5 / parameter[0].numel()) ** 0.5, generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(0, 0.1, generator=generator)
        else:
            parameter.uniform_(0.5, 1.5, generator=generator)
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1, generator=generator)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5, generator=generator)


def draw_grid(draw: random.Random, *, signed: bool) -> Grid:
    bits = draw.randint(2, 8)
    form = draw.choice(("full", "full", "narrow", "bipolar", "codebook"))
    if form == "codebook":
        top = min(bits, 7)
        powers = tuple(2**i for i in range(min(top, 2 ** (bits - 1))))
        return Codebook(bits, (*(-p for p in reversed(powers)), *powers) if signed else (0, *powers[:3]))
    return Uniform(bits, signed, form if signed else "full")


class Forced(torch.fx.Interpreter):
    """The fake-quantized network in float64, whose every activation goes on with the given levels.

    ``levels`` int ``[n, ...]`` by site, of whatever runs the program on the same inputs. ``differing``
    counts, by site, the codes that were others before that.
    """

    def __init__(self, lowered: Lowered, levels: Mapping[str, np.ndarray]) -> None:
        graph = lowered.graph.copy()
        super().__init__(graph.module.double())
        self.program = lowered.program
        self.levels = levels
        self.frozen = {site: quantizer.freeze() for site, quantizer in lowered.graph.quantizers.items()}
        self.differing: dict[str, int] = {}
        self.sizes: dict[str, int] = {}

    def call_module(self, target, args, kwargs):
        value = super().call_module(target, args, kwargs)
        if not isinstance(self.module.get_submodule(str(target)), Quantizer):
            return value
        site = target.removeprefix("quantizers.").replace(":", ".")
        grid, step = self.frozen[site].grid, self.frozen[site].step.numpy()
        if site in self.program.weights:
            step = step.reshape(-1, *(1,) * (value.dim() - 1))
            packed = self.program.weights[site]
            codes = unpack(packed.packed, grid.bits, value.numel()).reshape(packed.shape)
            levels = np.asarray(grid.levels)[codes]
        else:
            levels = self.levels[site]
        ours, theirs = np.searchsorted(grid.levels, levels), code_of(value.numpy() / step, grid)
        assert np.abs(ours - theirs).max() <= 1, f"{site}: codes differ by more than one level"
        self.differing[site], self.sizes[site] = int((ours != theirs).sum()), ours.size
        return torch.from_numpy(levels * step.astype(np.float64))


def code_of(levels: np.ndarray, grid: Grid) -> np.ndarray:
    """Codes of values that are levels but for rounding."""
    middle = (np.asarray(grid.levels)[1:] + np.asarray(grid.levels)[:-1]) / 2
    return np.searchsorted(middle, levels)
