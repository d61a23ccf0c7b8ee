"""The plan: a program as steps of the native engine, and where in memory every value lies.

Values keep the shapes of the program; a layout is strides. Codes of images are maps ``[image][row][column]
[channel]`` of bytes inside a physical border as wide as the widest padding that reads them, so that kernels
need no tests at edges. A layer takes what follows it along: a residual, limits, and the roundings of its
readers. What moves elements by strides alone costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from mixbits.core.check import specs
from mixbits.core.grid import Codebook, Grid, grid_from_json
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
from mixbits.runtime.kernels import PIXEL_UNIT, Bytes, bytes_of, convolution, pixel_stride
from mixbits.runtime.values import Weight

if TYPE_CHECKING or native_available():
    from mixbits import _native

ALIGN = 64  # of buffers, bytes
SLACK = 64  # bytes that kernels may read behind a buffer
MAX_ROW = (
    256  # vectors of a linear layer that are one row of its convolution, where they have no better divisor
)
GOOD_ROW = 64
FLOAT_BYTES = 4
LAYERS = ("conv1d", "conv2d", "linear")
MOVES = ("reshape", "permute", "slice", "select", "expand")
ON_CODES = (*MOVES, "pad", "upsample_nearest", "max_pool", "adaptive_max_pool")

Choose = Callable[
    ["_native.Conv", str, Sequence[str]], str
]  # convolution, layer, kernels that can: one of them


@dataclass(eq=False)
class Buffer:
    """A piece of the arena: its size, and the first and the last step that use it."""

    size: int
    first: int
    last: int
    offset: int = 0


@dataclass(frozen=True)
class Placed:
    """A value in memory: strides and offset in elements; ``storage`` and ``step`` if it is bytes."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    home: Buffer | str  # or the name of a block
    offset: int = 0
    storage: Bytes | None = None
    grid: Grid | None = None
    step: float = 1.0
    # Of a map or of rows of vectors that nothing was cut from: what lies behind a pixel's channels is 0. Its
    # border is (top, bottom, left, right).
    whole: bool = False
    finite: bool = False  # of floats: no input makes them infinite
    border: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def element(self) -> int:
        """Bytes of an element."""
        return FLOAT_BYTES if self.storage is None else 1

    @property
    def nbytes(self) -> int:
        """Bytes of its elements; those that are repeated by a stride of 0 count once."""
        sizes = zip(self.shape, self.strides, strict=True)
        return prod(size for size, stride in sizes if stride) * self.element

    @property
    def operand(self) -> _native.Operand:
        """As the engine's operations see it, once the arena is laid out."""
        storage = self.storage or Bytes(1, 0, 0, None)
        return _native.Operand(
            place=self.place,
            bytes=self.storage is not None,
            shape=list(self.shape),
            strides=list(self.strides),
            scale=storage.scale,
            offset=storage.offset,
            step=self.step,
            lowest=0 if self.grid is None else (self.grid.level_min - storage.offset) // storage.scale,
        )

    @property
    def place(self) -> _native.Place:
        """Where its first element lies, once the arena is laid out."""
        start = self.home.offset if isinstance(self.home, Buffer) else 0
        block = "arena" if isinstance(self.home, Buffer) else self.home
        return _native.Place(getattr(_native.Block, block), start + self.offset * self.element)

    def pixels(self, *, rows: int) -> _native.PixelPlace:
        """Where its pixels lie: those of a map, or vectors, ``rows`` of them in a row."""
        e, s = self.element, self.strides
        if rows:
            return _native.PixelPlace(self.place, 0, rows * s[-2] * e, s[-2] * e)
        row = s[2] if len(s) == 4 else 0
        return _native.PixelPlace(self.place, s[0] * e, row * e, s[-1] * e)


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
    constants: Any = None


def make_plan(
    program: Program, weights: Mapping[str, Weight], *, batch: int = 1, choose: Choose | None = None
) -> Plan:
    """Steps for ``batch`` samples; ``ValueError`` where the engine cannot run it, naming the layer."""
    planner = _Planner(simplified(program), weights, batch, choose or cheapest)
    planner.run()
    return planner.plan


def cheapest(conv: _native.Conv, layer: str, kernels: Sequence[str]) -> str:
    """The kernel with the lowest estimate."""
    return min(kernels, key=lambda name: _native.kernel_cost(name, conv)[0])


