"""Every exporter: what its files compute is what the fake-quantized network computes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from lowered import LARGE, NETWORKS, Forced, Lowered, lowered
from mixbits.core.grid import Codebook, Grid, Uniform, grid_to_json
from mixbits.core.instructions import INSTRUCTIONS
from mixbits.core.program import Instruction, PackedWeight, Program
from mixbits.export import Exported, onnx_qdq, qonnx
from mixbits.export.onnx_qdq import LAYERS
from mixbits.export.operations import MOVES, ON_FLOATS, operation
from mixbits.export.power_of_two import power_of_two_steps
from mixbits.lower import lower
from mixbits.pack.bits import pack
from mixbits.runtime import Executor
from strategies import UNIFORM_GRIDS

with warnings.catch_warnings():  # of packages that qonnx reads
    warnings.simplefilter("ignore")
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.infer_shapes import InferShapes

# Both sides start every site from the same codes (tests/lowered.py), so that only the float rounding of one
# stretch of operations counts, in another order of sums. Measured: 4e-5 of the codes at the worst site.
TIES = 1e-3
# Where a convolution runs in integers, onnxruntime rounds its bias, by at most 1 / 16 step of its result: that
# many values can cross a tie, if every channel has that error. Measured: 4.6e-3 of the codes at the worst site.
BIAS_TIES = 1 / 16
FEW = 2  # codes that may differ at any site, however small
# Relative to the largest logit: float32 sums of up to 512 products, each 6e-8 off. Measured: 5e-7.
LOGITS = 2e-6

QUICK = ("digits_cnn", "class_token", "grouped", "unet")
every_network = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NETWORKS]
)
AS_WRITTEN, OPTIMIZED = "ORT_DISABLE_ALL", "ORT_ENABLE_ALL"
optimized_or_not = pytest.mark.parametrize(
    "optimizations", [AS_WRITTEN, OPTIMIZED], ids=["as-written", "optimized"]
)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def in_onnxruntime(
    exported: Exported, x: np.ndarray, names: list[str], *, optimizations: str
) -> list[np.ndarray]:
    """The output and the values of these names, integers as int32, of a model that passes the checker."""
    onnx.checker.check_model(exported.to_bytes(), full_check=True)
    watched = session(_with_outputs(exported, names), optimizations).run(None, {"input": x})
    alone = session(exported.to_bytes(), optimizations).run(None, {"input": x})
    assert np.array_equal(watched[0], alone[0]), "watching changed what is computed"
    return watched


def session(model: bytes, optimizations: str = OPTIMIZED) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, optimizations)
    options.log_severity_level = 4
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _with_outputs(exported: Exported, names: list[str]) -> bytes:
    model = ir.from_proto(onnx.load_from_string(exported.to_bytes()))
    values = {value.name: value for node in model.graph for value in node.outputs}
    for name in names:
        cast = ir.node("Cast", [values[name]], {"to": ir.DataType.INT32}, name=f"{name}/cast")
        cast.outputs[0].name, cast.outputs[0].dtype = f"{name}/integers", ir.DataType.INT32
        model.graph.append(cast)
        model.graph.outputs.append(cast.outputs[0])
    return ir.to_proto(model).SerializeToString()


def in_qonnx(exported: Exported, x: np.ndarray, names: list[str]) -> list[np.ndarray]:
    """The output and the values of these names, by the executor of the qonnx package."""
    model = ModelWrapper(exported.to_bytes()).transform(InferShapes())
    values = execute_onnx(model, {"input": x}, return_full_exec_context=True)
    return [values["output"], *(values[name] for name in names)]


def agree(network: Lowered, logits: np.ndarray, levels: Mapping[str, np.ndarray], ties: float) -> None:
    """Codes are those of the fake-quantized network but for ties, and so are the logits of equal codes."""
    forced = Forced(network, levels)
    with torch.no_grad():
        expected = forced.run(torch.from_numpy(network.x).double()).numpy()
    allowed = {site: FEW + ties * size for site, size in forced.sizes.items()}
    assert {site: n for site, n in forced.differing.items() if n > allowed[site]} == {}
    assert np.abs(logits - expected).max() <= LOGITS * np.abs(expected).max()
    assert np.array_equal(logits.argmax(-1), expected.argmax(-1))


def activation_grids(network: Lowered) -> dict[str, Grid]:
    quantizers = network.graph.quantizers
    sites = [site.name for site in network.graph.profile.sites if site.kind == "activation"]
    return {name: quantizers[name].freeze().grid for name in sites}


def signed_integers(grid: Grid) -> bool:
    """Whether an exporter takes integers below 0 for a grid; one bipolar bit is 0 and 1."""
    return grid.level_min < 0 and grid != Uniform(1, signed=True, form="bipolar")


def levels_of_integers(integers: np.ndarray, grid: Grid) -> np.ndarray:
    """The level that an exported integer stands for."""
    if isinstance(grid, Codebook):
        return integers
    if grid.form == "bipolar":
        return 2 * integers + (-1 if grid.bits == 1 else 1)
    return np.clip(integers, grid.level_min, grid.level_max)


@every_network
@optimized_or_not
@pytest.mark.parametrize("runtime", ["any", "onnxruntime"])
def test_onnxruntime_computes_what_the_fake_quantized_network_computes(name, runtime, optimizations):
    network, grids = lowered(name), activation_grids(lowered(name))
    exported = onnx_qdq(network.program, runtime=runtime)

    logits, *integers = in_onnxruntime(
        exported, network.x, [f"{site}@quantized" for site in grids], optimizations=optimizations
    )

    unsigned = runtime == "onnxruntime"  # its integers are, around 128
    levels = {
        site: levels_of_integers(found - 128 if unsigned and signed_integers(grid) else found, grid)
        for (site, grid), found in zip(grids.items(), integers, strict=True)
    }
    agree(network, logits, levels, BIAS_TIES if runtime == "onnxruntime" else TIES)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in NETWORKS
        if name not in LARGE
    ],
)
def test_the_qonnx_executor_computes_what_the_fake_quantized_network_computes(name):
    network, grids = lowered(name), activation_grids(lowered(name))

    logits, *values = in_qonnx(
        qonnx(network.program, batch=2), network.x, [f"{site}@quantized" for site in grids]
    )

    steps = {site: network.graph.quantizers[site].freeze().step.numpy() for site in grids}
    levels = {
        site: np.rint(value / steps[site]).astype(np.int64) for site, value in zip(grids, values, strict=True)
    }
    agree(network, logits, levels, TIES)


@every_network
def test_two_bit_types_compute_the_same_where_onnxruntime_does_not_optimize(name):
    network, grids = lowered(name), activation_grids(lowered(name))
    exported = onnx_qdq(network.program, smallest=2)

    logits, *integers = in_onnxruntime(
        exported, network.x, [f"{site}@quantized" for site in grids], optimizations=AS_WRITTEN
    )

    levels = {
        site: levels_of_integers(found, grid)
        for (site, grid), found in zip(grids.items(), integers, strict=True)
    }
    agree(network, logits, levels, TIES)


def layer_then_quantize(scale: np.ndarray, bias: np.ndarray) -> Program:
    """A convolution on codes whose result is quantized at once: what onnxruntime runs in integers."""
    weight_grid, grid = Uniform(2, signed=True), Uniform(4, signed=False)
    codes = np.random.default_rng(0).integers(0, 4, (len(scale), 3, 3, 3)).astype(np.uint8)
    weight = PackedWeight(codes.shape, weight_grid, pack(codes.ravel(), 2))
    window = {"stride": [1, 1], "padding": [[1, 1], [1, 1]], "dilation": [1, 1], "groups": 1}
    layer = {"weight": "w", "scale": "scale", "bias": "bias", **window}
    steps = (
        Instruction("quantize", "input", ("input",), "codes", {"grid": grid_to_json(grid), "step": "step"}),
        Instruction("conv2d", "conv", ("codes",), "maps", layer),
        Instruction("quantize", "maps", ("maps",), "out", {"grid": grid_to_json(grid), "step": "step"}),
    )
    constants = {"step": np.asarray(0.25, np.float32), "scale": scale, "bias": bias}
    return Program((3, 9, 9), "out", steps, {"w": weight}, constants)


def optimized_kinds(exported: Exported, tmp_path) -> list[str]:
    """The operations that onnxruntime makes of a model."""
    options = ort.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 4, str(tmp_path / "optimized.onnx")
    ort.InferenceSession(exported.to_bytes(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]


def test_convolutions_for_onnxruntime_run_in_integers(tmp_path):
    ones, zeros = np.ones(8, np.float32), np.zeros(8, np.float32)
    program = layer_then_quantize(0.05 * ones, 0.3 * ones)
    assert "QLinearConv" in optimized_kinds(onnx_qdq(program, runtime="onnxruntime"), tmp_path)
    assert "QLinearConv" not in optimized_kinds(onnx_qdq(program), tmp_path)
    without_bias = layer_then_quantize(0.05 * ones, zeros)
    assert "QLinearConv" in optimized_kinds(onnx_qdq(without_bias, smallest=8), tmp_path)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_matrix_products_for_onnxruntime_run_in_integers(signed, bits, tmp_path):
    program = on_weights(Uniform(4, signed=True), Uniform(bits, signed=signed))
    assert "MatMulIntegerToFloat" in optimized_kinds(onnx_qdq(program, runtime="onnxruntime"), tmp_path)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("runtime", ["any", "onnxruntime"])
def test_biases_of_matrix_products_are_not_rounded(runtime, bits):
    program = on_weights(Uniform(bits, signed=True), Uniform(4, signed=False))
    fine = {"grid": grid_to_json(Uniform(8, signed=True)), "step": "fine"}
    steps = (*program.instructions, Instruction("quantize", "layer", ("y",), "out", fine))
    constants = program.constants | {
        "fine": np.asarray(0.01, np.float32),
        "bias": np.linspace(-1, 1, 2**bits, dtype=np.float32),
    }
    program = replace(program, output="out", instructions=steps, constants=constants)
    x = np.linspace(-1, 5, 50, dtype=np.float32)[:, None]
    (found,) = in_onnxruntime(onnx_qdq(program, runtime=runtime), x, [], optimizations=OPTIMIZED)
    assert (found != Executor(program)(x)).mean() <= TIES


def test_clamped_inputs_of_matrix_products_are_not_quantized_anew():
    program = on_weights(Uniform(4, signed=True), Uniform(4, signed=False))
    clamp = Instruction("clamp", "relu6", ("input",), "clamped", {"low": 0, "high": 2.0})
    quantize, layer = program.instructions
    program = replace(program, instructions=(clamp, replace(quantize, inputs=("clamped",)), layer))
    x = np.linspace(-1, 5, 50, dtype=np.float32)[:, None]
    expected = Executor(program)(x)
    for runtime in ("any", "onnxruntime"):
        (found,) = in_onnxruntime(onnx_qdq(program, runtime=runtime), x, [], optimizations=OPTIMIZED)
        assert np.abs(found - expected).max() <= 4 * ULP * np.abs(expected).max()


def test_every_instruction_has_an_operation():
    assert {"quantize", *LAYERS, *MOVES, *ON_FLOATS} == set(INSTRUCTIONS)
    later = Instruction("fold_space", "layer7", (), "y")
    with pytest.raises(ValueError, match=r"^layer7: no ONNX operation for fold_space \(have: .*relu"):
        operation(later)


@pytest.mark.parametrize("runtime", ["any", "onnxruntime"])
@pytest.mark.parametrize("tiny", [0.0, 1e-14, 1e-3], ids=["none", "below-the-bias", "small"])
def test_channels_that_batch_norm_turns_round_or_off_keep_their_biases(runtime, tiny):
    scale = np.float32([0.05, -0.05, tiny, -tiny, 0.04, 0.03, -0.02, 0.01])
    program = layer_then_quantize(scale, np.float32([0.3, 0.31, 1.3, 2.7, 0.0, -0.2, 1.1, 3.0]))
    x = np.random.default_rng(1).normal(1, 1, (4, 3, 9, 9)).astype(np.float32)
    expected = Executor(program)(x)

    (found,) = in_onnxruntime(onnx_qdq(program, runtime=runtime), x, [], optimizations=OPTIMIZED)

    assert (found != expected).mean() <= (BIAS_TIES if runtime == "onnxruntime" else 0)
    assert np.abs(found - expected).max() <= 0.25 * (1 + ULP)


def test_weights_are_stored_in_the_narrowest_type_once():
    network = lowered("shared_cnn")
    model = onnx_qdq(network.program).model
    for name, weight in network.program.weights.items():
        stored = [tensor for key, tensor in model.graph.initializers.items() if key.startswith(name)]
        assert len(stored) == 1
        reach = max(-weight.grid.level_min - 1, weight.grid.level_max)
        bits = 4 if reach < 8 else 8 if reach < 128 else 16
        elements = int(np.prod(weight.shape))
        assert stored[0].const_value.nbytes == -(-elements * bits // 8)


def test_no_node_is_left_unread():
    for export in (onnx_qdq, qonnx):
        graph = export(lowered("digits_cnn").program).model.graph
        assert [
            node.name for node in graph if not any(v.uses() or v in graph.outputs for v in node.outputs)
        ] == []


def test_a_network_is_lowered_on_the_way():
    network = lowered("digits_cnn")
    for export in (onnx_qdq, qonnx):
        assert export(network.graph).to_bytes() != b""
        about = dict(network.program.about)
        assert export(replace(network.program, about={})).to_bytes() == export(network.graph).to_bytes()
        assert about == {"network": "digits_cnn"}


def test_powers_of_two_are_the_only_scales_where_asked():
    network = lowered("digits_cnn")
    exported = qonnx(network.graph, power_of_two=True)
    initializers = exported.model.graph.initializers
    quantizers = [node for node in exported.model.graph if node.op_type in ("IntQuant", "BipolarQuant")]
    scales = [initializers[node.inputs[1].name].const_value.numpy() for node in quantizers]
    assert len(scales) == len(network.graph.profile.sites)
    assert all((np.frexp(scale)[0] == 0.5).all() for scale in scales)

    rounded = power_of_two_steps(network.graph)
    expected = Executor(lower(rounded))(network.x)
    (found,) = in_qonnx(qonnx(network.graph, power_of_two=True, batch=2), network.x, [])
    assert np.abs(found - expected).max() <= LOGITS * np.abs(expected).max()


def test_the_steps_of_a_program_cannot_become_powers_of_two():
    with pytest.raises(
        ValueError, match=r"input@quantized: its step 0\.\d+ is no power of two.* Export from"
    ):
        qonnx(lowered("digits_cnn").program, power_of_two=True)


@pytest.mark.parametrize(
    "export",
    [
        partial(onnx_qdq, runtime="tensorrt"),
        partial(onnx_qdq, smallest=3),
        partial(qonnx, node="QuantLinear"),
        partial(qonnx, batch=0),
    ],
    ids=["runtime", "smallest", "node", "batch"],
)
def test_targets_that_do_not_exist_are_refused(export):
    with pytest.raises(ValueError, match="no such"):
        export(lowered("digits_cnn").program)


def test_the_notes_say_what_runs_in_float():
    notes = " ".join(onnx_qdq(lowered("digits_cnn").program).notes)
    assert "4-bit weights" in notes
    assert "--for onnxruntime" in notes
    assert "4-bit weights" not in " ".join(
        onnx_qdq(lowered("digits_cnn").program, runtime="onnxruntime").notes
    )


def test_the_batch_is_open():
    network = lowered("digits_cnn")
    run = session(onnx_qdq(network.program).to_bytes()).run
    both = run(None, {"input": network.x})[0]
    assert run(None, {"input": network.x[1:]})[0].shape == (1, *both.shape[1:])
    assert np.abs(run(None, {"input": network.x[1:]})[0] - both[1:]).max() <= LOGITS * np.abs(both).max()


# --- grids, one at a time --------------------------------------------------------------------------------------

CODEBOOKS = (
    Codebook(2, (-4, -1, 1, 4)),
    Codebook(3, (0, 1, 2, 4, 8)),
    Codebook(4, (-7, -3, -1, 0, 2, 5), (-4.7, -1.5, -0.2, 1.0, 3.3)),
    Codebook(8, tuple(range(-128, 128, 3))),
    Codebook(8, tuple(range(0, 256, 7))),
)
every_grid = pytest.mark.parametrize("grid", [*UNIFORM_GRIDS, *CODEBOOKS], ids=str)
HALVES = np.arange(-600, 601, dtype=np.float32) / 2  # in steps: all levels, all ties, and beyond
BESIDE = HALVES + np.float32(0.13)  # no ties, for steps by which division is not exact


def on_activations(grid: Grid, step: float) -> Program:
    """Quantize, nothing else."""
    attrs = {"grid": grid_to_json(grid), "step": "step"}
    quantize = Instruction("quantize", "site", ("input",), "codes", attrs)
    return Program((len(HALVES),), "codes", (quantize,), {}, {"step": np.float32(step).reshape(())})


def on_weights(grid: Grid, activation: Grid = Uniform(8, signed=True)) -> Program:  # noqa: B008  frozen
    """All levels of the grid, times an input of one step; batch norm turns some channels round."""
    codes = np.arange(len(grid.levels), dtype=np.uint8)
    scale = (np.where(codes % 3 == 1, -1, 1) * 0.21).astype(np.float32)
    step = np.asarray(0.3, np.float32)
    constants = {"step": step, "scale": scale, "bias": codes.astype(np.float32)}
    weight = PackedWeight((len(codes), 1), grid, pack(codes, grid.bits))
    attrs = {"grid": grid_to_json(activation), "step": "step"}
    layer = {"weight": "w", "scale": "scale", "bias": "bias"}
    steps = (
        Instruction("quantize", "input", ("input",), "codes", attrs),
        Instruction("linear", "layer", ("codes",), "y", layer),
    )
    return Program((1,), "y", steps, {"w": weight}, constants)


ONNX = partial(in_onnxruntime, optimizations=AS_WRITTEN)
FORMATS = {
    "int8": (partial(onnx_qdq, smallest=8), ONNX),
    "int4": (onnx_qdq, ONNX),
    "int2": (partial(onnx_qdq, smallest=2), ONNX),
    "onnxruntime": (partial(onnx_qdq, runtime="onnxruntime"), ONNX),
    "qonnx": (qonnx, in_qonnx),
    "quant": (partial(qonnx, node="Quant"), in_qonnx),
}
RARE = ("int2", "quant")
every_format = pytest.mark.parametrize(
    ("export", "run"),
    [
        pytest.param(*format_, id=name, marks=pytest.mark.slow if name in RARE else ())
        for name, format_ in FORMATS.items()
    ],
)
ULP = 2.0**-23  # of a value: the definition rounds once, a format may round twice


@every_format
@every_grid
@pytest.mark.parametrize(("ratios", "step"), [(HALVES, 0.25), (BESIDE, 0.3)], ids=["ties", "any-step"])
def test_every_grid_of_activations_is_exported(grid, export, run, ratios, step):
    program = on_activations(grid, step)
    x = (ratios * np.float32(step))[None]
    expected = Executor(program)(x)

    (found,) = run(export(program), x, [])

    assert np.abs(found - expected).max() <= ULP * np.abs(expected).max()


@every_format
@every_grid
def test_every_grid_of_weights_is_exported(grid, export, run):
    program = on_weights(grid)
    x = np.full((1, 1), 0.9, np.float32)
    expected = Executor(program)(x)

    (found,) = run(export(program), x, [])

    assert np.abs(found - expected).max() <= 4 * ULP * np.abs(expected).max()
