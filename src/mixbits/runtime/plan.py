"""The plan: a program as steps of the native engine, and where in memory every value lies.

Values keep the shapes of the program; a layout is strides. Codes of images are maps ``[image][row][column]
[channel]`` of bytes inside a physical border as wide as the widest padding that reads them, so that kernels
need no tests at edges. A layer takes what follows it along: a residual, limits, and the roundings of its
readers. What moves elements by strides alone costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from mixbits.core.check import specs
from mixbits.core.grid import Grid, grid_from_json
from mixbits.core.infer import MAX_ACCUMULATOR, Spec
from mixbits.core.instructions import (
    BATCHED,
    CONSTANT,
    INSTRUCTIONS,
    MAX_FLOAT32,
    MAX_SIZE,
    MAYBE_CONSTANT,
)
from mixbits.core.program import Instruction, Program
from mixbits.pack.bits import native_available
from mixbits.runtime.kernels import PIXEL_UNIT, bytes_of, convolution, pixel_stride
from mixbits.runtime.layout import (
    FLOAT_BYTES,
    Buffer,
    Placed,
    dense,
    image,
    lay_out,
    moved_view,
    order_of,
    rounding,
    row_length,
    rows_stride,
    two,
)
from mixbits.runtime.memory import Memory
from mixbits.runtime.simplify import readers_of, simplified
from mixbits.runtime.values import weight_levels

if TYPE_CHECKING or native_available():
    from mixbits import _native

ALIGN = 64  # of buffers, bytes
SLACK = 64  # bytes that kernels may read behind a buffer
MAX_MAPS = 4  # roundings that go along with a layer, csrc/engine/finish.h
LAYERS = ("conv1d", "conv2d", "linear")
MOVES = ("reshape", "permute", "slice", "select", "expand")
ON_CODES = (*MOVES, "pad", "upsample_nearest", "max_pool", "adaptive_max_pool")

# From a convolution, its layer's name and the kernels that can compute it: one of them.
Choose = Callable[["_native.Conv", str, Sequence[str]], str]


@dataclass(frozen=True)
class Ran:
    """What a step does, for reports: its instructions, its kernel, and what it reads and writes."""

    names: tuple[str, ...]
    what: str  # a kernel's name, or an operation's
    weight_bits: int = 0
    input_bits: int = 0
    macs: int = 0
    bytes: int = 0  # of inputs, outputs, and weights as the kernel keeps them, each counted once
    of_input: bool = False  # it rounds the program's input


@dataclass
class Plan:
    """Steps in order, as functions that make them once the arena is laid out."""

    makers: list[Callable[[], Any]] = field(default_factory=list[Callable[[], Any]])
    ran: list[Ran] = field(default_factory=list[Ran])
    arena: int = 0  # bytes
    scratch: int = 0  # bytes, of the step that needs most
    kept: int = 0  # bytes of weights and of what else steps keep
    constants: Any = None

    def memory(self, threads: int) -> Memory:
        """What an engine of so many threads will allocate."""
        arena, scratch, constants = (
            size + SLACK for size in (self.arena, self.scratch, self.constants.nbytes)
        )
        return Memory(threads * arena, threads * scratch, constants + self.kept)


def make_plan(program: Program, *, batch: int = 1, choose: Choose | None = None) -> Plan:
    """Steps for ``batch`` samples; ``ValueError`` where the engine cannot run it, naming the layer.

    Weights are looked at when steps are made, one after the other.
    """
    planner = _Planner(simplified(program), batch, choose or cheapest)
    planner.run()
    return planner.plan


def cheapest(conv: _native.Conv, layer: str, kernels: Sequence[str]) -> str:
    """The kernel with the lowest estimate."""
    return min(kernels, key=lambda name: _native.kernel_cost(name, conv)[0])


@dataclass
class _After:
    """What goes along with a layer, and where it puts its results."""

    names: list[str]
    residual: Placed | None = None
    limits: tuple[float, float] | None = None
    floats: Placed | None = None
    maps: list[tuple[Placed, Grid, float]] = field(default_factory=list[tuple[Placed, Grid, float]])

    @property
    def values(self) -> list[Placed]:
        """All that is read or written."""
        both = [value for value in (self.residual, self.floats) if value is not None]
        return [*both, *(to for to, _, _ in self.maps)]

    def give(self, made: _native.LayerStep, row: int) -> None:
        """Tell a layer's step; ``row`` vectors are a row, of a linear layer."""
        if self.residual is not None and self.residual.storage is not None:
            stored = self.residual.storage
            made.add_bytes(self.residual.pixels(rows=row), stored.scale, stored.offset, self.residual.step)
        elif self.residual is not None:
            made.add_floats(self.residual.pixels(rows=row), self.residual.finite)
        if self.limits is not None:
            made.limit(*self.limits)
        if self.floats is not None:
            made.give_floats(self.floats.pixels(rows=row))
        for to, grid, value in self.maps:
            made.give_bytes(to.pixels(rows=row), rounding(grid, to, value))


