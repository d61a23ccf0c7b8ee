"""Exports: a trained, quantized network as a file of another ecosystem. Needs the extra ``onnx``."""

from __future__ import annotations

try:
    import onnx_ir as _  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"exports are built with onnx-ir, which is not installed ({error}). "
        "Install the extra: pip install 'mixbits[onnx]'"
    ) from error

from mixbits.export.hls4ml import hls4ml
from mixbits.export.onnx_graph import Exported
from mixbits.export.onnx_qdq import onnx_qdq
from mixbits.export.power_of_two import power_of_two_steps
from mixbits.export.qonnx import qonnx
from mixbits.export.torchao import TorchaoConfig, torchao

__all__ = ["Exported", "TorchaoConfig", "hls4ml", "onnx_qdq", "power_of_two_steps", "qonnx", "torchao"]