def separable(program: Program) -> bool:
    """Whether samples are computed independently, so that a batch is so many runs of one sample.

    It compares the shapes for one and for two samples: no instruction may work across a dimension that grows.
    """
    one, two = (specs(program, batch) for batch in (1, 2))
    for step in program.instructions:
        across = _dims_across(step, len(one[step.inputs[0]].shape) if step.inputs else 0)
        for name in step.inputs:
            pairs = list(zip(one[name].shape, two[name].shape, strict=True))
            if any(pairs[dim][0] != pairs[dim][1] for dim in across if -len(pairs) <= dim < len(pairs)):
                return False
        if two[step.output].elements not in (one[step.output].elements, 2 * one[step.output].elements):
            return False
    return two[program.output].elements == 2 * one[program.output].elements


def _dims_across(step: Instruction, rank: int) -> Sequence[int]:
    """Dimensions of its inputs that an instruction works across or picks from."""
    attrs = step.attrs
    behind_first = range(1, rank)
    across: dict[str, Sequence[int]] = {
        "matmul": (-1, -2),
        "attention": (-1, -2),
        "linear": (-1,),
        **dict.fromkeys(("conv1d", "conv2d", "group_norm", "batch_norm", "prelu"), behind_first),
    }
    if step.op in across:
        return across[step.op]
    if step.op == "layer_norm":
        return range(-attrs["dims"], 0)
    if step.op == "pad":
        return [dim for dim, pads in enumerate(attrs["pads"]) if any(pads)]
    if "dims" in attrs and step.op != "permute":
        return attrs["dims"]
    if "dim" in attrs:
        return [attrs["dim"]]
    windows = attrs.get("kernel", attrs.get("size", ()))
    return range(-len(windows), 0)


def simplified(program: Program) -> Program:
    """The same values from cheaper instructions: rounding before maximum pools, padding as a convolution's own.

    Rounding is monotone: the code of the largest value is the largest code.
    """
    readers = _readers(program)
    grids = {name: spec.grid for name, spec in specs(program, 1).items()}
    steps: list[Instruction] = []
    done = set[str]()
    pads: dict[str, Instruction] = {}  # of codes, with level 0, before nothing but convolutions
    for step in program.instructions:
        reading = [reader.op for reader in readers[step.output]]
        if step.output == program.output or step.output in done:
            steps += [] if step.output in done else [step]
        elif step.op in ("max_pool", "adaptive_max_pool") and reading == ["quantize"]:
            rounding = readers[step.output][0]
            before = replace(rounding, inputs=step.inputs, output=f"{rounding.output} before {step.name}")
            steps += [before, replace(step, inputs=(before.output,), output=rounding.output)]
            done.add(rounding.output)
        elif grids[step.output] is not None and _only_pads(step) and set(reading) <= {"conv1d", "conv2d"}:
            pads[step.output] = step
        elif step.op in ("conv1d", "conv2d") and step.inputs[0] in pads:
            pad = pads[step.inputs[0]]
            both = zip(step.attrs["padding"], pad.attrs["pads"][2:], strict=True)
            padding = [[own[0] + more[0], own[1] + more[1]] for own, more in both]
            steps.append(replace(step, inputs=pad.inputs, attrs={**step.attrs, "padding": padding}))
        else:
            steps.append(step)
    return replace(program, instructions=tuple(steps))


def _only_pads(step: Instruction) -> bool:
    """Whether an instruction adds level 0 around the last dimensions, and cuts nothing off."""
    if step.op != "pad" or step.attrs["mode"] != "constant":
        return False
    images, channels, *space = step.attrs["pads"]
    return not any((*images, *channels)) and min(side for pair in space for side in pair) >= 0


def _readers(program: Program) -> dict[str, list[Instruction]]:
    readers: dict[str, list[Instruction]] = {"input": []}
    for step in program.instructions:
        readers[step.output] = []
    for step in program.instructions:
        for name in dict.fromkeys(step.inputs):
            readers[name].append(step)
    return readers


