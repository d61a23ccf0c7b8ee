"""FPGA tools: what hls4ml's emulation in C++ fixed point computes is what our runtime computes."""

from __future__ import annotations

import warnings
from itertools import cycle

import numpy as np
import pytest
import torch
from torch import nn

from mixbits.core.grid import Uniform
from mixbits.export import qonnx
from mixbits.export.power_of_two import power_of_two_steps
from mixbits.graph.quant_graph import QuantGraph, capture, put_
from mixbits.lower import lower
from mixbits.quant.observe import Recorder, mse_step
from mixbits.quant.quantizer import LearnedStep
from mixbits.runtime import Executor

PRECISION = "fixed<32,16>"  # of hls4ml's inputs and biases: multiples of 2**-16, the rest cut off
UNIT = 2.0**-16


def quantized(network: nn.Module, x: torch.Tensor) -> QuantGraph:
    """Random weights, biases in fixed point, widths of 2 to 8 bits, one power-of-two step a tensor."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.copy_((parameter / UNIT).round() * UNIT)
    graph = capture(network, x)
    graph.module.eval()
    recorders = {site.name: Recorder(1) for site in graph.profile.sites}
    put_(graph, recorders)
    with torch.no_grad():
        graph(x)
    placed = {}
    for site, bits in zip(graph.profile.sites, cycle((8, 3, 4, 4, 5, 2, 6)), strict=False):
        grid = Uniform(bits, signed=site.kind == "weight" or site.signed)
        values = graph.weight(site.name).detach().flatten() if site.kind == "weight" else None
        values = recorders[site.name].values() if values is None else values
        placed[site.name] = LearnedStep(grid, mse_step(values[None], grid)[0], shared_by=1)
    put_(graph, placed)
    graph.module.eval()
    return power_of_two_steps(graph)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # what these packages warn of is theirs to mend
def test_emulated_circuit_equals_the_runtime_bit_for_bit(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import hls4ml  # noqa: PLC0415  takes seconds
        from qonnx.core.modelwrapper import ModelWrapper  # noqa: PLC0415
        from qonnx.util.cleanup import cleanup_model  # noqa: PLC0415
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5))
    x = (torch.randn(200, 16) / UNIT).round() * UNIT
    graph = quantized(network, x)
    expected = Executor(lower(graph))(x.numpy())

    model = cleanup_model(ModelWrapper(qonnx(graph, power_of_two=True).to_bytes()))
    options = hls4ml.utils.config.config_from_onnx_model(
        model, granularity="name", backend="Vitis", default_precision=PRECISION
    )
    circuit = hls4ml.converters.convert_from_onnx_model(
        model,
        output_dir=str(tmp_path / "circuit"),
        io_type="io_parallel",
        backend="Vitis",
        hls_config=options,
    )
    circuit.compile()
    found = circuit.predict(x.numpy()).reshape(expected.shape)

    assert len(np.unique(expected)) > 100
    assert np.array_equal(found, expected)
