"""Every exporter: what its files compute is what the fake-quantized network computes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from lowered import NETWORKS, Forced, Lowered, lowered
from mixbits.core.grid import Uniform
from mixbits.export import Exported, onnx_qdq

# Both sides start every site from the same codes (see tests/lowered.py), so that only the float rounding of
# one stretch of operations counts: onnxruntime sums in float32, in an order of its own.
TIES = 1e-3
# Relative to the largest logit: float32 sums of up to 512 products of 6e-8 each.
LOGITS = 1e-5
# With the biases of convolutions in int32 units of the integer sums, as onnxruntime holds them. A unit is at
# most 1 / 64 of what 8-bit weights would have ...
BIAS_TIES = 2e-2

pytestmark = pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning")
QUICK = ("digits_cnn", "branches", "grouped", "residual_without_relu", "class_token", "unet")
every_network = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NETWORKS]
)
LEVELS = {"as-written": "ORT_DISABLE_ALL", "optimized": "ORT_ENABLE_ALL"}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def session(model: bytes, optimizations: str = "ORT_ENABLE_ALL") -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, optimizations)
    options.log_severity_level = 4
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def with_codes(exported: Exported, names: list[str]) -> bytes:
    """The model with the integers of these values among its outputs, 4-bit ones as int8."""
    model = ir.from_proto(onnx.load_from_string(exported.to_bytes()))
    values = {value.name: value for node in model.graph for value in node.outputs}
    for name in names:
        cast = ir.node("Cast", [values[name]], {"to": ir.DataType.INT32}, name=f"{name}/cast")
        cast.outputs[0].name = f"{name}/integers"
        cast.outputs[0].dtype = ir.DataType.INT32
        model.graph.append(cast)
        model.graph.outputs.append(cast.outputs[0])
    return ir.to_proto(model).SerializeToString()


def ran(network: Lowered, exported: Exported, optimizations: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits, and the levels of every activation site, as onnxruntime computes them."""
    sites = {
        site.name: network.graph.quantizers[site.name].freeze().grid
        for site in network.graph.profile.sites
        if site.kind == "activation"
    }
    watched = session(with_codes(exported, [f"{site}@quantized" for site in sites]), optimizations)
    logits, *integers = watched.run(None, {"input": network.x})
    alone = session(exported.to_bytes(), optimizations).run(None, {"input": network.x})[0]
    assert np.array_equal(logits, alone), "watching changes what is computed"
    levels = {}
    for (site, grid), found in zip(sites.items(), integers, strict=True):
        if isinstance(grid, Uniform) and grid.form == "bipolar":
            found = 2 * found + (-1 if grid.bits == 1 else 1)
        elif isinstance(grid, Uniform):
            found = np.clip(found, grid.level_min, grid.level_max)
        levels[site] = found.astype(np.int16)
    return logits, levels


@every_network
@pytest.mark.parametrize("optimizations", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("runtime", ["any", "onnxruntime"])
def test_onnxruntime_computes_what_the_fake_quantized_network_computes(name, runtime, optimizations):
    network = lowered(name)
    exported = onnx_qdq(network.program, runtime=runtime)
    logits, levels = ran(network, exported, optimizations)
    forced = Forced(network, levels)
    with torch.no_grad():
        expected = forced.run(torch.from_numpy(network.x).double()).numpy()
    print(
        sorted([(n / forced.sizes[s], n, s) for s, n in forced.differing.items()])[-3:],
        np.abs(logits - expected).max() / np.abs(expected).max(),
    )
    ties = BIAS_TIES if runtime == "onnxruntime" else TIES
    allowed = {site: 2 + ties * size for site, size in forced.sizes.items()}
    assert {s: n for s, n in forced.differing.items() if n > allowed[s]} == {}
    assert np.abs(logits - expected).max() <= LOGITS * np.abs(expected).max()