@dataclass
class _Planner:
    program: Program
    weights: Mapping[str, Weight]
    batch: int
    choose: Choose

    def __post_init__(self) -> None:
        self.specs: Mapping[str, Spec] = specs(self.program, self.batch)
        self.readers = _readers(self.program)
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

    # --- what readers want -----------------------------------------------------------------------------------

    def _padded(self) -> set[str]:
        """Values of codes that need a byte for level 0: an instruction pads them, or what moves make of them."""
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
                sides = [side for pair in _two(reader.attrs["padding"], (0, 0)) for side in pair]
                border = [max(a, b) for a, b in zip(border, sides, strict=True)]
        top, bottom, left, right = border
        return top, bottom, left, right

    def _is_map(self, name: str) -> bool:
        return any(reader.op in ("conv1d", "conv2d") for reader in self.readers[name])

    # --- memory ----------------------------------------------------------------------------------------------

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
        n, c, h, w = _image(shape)
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
            n, c, h, w = _image(value.shape)
            border.top, border.bottom, border.left, border.right = value.border
            border.images, border.channels, border.pixel = n, c, value.strides[-1]
            border.rows, border.columns = h + border.top + border.bottom, w + border.left + border.right
        else:
            border.rows, border.columns = prod(value.shape[:-1]), 1
            border.images, border.channels, border.pixel = 1, value.shape[-1], pixel_stride(value.shape[-1])
        border.place = _native.Place(_native.Block.arena, value.home.offset)
        border.value = value.storage.zero or 0
        return border

    def _clear(self, value: Placed) -> None:
        """A step that fills a map, where its producer would leave bytes behind channels as they were."""
        channels = value.shape[1] if value.strides[1:2] == (1,) and len(value.shape) > 2 else value.shape[-1]
        if pixel_stride(channels) == channels:
            return

        def make() -> Any:
            border = self._whole_border(value)
            border.top, border.bottom = border.rows, 0
            step = _native.FillStep()
            step.borders = [border]
            return step

        self._step(make, [value], Ran((), "fill"))

    # --- steps -----------------------------------------------------------------------------------------------

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

        def make() -> Any:
            operation = _native.Operation(step.op, attrs)
            made = _native.OperationStep(operation, [value.operand for value in inputs], to.operand)
            made.borders = self._borders(to)
            return made

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

    # --- layers ----------------------------------------------------------------------------------------------

    def _layer(self, index: int, step: Instruction) -> None:
        """A layer and what goes along with it: an addition, limits, and the roundings of its readers."""
        linear, weight = step.op == "linear", self.program.weights[step.attrs["weight"]]
        source, shape = self._layer_input(step), self.specs[step.output].shape
        assert source.grid is not None
        assert source.storage is not None
        levels = self.weights[step.attrs["weight"]].levels
        names, name = [step.name], step.output
        conv, row = self._conv(step, source, levels.shape)

        residual, limits = None, None
        only = self._only_reader(name)
        if only is not None and only.op == "add":
            other = only.inputs[1 - only.inputs.index(name)]
            if self._goes_along(other, index, shape, linear=linear):
                residual, name = self.values[other], only.output
                names.append(only.name)
                self.along.add(name)
                only = self._only_reader(name)
        if only is not None and only.op in ("relu", "clamp"):
            low, high = (0, None) if only.op == "relu" else (only.attrs["low"], only.attrs["high"])
            limits = (-np.inf if low is None else low, np.inf if high is None else high)
            name = only.output
            names.append(only.name)
            self.along.add(name)
        roundings = [r for r in self.readers[name] if r.op == "quantize"][:4]
        floats = None
        if len(roundings) < len(self.readers[name]) or name == self.program.output:
            rank = len(shape)
            order = range(rank) if linear else (0, *range(2, rank), 1)
            scale, bias = (np.abs(self.program.constants[step.attrs[k]]) for k in ("scale", "bias"))
            finite = float(scale.max()) * MAX_ACCUMULATOR + float(bias.max()) < MAX_FLOAT32
            floats = replace(self._floats(name, shape, order), finite=finite and residual is None)
            self.values[name] = floats
        if limits == (0, np.inf) and floats is None:
            grids = [grid_from_json(reader.attrs["grid"]) for reader in roundings]
            limits = None if all(grid.level_min >= 0 for grid in grids) else limits  # they cut it off anyway
        maps: list[tuple[Placed, Grid, float]] = []
        for reader in roundings:
            grid = grid_from_json(reader.attrs["grid"])
            value = float(self.program.constants[reader.attrs["step"]])
            room = self._vectors if linear else self._map
            to = room(reader.output, shape, grid, value)
            maps.append((to, grid, value))
            self.values[reader.output] = to
            self.along.add(reader.output)
            names.append(reader.name)

        kernel = self._kernel(conv, step.name)

        def make() -> Any:
            made = _native.LayerStep()
            made.conv, made.images = conv, 1 if linear else shape[0]
            made.input, made.input_image = self._window(step, source), 0 if linear else source.strides[0]
            if not linear and source.storage.zero is None:
                (top, _), (left, _) = _two(step.attrs["padding"], (0, 0))
                made.pad(source.storage.offset, top, left, *_image(source.shape)[2:])
            if residual is not None and residual.storage is not None:
                stored = residual.storage
                made.add_bytes(residual.pixels(rows=row), stored.scale, stored.offset, residual.step)
            elif residual is not None:
                made.add_floats(residual.pixels(rows=row), residual.finite)
            if limits is not None:
                made.limit(*limits)
            if floats is not None:
                made.give_floats(floats.pixels(rows=row))
            for to, grid, value in maps:
                made.give_bytes(to.pixels(rows=row), rounding(grid, to, value))
            made.borders = [border for to, _, _ in maps for border in self._borders(to)]
            scale, bias = (self.program.constants[step.attrs[key]] for key in ("scale", "bias"))
            made.use(kernel, levels.reshape(levels.shape[0], conv.c, conv.kh, conv.kw), scale, bias)
            return made

        used = [source, *([] if residual is None else [residual]), *([] if floats is None else [floats])]
        macs = shape[0] * conv.groups * conv.o * conv.c * conv.kh * conv.kw * conv.out_h * conv.out_w
        ran = Ran(
            tuple(names),
            kernel,
            weight_bits=weight.grid.bits,
            input_bits=source.grid.bits,
            macs=macs if not linear else macs // shape[0],
            bytes=_native.weight_bytes(kernel, conv),
        )
        self._step(make, [*used, *(to for to, _, _ in maps)], ran)

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
            return len(shape) > 1 and _rows_stride(value) is not None
        return value.strides[1] == 1

    def _layer_input(self, step: Instruction) -> Placed:
        """The codes that a layer reads, in a layout that kernels take: copied if they lie otherwise."""
        source = self.values[step.inputs[0]]
        assert source.storage is not None
        assert source.grid is not None
        if step.op == "linear":
            k = source.shape[-1]
            if _rows_stride(source) == pixel_stride(k) and (source.whole or k % PIXEL_UNIT == 0):
                return source
            to = self._vectors(f"{step.inputs[0]} for {step.name}", source.shape, source.grid, source.step)
            to = replace(to, storage=source.storage)
        else:
            sides = [side for pair in _two(step.attrs["padding"], (0, 0)) for side in pair]
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
            row = _row_length(vectors)
            conv = convolution((*weight, 1, 1), grid, source.grid, size=(vectors // row, row))
            columns = row
        else:
            row = 0
            two = {key: _two(step.attrs[key], 1) for key in ("stride", "dilation")}
            conv = convolution(
                weight if len(weight) == 4 else (*weight[:2], 1, weight[2]),
                grid,
                source.grid,
                size=_image(source.shape)[2:],
                padding=_two(step.attrs["padding"], (0, 0)),
                groups=step.attrs["groups"],
                **two,
            )
            columns = _image(source.shape)[3] + source.border[2] + source.border[3]
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
        (top, _), (left, _) = _two(step.attrs["padding"], (0, 0))
        row = source.strides[2] if len(source.strides) == 4 else 0
        return replace(source, offset=source.offset - top * row - left * source.strides[-1]).place


# --- layouts -----------------------------------------------------------------------------------------------


def dense(shape: Sequence[int], order: Sequence[int] | None = None) -> tuple[int, ...]:
    """Strides without gaps; the last dimension of ``order`` lies closest together.

    >>> dense((1, 3, 4, 5)), dense((1, 3, 4, 5), (0, 2, 3, 1))
    ((60, 20, 5, 1), (60, 1, 15, 3))
    """
    strides, total = [0] * len(shape), 1
    for dim in reversed(range(len(shape)) if order is None else list(order)):
        strides[dim] = total
        total *= shape[dim]
    return tuple(strides)


def order_of(value: Placed) -> list[int]:
    """Dimensions from the one that lies farthest apart to the closest; of equal ones, in their order."""
    return sorted(range(len(value.shape)), key=lambda dim: -abs(value.strides[dim]))


def moved_view(value: Placed, step: Instruction, wanted: tuple[int, ...]) -> Placed | None:
    """What a move makes of a value by strides alone; None for a reshape that needs a copy."""
    attrs, shape, strides = step.attrs, list(value.shape), list(value.strides)
    offset = value.offset
    if step.op == "permute":
        shape, strides = ([given[dim] for dim in attrs["dims"]] for given in (shape, strides))
    elif step.op == "slice":
        dim = attrs["dim"]
        offset += attrs["start"] * strides[dim]
        strides[dim] *= attrs["step"]
    elif step.op == "select":
        offset += attrs["index"] * strides[attrs["dim"]]
        del strides[attrs["dim"]]
    elif step.op == "expand":
        new = len(wanted) - len(shape)
        strides = [0] * new + [
            0 if size == 1 and to != 1 else stride
            for size, to, stride in zip(shape, wanted[new:], strides, strict=True)
        ]
    else:
        reshaped = reshaped_strides(shape, strides, wanted)
        if reshaped is None:
            return None
        strides = list(reshaped)
    return replace(
        value, shape=wanted, strides=tuple(strides), offset=offset, whole=False, border=(0, 0, 0, 0)
    )


def reshaped_strides(
    shape: Sequence[int], strides: Sequence[int], wanted: Sequence[int]
) -> tuple[int, ...] | None:
    """Strides of the same elements in another shape, None if no strides give them.

    >>> reshaped_strides((2, 3, 4), (24, 8, 1), (6, 2, 2)), reshaped_strides((2, 3), (1, 2), (6,))
    ((8, 2, 1), None)
    """
    runs: list[list[int]] = []  # [size, stride of the last dimension] of runs of dimensions that lie like one
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if runs and runs[-1][1] == size * stride:
            runs[-1] = [runs[-1][0] * size, stride]
        else:
            runs.append([size, stride])
    found = [0] * len(wanted)
    left, stride = runs[-1] if runs else [1, 1]
    for dim in reversed(range(len(wanted))):
        if wanted[dim] == 1:
            found[dim] = stride
            continue
        if left == 1 and runs:
            runs.pop()
            left, stride = runs[-1] if runs else [1, 1]
        if left % wanted[dim]:
            return None
        found[dim] = stride
        stride *= wanted[dim]
        left //= wanted[dim]
    return tuple(found)


def lay_out(buffers: Sequence[Buffer]) -> int:
    """Give every buffer its offset, so that those in use at the same time do not overlap; the arena's size.

    The largest first, each at the lowest place that is free for as long as it lives.
    """
    placed: list[Buffer] = []
    for buffer in sorted(buffers, key=lambda b: (-b.size, b.first)):
        near = sorted(
            (b for b in placed if b.first <= buffer.last and buffer.first <= b.last), key=lambda b: b.offset
        )
        offset = 0
        for other in near:
            if other.offset - offset >= buffer.size:
                break
            offset = max(offset, other.offset + other.size)
        buffer.offset = offset
        placed.append(buffer)
    return max((b.offset + b.size for b in buffers), default=0)


def rounding(grid: Grid, to: Placed, step: float) -> _native.Rounding:
    """How values become the bytes of a grid."""
    assert to.storage is not None
    stored = to.storage
    if isinstance(grid, Codebook):
        codes = [(level - stored.offset) // stored.scale for level in grid.levels]
        return _native.codebook_rounding(step, np.float32(grid.edges), np.uint8(codes))
    byte_step = grid.spacing // stored.scale
    if grid.level_min != stored.offset:
        raise ValueError(f"codes from {grid.level_min} are stored from {stored.offset}")
    return _native.uniform_rounding(step, grid.level_min, grid.spacing, len(grid.levels) - 1, byte_step)


def _image(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """[n, C, H, W] of a map; of [n, C, W], H is 1."""
    n, c, *size = shape
    h, w = size if len(size) == 2 else (1, *size)
    return n, c, h, w


def _two(values: Sequence[Any], missing: Any) -> Sequence[Any]:
    """Attributes of two dimensions; those of a 1-D convolution behind ``missing``."""
    return values if len(values) == 2 else [missing, *values]


def _rows_stride(value: Placed) -> int | None:
    """The distance of vectors of the last dimension, None if they do not lie one after the other."""
    shape, strides = value.shape, value.strides
    if shape[-1] != 1 and strides[-1] != 1:
        return None
    apart = [(size, stride) for size, stride in zip(shape[:-1], strides[:-1], strict=True) if size != 1]
    if not apart:
        return pixel_stride(shape[-1]) if value.whole or shape[-1] % PIXEL_UNIT == 0 else None
    if any(a[1] != b[0] * b[1] for a, b in pairwise(apart)):
        return None
    return apart[-1][1]


def _row_length(vectors: int) -> int:
    """How many vectors of a linear layer make a row of its convolution.

    >>> _row_length(1), _row_length(196), _row_length(197), _row_length(4096)
    (1, 49, 197, 64)
    """
    good = [row for row in range(min(GOOD_ROW, vectors), 0, -1) if vectors % row == 0]
    return good[0] if good[0] >= GOOD_ROW // 4 or vectors > MAX_ROW else vectors
