"""ONNX with QuantizeLinear and DequantizeLinear: real integer types, run by every ONNX runtime.

Built from the program that ships, an instruction at a time, so that both compute the same: the packed levels
are the initializers, batch norm is in the scales and biases of layers as the engine has it there, and codes
that only move are moved as integers. See ``docs/exports.md`` for what runtimes make of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mixbits.core import grid as grids
from mixbits.core.grid import Codebook, Uniform, grid_from_json
from mixbits.core.program import Instruction, Program
from mixbits.export.integer_kernels import bias_error, fitted_weights, level_limit
from mixbits.export.onnx_graph import Exported, OnnxGraph
from mixbits.export.operations import MOVES, Call, operation
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

Runtime: TypeAlias = Literal["any", "onnxruntime"]
Smallest: TypeAlias = Literal[8, 4, 2]

# Integer types by their bits, signed and unsigned. 16 bits are for weights on a bipolar grid of 8 bits.
CONTAINERS = {
    2: (ir.DataType.INT2, ir.DataType.UINT2),
    4: (ir.DataType.INT4, ir.DataType.UINT4),
    8: (ir.DataType.INT8, ir.DataType.UINT8),
    16: (ir.DataType.INT16, ir.DataType.UINT16),
}
# Operator set and format version in which the smallest type exists.
VERSIONS = {8: (21, 10), 4: (21, 10), 2: (25, 13)}
LAYERS = ("conv1d", "conv2d", "linear")
BIAS_ERROR = 1 / 16  # steps of the quantized result that rounding may move a bias by, in integer kernels


@dataclass(frozen=True)
class Codes:
    """Integers in the graph: they mean ``step * (integer - zero) + offset``, within ``limits``."""

    integers: ir.Value
    dtype: ir.DataType
    step: float
    zero: int = 0
    offset: float = 0.0
    limits: tuple[int, int] | None = None  # integers beyond are not levels, but the type holds them


def onnx_qdq(network: QuantGraph | Program, *, runtime: Runtime = "any", smallest: Smallest = 4) -> Exported:
    """The ONNX model of a network with a quantizer on every site, or of its program.

    ``smallest`` is the narrowest integer type that may appear, in bits: 4 needs opset 21, 2 needs opset 25
    and IR version 13. ``runtime="onnxruntime"`` takes 8-bit types throughout, whose convolutions and matrix
    products it runs in integers. Raises ``ValueError`` naming the site or layer that cannot be exported.
    """
    if runtime not in get_args(Runtime) or smallest not in get_args(Smallest):
        raise ValueError(f"no such target: runtime {runtime!r}, smallest {smallest!r} (8, 4 or 2 bits)")
    if runtime == "onnxruntime":
        smallest = 8
    exporter = _Exporter(program_of(network), runtime, smallest)
    return exporter.export()


class _Exporter:
    """One export: the graph that grows, and which of its values are integers."""

    def __init__(self, program: Program, runtime: Runtime, smallest: Smallest) -> None:
        self.program = program
        self.runtime = runtime
        self.smallest = smallest
        self.graph = OnnxGraph(program, batch=None)
        self.origins = code_origins(self.graph)
        self.steps = steps_of(program)
        self.producers = {step.output: step for step in program.instructions}
        self.wide = set(self._wide())
        self.codes: dict[str, Codes] = {}
        self.floats: dict[str, ir.Value] = {"input": self.graph.input}
        self.dequantized: dict[str, ir.Value] = {}  # codes as floats, less their offset
        self.weights: dict[Any, ir.Value] = {}
        self.seen = Counter[str]()  # constructs that the notes are about

    def export(self) -> Exported:
        """The whole model."""
        for step in self.program.instructions:
            self.graph.scope = step.output
            if step.op == "quantize":
                self.codes[step.output] = self._quantize(step)
            elif step.op in LAYERS:
                self._keep(step, self._layer(step))
            elif step.output in self.origins and not self._is_shifted_pad(step):
                self._move(step)
            else:
                inputs = [self._float(name) for name in step.inputs]
                self._keep(step, operation(step)(self._call(step), *inputs))
        opset, ir_version = VERSIONS[self.smallest if self._uses_two_bits() else max(self.smallest, 4)]
        output = self._float(self.program.output)
        return self.graph.finish(
            output, opsets={"": opset}, ir_version=ir_version, notes=tuple(self._notes())
        )

    def _keep(self, step: Instruction, value: ir.Value) -> None:
        self.graph.name(value, step.output)
        self.floats[step.output] = value

    def _call(self, step: Instruction) -> Call:
        return Call(self.graph, step.attrs, [self.graph.specs[name].shape for name in step.inputs])

    # --- activations ---------------------------------------------------------------------------------------

    def _container(self, low: int, high: int, *, at_least: int = 0) -> ir.DataType:
        """The narrowest allowed type that holds a range."""
        for bits, (signed, unsigned) in CONTAINERS.items():
            if bits >= max(self.smallest, at_least):
                if low < 0 and -(1 << (bits - 1)) <= low and high < 1 << (bits - 1):
                    return signed
                if low >= 0 and high < 1 << bits:
                    return unsigned
        raise AssertionError("levels fit 16 bits")

    def _wide(self) -> Iterable[str]:
        """Codes that need 8 bits whatever their grid.

        onnxruntime 1.31 moves 4-bit types through few operations, fails to load models where a convolution
        with 8-bit weights reads them, and where a Clip stands between them and a matrix product, it computes
        the product with dynamically quantized inputs (MatMulNBits).
        """
        for step in self.program.instructions:
            for name in step.inputs:
                if name not in self.origins:
                    continue
                moved = step.op == "quantize" or step.op in MOVES
                if moved or (step.op in LAYERS and self._reads_eight_bits(step)):
                    yield self.origins[name]

    def _reads_eight_bits(self, step: Instruction) -> bool:
        """Whether a layer is better off with an 8-bit input."""
        grid = self.program.weights[step.attrs["weight"]].grid
        if self._container(grid.level_min, grid.level_max).bitwidth >= 8:
            return True
        return step.op == "linear" and self._needs_clip(self.producers[self.origins[step.inputs[0]]])

    def _needs_clip(self, quantize: Instruction) -> bool:
        """Whether the narrowest type of an activation holds more integers than it has levels."""
        grid = grid_from_json(quantize.attrs["grid"])
        if isinstance(grid, Codebook) or grid.form == "bipolar":
            return True
        _, *limits = self._without_clamp(quantize, grid, self.steps[quantize.output])
        return tuple(limits) != _range(self._container(grid.level_min, grid.level_max))

    def _quantize(self, step: Instruction) -> Codes:
        """Integers of a site."""
        grid, size = grid_from_json(step.attrs["grid"]), self.steps[step.output]
        if isinstance(grid, Codebook):
            self.seen["codebook"] += 1
            name = step.attrs["step"]
            number = self.graph.constant(size, name=name)
            codes, bits = codebook_codes(self.graph, self._float(step.inputs[0]), number, grid)
            dtype, zero = self._activation_type(grid.level_min, grid.level_max, at_least=8)
            table = self.graph.constant(level_table(grid, bits) + zero, dtype.numpy())
            levels = self.graph.op("Gather", table, codes)
            self.graph.name(levels, step.output)
            return Codes(levels, dtype, size, zero)
        if grid.form == "bipolar":
            return self._quantize_bipolar(step, grid, size)
        name, low, high = self._without_clamp(step, grid, size)
        return self._quantize_linear(step, self._float(name), size, range_of=grid, limits=(low, high))

    def _without_clamp(self, step: Instruction, grid: Uniform, size: float) -> tuple[str, int, int]:
        """The value to quantize, and the lowest and highest level: a clamp in front becomes part of these.

        Rounding is monotone, so that the limits may be rounded instead of what they limit.
        """
        (name,) = step.inputs
        before = self.producers.get(name)
        if before is None or before.op != "clamp":
            return name, grid.level_min, grid.level_max

        def level(limit: float | None, otherwise: int) -> int:
            if limit is None:
                return otherwise
            return grid.levels[int(grids.quantize(np.asarray(limit, np.float32), size, grid))]

        low, high = before.attrs["low"], before.attrs["high"]
        return before.inputs[0], level(low, grid.level_min), level(high, grid.level_max)

    def _quantize_bipolar(self, step: Instruction, grid: Uniform, size: float) -> Codes:
        """Odd levels are every second integer, one step aside: 2 * step * integer + step.

        The shift is by an even number of integers, so that ties go where the definition lets them go; with
        one bit that takes integers 0 and 1 less a step.
        """
        offset = -size if grid.bits == 1 else size
        x = self.graph.op("Sub", self._float(step.inputs[0]), self.graph.constant(offset))
        integers = Uniform(grid.bits, signed=grid.bits > 1)
        self.seen["bipolar"] += 1
        limits = (integers.level_min, integers.level_max)
        return self._quantize_linear(step, x, 2 * size, range_of=integers, limits=limits, offset=offset)

    def _quantize_linear(
        self,
        step: Instruction,
        x: ir.Value,
        size: float,
        *,
        range_of: Uniform,
        limits: tuple[int, int],
        offset: float = 0.0,
    ) -> Codes:
        """QuantizeLinear, and a Clip where the type holds more integers than ``limits``.

        8-bit integers are clipped as integers. 4-bit ones cannot be: their floats are, behind
        DequantizeLinear, as onnxruntime 1.31 does not load a float Clip in front of a 4-bit QuantizeLinear.
        """
        dtype, zero = self._activation_type(
            range_of.level_min, range_of.level_max, at_least=8 if step.output in self.wide else 0
        )
        number = self.graph.constant(zero, dtype.numpy())
        integers = self.graph.op("QuantizeLinear", x, self.graph.constant(size), number)
        low, high = (limit + zero for limit in limits)
        whole = (low, high) == _range(dtype)
        if not whole:
            self.seen[f"clip{dtype.bitwidth}"] += 1
        if not whole and dtype.bitwidth >= 8:
            least, most = (self.graph.constant(limit, dtype.numpy()) for limit in (low, high))
            integers, whole = self.graph.op("Clip", integers, least, most), True
        self.graph.name(integers, step.output)
        return Codes(integers, dtype, size, zero, offset, None if whole else limits)

    def _activation_type(self, low: int, high: int, *, at_least: int) -> tuple[ir.DataType, int]:
        """The type of an activation's integers and its zero point.

        onnxruntime's matrix products for x86 want unsigned inputs. It makes signed ones unsigned itself, but
        not where a Clip stands between the quantizers.
        """
        dtype = self._container(low, high, at_least=at_least)
        if self.runtime == "onnxruntime" and dtype == ir.DataType.INT8:
            return ir.DataType.UINT8, grids.level_count(grids.MAX_BITS) // 2
        return dtype, 0

    def _is_shifted_pad(self, step: Instruction) -> bool:
        """Whether zeros are added to codes of which no integer is zero."""
        codes = self.codes.get(step.inputs[0])
        zeros = step.op == "pad" and step.attrs["mode"] == "constant"
        return zeros and codes is not None and codes.offset != 0

    def _move(self, step: Instruction) -> None:
        """Codes stay integers."""
        (name,) = step.inputs
        if name not in self.codes:  # padded before, see _is_shifted_pad
            self._keep(step, MOVES[step.op](self._call(step), self.floats[name]))
            return
        codes = self.codes[name]
        call = replace(self._call(step), dtype=np.dtype(codes.dtype.numpy()), zero=codes.zero)
        moved = MOVES[step.op](call, codes.integers)
        self.graph.name(moved, step.output)
        self.codes[step.output] = replace(codes, integers=moved)

    def _float(self, name: str, *, shifted: bool = True) -> ir.Value:
        """A value in float32, dequantized once however often it is read; without its offset if so asked."""
        codes, graph = self.codes.get(name), self.graph
        if codes is None or (shifted and name in self.floats):
            return self.floats[name]
        if name not in self.dequantized:
            zero = graph.constant(codes.zero, codes.dtype.numpy())
            x = graph.op("DequantizeLinear", codes.integers, graph.constant(codes.step), zero)
            if codes.limits is not None:
                low, high = (graph.constant(limit * codes.step) for limit in codes.limits)
                x = graph.op("Clip", x, low, high)
            self.dequantized[name] = x
        x = self.dequantized[name]
        if not shifted or not codes.offset:
            return x
        self.floats[name] = graph.op("Add", x, graph.constant(codes.offset))
        return self.floats[name]

    # --- layers --------------------------------------------------------------------------------------------

    def _layer(self, step: Instruction) -> ir.Value:
        """A convolution or matrix product of dequantized tensors, and its bias."""
        (name,), attrs, graph = step.inputs, step.attrs, self.graph
        linear = step.op == "linear"
        levels, scale = self._levels(step)
        grid = self.program.weights[attrs["weight"]].grid
        low, high = min(grid.level_min, int(levels.min())), max(grid.level_max, int(levels.max()))
        # A float input would turn the product of an 8-bit weight into a MatMulNBits, see _wide.
        dtype = self._container(low, high, at_least=16 if linear and name not in self.codes else 0)
        self.seen[f"{step.op if linear else 'conv'}:{dtype.name}"] += 1
        weight = self._weight(attrs["weight"], levels.T if linear else levels, dtype)
        weight = graph.op("DequantizeLinear", weight, graph.constant(scale), axis=1 if linear else 0)
        bias = self.program.constants[attrs["bias"]]
        if linear:
            codes = self.codes.get(name)
            if codes is not None and codes.offset:  # w (x + offset) = w x + offset * sum of w
                sums = levels.sum(axis=1, dtype=np.int64) * scale.astype(np.float64)
                bias = (bias + codes.offset * sums).astype(np.float32)
            y = graph.op("MatMul", self._float(name, shifted=False), weight)
            if not bias.any():
                return y
            # onnxruntime 1.31 would make a Gemm of a product and an Add. It runs that in float, with the bias
            # rounded to the unit of the integer sums where the result is quantized at once.
            return graph.op("Sub", y, graph.constant(-bias, name=attrs["bias"]))
        x = self._float(name)
        before, after = zip(*attrs["padding"], strict=True)
        inside = self.runtime == "onnxruntime" and self._bias_rounds_well(step, scale)
        inner = graph.constant(bias, name=attrs["bias"]) if inside and bias.any() else None
        y = graph.op(
            "Conv",
            *((x, weight) if inner is None else (x, weight, inner)),
            kernel_shape=levels.shape[2:],
            strides=attrs["stride"],
            pads=[*before, *after],
            dilations=attrs["dilation"],
            group=attrs["groups"],
        )
        if inside or not bias.any():
            return y
        # Not an input of the convolution, whose bias onnxruntime rounds to the unit of the integer sums.
        channel = bias.reshape(-1, *(1,) * len(attrs["stride"]))
        return graph.op("Add", y, graph.constant(channel, name=attrs["bias"]))

    def _levels(self, step: Instruction) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
        """Levels [O, ...] of a layer's weight and the step of each channel, batch norm included."""
        attrs, (name,) = step.attrs, step.inputs
        levels = weight_levels(attrs["weight"], self.program.weights[attrs["weight"]])
        size, constants = self.steps[self.origins[name]], self.program.constants
        steps = weight_steps(constants[attrs["scale"]], size)
        if self.runtime != "onnxruntime":
            return levels, steps
        grid = self.graph.specs[name].grid
        assert grid is not None, "a layer reads codes"
        limit = level_limit(grid)
        if limit < np.abs(levels).max(initial=0) <= grids.level_count(7):  # above, the layer runs in float
            self.seen["saturating"] += 1
        return fitted_weights(levels, steps, constants[attrs["bias"]], input_step=size, limit=limit)

    def _bias_rounds_well(self, step: Instruction, steps: NDArray[np.float32]) -> bool:
        """Whether a convolution whose result is quantized keeps its biases well enough in integers."""
        read = {step.output}
        for other in self.program.instructions:
            if other.op in ("clamp", "relu") and other.inputs[0] in read:
                read.add(other.output)
        finest = min(
            (
                self.steps[q.output]
                for q in self.producers.values()
                if q.op == "quantize" and q.inputs[0] in read
            ),
            default=np.inf,  # it stays float, and so do its biases
        )
        bias = self.program.constants[step.attrs["bias"]]
        error = bias_error(bias, steps, self.steps[self.origins[step.inputs[0]]])
        if finest < np.inf and error > finest * BIAS_ERROR:
            self.seen["float bias"] += 1
            return False
        return True

    def _weight(self, name: str, levels: NDArray[np.int16], dtype: ir.DataType) -> ir.Value:
        """The initializer of a weight, one for all layers that read it in the same layout."""
        key = (name, levels.shape, levels.tobytes())
        if key not in self.weights:
            self.weights[key] = self.graph.constant(levels, dtype.numpy(), name=name)
        return self.weights[key]

    # --- notes ---------------------------------------------------------------------------------------------

    def _uses_two_bits(self) -> bool:
        used = {str(key).rpartition(":")[2] for key in self.seen}
        narrow = {codes.dtype for codes in self.codes.values()}
        return bool(used & {"INT2", "UINT2"} or narrow & {ir.DataType.INT2, ir.DataType.UINT2})

    def _notes(self) -> Iterable[str]:
        """What the file holds, and what runtimes were seen to do with it."""
        seen: Mapping[str, int] = self.seen
        layers = {key: count for key, count in seen.items() if ":" in key}
        types = Counter[str]()
        for key, count in layers.items():
            types[key.partition(":")[2]] += count
        yield "weights: " + ", ".join(f"{count} x {name}" for name, count in sorted(types.items()))
        held = Counter(codes.dtype.name for name, codes in self.codes.items() if self.origins[name] == name)
        yield "activations: " + ", ".join(f"{count} x {name}" for name, count in sorted(held.items()))
        narrow = sum(count for key, count in layers.items() if key.endswith("INT4"))
        if narrow:
            yield (
                f"{narrow} layers have 4-bit weights: half the bytes of INT8, but onnxruntime 1.31 computes "
                "these layers in float and dequantizes their weights at every call (a 1024 x 1024 layer took "
                "2.5 times as long as in float with 64 rows, 12 times with one). For speed there: "
                "--for onnxruntime"
            )
        if any(key.endswith("INT2") for key in layers):
            yield (
                "2-bit weights: load with graph optimizations disabled (ORT_DISABLE_ALL), with which "
                "onnxruntime 1.31 computes in float. With them it does not load such layers beside "
                "quantized activations, or computes something else"
            )
        if seen["clip4"] or seen["clip8"]:
            yield (
                f"{seen['clip4'] + seen['clip8']} activations use fewer integers than their type has and "
                "are limited by a Clip: of integers behind QuantizeLinear in 8-bit types, of floats behind "
                "DequantizeLinear in narrower ones"
            )
        if self.runtime == "any":
            yield (
                "biases are added behind the layers: onnxruntime would round a convolution's own bias to "
                "the unit of its integer sums"
            )
        else:
            yield (
                "onnxruntime 1.31 runs a convolution in integers where its result is quantized at once; one "
                "that is added to something first runs in float. It rounds the biases of the former to int32 "
                "units of the integer sums, which moves some values across a tie"
            )
            if seen["float bias"]:
                yield (
                    f"{seen['float bias']} convolutions run in float all the same, as rounding would move "
                    f"a bias by more than 1/{round(1 / BIAS_ERROR)} of the step of their result"
                )
            if seen["saturating"]:
                yield (
                    f"{seen['saturating']} layers have 8-bit weights and 8-bit inputs: on x86 processors "
                    "without VNNI onnxruntime saturates pairs of products. Use 7 bits for one of the two"
                )
        if seen["bipolar"]:
            yield f"{seen['bipolar']} activations are on a bipolar grid: convolutions of them run in float"
        if seen["codebook"]:
            yield (
                f"{seen['codebook']} activations are on a codebook: a binary search of compares and gathers, "
                "slower than QuantizeLinear"
            )
        if any(key.endswith("INT16") for key in layers):
            yield "8-bit bipolar weights are odd integers up to 255, so they are stored as INT16"


def _range(dtype: ir.DataType) -> tuple[int, int]:
    """Lowest and highest integer of a type."""
    signed = dtype.name.startswith("INT")
    whole = Uniform(min(dtype.bitwidth, grids.MAX_BITS), signed=signed)
    return whole.level_min, whole.level_max
