"""Today's int8 runtimes for ``engine.py``: makes their models, and runs one of them whenever asked.

Of an environment of its own, with what ``engine_peers.txt`` lists; nothing of mixbits is imported here.

    python benchmarks/engine_peers.py build onnxruntime FOLDER
    python benchmarks/engine_peers.py serve onnxruntime FOLDER/onnxruntime.onnx --threads 1

``FOLDER`` holds ``network.pt2``, the float network exported for one batch size, and ``images.npy``, float32
[calibration batches, n, ...]. ``serve`` writes what it is as a line of JSON, then reads seconds, a line each, and
answers with the milliseconds of the fastest run of as many seconds, a line each.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

FEWEST_RUNS = 5  # of one turn, however long they take
OPSET = 20  # of ONNX files

# Time that passes, or that the process computes: the same for one thread, but while others compute on its core.
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}

Run = Callable[[], object]


def fastest(run: Run, clock: str, seconds: float) -> float:
    """Milliseconds of the fastest of the runs that start within ``seconds``; one more before is not counted."""
    now = CLOCKS[clock]
    run()
    least, count, end = float("inf"), 0, time.perf_counter() + seconds
    while count < FEWEST_RUNS or time.perf_counter() < end:
        began = now()
        run()
        least, count = min(least, now() - began), count + 1
    return 1e3 * least


# --- making models ---------------------------------------------------------------------------------------------------


def float_onnx(folder: Path) -> Path:
    """The float network as ONNX."""
    import torch

    path = folder / "float.onnx"
    if not path.exists():
        exported = torch.export.load(folder / "network.pt2")
        torch.onnx.export(
            exported, (), path, input_names=["x"], output_names=["y"], opset_version=OPSET, dynamo=True,
            external_data=False, verbose=False,
        )  # fmt: skip
    return path


def build_onnxruntime(folder: Path) -> None:
    """Static quantization in QDQ form: weights int8 per channel, activations uint8."""
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(q.CalibrationDataReader):
        def __init__(self) -> None:
            self.rest: Iterator[Any] = iter(np.load(folder / "images.npy"))

        def get_next(self) -> Any:
            x = next(self.rest, None)
            return None if x is None else {"x": x}

    prepared = folder / "prepared.onnx"
    quant_pre_process(float_onnx(folder), prepared)
    q.quantize_static(
        prepared,
        folder / "onnxruntime.onnx",
        Reader(),
        quant_format=q.QuantFormat.QDQ,
        per_channel=True,
        activation_type=q.QuantType.QUInt8,
        weight_type=q.QuantType.QInt8,
    )


def build_openvino(folder: Path) -> None:
    """NNCF's static quantization, the mixed preset: activations asymmetric where they have negative values."""
    import nncf
    import openvino

    images = [{"x": x} for x in np.load(folder / "images.npy")]
    quantized = nncf.quantize(
        openvino.Core().read_model(float_onnx(folder)),
        nncf.Dataset(images),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(images),
    )
    openvino.save_model(quantized, folder / "openvino.xml")


def build_litert(folder: Path) -> None:
    """LiteRT with channels last, then its quantizer: weights int8 per channel, activations int8."""
    import litert_torch
    import torch
    from ai_edge_quantizer import quantizer, recipe

    images = np.load(folder / "images.npy").transpose(0, 1, 3, 4, 2)
    exported = torch.export.load(folder / "network.pt2").module()
    channels_last = litert_torch.to_channel_last_io(exported, args=[0])
    floats = folder / "float.tflite"
    litert_torch.convert(channels_last, (torch.from_numpy(images[0].copy()),)).export(str(floats))
    quantizing = quantizer.Quantizer(str(floats))
    quantizing.load_quantization_recipe(recipe.static_wi8_ai8())
    samples = {"serving_default": [{"args_0": x} for x in images]}
    quantizing.quantize(quantizing.calibrate(samples)).export_model(str(folder / "litert.tflite"))


