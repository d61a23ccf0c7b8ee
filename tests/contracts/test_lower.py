"""Every network lowered: the program computes what the network computes, in the bytes that costs say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from lowered import LARGE, NETWORKS, Forced, Lowered, lowered, quantized
from mixbits import zoo
from mixbits.core.cost import COSTS
from mixbits.core.grid import Uniform, dequantize, quantize
from mixbits.graph.quant_graph import QuantGraph, capture, put_
from mixbits.lower import lower
from mixbits.pack.artifact import ALIGN, FILLER, read_program, write_program
from mixbits.pack.bits import unpack
from mixbits.quant.quantizer import LearnedStep
from mixbits.runtime import Executor
from mixbits.runtime.values import Codes
from networks import Functional

# Both sides start every site from the same codes, so that only the rounding of one stretch of operations
# counts. A value of up to 255 steps is off by some units of its last place, 255 * 2**-22 = 6e-5 steps, on
# either side of a tie. Measured: 1.6e-4 of the codes at the worst site (vit_tiny, an 8-bit site behind a
# layer norm), 0 at nearly all.
TIES = 1e-3
# Relative to the largest logit: a few float32 roundings of 6e-8 after the last site. Measured: 1.1e-7.
LOGITS = 1e-6

every_network = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in NETWORKS]
)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def activations(network: Lowered) -> list[str]:
    return [site.name for site in network.graph.profile.sites if site.kind == "activation"]


def levels_at(trace, site: str) -> np.ndarray:
    codes = trace[f"{site}@quantized"]
    assert isinstance(codes, Codes)
    return codes.levels


@every_network
def test_program_computes_what_the_fake_quantized_network_computes(name):
    network = lowered(name)
    trace = Executor(network.program).trace(network.x)
    forced = Forced(network, {site: levels_at(trace, site) for site in activations(network)})
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
    stored = load_file(tmp_path / "model.mixbits")
    tensors = {name: tensor for name, tensor in stored.items() if not name.startswith(FILLER)}
    assert sum(tensor.nbytes for tensor in tensors.values()) == COSTS["size"].of(profile, bits)
    assert sum(tensors[site.name].nbytes for site in profile.weights) == COSTS["weights"].of(profile, bits)
    assert sum(tensor.nbytes for tensor in stored.values()) < COSTS["size"].of(profile, bits) + ALIGN * len(
        tensors
    )
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
        (lambda self, x: self.head(self.conv(x).mean((2, 3))) + self.conv(x).mean(0).mean(), "mean"),
        (
            lambda self, x: self.head(self.conv(x).mean((2, 3))) + self.head.weight.sum(1),
            "quantized weight 'head.weight'",
        ),
    ],
    ids=["over-batch", "weight-elsewhere"],
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