@dataclass
class _Planner:
    program: Program
    batch: int
    choose: Choose

    def __post_init__(self) -> None:
        self.specs: Mapping[str, Spec] = specs(self.program, self.batch)
        self.readers = readers_of(self.program)
        self.position = {step.output: i for i, step in enumerate(self.program.instructions)}
        self.position["input"] = -1
        self.padded = self._padded()
        self.values: dict[str, Placed] = {}
        self.along = set[str]()  # outputs of instructions that went along with a layer
        self.buffers: list[Buffer] = []
        self.plan = Plan()
        self.constants = bytearray()
        shape = self.specs["input"].shape
        self.values["input"] = Placed(shape, dense(shape), "input")

    # --- what readers want -----------------------------------------------------------------------------

    def _padded(self) -> set[str]:
        """Values of codes that need a byte for level 0: an instruction pads what moves make of them."""
        found = set[str]()
        for step in reversed(self.program.instructions):
            adds = step.op == "pad" and step.attrs["mode"] == "constant"
            if adds or (step.output in found and step.op in ON_CODES):
                found.update(step.inputs)
        return found

    def _border(self, name: str) -> tuple[int, int, int, int]:
        """The widest paddings of the convolutions that read a map."""
        border = [0, 0, 0, 0]
        for reader in self.readers[name]:
            if reader.op in ("conv1d", "conv2d"):
                sides = [side for pair in two(reader.attrs["padding"], (0, 0)) for side in pair]
                border = [max(a, b) for a, b in zip(border, sides, strict=True)]
        top, bottom, left, right = border
        return top, bottom, left, right

    def _is_map(self, name: str) -> bool:
        return any(reader.op in ("conv1d", "conv2d") for reader in self.readers[name])

    # --- memory ----------------------------------------------------------------------------------------

    def _buffer(self, size: int) -> Buffer:
        now = len(self.plan.makers)
        buffer = Buffer(-(-(size + SLACK) // ALIGN) * ALIGN, now, now)
        self.buffers.append(buffer)
        return buffer

    def _step(self, make: Callable[[], Any], values: Sequence[Placed], ran: Ran) -> None:
        """Add a step that reads and writes these values."""
        for value in values:
            if isinstance(value.home, Buffer):
                value.home.last = len(self.plan.makers)
        self.plan.makers.append(make)
        self.plan.ran.append(replace(ran, bytes=ran.bytes + sum(value.nbytes for value in values)))

    def _need(self, kept: int, scratch: int) -> None:
        """Note the bytes that a step keeps and those of its scratch, which the next step uses again."""
        self.plan.kept += kept
        self.plan.scratch = max(self.plan.scratch, scratch)

    def _floats(self, name: str, shape: tuple[int, ...], order: Sequence[int]) -> Placed:
        """Room for floats, dense with dimensions in this order, the last one closest together."""
        strides = dense(shape, order)
        if name == self.program.output and strides == dense(shape):
            return Placed(shape, strides, "output")
        return Placed(shape, strides, self._buffer(prod(shape) * FLOAT_BYTES))

    def _map(self, name: str, shape: tuple[int, ...], grid: Grid, step: float) -> Placed:
        """Room for codes of images [n, C, H, W] or [n, C, W], channels last."""
        storage = bytes_of(grid, padded=name in self.padded)
        top, bottom, left, right = border = self._border(name)
        n, c, h, w = image(shape)
        pixel, columns, rows = pixel_stride(c), left + w + right, top + h + bottom
        # As much again as a row behind it: what reads whole rows may start inside the border.
        home = self._buffer(pixel * columns * (rows * n + 1))
        strides = (rows * columns * pixel, 1, *((columns * pixel,) if len(shape) == 4 else ()), pixel)
        offset = (top * columns + left) * pixel
        return Placed(shape, strides, home, offset, storage, grid, step, whole=True, border=border)

    def _vectors(self, name: str, shape: tuple[int, ...], grid: Grid, step: float) -> Placed:
        """Room for codes of vectors [..., K], each a multiple of four bytes long."""
        k = pixel_stride(shape[-1])
        strides = dense((*shape[:-1], k))
        storage = bytes_of(grid, padded=name in self.padded)
        return Placed(
            shape, strides, self._buffer(prod(shape[:-1]) * k), 0, storage, grid, step, whole=len(shape) > 1
        )

    def _codes(self, name: str, shape: tuple[int, ...], grid: Grid, step: float) -> Placed:
        if self._is_map(name) or (len(shape) == 4 and not any(r.op == "linear" for r in self.readers[name])):
            return self._map(name, shape, grid, step)
        return self._vectors(name, shape, grid, step)

    def _borders(self, value: Placed) -> list[_native.Border]:
        if not any(value.border):
            return []
        return [self._whole_border(value)]

    def _whole_border(self, value: Placed) -> _native.Border:
        """The border of a map, or the rows of vectors as a map without one."""
        assert isinstance(value.home, Buffer)
        assert value.storage is not None
        border = _native.Border()
        if len(value.shape) in (3, 4) and value.strides[1] == 1:
            n, c, h, w = image(value.shape)
            border.top, border.bottom, border.left, border.right = value.border
            border.images, border.channels, border.pixel = n, c, value.strides[-1]
            border.rows, border.columns = h + border.top + border.bottom, w + border.left + border.right
        else:
            *rows, k = value.shape
            border.rows, border.columns = prod(rows), 1
            border.images, border.channels, border.pixel = 1, k, pixel_stride(k)
        border.place = _native.Place(_native.Block.arena, value.home.offset)
        border.value = value.storage.zero or 0
        return border

    def _clear(self, value: Placed) -> None:
        """A step that fills a map, where its producer would leave bytes behind channels as they were."""
        *_, last = value.shape
        channels = value.shape[1] if value.strides[1:2] == (1,) and len(value.shape) > 2 else last
        if pixel_stride(channels) == channels:
            return

        def make() -> Any:
            border = self._whole_border(value)
            border.top, border.bottom = border.rows, 0
            step = _native.FillStep()
            step.borders = [border]
            return step

        self._step(make, [value], Ran((), "fill"))

    # --- steps -----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Plan every instruction."""
        for index, step in enumerate(self.program.instructions):
            if step.output in self.along:
                continue
            try:
                if step.op in LAYERS:
                    self._layer(index, step)
                elif step.op == "quantize":
                    self._quantize(step)
                elif step.op in MOVES:
                    self._move(step)
                elif step.op in ("constant", "scalar"):
                    self._constant(step)
                else:
                    self._operation(step)
            except ValueError as error:
                raise ValueError(f"{step.name}: {error}") from error
        self._finish()
        self.plan.arena = lay_out(self.buffers)
        self.plan.constants = np.frombuffer(bytes(self.constants), np.uint8)

    def _quantize(self, step: Instruction) -> None:
        source, grid = self.values[step.inputs[0]], grid_from_json(step.attrs["grid"])
        value = float(self.program.constants[step.attrs["step"]])
        to = self._codes(step.output, source.shape, grid, value)
        if len(to.shape) != 4 or to.strides[3] != PIXEL_UNIT:  # those are written whole
            self._clear(to)

        def make() -> Any:
            onto = rounding(grid, to, value)
            onto.finite = step.inputs[0] == "input"
            made = _native.RoundStep(source.operand, to.operand, onto)
            made.borders = self._borders(to)
            return made

        of_input = step.inputs[0] == "input"
        self._step(make, [source, to], Ran((step.name,), "quantize", of_input=of_input))
        self.values[step.output] = to

    def _constant(self, step: Instruction) -> None:
        attrs = self._attrs(step)
        values = np.asarray(attrs["constant" if step.op == "constant" else "value"], np.float32)
        offset = len(self.constants) // FLOAT_BYTES
        self.constants += values.tobytes()
        self.values[step.output] = Placed(values.shape, dense(values.shape), "constants", offset)

    def _move(self, step: Instruction) -> None:
        source = self.values[step.inputs[0]]
        wanted = self.specs[step.output].shape
        moved = moved_view(source, step, wanted)
        if moved is None:  # a reshape of what does not lie in its order
            moved = replace(self._copied(source, step.name), shape=wanted, strides=dense(wanted))
        self.values[step.output] = moved

    def _copied(self, source: Placed, name: str) -> Placed:
        """A dense copy in the order of dimensions."""
        strides = dense(source.shape)
        home = self._buffer(prod(source.shape) * source.element)
        to = replace(source, strides=strides, home=home, offset=0, whole=False, border=(0, 0, 0, 0))
        self._copy(source, to, name)
        return to

    def _copy(self, source: Placed, to: Placed, name: str) -> None:
        def make() -> Any:
            made = _native.CopyStep(source.operand, to.operand)
            made.borders = self._borders(to)
            return made

        self._step(make, [source, to], Ran((name,), "copy"))

    def _operation(self, step: Instruction) -> None:
        inputs, spec = [self.values[name] for name in step.inputs], self.specs[step.output]
        if spec.grid is not None:
            assert inputs[0].storage is not None
            to = self._codes(step.output, spec.shape, spec.grid, inputs[0].step)
            if to.storage != inputs[0].storage:
                raise ValueError(f"codes stored as {inputs[0].storage} become {to.storage}")
            self._clear(to)
        else:
            like = next((v for v in inputs if len(v.shape) == len(spec.shape)), None)
            to = self._floats(
                step.output, spec.shape, range(len(spec.shape)) if like is None else order_of(like)
            )
        attrs = self._attrs(step)

        def placed() -> _native.OperationStep:
            operation = _native.Operation(step.op, attrs)
            return _native.OperationStep(operation, [value.operand for value in inputs], to.operand)

        def make() -> Any:
            made = placed()
            made.borders = self._borders(to)
            return made

        self._need(*placed().needs())
        self._step(make, [*inputs, to], Ran((step.name,), step.op))
        self.values[step.output] = to

    def _attrs(self, step: Instruction) -> dict[str, Any]:
        """Attributes with constants in place of their names and the batch's size in place of its word."""
        attrs: dict[str, Any] = {}
        for key, value in step.attrs.items():
            kind = INSTRUCTIONS[step.op].attrs[key]
            if kind in (CONSTANT, MAYBE_CONSTANT):
                attrs[key] = None if value is None else self.program.constants[value]
            elif kind is BATCHED:
                attrs[key] = [self.batch if size == "batch" else size for size in value]
            elif isinstance(value, int) and abs(value) > MAX_SIZE:
                attrs[key] = float(value)  # a number, not a size: it may be beyond 64 bits
            else:
                attrs[key] = value
        return attrs

    def _finish(self) -> None:
        """The program's output, dense in the output's block."""
        value = self.values[self.program.output]
        if value.home != "output":
            to = Placed(value.shape, dense(value.shape), "output")
            self._copy(value, to, "output")

    # --- layers ----------------------------------------------------------------------------------------

    def _layer(self, index: int, step: Instruction) -> None:
        """A layer and what goes along with it."""
        linear = step.op == "linear"
        source, shape = self._layer_input(step), self.specs[step.output].shape
        assert source.grid is not None
        assert source.storage is not None
        weight = self.program.weights[step.attrs["weight"]]
        conv, row = self._conv(step, source, weight.shape)
        after = self._after(index, step, shape)
        kernel = self._kernel(conv, step.name)
        border = None if linear or source.storage.zero is not None else source.storage.offset

        def shaped() -> _native.LayerStep:
            made = _native.LayerStep()
            made.conv, made.images = conv, 1 if linear else shape[0]
            if border is not None:
                (top, _), (left, _) = two(step.attrs["padding"], (0, 0))
                made.pad(border, top, left, *image(source.shape)[2:])
            return made

        def make() -> Any:
            made = shaped()
            made.input, made.input_image = self._window(step, source), 0 if linear else source.strides[0]
            after.give(made, row)
            made.borders = [border for to, _, _ in after.maps for border in self._borders(to)]
            scale, bias = (self.program.constants[step.attrs[key]] for key in ("scale", "bias"))
            levels = weight_levels(step.attrs["weight"], weight)
            made.use(kernel, levels.reshape(-1, conv.c, conv.kh, conv.kw), scale, bias)
            return made

        self._need(*shaped().needs(kernel))

        macs = conv.groups * conv.o * conv.c * conv.kh * conv.kw * conv.out_h * conv.out_w
        ran = Ran(
            tuple(after.names),
            kernel,
            weight_bits=weight.grid.bits,
            input_bits=source.grid.bits,
            macs=macs if linear else shape[0] * macs,
            bytes=_native.weight_bytes(kernel, conv),
        )
        self._step(make, [source, *after.values], ran)

    def _after(self, index: int, step: Instruction, shape: tuple[int, ...]) -> _After:
        """What goes along with a layer: an addition, limits, and the roundings of its readers."""
        linear, name = step.op == "linear", step.output
        after = _After([step.name])
        only = self._only_reader(name)
        if only is not None and only.op == "add":
            other = only.inputs[1 - only.inputs.index(name)]
            if self._goes_along(other, index, shape, linear=linear):
                after.residual, name = self.values[other], only.output
                after.names.append(only.name)
                self.along.add(name)
                only = self._only_reader(name)
        if only is not None and only.op in ("relu", "clamp"):
            low, high = (0, None) if only.op == "relu" else (only.attrs["low"], only.attrs["high"])
            after.limits = (-np.inf if low is None else low, np.inf if high is None else high)
            name = only.output
            after.names.append(only.name)
            self.along.add(name)
        roundings = [r for r in self.readers[name] if r.op == "quantize"][:MAX_MAPS]
        if len(roundings) < len(self.readers[name]) or name == self.program.output:
            order = range(len(shape)) if linear else (0, *range(2, len(shape)), 1)
            scale, bias = (np.abs(self.program.constants[step.attrs[k]]) for k in ("scale", "bias"))
            finite = float(scale.max()) * MAX_ACCUMULATOR + float(bias.max()) < MAX_FLOAT32
            finite = finite and after.residual is None
            after.floats = self.values[name] = replace(self._floats(name, shape, order), finite=finite)
        for reader in roundings:
            grid = grid_from_json(reader.attrs["grid"])
            value = float(self.program.constants[reader.attrs["step"]])
            room = self._vectors if linear else self._map
            self.values[reader.output] = room(reader.output, shape, grid, value)
            after.maps.append((self.values[reader.output], grid, value))
            after.names.append(reader.name)
            self.along.add(reader.output)
        cut_off = all(grid.level_min >= 0 for _, grid, _ in after.maps)
        if after.limits == (0, np.inf) and after.floats is None and cut_off:
            after.limits = None  # the grids end there anyway
        return after

    def _kernel(self, conv: _native.Conv, layer: str) -> str:
        able = [name for name, usable, _ in _native.kernels() if usable and not _native.refuses(name, conv)]
        return self.choose(conv, layer, able)

    def _only_reader(self, name: str) -> Instruction | None:
        readers = self.readers[name]
        return readers[0] if len(readers) == 1 and name != self.program.output else None

    def _goes_along(self, name: str, index: int, shape: tuple[int, ...], *, linear: bool) -> bool:
        """Whether a value can be added while a layer's sums are at hand: it exists by then and lies alike."""
        if name not in self.values or self.position[name] >= index or self.specs[name].shape != shape:
            return False
        value = self.values[name]
        if linear:
            return len(shape) > 1 and rows_stride(value) is not None
        return value.strides[1] == 1

    def _layer_input(self, step: Instruction) -> Placed:
        """The codes that a layer reads, in a layout that kernels take: copied if they lie otherwise."""
        source = self.values[step.inputs[0]]
        assert source.storage is not None
        assert source.grid is not None
        if step.op == "linear":
            k = source.shape[-1]
            if rows_stride(source) == pixel_stride(k) and (source.whole or k % PIXEL_UNIT == 0):
                return source
            to = self._vectors(f"{step.inputs[0]} for {step.name}", source.shape, source.grid, source.step)
            to = replace(to, storage=source.storage)
        else:
            sides = [side for pair in two(step.attrs["padding"], (0, 0)) for side in pair]
            if source.whole and all(a <= b for a, b in zip(sides, source.border, strict=True)):
                return source
            name = f"{step.inputs[0]} for {step.name}"
            self.readers[name] = [step]
            if step.inputs[0] in self.padded:
                self.padded.add(name)
            to = self._map(name, source.shape, source.grid, source.step)
        self.readers.setdefault(f"{step.inputs[0]} for {step.name}", [step])
        self._clear(to)
        self._copy(source, to, step.name)
        return to

    def _conv(self, step: Instruction, source: Placed, weight: tuple[int, ...]) -> tuple[_native.Conv, int]:
        """The layer as kernels see it; and how many vectors are a row, of a linear layer."""
        assert source.grid is not None
        grid = self.program.weights[step.attrs["weight"]].grid
        if step.op == "linear":
            vectors = prod(source.shape[:-1])
            row = row_length(vectors)
            conv = convolution((*weight, 1, 1), grid, source.grid, size=(vectors // row, row))
            columns = row
        else:
            row = 0
            both = {key: two(step.attrs[key], 1) for key in ("stride", "dilation")}
            conv = convolution(
                weight if len(weight) == 4 else (*weight[:2], 1, weight[2]),
                grid,
                source.grid,
                size=image(source.shape)[2:],
                padding=two(step.attrs["padding"], (0, 0)),
                groups=step.attrs["groups"],
                **both,
            )
            columns = image(source.shape)[3] + source.border[2] + source.border[3]
        assert source.storage is not None
        stored = source.storage
        conv.in_w, conv.pixel_stride = columns, pixel_stride(conv.c * conv.groups)
        conv.a_max, conv.a_scale, conv.a_offset, conv.a_zero = (
            stored.largest,
            stored.scale,
            stored.offset,
            stored.zero or 0,
        )
        return conv, row

    def _window(self, step: Instruction, source: Placed) -> _native.Place:
        """Where the window of the first output starts."""
        if step.op == "linear":
            return source.place
        (top, _), (left, _) = two(step.attrs["padding"], (0, 0))
        row = source.strides[2] if len(source.strides) == 4 else 0
        return replace(source, offset=source.offset - top * row - left * source.strides[-1]).place
