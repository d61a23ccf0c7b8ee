"""Torchao: the widths of weights as torchao's own per-module configuration, which its ``quantize_`` applies.

The file is what ``torchao.core.config.config_to_dict`` writes of a ``FqnToConfig`` with an
``IntxWeightOnlyConfig`` (version 2, torchao 0.18) a module, and is read by ``config_from_dict``. It holds
widths: torchao takes the weights of the network that it is given and chooses their steps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixbits.core.files import whole_file
from mixbits.core.grid import Grid, Uniform, describe
from mixbits.core.program import Instruction, Program

PARAMETER = ".weight"  # of a module; its configuration is found by the module's name


@dataclass(frozen=True)
class TorchaoConfig:
    """JSON for ``config_from_dict``, and what its users should know about it, a sentence a note."""

    config: Mapping[str, Any]
    notes: tuple[str, ...]

    def write(self, path: str | Path) -> int:
        """Write the JSON file, whole or not at all; returns its bytes."""
        contents = (json.dumps(self.config, indent=1) + "\n").encode()
        with whole_file(Path(path)) as file:
            file.write(contents)
        return len(contents)


def torchao(program: Program) -> TorchaoConfig:
    """The widths of a packed network's weights as a configuration; a note says what it leaves in float.

    Raises ``ValueError`` if no weight can be expressed.
    """
    readers = {i.attrs["weight"]: i for i in program.instructions if i.attrs.get("weight") in program.weights}
    reasons = {
        name: _reason(name, weight.grid, weight.shape, readers[name])
        for name, weight in program.weights.items()
    }
    expressed = {name: program.weights[name].grid for name, reason in reasons.items() if not reason}
    left = [f"{name} ({reason})" for name, reason in reasons.items() if reason]
    if not expressed:
        raise ValueError(f"torchao can express none of this network's weights: {'; '.join(left)}")
    config = {
        "_type": "FqnToConfig",
        "_version": 1,
        "_data": {
            "fqn_to_config": {name.removesuffix(PARAMETER): _intx(g.bits) for name, g in expressed.items()}
        },
    }
    windows = [name for name in expressed if len(program.weights[name].shape) > 2]
    narrow = [name for name, grid in expressed.items() if isinstance(grid, Uniform) and grid.form == "narrow"]
    activations = [
        f"{i.name} ({i.attrs['grid']['bits']} bits)" for i in program.instructions if i.op == "quantize"
    ]
    notes = [
        "it quantizes the weights it is given, in its own steps: the run's accuracy does not carry over",
        f"activations stay in float; a configuration of weights cannot express {', '.join(activations)}",
    ]
    if left:
        notes.append("stay in float, because torchao cannot express them: " + "; ".join(left))
    if windows:
        notes.append("one step an output channel and place of the window: " + ", ".join(windows))
    if narrow:
        notes.append(
            "torchao may also take the lowest level, which narrow grids leave out: " + ", ".join(narrow)
        )
    return TorchaoConfig(config, tuple(notes))


def _reason(name: str, grid: Grid, shape: tuple[int, ...], reader: Instruction) -> str:
    """Why torchao cannot express a weight; empty if it can."""
    if not name.endswith(PARAMETER):
        return "not the weight of a module"
    if not isinstance(grid, Uniform) or grid.form == "bipolar" or not grid.signed:
        return f"{describe(grid)}; torchao has -2^(b-1) .. 2^(b-1)-1"
    if len(shape) not in (2, 4):
        return f"a tensor of {len(shape)} dimensions, torchao takes 2 and 4"
    if reader.attrs.get("groups", 1) != 1:
        return "a convolution in groups, which torchao's weights do not compute"
    return ""


def _intx(bits: int) -> dict[str, Any]:
    return {
        "_type": "IntxWeightOnlyConfig",
        "_version": 2,
        "_data": {
            "weight_dtype": {"_type": "torch.dtype", "_data": f"int{bits}"},
            "granularity": {"_type": "PerAxis", "_version": 1, "_data": {"axis": 0}},
            "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
        },
    }
