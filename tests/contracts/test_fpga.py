"""FPGA tools: what hls4ml's emulation in C++ fixed point computes is what our runtime computes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mixbits.core.grid import Grid, Uniform
from mixbits.export import Exported, hls4ml, power_of_two_steps
from mixbits.graph.quant_graph import QuantGraph, capture, put_
from mixbits.lower import lower
from mixbits.quant.observe import Recorder, mse_step
from mixbits.quant.quantizer import LearnedStep
from mixbits.runtime import Executor
from networks import Functional

DOCUMENT = Path(__file__).parents[2] / "docs" / "exports.md"
RECIPE = re.compile(r"^```py\n(import hls4ml\n.*?)^```", re.DOTALL | re.MULTILINE)


def block(c_in: int, c_out: int, kernel: int = 3, **options) -> nn.Sequential:
    layer = nn.Conv2d(c_in, c_out, kernel, bias=False, **options)
    return nn.Sequential(layer, nn.BatchNorm2d(c_out), nn.ReLU())


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5))


def strided() -> nn.Module:
    """Strides, padding, batch norm, biases, a max-pool that hangs over, features in the order of maps."""
    pool = nn.MaxPool2d(3, 2, 1)
    last = nn.Conv2d(6, 4, 1)
    return nn.Sequential(
        block(3, 6, stride=2, padding=1), pool, last, nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)
    )


def residual() -> nn.Module:
    """Additions of a branch to codes and to another branch, means of 4 pixels."""

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(self.same(x) + x)
        x = torch.relu(self.down(x) + self.shortcut(x))
        return self.head(self.pool(x).flatten(1))

    def branch(c_in: int, c_out: int, stride: int) -> nn.Sequential:
        inner = block(c_in, c_out, stride=stride, padding=1)
        return nn.Sequential(inner, nn.Conv2d(c_out, c_out, 3, padding=1), nn.BatchNorm2d(c_out))

    return Functional(
        forward,
        stem=block(3, 4, stride=2, padding=1),
        same=branch(4, 4, 1),
        down=branch(4, 6, 2),
        shortcut=nn.Sequential(nn.Conv2d(4, 6, 1, stride=2, bias=False), nn.BatchNorm2d(6)),
        pool=nn.AvgPool2d(2),
        head=nn.Linear(24, 5),
    )


def separable() -> nn.Module:
    """Depthwise layers, ReLU6, means of 9 pixels."""
    depthwise = block(6, 6, padding=1, groups=6)
    last = nn.Sequential(nn.Conv2d(6, 8, 1), nn.ReLU6(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(8, 5))
    return nn.Sequential(block(3, 6, stride=2, padding=1), depthwise, nn.MaxPool2d(2, 1), last)


def branches() -> nn.Module:
    """Joined channels, groups, dilation, a sum of ReLUs, the largest of all pixels."""

    def forward(self, x):
        x = torch.relu(self.a(x)) + torch.relu(self.b(x))
        x = torch.cat([self.grouped(x), self.dilated(x), x], 1)
        return self.head(self.pool(self.last(x)).flatten(1))

    return Functional(
        forward,
        a=nn.Conv2d(3, 4, 3),
        b=nn.Conv2d(3, 4, 3),
        grouped=block(4, 4, padding=1, groups=2),
        dilated=block(4, 2, padding=2, dilation=2),
        last=nn.Conv2d(10, 4, 1),
        pool=nn.AdaptiveMaxPool2d(1),
        head=nn.Linear(4, 5),
    )


def bipolar(grid: Grid) -> Grid:
    return Uniform(min(grid.bits, 3), signed=True, form="bipolar") if grid.level_min < 0 else grid


def narrow(grid: Grid) -> Grid:
    return Uniform(grid.bits, signed=True, form="narrow") if grid.level_min < 0 else grid


NETWORKS = {
    "perceptron": (perceptron, (16,), None, "io_parallel"),
    "strided": (strided, (3, 8, 8), None, "io_parallel"),
    "residual": (residual, (3, 16, 16), None, "io_stream"),
    "separable": (separable, (3, 8, 8), narrow, "io_parallel"),
    "branches": (branches, (3, 6, 6), bipolar, "io_parallel"),
}


def quantized(
    network: nn.Module, x: torch.Tensor, change: Callable[[Grid], Grid] | None = None
) -> QuantGraph:
    """Random batch norms, widths of 2 to 8 bits, a power-of-two step an activation and a channel."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            for parameter, low, high in (
                (module.running_var, 0.3, 2),
                (module.weight, -1, 2),
                (module.bias, -1, 1),
            ):
                nn.init.uniform_(parameter, low, high)
            nn.init.normal_(module.running_mean, std=0.3)
    graph = capture(network, x)
    graph.module.eval()
    recorders = {site.name: Recorder(1) for site in graph.profile.sites}
    put_(graph, recorders)
    with torch.no_grad():
        graph(x)
    placed = {}
    for site, bits in zip(graph.profile.sites, cycle((8, 3, 4, 4, 5, 2, 6)), strict=False):
        grid = Uniform(bits, signed=site.kind == "weight" or site.signed)
        grid = grid if change is None else change(grid)
        if site.kind == "weight":
            weight = graph.weight(site.name).detach()
            step = mse_step(weight.flatten(1), grid).reshape(-1, *(1,) * (weight.dim() - 1))
        else:
            step = mse_step(recorders[site.name].values()[None], grid)[0]
        placed[site.name] = LearnedStep(grid, step, shared_by=1)
    put_(graph, placed)
    graph.module.eval()
    return power_of_two_steps(graph)


