"""QONNX: quantizers of any width as nodes, read by FINN, hls4ml and their kin (arXiv 2206.07527).

Weights are float initializers behind ``IntQuant``, activations floats behind theirs; every tensor is float32
and every quantizer says which integers it stands for. Built from the program that ships, like
``onnx_qdq.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mixbits.core.grid import Codebook, Grid, Uniform, grid_from_json
from mixbits.core.program import Instruction, Program
from mixbits.export.onnx_graph import Exported, OnnxGraph
from mixbits.export.operations import Call, operation
from mixbits.export.power_of_two import power_of_two_program
from mixbits.export.quantizing import (
    code_origins,
    codebook_codes,
    level_table,
    program_of,
    steps_of,
    weight_steps,
)
from mixbits.graph.quant_graph import QuantGraph
from mixbits.runtime.values import weight_levels

DOMAIN = "qonnx.custom_op.general"
OPSET, IR_VERSION = 21, 10
ONE_BIT = Uniform(1, signed=True, form="bipolar")

NodeName: TypeAlias = Literal["IntQuant", "Quant"]


def qonnx(
    network: QuantGraph | Program,
    *,
    power_of_two: bool = False,
    node: NodeName = "IntQuant",
    batch: int = 1,
) -> Exported:
    """The QONNX model of a network with a quantizer on every site, or of its program.

    ``power_of_two``: every quantizer's scale is a power of two, for hardware that shifts. Steps of a
    ``QuantGraph`` are rounded to the nearest one (see ``power_of_two_steps``: another network, to be measured
    again); what else a layer multiplies by stays a ``Mul`` behind it. ``node`` is the name of the quantizer
    node, ``Quant`` in files of before 2025. ``batch`` is fixed, as those tools want it. Raises ``ValueError``
    naming the site or layer that cannot be exported.
    """
    if node not in get_args(NodeName) or batch < 1:
        raise ValueError(f"no such model: node {node!r} (IntQuant or Quant), batch {batch} (from 1)")
    program = power_of_two_program(network) if power_of_two else program_of(network)
    return _Exporter(program, power_of_two, node, batch).export()


class _Exporter:
    """One export."""

    def __init__(self, program: Program, power_of_two: bool, node: NodeName, batch: int) -> None:
        self.program = program
        self.power_of_two = power_of_two
        self.node = node
        self.graph = OnnxGraph(program, batch=batch)
        self.steps, self.origins = steps_of(program), code_origins(self.graph)
        self.values: dict[str, ir.Value] = {"input": self.graph.input}
        self.seen: set[str] = set()

    def export(self) -> Exported:
        """The whole model."""
        exporters: Mapping[str, Any] = {
            "quantize": self._activation,
            "conv1d": self._convolution,
            "conv2d": self._convolution,
            "linear": self._linear,
        }
        for step in self.program.instructions:
            self.graph.scope = step.output
            inputs = [self.values[name] for name in step.inputs]
            if step.op in exporters:
                value = exporters[step.op](step, *inputs)
            else:
                shapes = [self.graph.specs[name].shape for name in step.inputs]
                value = operation(step)(Call(self.graph, step.attrs, shapes), *inputs)
            self.graph.name(value, step.output)
            self.values[step.output] = value
        return self.graph.finish(
            self.values[self.program.output],
            opsets={"": OPSET, DOMAIN: 1},
            ir_version=IR_VERSION,
            notes=tuple(self._notes()),
        )

    def _activation(self, step: Instruction, x: ir.Value) -> ir.Value:
        """The quantizer of a site."""
        grid, size, graph = grid_from_json(step.attrs["grid"]), self.steps[step.output], self.graph
        number = graph.constant(size)
        if isinstance(grid, Codebook):
            self.seen.add("codebook")
            codes, bits = codebook_codes(graph, x, number, grid)
            levels = graph.op("Gather", graph.constant(level_table(grid, bits)), codes)
            return self._int_quant(graph.op("Mul", levels, number), size, width_of(grid))
        if grid.form != "bipolar":
            if grid.bits == 1 and grid.signed:  # -1 and 0, in two bits
                x = graph.op("Clip", x, graph.constant(-size), graph.constant(0))
            return self._int_quant(x, size, width_of(grid))
        if grid.bits == 1:  # at 0, BipolarQuant goes up and the definition down: mirror it
            return graph.op("Neg", graph.op("BipolarQuant", graph.op("Neg", x), number, domain=DOMAIN))
        self.seen.add("shifted")
        y = self._int_quant(graph.op("Sub", x, number), 2 * size, Width(grid.bits, signed=True))
        return graph.op("Add", y, number)

    def _int_quant(self, x: ir.Value, scale: Any, width: Width) -> ir.Value:
        """An ``IntQuant`` node."""
        graph = self.graph
        return graph.op(
            self.node,
            x,
            graph.constant(scale),
            graph.constant(0),
            graph.constant(width.bits),
            domain=DOMAIN,
            signed=int(width.signed),
            narrow=int(width.narrow),
            rounding_mode="ROUND",
        )

    def _weight(self, step: Instruction) -> tuple[ir.Value, NDArray[np.float32]]:
        """A layer's weight behind its quantizer, and what its sums are multiplied by: 1 where possible.

        A quantizer's scale is positive: a channel's sign goes into the factor, and with ``power_of_two`` all
        but the power. A linear layer's weight is transposed to [K, O].
        """
        attrs = step.attrs
        packed = self.program.weights[attrs["weight"]]
        levels = weight_levels(attrs["weight"], packed)
        whole = weight_steps(self.program.constants[attrs["scale"]], self.steps[self.origins[step.inputs[0]]])
        scale = np.where(whole == 0, np.float32(1), np.abs(whole))
        if self.power_of_two:
            scale = np.exp2(np.floor(np.log2(scale)))
        factor = (whole / scale).astype(np.float32)
        if (scale == scale[0]).all():
            scale = scale[:1]
        if step.op == "linear":
            levels, wide = levels.T, scale.reshape(1, -1)
        else:
            wide = scale.reshape(-1, *(1,) * (levels.ndim - 1))
        if wide.size == 1:
            wide = wide.reshape(())
        values = self.graph.constant(levels * wide, name=attrs["weight"])
        if packed.grid == ONE_BIT:
            return self.graph.op("BipolarQuant", values, self.graph.constant(wide), domain=DOMAIN), factor
        return self._int_quant(values, wide, width_of(packed.grid)), factor

    def _convolution(self, step: Instruction, x: ir.Value) -> ir.Value:
        """A convolution, its bias inside where nothing comes between."""
        weight, factor = self._weight(step)
        before, after = zip(*step.attrs["padding"], strict=True)
        bias, channel = self.program.constants[step.attrs["bias"]], (-1, *(1,) * len(before))
        plain = bool((factor == 1).all())
        inner = self.graph.constant(bias, name=step.attrs["bias"]) if plain and bias.any() else None
        y = self.graph.op(
            "Conv",
            *((x, weight) if inner is None else (x, weight, inner)),
            kernel_shape=self.program.weights[step.attrs["weight"]].shape[2:],
            strides=step.attrs["stride"],
            pads=[*before, *after],
            dilations=step.attrs["dilation"],
            group=step.attrs["groups"],
        )
        return y if plain else self._affine(y, factor.reshape(channel), bias.reshape(channel), step)

    def _linear(self, step: Instruction, x: ir.Value) -> ir.Value:
        """A matrix product and its bias."""
        weight, factor = self._weight(step)
        bias = self.program.constants[step.attrs["bias"]]
        return self._affine(self.graph.op("MatMul", x, weight), factor, bias, step)

    def _affine(
        self, y: ir.Value, factor: NDArray[np.float32], bias: NDArray[np.float32], step: Instruction
    ) -> ir.Value:
        """Sums times a factor plus a bias, without what changes nothing."""
        if not (factor == 1).all():
            self.seen.add("factor")
            y = self.graph.op("Mul", y, self.graph.constant(factor))
        return (
            self.graph.op("Add", y, self.graph.constant(bias, name=step.attrs["bias"])) if bias.any() else y
        )

    def _notes(self) -> Iterable[str]:
        """What readers of the file should know."""
        yield f"quantizers are {self.node} nodes of the domain {DOMAIN}; the batch is fixed"
        grids = {name: weight.grid for name, weight in self.program.weights.items()}
        wide = [name for name, grid in grids.items() if grid != ONE_BIT and width_of(grid).bits > grid.bits]
        if wide:
            yield (
                f"{len(wide)} weights (first {wide[0]}) are on a bipolar grid or a codebook: their levels "
                "are exact, in the narrowest integers that hold them, which have more bits than the weights"
            )
        if "shifted" in self.seen:
            yield "bipolar activations of 2 bits or more stand one step aside: Sub, quantizer, Add"
        if "codebook" in self.seen:
            yield "activations on codebooks are standard ONNX nodes, which FPGA compilers do not read"
        if self.power_of_two:
            yield "all scales are powers of two; where steps were rounded to that, measure accuracy again"
        if "factor" in self.seen:
            what = "what is no power of two" if self.power_of_two else "the signs"
            yield f"batch norm's factors, {what}, are a Mul behind the layer"


class Width(NamedTuple):
    """The integers that a quantizer node stands for."""

    bits: int
    signed: bool
    narrow: bool = False


def width_of(grid: Grid) -> Width:
    """The narrowest consecutive integers that hold all levels; one signed bit would be bipolar, so two.

    >>> width_of(Codebook(2, (-4, -1, 1, 4))), width_of(Uniform(3, signed=True, form="narrow"))
    (Width(bits=4, signed=True, narrow=False), Width(bits=3, signed=True, narrow=True))
    """
    if isinstance(grid, Uniform) and grid.form != "bipolar" and (grid.bits > 1 or not grid.signed):
        return Width(grid.bits, grid.signed, grid.form == "narrow")
    if grid.level_min >= 0:
        return Width(grid.level_max.bit_length(), signed=False)
    return Width(1 + max(grid.level_max, -grid.level_min - 1, 1).bit_length(), signed=True)
