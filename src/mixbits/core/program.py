"""Program: a lowered network as plain data: instructions, packed weights, float constants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixbits.core.grid import Grid


@dataclass(frozen=True)
class PackedWeight:
    """A weight tensor's codes, packed at the width of its grid.

    The real value of code ``c`` is ``step * grid.levels[c]``; the step is not here, it is folded into the
    scales of the instructions that read the weight.
    """

    shape: tuple[int, ...]
    grid: Grid
    packed: NDArray[np.uint8]  # one row of bytes, see pack/bits.py


@dataclass(frozen=True)
class Instruction:
    """One operation on named values.

    ``op`` is a row of ``core/instructions.py`` and a function of ``runtime/reference.py``; ``name`` is where
    the operation came from, for messages and reports; ``attrs`` is JSON, and refers to weights and constants
    of the program by name.
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    output: str
    attrs: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Program:
    """Instructions in order, from the value ``input`` (float32, batch first) to the value ``output``."""

    input_shape: tuple[int, ...]  # without the batch dimension
    output: str
    instructions: tuple[Instruction, ...]
    weights: Mapping[str, PackedWeight]
    constants: Mapping[str, NDArray[np.float32]]
    about: Mapping[str, Any] = field(
        default_factory=dict[str, Any]
    )  # provenance: data set, normalization, classes

    @property
    def weight_bytes(self) -> int:
        """Bytes of all packed weights."""
        return sum(weight.packed.nbytes for weight in self.weights.values())

    @property
    def stored_floats(self) -> int:
        """Number of float32 constants: scales, biases, steps and the constants of float operations."""
        return sum(constant.size for constant in self.constants.values())

    @property
    def size_bytes(self) -> int:
        """Bytes of everything stored, as ``core.cost.size_bytes`` counts: weights and constants, no names."""
        return self.weight_bytes + sum(constant.nbytes for constant in self.constants.values())


def last_reads(program: Program) -> dict[str, int]:
    """The index of the last instruction that reads each value; the output is read behind the last."""
    last = {name: index for index, step in enumerate(program.instructions) for name in step.inputs}
    last[program.output] = len(program.instructions)
    return last
