"""Baselines that learn nothing by training: what they choose on networks whose sensitivities differ."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from mixbits.core.budget import parse_budget
from mixbits.graph.quant_graph import capture
from mixbits.methods.reversed import Reversed
from mixbits.methods.sensitivity import Sensitivity
from mixbits.train.method import Target, learn
from mixbits.train.steps import Loop
from mixbits.train.task import Task, make_task


def widening() -> nn.Module:
    """Layers of very different sizes, as networks have them: the largest weigh 60 times the smallest."""
    layers, channels = [], 3
    for width in (8, 8, 16, 16, 32, 32):
        stride = 2 if width > channels > 3 else 1
        layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


@pytest.fixture(scope="module")
def task() -> Task:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 3, 16, 16, generator=generator).numpy()
    y = torch.randint(0, 10, (256,), generator=generator).numpy()
    return make_task((x, y), (x[:8], y[:8]), batch_size=64, held_out=0.1)


@pytest.mark.parametrize("limit", ["weights=3bit,act=3bit", "weights=4bit,act=4bit"])
def test_reversed_gives_wide_weights_and_activations_where_sensitivity_gives_narrow_ones(task, limit):
    torch.manual_seed(0)
    graph = capture(widening(), torch.zeros(2, 3, 16, 16))
    target = Target(parse_budget(limit), range(1, 9), range(1, 9), pins={"input": 8})

    right, _ = learn(Sensitivity(), graph, task, target, Loop())
    turned, _ = learn(Reversed(), graph, task, target, Loop())

    for sites in (graph.profile.weights, graph.profile.activations):
        names = [site.name for site in sites if site.name != "input"]
        agreement, _ = spearmanr([right.bits[n] for n in names], [turned.bits[n] for n in names])
        assert agreement < -0.3
