"""Every network lowered: the program computes what the network computes, in the bytes that costs say."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file
from torch import nn

from mixbits import zoo
from mixbits.core.cost import COSTS
from mixbits.core.grid import Codebook, Grid, Uniform, dequantize, quantize
from mixbits.core.program import Program
from mixbits.graph.quant_graph import QuantGraph, capture, put_
from mixbits.lower import lower
from mixbits.pack.artifact import read_program, write_program
from mixbits.pack.bits import unpack
from mixbits.quant.observe import Recorder, mse_step
from mixbits.quant.quantizer import LearnedStep, Quantizer
from mixbits.runtime import Executor
from mixbits.runtime.values import Codes
from mixbits.zoo.mobilenet import STAGES_32, MobileNet, Stage
from mixbits.zoo.vgg import STAGES, VGG
from mixbits.zoo.vit import ViT
from networks import ODD_NETWORKS, Functional

# Both sides start every site from the same codes, so that only the rounding of one stretch of operations
# counts. A value of up to 255 steps is off by some units of its last place, 255 * 2**-22 = 6e-5 steps, on
# either side of a tie. Measured: 1.6e-4 of the codes at the worst site (vit_tiny, an 8-bit site behind a
# layer norm), 0 at nearly all.
TIES = 1e-3
# Relative to the largest logit: a few float32 roundings of 6e-8 after the last site. Measured: 1.1e-7.
LOGITS = 1e-6

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
# Said once by torch where a codebook's activation is a transposed tensor.
pytestmark = pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning")
every_network = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in NETWORKS]
)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    """The fake-quantized network in float64, whose every site goes on with the program's codes.

    ``differing`` counts, by site, the codes that were not the program's before that.
    """

    def __init__(self, lowered: Lowered) -> None:
        graph = lowered.graph.copy()
        super().__init__(graph.module.double())
        self.program = lowered.program
        self.trace = Executor(lowered.program).trace(lowered.x)
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
            codes = self.trace[f"{site}@quantized"]
            assert isinstance(codes, Codes)
            levels = codes.levels
        ours, theirs = np.searchsorted(grid.levels, levels), code_of(value.numpy() / step, grid)
        assert np.abs(ours - theirs).max() <= 1, f"{site}: codes differ by more than one level"
        self.differing[site], self.sizes[site] = int((ours != theirs).sum()), ours.size
        return torch.from_numpy(levels * step.astype(np.float64))


def code_of(levels: np.ndarray, grid: Grid) -> np.ndarray:
    """Codes of values that are levels but for rounding."""
    middle = (np.asarray(grid.levels)[1:] + np.asarray(grid.levels)[:-1]) / 2
    return np.searchsorted(middle, levels)


@every_network
def test_program_computes_what_the_fake_quantized_network_computes(name):
    network = lowered(name)
    forced = Forced(network)
    with torch.no_grad():
        expected = forced.run(torch.from_numpy(network.x).double()).numpy()
    allowed = {site: 1 + TIES * size for site, size in forced.sizes.items()}
    assert {s: n for s, n in forced.differing.items() if n > allowed[s]} == {}
    assert set(forced.differing) == {site.name for site in network.graph.profile.sites}
    logits = Executor(network.program)(network.x)
    assert logits.dtype == np.float32
    assert np.abs(logits - expected).max() <= LOGITS * np.abs(expected).max()


@every_network
def test_cost_formulas_equal_the_bytes_of_the_file(name, tmp_path):
    network = lowered(name)
    write_program(network.program, tmp_path / "model.mixbits")
    profile = network.graph.profile
    bits = {site: quantizer.freeze().grid.bits for site, quantizer in network.graph.quantizers.items()}
    tensors = load_file(tmp_path / "model.mixbits")
    assert sum(tensor.nbytes for tensor in tensors.values()) == COSTS["size"].of(profile, bits)
    assert sum(tensors[site.name].nbytes for site in profile.weights) == COSTS["weights"].of(profile, bits)
    assert network.program.stored_floats == profile.stored_floats
    assert network.program.size_bytes == COSTS["size"].of(profile, bits)


@every_network
def test_program_from_a_file_is_the_program(name, tmp_path):
    program = lowered(name).program
    write_program(program, tmp_path / "a.mixbits")
    again = read_program(tmp_path / "a.mixbits")
    write_program(again, tmp_path / "b.mixbits")
    assert (tmp_path / "a.mixbits").read_bytes() == (tmp_path / "b.mixbits").read_bytes()
    assert again.instructions == program.instructions
    x = lowered(name).x[:1]
    assert np.array_equal(Executor.from_file(tmp_path / "a.mixbits")(x), Executor(program)(x))


@every_network
def test_samples_do_not_depend_on_their_batch(name):
    network = lowered(name)
    executor = Executor(network.program)
    together = executor(network.x[:2])
    assert np.array_equal(executor(network.x[1:2]), together[1:])
    assert executor(network.x[:0]).shape == (0, *together.shape[1:])


def test_relu_in_front_of_an_unsigned_grid_goes():
    program = lowered("resnet20").program
    assert not [step for step in program.instructions if step.op == "relu"]


def test_batch_norm_becomes_scale_and_bias():
    program = lowered("resnet20").program
    assert not [step for step in program.instructions if step.op == "batch_norm"]
    assert [step.name for step in program.instructions if step.op == "conv2d"][:2] == [
        "conv1",
        "layer1.0.conv1",
    ]


def test_a_weight_read_twice_is_stored_once():
    program = lowered("shared_cnn").program
    readers = [step.name for step in program.instructions if step.attrs.get("weight") == "shared.weight"]
    assert readers == ["shared", "shared.1"]
    assert list(program.weights) == ["stem.weight", "shared.weight", "linear.weight"]


def test_values_that_only_move_stay_codes():
    shape, _ = NETWORKS["vgg16_narrow"]
    trace = Executor(lowered("vgg16_narrow").program).trace(np.zeros((1, *shape), np.float32))
    pools = [value for name, value in trace.items() if "max_pool2d" in name]
    assert len(pools) == 5
    assert all(isinstance(value, Codes) for value in pools)


def test_packed_weights_are_the_codes_of_the_grid():
    network = lowered("digits_cnn")
    frozen = network.graph.quantizers["conv1.0.weight"].freeze()
    weight, packed = (
        network.graph.weight("conv1.0.weight").detach().numpy(),
        network.program.weights["conv1.0.weight"],
    )
    step = frozen.step.numpy().reshape(-1, 1, 1, 1)
    codes = unpack(packed.packed, frozen.grid.bits, weight.size).reshape(weight.shape)
    assert np.array_equal(codes, quantize(weight, step, frozen.grid))
    assert np.abs(dequantize(codes, step, frozen.grid) - weight).max() < np.abs(weight).max()


def small(forward) -> QuantGraph:
    network = Functional(forward, conv=nn.Conv2d(3, 4, 3), head=nn.Linear(4, 2))
    generator = torch.Generator().manual_seed(0)
    return quantized(network, torch.randn((2, 3, 6, 6), generator=generator), generator)


def test_a_site_without_quantizer_is_named():
    graph = capture(zoo.digits_cnn(), torch.zeros(2, 1, 8, 8))
    graph.module.eval()
    with pytest.raises(
        ValueError, match=r"input: no quantizer on this site .* Place a quantizer on each, or learn"
    ):
        lower(graph)


def test_training_mode_is_refused():
    graph = lowered("digits_cnn").graph.copy()
    graph.module.train()
    with pytest.raises(ValueError, match="training mode"):
        lower(graph)


def test_an_operation_without_rule_is_named():
    graph = small(lambda self, x: self.head(torch.atan(self.conv(x)).mean((2, 3))))
    with pytest.raises(
        ValueError, match=r"^atan: no instruction for atan \(have: .*conv2d.*\)\. Write the network"
    ):
        lower(graph)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (
            lambda self, x: self.head(F.interpolate(self.conv(x), size=(7, 7)).mean((2, 3))),
            "sizes .4, 4. to .7, 7.",
        ),
        (lambda self, x: self.head(self.conv(x).mean((2, 3))) + self.conv(x).mean(0).mean(), "mean"),
        (
            lambda self, x: self.head(self.conv(x).mean((2, 3))) + self.head.weight.sum(1),
            "quantized weight 'head.weight'",
        ),
    ],
    ids=["uneven-scale", "over-batch", "weight-elsewhere"],
)
def test_forms_that_no_instruction_has_are_named(forward, message):
    graph = small(forward)
    with pytest.raises(ValueError, match=message):
        lower(graph)


def test_sums_beyond_the_accumulator_are_refused():
    inputs = 2**31 // 255**2 + 1
    network = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 2))
    graph = capture(network, torch.zeros(2, inputs))
    step, bipolar = torch.tensor(0.1), Uniform(8, signed=True, form="bipolar")
    put_(graph, {site.name: LearnedStep(bipolar, step, shared_by=1) for site in graph.profile.sites})
    graph.module.eval()
    with pytest.raises(
        ValueError, match=r"1: its sums can reach 2147\d+, beyond the 32-bit .* Use fewer bits for '1.weight'"
    ):
        lower(graph)
