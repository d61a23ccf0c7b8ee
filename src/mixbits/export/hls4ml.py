"""QONNX in the form that hls4ml reads: channels last, one scale a tensor, every number of a fixed width.

hls4ml computes in fixed point and infers the type of every sum from the types that go in, so that nothing is
cut off where all constants say their widths. Only operations that it is known to compute right are written
(``tests/contracts/test_fpga.py``); all others are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mixbits.core.grid import Codebook, grid_from_json
from mixbits.core.infer import largest_level
from mixbits.core.program import Instruction, Program
from mixbits.export.onnx_graph import Exported, OnnxGraph
from mixbits.export.power_of_two import power_of_two_program
from mixbits.export.qonnx import DOMAIN, IR_VERSION, OPSET, Width, width_of
from mixbits.export.quantizing import code_origins, steps_of, weight_steps
from mixbits.graph.quant_graph import QuantGraph
from mixbits.runtime.values import weight_levels

CHANNELS_LAST = "qonnx.custom_op.channels_last"
MAPS = 4  # dimensions of [n, height, width, channels]


def hls4ml(network: QuantGraph | Program) -> Exported:
    """The QONNX model that hls4ml 1.3 turns into a circuit, of a network with a quantizer on every site.

    Steps of a ``QuantGraph`` are rounded to powers of two first (``power_of_two_steps``: another network, to
    be measured again); a program must have such steps. The model takes one sample at a time, channels last:
    float32 ``[1, height, width, channels]``, or ``[1, features]``. Raises ``ValueError`` naming the
    site or the layer that hls4ml cannot compute, and what to use instead.
    """
    return _Exporter(power_of_two_program(network)).export()


@dataclass(frozen=True)
class _Value:
    """A value of the circuit: multiples of ``unit`` (0: any number) up to ``largest``, in magnitude."""

    ir: ir.Value
    unit: float
    largest: float
    maps: tuple[int, ...] | None = None  # (C, H, W) of maps that were flattened channels last


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
            "batch_norm": self._batch_norm,
            "reshape": self._flatten,
            "add": self._sum,
            "sub": self._sum,
            "cat": self._cat,
            "relu": self._clamp,
            "clamp": self._clamp,
        }
        self._laid_out(self.graph.input, "input")
        values = {"input": _Value(self.graph.input, 0, np.inf)}
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

    def _fixed(self, value: Any, *, name: str = "") -> _Value:
        """A float32 constant behind the narrowest fixed-point type that holds it exactly."""
        array = np.asarray(value, np.float32)
        unit, width = _fixed_point(array)
        y = self._quant(self.graph.constant(array, name=name), unit, width)
        return _Value(y, unit, float(np.abs(array).max()))

    def _quantize(self, step: Instruction, x: _Value) -> _Value:
        """The quantizer of a site."""
        grid, size = grid_from_json(step.attrs["grid"]), self.steps[step.output]
        if isinstance(grid, Codebook):
            raise _refused(step, "hls4ml has no codebooks", "Use uniform grids for activations.")
        if grid.form == "bipolar":
            # Levels are odd: 2 q - (2**bits - 1) steps, and q is even at a tie.
            aside = size * grid.level_max
            q = self._merged("Add", self._fixed(aside), x)
            q = self._quant(q.ir, 2 * size, Width(grid.bits, signed=False))
            y = self._op("Add", self._fixed(-aside).ir, q)
        else:
            y = self._quant(x.ir, size, Width(grid.bits, grid.signed, grid.form == "narrow"))
        return _Value(y, size, size * largest_level(grid), x.maps)

    def _weight(self, step: Instruction) -> tuple[NDArray[Any], float, Width]:
        """A layer's weight, [O, ...], its unit and its width: one unit for all channels."""
        name = step.attrs["weight"]
        packed = self.program.weights[name]
        scale, read = self.program.constants[step.attrs["scale"]], self.origins[step.inputs[0]]
        units = weight_steps(scale, self.steps[read])
        if not ((np.frexp(units)[0] == 0.5) & (units > 0)).all():
            raise ValueError(
                f"{step.name}: a scale of its channels is no power of two. Export from the network (a run's "
                "folder) instead of the program; let no two layers share a weight or a batch norm."
            )
        levels, unit, width = weight_levels(name, packed), float(units.min()), width_of(packed.grid)
        more = int(np.log2(units.max() / unit))
        if more:
            self.widened.append(name)
            width = Width(width.bits + more, width.signed)
        return levels * units.reshape(-1, *(1,) * (levels.ndim - 1)).astype(np.float64), unit, width

    def _convolution(self, step: Instruction, x: _Value) -> _Value:
        """A convolution; groups and dilation, which hls4ml lacks, are zeros in a larger weight."""
        attrs, (channels, *_) = step.attrs, self._maps(step)
        weight, unit, width = self._weight(step)
        depthwise = attrs["groups"] == channels == len(weight)
        if not depthwise:
            weight = _ungrouped(weight, attrs["groups"])
        (top, bottom), (left, right) = attrs["padding"]
        return self._conv(
            x,
            (_undilated(weight, attrs["dilation"]), unit, width),
            self.program.constants[attrs["bias"]],
            strides=attrs["stride"],
            pads=[top, left, bottom, right],
            group=channels if depthwise else 1,
        )

    def _conv(
        self, x: _Value, weight: tuple[NDArray[Any], float, Width], bias: NDArray[Any], **attrs: Any
    ) -> _Value:
        """A convolution of maps with a weight [O, C / group, *kernel], its unit and its width.

        A bias of zeros is written too: hls4ml gives one that is absent the default type, a wide one.
        """
        values, unit, width = weight
        w = self._quant(self.graph.constant(np.moveaxis(values, 1, -1)), unit, width)
        b = self._fixed(bias)
        attrs = {"kernel_shape": values.shape[2:], "dilations": [1, 1], **attrs}
        y = self._op("Conv", x.ir, w, b.ir, domain=CHANNELS_LAST, **attrs)
        return _Value(y, min(unit * x.unit, b.unit), _gain(values) * x.largest + b.largest)

    def _linear(self, step: Instruction, x: _Value) -> _Value:
        """A matrix product and its bias."""
        if len(self._shape(step.inputs[0])) != 2:
            raise _refused(step, "hls4ml multiplies vectors of features only", "Flatten its input first.")
        values, unit, width = self._weight(step)
        if x.maps is not None:  # features are in another order
            values = np.moveaxis(values.reshape(len(values), *x.maps), 1, -1).reshape(len(values), -1)
        w = self._quant(self.graph.constant(values.T), unit, width)
        b = self._fixed(self.program.constants[step.attrs["bias"]])
        y = self._op("Add", self._op("MatMul", x.ir, w), b.ir)
        return _Value(y, min(unit * x.unit, b.unit), _gain(values) * x.largest + b.largest)

    def _batch_norm(self, step: Instruction, x: _Value) -> _Value:
        """A batch norm that is part of no layer: a depthwise convolution of single pixels."""
        channels, *_ = self._maps(step)
        scale, shift = (self.program.constants[step.attrs[key]] for key in ("scale", "shift"))
        self.inexact.append(step.name)
        weight = scale.astype(np.float64).reshape(-1, 1, 1, 1)
        return self._conv(
            x, (weight, *_fixed_point(scale)), shift, strides=[1, 1], pads=[0] * 4, group=channels
        )

    def _max_pool(self, step: Instruction, x: _Value) -> _Value:
        """Largest values of windows; where these hang over, unsigned values get a sign."""
        kernel, stride, pads = self._windows(step)
        value, grid = x.ir, self.graph.specs[step.inputs[0]].grid
        if any(pads) and grid is not None and grid.level_min >= 0:
            # hls4ml pads with the sign bit alone, which is the largest value of an unsigned type.
            value = self._quant(value, x.unit, Width(width_of(grid).bits + 1, signed=True))
        y = self._op("MaxPool", value, domain=CHANNELS_LAST, kernel_shape=kernel, strides=stride, pads=pads)
        return replace(x, ir=y)

    def _mean(self, step: Instruction, x: _Value) -> _Value:
        """Means of windows: sums by a depthwise convolution with ones, divided by shifting where possible."""
        attrs, (channels, *_) = step.attrs, self._maps(step)
        kernel, stride, pads = self._windows(step)
        if any(pads) and not attrs["include_pad"] and attrs["divisor"] is None:
            raise _refused(step, "its windows differ in size at the border", "Use count_include_pad=True.")
        count = attrs.get("divisor") or int(np.prod(kernel))
        power = count & -count
        one = 1 / count if power == count else 1.0
        weight = np.full((channels, 1, *kernel), one), one, Width(1, signed=False)
        y = self._conv(x, weight, np.zeros(channels), strides=stride, pads=pads, group=channels)
        if power != count:
            # A type of its own, or else hls4ml 1.3 tries to multiply the weight, and fails.
            sums = Width(int(y.largest / y.unit).bit_length() + 1, signed=True)
            y = replace(y, ir=self._quant(y.ir, y.unit, sums))
            share = self._fixed(1 / count)
            y = _Value(self._op("Mul", y.ir, share.ir), y.unit * share.unit, y.largest * share.largest)
            readers = [other for other in self.program.instructions if step.output in other.inputs]
            if any(self.steps.get(other.output, np.inf) > x.unit / power for other in readers):
                self.inexact.append(step.name)
        flat = len(self._shape(step.output)) < MAPS
        return replace(y, ir=self._op("Flatten", y.ir, axis=1)) if flat else y

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
        kernel, stride, padding = (list(attrs[key]) for key in ("kernel", "stride", "padding"))
        if any(size > 1 for size in attrs.get("dilation", ())):
            raise _refused(step, "hls4ml has no pool with dilation", "Use dilation=1.")
        windows = zip(self._shape(step.output)[2:], sizes, kernel, stride, padding, strict=True)
        if any((count - 1) * s + k > size + 2 * p for count, size, k, s, p in windows):
            raise _refused(step, "hls4ml has no windows beyond the padding", "Use ceil_mode=False.")
        return kernel, stride, [*padding, *padding]

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
        return replace(
            x, ir=self._op("Flatten", x.ir, axis=1), maps=shape[1:] if max(shape[2:]) > 1 else None
        )

    def _sum(self, step: Instruction, a: _Value, b: _Value) -> _Value:
        """The sum or the difference of two values of one shape."""
        shapes = [self._shape(name) for name in step.inputs]
        if shapes[0] != shapes[1] or a.maps != b.maps:
            raise _refused(step, f"hls4ml repeats no values, and shapes are {shapes}", "Use equal shapes.")
        return self._merged(step.op.capitalize(), a, b)

    def _merged(self, kind: str, a: _Value, b: _Value) -> _Value:
        """``Add`` or ``Sub`` of two values, where hls4ml 1.3 takes a constant right only as ``a``."""
        return _Value(
            self._op(kind, a.ir, b.ir), min(a.unit, b.unit), a.largest + b.largest, a.maps or b.maps
        )

    def _positive(self, x: _Value) -> _Value:
        """max(x, 0): a quantizer that holds every positive value."""
        bits = int(x.largest / x.unit).bit_length()
        return replace(x, ir=self._quant(x.ir, x.unit, Width(bits, signed=False)))

    def _cat(self, step: Instruction, *parts: _Value) -> _Value:
        """Channels or features one after the other, two values at a time."""
        rank = len(self._shape(step.output))
        if step.attrs["dim"] != 1 or rank not in (2, MAPS) or any(part.maps for part in parts):
            raise _refused(
                step, "hls4ml joins channels of maps, or features", "Use dim=1, before flattening."
            )
        sizes = [self._shape(name)[1] for name in step.inputs]
        y = parts[0].ir
        for index, part in enumerate(parts[1:], start=2):
            y = self._op("Concat", y, part.ir, axis=rank - 1)
            shape = self._shape(step.output)
            y.shape = ir.Shape((1, *shape[2:], sum(sizes[:index])))
            y.dtype = ir.DataType.FLOAT
        return _Value(y, min(part.unit for part in parts), max(part.largest for part in parts))

    def _clamp(self, step: Instruction, x: _Value) -> _Value:
        """Limits that no quantizer has taken in, by quantizers that only cut off what is negative."""
        if not x.unit:
            raise _refused(step, "hls4ml limits no numbers of unknown width", "Begin with a layer.")
        low, high = (0, None) if step.op == "relu" else (step.attrs[key] for key in ("low", "high"))
        if low == 0:
            x = self._positive(x)
        elif low is not None:
            x = self._positive(self._merged("Add", self._fixed(-low), x))
            x = self._merged("Add", self._fixed(low), x)
        if high is not None:
            below = self._positive(self._merged("Sub", self._fixed(high), x))
            x = self._merged("Sub", self._fixed(high), below)
        return x

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
                f"{len(self.inexact)} operations (first {self.inexact[0]}) multiply by what is no power of "
                "two: a value halfway between two codes may become the other one, as float32 is rounded"
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


def _fixed_point(array: NDArray[np.float32]) -> tuple[float, Width]:
    """The unit and the width of the narrowest integers that hold float32 numbers exactly.

    >>> _fixed_point(np.float32([0.75, -2]))
    (0.25, Width(bits=5, signed=True, narrow=False))
    """
    unit = 1 / max(float(number).as_integer_ratio()[1] for number in array.flat)
    signed = bool((array < 0).any())
    return unit, Width(max(int(np.abs(array / unit).max()).bit_length() + signed, 1), signed)


def _gain(weight: NDArray[Any]) -> float:
    """How much larger than its input a layer's sums can be."""
    return float(np.abs(weight.reshape(len(weight), -1)).sum(axis=1).max())


def _refused(step: Instruction, what: str, remedy: str = "") -> ValueError:
    """The error of an instruction that hls4ml cannot compute."""
    remedy = remedy or "Write the network with one of these, or keep this operation outside the network."
    return ValueError(f"{step.name}: {what}. {remedy}")
