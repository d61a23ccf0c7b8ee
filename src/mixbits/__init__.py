"""mixbits: learn how many bits each tensor of a network deserves, train at those widths, run it in integers.

The names below are imported when they are first used, so that running a packed model needs no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "capture": "mixbits.graph.quant_graph",
    "QuantGraph": "mixbits.graph.quant_graph",
    "parse_budget": "mixbits.core.budget",
    "Policy": "mixbits.core.policy",
    "read_policy": "mixbits.core.policy",
    "Training": "mixbits.train.training",
    "Target": "mixbits.train.method",
    "learn": "mixbits.train.method",
    "begin_learning": "mixbits.train.method",
    "make_task": "mixbits.train.task",
    "Task": "mixbits.train.task",
    "AlternateHalves": "mixbits.train.task",
    "evaluate": "mixbits.train.task",
    "Finetune": "mixbits.train.finetune",
    "finetune": "mixbits.train.finetune",
    "begin_finetuning": "mixbits.train.finetune",
    "Loop": "mixbits.train.steps",
    "saving_inputs_only": "mixbits.quant.functional",
    "find_methods": "mixbits.methods",
    "read_program": "mixbits.pack.artifact",
    "write_program": "mixbits.pack.artifact",
    "Executor": "mixbits.runtime.executor",
}
__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604  the keys are strings


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mixbits' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
