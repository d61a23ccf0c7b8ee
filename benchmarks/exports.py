"""What onnxruntime makes of exported models: their times and operations.

A network of the zoo for 32 x 32 images, or ``linear`` (1024 x 1024), with random weights, uniform widths and calibrated steps; all sessions on one thread,
runs interleaved, the least of the repeats. Needs the extras onnx and qonnx, and onnxruntime.

    python benchmarks/exports.py --network resnet20 --bits 4 --batch 8
    python benchmarks/exports.py --network linear --bits 4 --batch 1
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import nn

from mixbits import zoo
from mixbits.core.grid import Uniform
from mixbits.export import onnx_qdq
from mixbits.graph.quant_graph import QuantGraph, capture, put_
from mixbits.lower import lower
from mixbits.quant.observe import Recorder, mse_step
from mixbits.quant.quantizer import LearnedStep

REPEATS = 30


def quantized(network: nn.Module, x: torch.Tensor, bits: int) -> QuantGraph:
    """The network with so many bits everywhere, one step a weight channel."""
    graph = capture(network, x)
    graph.module.eval()
    recorders = {site.name: Recorder(1) for site in graph.profile.sites}
    put_(graph, recorders)
    with torch.no_grad():
        graph(x)
    placed = {}
    for site in graph.profile.sites:
        if site.kind == "weight":
            weight = graph.weight(site.name).detach()
            grid = Uniform(bits, signed=True)
            step = mse_step(weight.flatten(1), grid).reshape(-1, *(1,) * (weight.dim() - 1))
        else:
            grid = Uniform(bits, signed=site.signed)
            step = mse_step(recorders[site.name].values()[None], grid)[0]
        placed[site.name] = LearnedStep(grid, step, shared_by=site.elements)
    put_(graph, placed)
    graph.module.eval()
    return graph


def session(model: bytes, optimized: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if chosen.network == "linear":
        network, x = nn.Sequential(nn.Linear(1024, 1024)).eval(), torch.randn(chosen.batch, 1024)
    else:
        network, x = getattr(zoo, chosen.network)().eval(), torch.randn(chosen.batch, 3, 32, 32)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training: biases are not zero
            nn.init.normal_(module.bias, 0, 0.1)
    program = lower(quantized(network, x, chosen.bits))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "float.onnx"
        batch = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(
            network, (x,), path, dynamo=True, dynamic_shapes=batch, external_data=False, verbose=False
        )
        models = {
            "float": path.read_bytes(),
            "any": onnx_qdq(program).to_bytes(),
            "onnxruntime": onnx_qdq(program, runtime="onnxruntime").to_bytes(),
        }
        sessions, kinds = {}, {}
        for name, model in models.items():
            sessions[name] = session(model, path)
            kinds[name] = Counter(node.op_type for node in onnx.load(path).graph.node)
    least = dict.fromkeys(models, np.inf)
    for _ in range(REPEATS):
        for name, run in sessions.items():
            feed = {run.get_inputs()[0].name: x.numpy()}
            began = time.perf_counter()
            run.run(None, feed)
            least[name] = min(least[name], time.perf_counter() - began)
    print(f"{chosen.network}, {chosen.bits} bits, batch {chosen.batch}, onnxruntime {ort.__version__}")
    print(f"packed: {program.size_bytes / 1024:.1f} KiB")
    for name, model in models.items():
        layers = {
            kind: n for kind, n in kinds[name].items() if "Conv" in kind or "MatMul" in kind or kind == "Gemm"
        }
        print(f"{name:<12} {1e3 * least[name]:8.2f} ms  {len(model) / 1024:8.1f} KiB  {layers}")


if __name__ == "__main__":
    main()