def build_matmulnbits(folder: Path) -> None:
    """A product with a matrix of 2 bits, as onnxruntime has it: a scale for every 32 weights, inputs rounded to int8."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    outputs, inputs = map(int, (folder / "shape.txt").read_text().split())
    bits, block = 2, 32
    draw = np.random.default_rng(0)
    packed = draw.integers(0, 256, (outputs, inputs // block, block * bits // 8), dtype=np.uint8)
    scales = draw.uniform(0.01, 0.02, (outputs, inputs // block)).astype(np.float32)
    node = helper.make_node(
        "MatMulNBits", ["x", "packed", "scales"], ["y"], domain="com.microsoft", K=inputs, N=outputs, bits=bits,
        block_size=block, accuracy_level=4,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, outputs])],
        [numpy_helper.from_array(packed, "packed"), numpy_helper.from_array(scales, "scales")],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "matmulnbits.onnx")


BUILD = {
    "onnxruntime": build_onnxruntime,
    "openvino": build_openvino,
    "litert": build_litert,
    "matmulnbits": build_matmulnbits,
    "matmulnbits-tables": build_matmulnbits,
}


# --- running them ----------------------------------------------------------------------------------------------------


def noise(shape: Sequence[int]) -> Any:
    """Values to run on: float32, normal."""
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def load_onnxruntime(model: Path, threads: int, *, tables: bool = False) -> Run:
    """A session; ``tables``: products with 2 bits by look-up, which onnxruntime must be asked for."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("mlas.use_lut_gemm", str(int(tables)))
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    inputs = {"x": noise(session.get_inputs()[0].shape)}
    return lambda: session.run(None, inputs)


def load_openvino(model: Path, threads: int) -> Run:
    """A request on a model that is compiled for latency, in one stream."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    if "ONEDNN_MAX_CPU_ISA" in os.environ:
        # Of its layers; a pool may still be of a later instruction set.
        facts = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
        layers = [
            fact for fact in facts if fact["layerType"].astype(str) in ("Convolution", "FullyConnected")
        ]
        kernels = {layer["primitiveType"].astype(str) for layer in layers}
        above = sorted(kernel for kernel in kernels if "avx512" in kernel)
        if above:
            raise SystemExit(
                f"OpenVINO does not keep to {os.environ['ONEDNN_MAX_CPU_ISA']}: {', '.join(above)}"
            )
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(noise(compiled.inputs[0].shape)))
    return request.infer


def load_litert(model: Path, threads: int) -> Run:
    """An interpreter with XNNPACK, which it uses unasked."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(model), num_threads=threads)
    interpreter.allocate_tensors()
    x = interpreter.get_input_details()[0]
    values = noise(x["shape"])
    if x["dtype"] != np.float32:
        scale, zero = x["quantization"]
        limits = np.iinfo(x["dtype"])
        values = np.clip(np.rint(values / scale) + zero, limits.min, limits.max).astype(x["dtype"])
    interpreter.set_tensor(x["index"], values)
    return interpreter.invoke


def load_inductor(model: Path, threads: int) -> Run:
    """PT2E's static quantization for x86, compiled by inductor with frozen weights."""
    import torch
    from torch._inductor import config
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    torch.set_num_threads(threads)
    config.freezing = True
    images = [torch.from_numpy(x) for x in np.load(model.parent / "images.npy")]
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    with torch.no_grad():
        prepared = prepare_pt2e(torch.export.load(model).module(), quantizer)
        for x in images:
            prepared(x)
        compiled = torch.compile(convert_pt2e(prepared))
    x = images[0].to(memory_format=torch.channels_last)

    def run() -> object:
        with torch.no_grad():
            return compiled(x)

    return run


# How a peer's model is loaded, its file, the package whose version is printed, and what it runs.
PEERS: dict[str, tuple[Callable[..., Run], str, str, str]] = {
    "onnxruntime": (load_onnxruntime, "onnxruntime.onnx", "onnxruntime", "int8"),
    "openvino": (load_openvino, "openvino.xml", "openvino", "int8"),
    "litert": (load_litert, "litert.tflite", "ai-edge-litert", "int8"),
    "inductor": (load_inductor, "network.pt2", "torch", "inductor int8"),
    "matmulnbits": (load_onnxruntime, "matmulnbits.onnx", "onnxruntime", "2-bit MatMulNBits"),
    "matmulnbits-tables": (
        partial(load_onnxruntime, tables=True),
        "matmulnbits.onnx",
        "onnxruntime",
        "2-bit MatMulNBits by tables",
    ),
}


def serve(peer: str, folder: Path, threads: int, clock: str) -> None:
    """Answer, a line of JSON each: first what runs, then the milliseconds of the fastest run of so many seconds."""
    # What runtimes print goes elsewhere.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    load, file, package, what = PEERS[peer]
    run = load(folder / file, threads)
    run()
    print(json.dumps(f"{package} {importlib.metadata.version(package)} {what}"), file=answers)
    for line in sys.stdin:
        print(json.dumps(fastest(run, clock, float(line))), file=answers)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("what", choices=["build", "serve"])
    options.add_argument("peer", choices=PEERS)
    options.add_argument("folder", type=Path)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--clock", choices=CLOCKS, default="wall")
    chosen = options.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    if chosen.what == "build":
        BUILD[chosen.peer](chosen.folder)
    else:
        serve(chosen.peer, chosen.folder, chosen.threads, chosen.clock)


if __name__ == "__main__":
    main()
