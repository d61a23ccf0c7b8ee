"""Exports: a trained, quantized network as a file of another ecosystem. Needs the extra ``onnx``."""

from __future__ import annotations

try:
    import onnx_ir as _  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"exports are built with onnx-ir, which is not installed ({error}). "
        "Install the extra: pip install 'mixbits[onnx]'"
    ) from error

from mixbits.export.onnx_graph import Exported
from mixbits.export.onnx_qdq import onnx_qdq
from mixbits.export.qonnx import qonnx
from mixbits.export.torchao import TorchaoConfig, torchao

__all__ = ["Exported", "TorchaoConfig", "onnx_qdq", "qonnx", "torchao"]