def emulated(exported: Exported, x: np.ndarray, io_type: str = "io_parallel") -> np.ndarray:
    """Outputs by the recipe of docs/exports.md."""
    (recipe,) = RECIPE.findall(DOCUMENT.read_text(encoding="utf-8"))
    assert "io_parallel" in recipe
    exported.write("model.onnx")
    names = {"images": x}
    with warnings.catch_warnings():  # what these packages warn of is theirs to mend
        warnings.simplefilter("ignore")
        exec(compile(recipe.replace("io_parallel", io_type), str(DOCUMENT), "exec"), names)
    return names["outputs"]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", NETWORKS)
def test_the_emulated_circuit_equals_the_runtime_bit_for_bit(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network, shape, change, io_type = NETWORKS[name]
    x = torch.randn(200, *shape)
    graph = quantized(network(), x, change)
    expected = Executor(lower(graph))(x.numpy())

    found = emulated(hls4ml(graph), x.numpy(), io_type)

    assert len(np.unique(expected)) > 30
    assert np.array_equal(found.reshape(expected.shape), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_means_of_other_counts_differ_by_one_code_and_only_halfway_between_two(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    head = nn.Linear(4, 4, bias=False)
    nn.init.eye_(head.weight)  # the outputs are multiples of the means
    x = torch.randn(500, 3, 6, 6)
    pool = nn.AdaptiveAvgPool2d(1)  # of 36 = 4 x 9
    graph = quantized(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), pool, nn.Flatten(), head), x)
    program = lower(graph)
    (pooled,) = (step for step in program.instructions if step.op == "adaptive_avg_pool")
    (coded,) = (step for step in program.instructions if step.inputs == (pooled.output,))
    size = float(program.constants[coded.attrs["step"]])
    before = replace(program, output=pooled.inputs[0], instructions=program.instructions[:3])
    sums = Executor(before)(x.numpy()).sum(axis=(2, 3), dtype=np.float64)
    halfway = np.vectorize(lambda total: (Fraction(total) / 36 / Fraction(size)).denominator == 2)(sums)
    exported = hls4ml(graph)
    expected = Executor(program)(x.numpy())

    found = emulated(exported, x.numpy()).reshape(expected.shape)

    kept = graph.quantizers["4.weight"](graph.weight("4.weight")).detach().diagonal().numpy()
    assert any("halfway" in note for note in exported.notes)
    assert (found != expected).any()
    assert halfway[found != expected].all()
    assert np.abs((found - expected) / (kept * size)).max() == 1


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.SiLU(), r"1/silu: not exported to hls4ml: silu \(have: .*relu.*\)\. Write"),
        (nn.MaxPool2d(2, ceil_mode=True), r"1/max_pool2d: .*beyond the padding.*ceil_mode=False"),
        (nn.MaxPool2d(2, dilation=2), r"1/max_pool2d: .*dilation=1"),
        (nn.AvgPool2d(3, 2, 1, count_include_pad=False), r"1/avg_pool2d: .*count_include_pad=True"),
        (nn.AdaptiveAvgPool2d(2), r"1/adaptive_avg_pool2d: .*sizes that divide"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_what_hls4ml_cannot_compute_is_refused_by_name(layer, message):
    torch.manual_seed(0)
    graph = quantized(nn.Sequential(nn.Conv2d(3, 4, 2), layer, nn.Conv2d(4, 2, 1)), torch.randn(4, 3, 6, 6))
    with pytest.raises(ValueError, match=message):
        hls4ml(graph)


def test_a_packed_program_with_other_factors_is_refused():
    torch.manual_seed(0)
    graph = quantized(block(3, 4), torch.randn(4, 3, 6, 6))
    program = lower(graph)
    scale = next(step.attrs["scale"] for step in program.instructions if step.op == "conv2d")
    constants = {**program.constants, scale: program.constants[scale] * 3}
    with pytest.raises(ValueError, match=r"0: a scale of its channels is no power of two. Export from"):
        hls4ml(replace(program, constants=constants))


def test_powers_of_two_leave_no_factor_and_exact_sums():
    torch.manual_seed(0)
    program = lower(quantized(residual(), torch.randn(8, 3, 16, 16)))
    for step in program.instructions:
        if "scale" in step.attrs:
            assert (np.frexp(program.constants[step.attrs["scale"]])[0] == 0.5).all()
    x = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
    logits = Executor(program)(x)
    assert np.array_equal(logits.astype(np.float64) * 2.0**24 % 1, np.zeros_like(logits))
