"""What the exporters of quantizers share: constants of layers, and the search in a codebook."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mixbits.core.grid import Codebook
from mixbits.core.program import Program
from mixbits.export.onnx_graph import OnnxGraph
from mixbits.graph.quant_graph import QuantGraph
from mixbits.lower import lower


def program_of(network: QuantGraph | Program) -> Program:
    """The program of a network: lowered, unless it is one already."""
    return network if isinstance(network, Program) else lower(network)


def code_origins(graph: OnnxGraph) -> Mapping[str, str]:
    """For each value that is codes: the output of the ``quantize`` that made them."""
    origins: dict[str, str] = {}
    for step in graph.program.instructions:
        if graph.specs[step.output].grid is not None:
            origins[step.output] = step.output if step.op == "quantize" else origins[step.inputs[0]]
    return origins


def steps_of(program: Program) -> Mapping[str, float]:
    """The step of every ``quantize``, a float32 number, by its output."""
    return {
        step.output: float(program.constants[step.attrs["step"]])
        for step in program.instructions
        if step.op == "quantize"
    }


def weight_steps(scale: NDArray[np.float32], step: float) -> NDArray[np.float32]:
    """Weight step x batch-norm scale of each channel: what a layer multiplies by, over its input's step."""
    return (scale.astype(np.float64) / step).astype(np.float32)


def codebook_codes(graph: OnnxGraph, x: ir.Value, step: ir.Value, grid: Codebook) -> tuple[ir.Value, int]:
    """Codes of a codebook, int32, and their number of bits, by binary search among its edges.

    Each round decides one bit, from the highest: it is set if x / step is at or above the edge in the middle
    of what is left. Edges that do not exist are infinite.
    """
    bits = (len(grid.levels) - 1).bit_length()
    edges = np.full((1 << bits) - 1, np.inf)
    edges[: len(grid.edges)] = grid.edges
    table, ratio = graph.constant(edges), graph.op("Div", x, step)
    codes = None
    for bit in reversed(range(bits)):
        middle = (1 << bit) - 1
        if codes is None:
            edge = graph.constant(edges[middle])
        else:
            edge = graph.op("Gather", table, graph.op("Add", codes, graph.constant(middle, np.int32)))
        above = graph.op("Cast", graph.op("GreaterOrEqual", ratio, edge), to=ir.DataType.INT32)
        above = graph.op("Mul", above, graph.constant(1 << bit, np.int32))
        codes = above if codes is None else graph.op("Add", codes, above)
    assert codes is not None
    return codes, bits


def level_table(grid: Codebook, bits: int) -> NDArray[np.int16]:
    """Levels of all codes of so many bits; codes without a level of their own have the highest."""
    return np.pad(np.asarray(grid.levels, np.int16), (0, (1 << bits) - len(grid.levels)), mode="edge")
