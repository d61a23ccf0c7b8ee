"""QONNX in the form that hls4ml reads: channels last, one scale a tensor, every number of a fixed width.

hls4ml computes in fixed point and infers the type of every sum from the types that go in, so that nothing is
cut off where all constants say their widths. Only operations that it is known to compute right are written
(``tests/contracts/test_fpga.py``); all others are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mixbits.core.grid import Codebook, grid_from_json
from mixbits.core.program import Instruction, Program
from mixbits.export.onnx_graph import Exported, OnnxGraph
from mixbits.export.power_of_two import power_of_two_steps
from mixbits.export.qonnx import DOMAIN, IR_VERSION, OPSET, Width, width_of
from mixbits.export.quantizing import code_origins, program_of, steps_of, weight_steps
from mixbits.graph.quant_graph import QuantGraph
from mixbits.runtime.values import weight_levels

CHANNELS_LAST = "qonnx.custom_op.channels_last"
MAPS = 4  # dimensions of [n, height, width, channels]
WINDOW = ("kernel", "stride", "padding")


def hls4ml(network: QuantGraph | Program) -> Exported:
    """The QONNX model that hls4ml 1.3 turns into a circuit, of a network with a quantizer on every site.

    Steps of a ``QuantGraph`` are rounded to powers of two first (:func:`power_of_two_steps`: another network,
    to be measured again); a program must have such steps. The model takes one sample at a time, channels
    last: float32 ``[1, height, width, channels]``, or ``[1, features]``. Raises ``ValueError`` naming the
    site or the layer that hls4ml cannot compute, and what to use instead.
    """
    program = program_of(power_of_two_steps(network) if isinstance(network, QuantGraph) else network)
    return _Exporter(program).export()


@dataclass(frozen=True)
class _Value:
    """A value of the circuit; ``maps`` is (C, H, W) of maps that were flattened channels last."""

    ir: ir.Value
    maps: tuple[int, ...] | None = None


class _Exporter:
    """One export."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = OnnxGraph(program, batch=1)
        self.steps, self.origins = steps_of(program), code_origins(self.graph)
        self.inexact: list[str] = []  # means whose count is no power of two
        self.widened: list[str] = []  # weights whose channels differ in their steps

    def export(self) -> Exported:
        """The whole model."""
        writers: Mapping[str, Any] = {
            "quantize": self._quantize,
            "conv2d": self._convolution,
            "linear": self._linear,
            "max_pool": self._max_pool,
            "adaptive_max_pool": self._max_pool,
            "avg_pool": self._mean,
            "adaptive_avg_pool": self._mean,
            "mean": self._mean,
            "reshape": self._flatten,
            "add": self._merge,
            "sub": self._merge,
            "relu": self._relu,
        }
        self._laid_out(self.graph.input, "input")
        values = {"input": _Value(self.graph.input)}
        for step in self.program.instructions:
            if step.op not in writers:
                raise _refused(
                    step, f"not exported to hls4ml: {step.op} (have: {', '.join(sorted(writers))})"
                )
            self.graph.scope = step.output
            value = writers[step.op](step, *(values[name] for name in step.inputs))
            self.graph.name(value.ir, step.output)
            self._laid_out(value.ir, step.output)
            values[step.output] = value
        last = values[self.program.output]
        if last.maps is not None and last.maps[0] > 1:
            raise ValueError(
                f"{self.program.output}: the output is flattened maps, whose order is another channels last. "
                "End the network with the maps or with a linear layer."
            )
        exported = self.graph.finish(
            last.ir, opsets={"": OPSET, DOMAIN: 1, CHANNELS_LAST: OPSET}, ir_version=IR_VERSION, notes=()
        )
        self._laid_out(exported.model.graph.outputs[0], self.program.output)
        return Exported(exported.model, tuple(self._notes()))

    def _laid_out(self, value: ir.Value, name: str) -> None:
        """Give a value its shape, maps channels last."""
        shape = self._shape(name)
        if len(shape) == MAPS:
            shape = (shape[0], *shape[2:], shape[1])
        value.shape, value.dtype = ir.Shape(shape), ir.DataType.FLOAT

    def _shape(self, name: str) -> tuple[int, ...]:
        """The program's shape of a value, batch and channels first."""
        return self.graph.specs[name].shape

    def _maps(self, step: Instruction) -> tuple[int, int, int]:
        """(C, H, W) of what an instruction reads, which must be maps."""
        shape = self._shape(step.inputs[0])
        if len(shape) != MAPS:
            raise _refused(step, f"its input has shape {list(shape[1:])} instead of channels, height, width")
        return shape[1], shape[2], shape[3]

    def _op(self, kind: str, *inputs: ir.Value, domain: str = "", **attrs: Any) -> ir.Value:
        return self.graph.op(kind, *inputs, domain=domain, **attrs)

    def _quant(self, x: ir.Value, scale: float, width: Width) -> ir.Value:
        """A quantizer, or the width of a constant that is on the grid already."""
        parameters = map(self.graph.constant, (scale, 0, width.bits))
        options = {"signed": int(width.signed), "narrow": int(width.narrow), "rounding_mode": "ROUND"}
        y = self._op("Quant", x, *parameters, domain=DOMAIN, **options)
        y.shape, y.dtype = x.shape, ir.DataType.FLOAT
        return y

    def _fixed(self, value: Any, *, name: str = "") -> ir.Value:
        """A float32 constant and the narrowest fixed-point type that holds it exactly."""
        array = np.asarray(value, np.float32)
        unit = 1 / max(float(number).as_integer_ratio()[1] for number in array.flat)
        signed = bool((array < 0).any())
        bits = max(int(abs(array / unit).max()).bit_length() + signed, 1)
        return self._quant(self.graph.constant(array, name=name), unit, Width(bits, signed))

    def _quantize(self, step: Instruction, x: _Value) -> _Value:
        """The quantizer of a site."""
        grid, size = grid_from_json(step.attrs["grid"]), self.steps[step.output]
        if np.frexp(size)[0] != 0.5:
            raise ValueError(
                f"{step.output}: its step {size} is no power of two, and a packed program's "
                "cannot be changed. Export from the network (a run's folder) instead of the program."
            )
        if isinstance(grid, Codebook):
            raise _refused(
                step, "hls4ml has no quantizer on a codebook", "Use uniform grids for activations."
            )
        if grid.form != "bipolar":
            width = Width(grid.bits, grid.signed, grid.form == "narrow")
            return _Value(self._quant(x.ir, size, width), x.maps)
        # Levels are odd, one step beside those of twice the step; mirrored, so that 0 goes down.
        aside = self._fixed(-size)
        codes = self._quant(self._op("Sub", aside, x.ir), 2 * size, Width(grid.bits, signed=True))
        return _Value(self._op("Sub", aside, codes), x.maps)

    def _weight(self, step: Instruction) -> tuple[NDArray[Any], float, Width]:
        """A layer's weight in integers, their unit and their width: one unit for all channels."""
        name = step.attrs["weight"]
        packed = self.program.weights[name]
        units = weight_steps(
            self.program.constants[step.attrs["scale"]], self.steps[self.origins[step.inputs[0]]]
        )
        if not ((np.frexp(units)[0] == 0.5) & (units > 0)).all():
            raise ValueError(
                f"{step.name}: a scale of its channels is no power of two. Export from the network (a run's "
                "folder) instead of the program; let no two layers share a weight or a batch norm."
            )
        unit = float(units.min())
        levels = weight_levels(name, packed).astype(np.int64)
        factors = (units / unit).astype(np.int64)
        width = width_of(packed.grid)
        if factors.max() > 1:
            self.widened.append(name)
            width = Width(width.bits + int(factors.max()).bit_length() - 1, width.signed)
        return levels * factors.reshape(-1, *(1,) * (levels.ndim - 1)), unit, width

    def _bias(self, step: Instruction) -> ir.Value | None:
        bias = self.program.constants[step.attrs["bias"]]
        return self._fixed(bias, name=step.attrs["bias"]) if bias.any() else None

    def _conv(self, x: ir.Value, weight: ir.Value, bias: ir.Value | None, **attrs: Any) -> _Value:
        """A convolution of maps; ``weight`` is [O, kernel, C / group]."""
        inputs = (x, weight) if bias is None else (x, weight, bias)
        return _Value(self._op("Conv", *inputs, domain=CHANNELS_LAST, dilations=[1, 1], **attrs))

    def _convolution(self, step: Instruction, x: _Value) -> _Value:
        """A convolution; groups and dilation, which hls4ml lacks, are zeros in a larger weight."""
        attrs, (channels, _, _) = step.attrs, self._maps(step)
        levels, unit, width = self._weight(step)
        groups = attrs["groups"]
        depthwise = groups == channels == len(levels) > 1
        if groups > 1 and not depthwise:
            levels = _ungrouped(levels, groups)
        levels = _undilated(levels, attrs["dilation"])
        weight = self.graph.constant(np.moveaxis(levels, 1, -1) * unit, name=attrs["weight"])
        (top, bottom), (left, right) = attrs["padding"]
        return self._conv(
            x.ir,
            self._quant(weight, unit, width),
            self._bias(step),
            kernel_shape=levels.shape[2:],
            strides=attrs["stride"],
            pads=[top, left, bottom, right],
            group=groups if depthwise else 1,
        )

    def _linear(self, step: Instruction, x: _Value) -> _Value:
        """A matrix product and its bias."""
        if len(self._shape(step.inputs[0])) != 2:
            raise _refused(step, "hls4ml multiplies vectors of features only", "Flatten its input first.")
        levels, unit, width = self._weight(step)
        if x.maps is not None:  # features are in another order
            levels = np.moveaxis(levels.reshape(len(levels), *x.maps), 1, -1).reshape(len(levels), -1)
        weight = self.graph.constant(levels.T * unit, name=step.attrs["weight"])
        y = self._op("MatMul", x.ir, self._quant(weight, unit, width))
        bias = self._bias(step)
        return _Value(y if bias is None else self._op("Add", y, bias))

    def _max_pool(self, step: Instruction, x: _Value) -> _Value:
        """Largest values of windows; where these hang over, unsigned values get a sign."""
        kernel, stride, pads = self._windows(step)
        if "dilation" in step.attrs and any(size > 1 for size in step.attrs["dilation"]):
            raise _refused(step, "hls4ml has no pool with dilation", "Use dilation=1.")
        value, grid = x.ir, self.graph.specs[step.inputs[0]].grid
        if any(pads) and grid is not None and grid.level_min >= 0:
            # hls4ml pads with the sign bit alone, which is the largest value of an unsigned type.
            signed = Width(width_of(grid).bits + 1, signed=True)
            value = self._quant(value, self.steps[self.origins[step.inputs[0]]], signed)
        attrs = {"kernel_shape": kernel, "strides": stride, "pads": pads}
        return _Value(self._op("MaxPool", value, domain=CHANNELS_LAST, **attrs))

    def _mean(self, step: Instruction, x: _Value) -> _Value:
        """Means of windows: sums by a depthwise convolution with ones, which are divided by shifting."""
        attrs, (channels, *_) = step.attrs, self._maps(step)
        kernel, stride, pads = self._windows(step)
        uneven = any(pads) and not attrs["include_pad"] and attrs["divisor"] is None
        if uneven or pads[:2] < pads[2:]:
            raise _refused(
                step,
                "its windows at the border have fewer elements",
                "Use count_include_pad=True and ceil_mode=False.",
            )
        count = attrs.get("divisor") or int(np.prod(kernel))
        shift = count & (count - 1) == 0
        one = 1 / count if shift else 1.0
        weight = self.graph.constant(np.full((channels, *kernel, 1), one))
        weight = self._quant(weight, one, Width(1, signed=False))
        window = {"kernel_shape": kernel, "strides": stride, "pads": pads, "group": channels}
        y = self._conv(x.ir, weight, None, **window).ir
        if not shift:
            self.inexact.append(step.name)
            y = self._op("Mul", y, self._fixed(np.float32(1 / count)))
        flat = len(self._shape(step.output)) < MAPS
        return _Value(self._op("Flatten", y, axis=1) if flat else y)

    def _windows(self, step: Instruction) -> tuple[list[int], list[int], list[int]]:
        """Kernel, strides and pads (top, left, bottom, right) of a pool."""
        _, *sizes = self._maps(step)
        attrs = step.attrs
        if step.op == "mean" and sorted(attrs["dims"]) != [2, 3]:
            raise _refused(step, f"hls4ml has no mean over {attrs['dims']}", "Use one over height and width.")
        if "kernel" not in attrs:
            counts = attrs.get("size", [1, 1])
            if any(size % count for size, count in zip(sizes, counts, strict=True)):
                raise _refused(
                    step, f"{sizes} into {counts} windows differ in size", "Use sizes that divide."
                )
            kernel = [size // count for size, count in zip(sizes, counts, strict=True)]
            return kernel, kernel, [0, 0, 0, 0]
        windows = zip(self._shape(step.output)[2:], sizes, *(attrs[k] for k in WINDOW), strict=True)
        behind = [max((n - 1) * stride + k - size - p, 0) for n, size, k, stride, p in windows]
        kernel, stride, before = (list(attrs[k]) for k in WINDOW)
        return kernel, stride, [*before, *behind]

    def _flatten(self, step: Instruction, x: _Value) -> _Value:
        """Maps as features; the linear layer behind takes them in the order that they have here."""
        shape, wanted = self._shape(step.inputs[0]), self._shape(step.output)
        if shape == wanted:
            return x
        if len(shape) != MAPS or len(wanted) != 2:
            raise _refused(
                step,
                f"hls4ml has no reshape from {list(shape[1:])} to {list(wanted[1:])}",
                "Flatten maps only.",
            )
        return _Value(self._op("Flatten", x.ir, axis=1), shape[1:])

    def _merge(self, step: Instruction, a: _Value, b: _Value) -> _Value:
        """The sum or the difference of two values of one shape."""
        shapes = [self._shape(name) for name in step.inputs]
        if shapes[0] != shapes[1] or a.maps != b.maps:
            raise _refused(step, f"hls4ml repeats no values, and shapes are {shapes}", "Use equal shapes.")
        return _Value(self._op(step.op.capitalize(), a.ir, b.ir), a.maps)

    def _relu(self, step: Instruction, x: _Value) -> _Value:
        """A ReLU that no quantizer has taken in."""
        return _Value(self._op("Relu", x.ir), x.maps)

    def _notes(self) -> Iterator[str]:
        """What readers of the file should know."""
        yield "for hls4ml: maps are channels last, one sample at a time, all scales are powers of two"
        yield "where steps were rounded to powers of two, measure accuracy again"
        if self.widened:
            yield (
                f"{len(self.widened)} weights (first {self.widened[0]}) have channels with different steps: "
                "they are in units of the smallest, in more bits"
            )
        if self.inexact:
            yield (
                f"{len(self.inexact)} means (first {self.inexact[0]}) are of a count that is no power of "
                "two: where one lies halfway between two codes, the circuit may take the other one"
            )


def _ungrouped(levels: NDArray[Any], groups: int) -> NDArray[Any]:
    """[O, C / groups, *kernel] to [O, C, *kernel], with zeros for channels of other groups."""
    count, channels, *kernel = levels.shape
    whole = np.zeros((groups, count // groups, groups, channels, *kernel), levels.dtype)
    for group, part in enumerate(levels.reshape(groups, -1, channels, *kernel)):
        whole[group, :, group] = part
    return whole.reshape(count, groups * channels, *kernel)


def _undilated(levels: NDArray[Any], dilation: Sequence[int]) -> NDArray[Any]:
    """[O, C, *kernel] with zeros between the elements of the kernel."""
    sizes = [d * (k - 1) + 1 for k, d in zip(levels.shape[2:], dilation, strict=True)]
    whole = np.zeros((*levels.shape[:2], *sizes), levels.dtype)
    whole[:, :, :: dilation[0], :: dilation[1]] = levels
    return whole


def _refused(step: Instruction, what: str, remedy: str = "") -> ValueError:
    """The error of an instruction that hls4ml cannot compute."""
    remedy = remedy or "Write the network with one of these, or keep this operation outside the network."
    return ValueError(f"{step.name}: {what}. {remedy}")
