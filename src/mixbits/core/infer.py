"""Shape rules of the instruction set: what an instruction's output will be, or why it cannot run.

Every rule takes the specs of the inputs, the attributes, and the scope; its ``ValueError`` is a sentence that
``core/check.py`` puts the instruction's name in front of. Rules also bound the memory that is needed while
computing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from mixbits.core.grid import Grid, grid_from_json
from mixbits.core.program import PackedWeight

MAX_ACCUMULATOR = 2**31 - 1  # int32, what native kernels sum in


@dataclass(frozen=True)
class Spec:
    """Shape of a value with its batch, and its grid if it is codes (None: float32)."""

    shape: tuple[int, ...]
    grid: Grid | None = None

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Scope:
    """What rules may look up: batch size, weights, constants' shapes, the most elements of one array."""

    batch: int
    weights: Mapping[str, PackedWeight]
    constants: Mapping[str, tuple[int, ...]]
    max_elements: int

    def constant(self, name: str, *shapes: tuple[int, ...]) -> None:
        """Raise unless the constant has one of these shapes."""
        if self.constants[name] not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"constant {name!r} has shape {list(self.constants[name])}, wanted is {wanted}")

    def bound(self, elements: int) -> None:
        """Raise if an array of this size may not be allocated."""
        if elements > self.max_elements:
            raise ValueError(
                f"it needs an array of {elements} elements, more than the limit of {self.max_elements}"
            )


Attrs: TypeAlias = Mapping[str, Any]
Rule: TypeAlias = Callable[[Sequence[Spec], Attrs, Scope], Spec]


def largest_level(grid: Grid) -> int:
    """Largest magnitude of a level."""
    return max(-grid.level_min, grid.level_max)


def accumulator_bound(reduction: int, weight: Grid, activation: Grid) -> int:
    """Largest magnitude that a sum of ``reduction`` products of levels can reach.

    >>> from mixbits.core.grid import Uniform
    >>> accumulator_bound(9, Uniform(2, signed=True), Uniform(2, signed=False))
    54
    """
    return reduction * largest_level(weight) * largest_level(activation)


def _need(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)


def _dim(dim: int, shape: tuple[int, ...]) -> int:
    _need(dim < len(shape), f"dimension {dim} does not exist in shape {list(shape)}")
    return dim


def _layer_weight(inputs: Sequence[Spec], attrs: Attrs, scope: Scope) -> PackedWeight:
    """The weight of a layer, checked: codes in, a scale and a bias a channel, sums within the accumulator."""
    weight, (x,) = scope.weights[attrs["weight"]], inputs
    if x.grid is None:
        raise ValueError("its input is float, but a layer reads codes; quantize it first")
    scope.constant(attrs["scale"], weight.shape[:1])
    scope.constant(attrs["bias"], weight.shape[:1])
    bound = accumulator_bound(math.prod(weight.shape[1:]), weight.grid, x.grid)
    if bound > MAX_ACCUMULATOR:
        raise ValueError(
            f"its sums can reach {bound}, beyond the 32-bit accumulator ({MAX_ACCUMULATOR}). "
            "Use fewer bits for its weight or its input, or split the layer."
        )
    return weight


def quantize(inputs: Sequence[Spec], attrs: Attrs, scope: Scope) -> Spec:
    """Codes of the same shape."""
    scope.constant(attrs["step"], ())
    return Spec(inputs[0].shape, grid_from_json(attrs["grid"]))


def convolution(inputs: Sequence[Spec], attrs: Attrs, scope: Scope) -> Spec:
    """[n, C, *sizes] with weight [O, C / groups, *kernel] to [n, O, *sizes]."""
    weight, shape, groups = _layer_weight(inputs, attrs, scope), inputs[0].shape, attrs["groups"]
    dims = len(attrs["stride"])
    _need(len(shape) == dims + 2, f"its input has {len(shape)} dimensions, wanted are {dims + 2}")
    _need(
        len(weight.shape) == dims + 2, f"its weight has {len(weight.shape)} dimensions, wanted are {dims + 2}"
    )
    _need(
        weight.shape[0] % groups == 0, f"{weight.shape[0]} output channels do not divide into {groups} groups"
    )
    _need(
        shape[1] == weight.shape[1] * groups,
        f"its input has {shape[1]} channels, its weight reads {weight.shape[1]} x {groups} groups",
    )
    padded = [size + sum(pad) for size, pad in zip(shape[2:], attrs["padding"], strict=True)]
    scope.bound(math.prod((*shape[:2], *padded)))
    out: list[int] = []
    for size, kernel, stride, dilation in zip(
        padded, weight.shape[2:], attrs["stride"], attrs["dilation"], strict=True
    ):
        window = dilation * (kernel - 1) + 1
        _need(window <= size, f"its window of {window} is larger than the padded input of {size}")
        out.append((size - window) // stride + 1)
    return Spec((shape[0], weight.shape[0], *out))


def linear(inputs: Sequence[Spec], attrs: Attrs, scope: Scope) -> Spec:
    """[..., K] with weight [O, K] to [..., O]."""
    weight, shape = _layer_weight(inputs, attrs, scope), inputs[0].shape
    _need(len(weight.shape) == 2, f"its weight has {len(weight.shape)} dimensions, wanted are 2")
    _need(
        shape[-1:] == weight.shape[1:],
        f"its input {list(shape)} does not fit its weight {list(weight.shape)}",
    )
    return Spec((*shape[:-1], weight.shape[0]))


def reshape(inputs: Sequence[Spec], attrs: Attrs, scope: Scope) -> Spec:
    """The same values in another shape; -1 is what is left."""
    shape, count = list(attrs["shape"]), inputs[0].elements
    if -1 in shape:
        rest = math.prod(size for size in shape if size != -1)
        _need(count % rest == 0, f"{list(inputs[0].shape)} does not fit the shape {shape}")
        shape[shape.index(-1)] = count // rest
    _need(math.prod(shape) == count, f"{list(inputs[0].shape)} does not fit the shape {shape}")
    return Spec(tuple(shape), inputs[0].grid)


def permute(inputs: Sequence[Spec], attrs: Attrs, scope: Scope) -> Spec:
    """Dimensions in another order."""
    shape = inputs[0].shape
    dims: list[int] = attrs["dims"]
    _need(
        sorted(dims) == list(range(len(shape))),
        f"{dims} does not order the {len(shape)} dimensions of its input",
    )
    return Spec(tuple(shape[dim] for dim in dims), inputs[0].grid)


def slice_(inputs: Sequence[Spec], attrs: Attrs, scope: Scope) -> Spec:
    """Elements start, start + step, ... below stop of one dimension."""
    shape: list[int] = list(inputs[0].shape)
    dim = _dim(attrs["dim"], inputs[0].shape)
    shape[dim] = len(range(attrs["start"], min(attrs["stop"], shape[dim]), attrs["step"]))
    return Spec(tuple(shape), inputs[0].grid)


def select(inputs: Sequence[Spec], attrs: Attrs, scope: Scope) -> Spec:
    """One element of a dimension, which goes."""
    shape, dim = inputs[0].shape, _dim(attrs["dim"], inputs[0].shape)
    _need(
        attrs["index"] < shape[dim],
        f"index {attrs['index']} does not exist in dimension {dim} of {list(shape)}",
    )
    return Spec(shape[:dim] + shape[dim + 1 :], inputs[0].grid)


def expand(inputs: Sequence[Spec], attrs: Attrs, scope: Scope) -> Spec:
    """Dimensions of size one repeated; new ones come first."""
    old = inputs[0].shape
    sizes = [scope.batch if size == "batch" else size for size in attrs["shape"]]
    _need(len(sizes) >= len(old), f"{list(old)} cannot be expanded to fewer dimensions, {attrs['shape']}")
    aligned = (1,) * (len(sizes) - len(old)) + old
    shape = tuple(was if size == -1 else size for was, size in zip(aligned, sizes, strict=True))
    fits = all(was in (1, size) for was, size in zip(aligned, shape, strict=True))
    _need(fits, f"{list(old)} cannot be expanded to {attrs['shape']}")
    return Spec(shape, inputs[0].grid)


def pad(inputs: Sequence[Spec], attrs: Attrs, scope: Scope) -> Spec:
    """Values added before and after each dimension, or cut off where negative."""
    shape, pads, mode = inputs[0].shape, attrs["pads"], attrs["mode"]
    _need(len(pads) == len(shape), f"{len(pads)} pairs of padding do not fit {len(shape)} dimensions")
    out: list[int] = []
    for size, (before, after) in zip(shape, pads, strict=True):
        _need(
            -min(before, 0) - min(after, 0) < max(size, 1), f"padding {pads} cuts away all of {list(shape)}"
        )
        _need(mode == "constant" or min(before, after) >= 0, f"mode {mode} cannot cut, but padding is {pads}")
        most = size - 1 if mode == "reflect" else size if mode == "wrap" else max(before, after)
        _need(max(before, after) <= max(most, 0), f"mode {mode} cannot pad {list(shape)} by {pads}")
        _need(size > 0 or (before, after) == (0, 0), f"an empty {list(shape)} cannot be padded")
        out.append(size + before + after)
    keeps = mode != "constant" or attrs["value"] == 0
    return Spec(tuple(out), inputs[0].grid if keeps else None)


def _spatial(spec: Spec, *lists: list[Any]) -> tuple[int, ...]:
    """The sizes that windows of one or two dimensions slide over."""
    dims = len(lists[0])
    _need(1 <= dims <= 2 and all(len(entry) == dims for entry in lists), "windows have one or two dimensions")
    _need(len(spec.shape) > dims, f"its input {list(spec.shape)} has too few dimensions")
    return spec.shape[-dims:]


def upsample(inputs: Sequence[Spec], attrs: Attrs, scope: Scope) -> Spec:
    """[..., *sizes] to [..., *size]; picking the nearest keeps codes, interpolating does not."""
    sizes = _spatial(inputs[0], attrs["size"])
    grid = None if "align_corners" in attrs else inputs[0].grid
    scope.bound(math.prod(inputs[0].shape[: -len(sizes)]) * max(sizes) * max(attrs["size"]))
    # The matrices that interpolate.
    scope.bound(max(a * b for a, b in zip(sizes, attrs["size"], strict=True)))
    return Spec((*inputs[0].shape[: -len(sizes)], *attrs["size"]), grid)


def window_count(size: int, kernel: int, stride: int, padding: int, *, dilation: int = 1, ceil: bool) -> int:
    """How many windows fit; with ``ceil`` also one that starts inside or in front, and hangs over."""
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (-(-room // stride) if ceil else room // stride) + 1
    return count - 1 if ceil and (count - 1) * stride >= size + padding else count


def _pool(spec: Spec, attrs: Attrs, dilation: list[int], scope: Scope) -> tuple[int, ...]:
    sizes = _spatial(spec, attrs["kernel"], attrs["stride"], attrs["padding"], dilation)
    out: list[int] = []
    padded: list[int] = []
    for size, kernel, stride, padding, step in zip(
        sizes, attrs["kernel"], attrs["stride"], attrs["padding"], dilation, strict=True
    ):
        _need(2 * padding <= kernel, f"padding {padding} is more than half of the window {kernel}")
        count = window_count(size, kernel, stride, padding, dilation=step, ceil=attrs["ceil"])
        _need(count >= 1, f"its window does not fit the size {size}")
        out.append(count)
        padded.append((count - 1) * stride + step * (kernel - 1) + 1 + size)
    scope.bound(math.prod((*spec.shape[: -len(sizes)], *padded)))
    return (*spec.shape[: -len(sizes)], *out)


def max_pool(inputs: Sequence[Spec], attrs: Attrs, scope: Scope) -> Spec:
    """Largest values of windows."""
    return Spec(_pool(inputs[0], attrs, attrs["dilation"], scope), inputs[0].grid)


def avg_pool(inputs: Sequence[Spec], attrs: Attrs, scope: Scope) -> Spec:
    """Means of windows."""
    return Spec(_pool(inputs[0], attrs, [1] * len(attrs["kernel"]), scope))


def adaptive_max_pool(inputs: Sequence[Spec], attrs: Attrs, scope: Scope) -> Spec:
    """Largest values of ``size`` windows that cover everything."""
    sizes = _spatial(inputs[0], attrs["size"])
    _need(min(sizes) > 0, "there is nothing to pool")
    return Spec((*inputs[0].shape[: -len(sizes)], *attrs["size"]), inputs[0].grid)


def adaptive_avg_pool(inputs: Sequence[Spec], attrs: Attrs, scope: Scope) -> Spec:
    """Means of ``size`` windows that cover everything."""
    return Spec(adaptive_max_pool(inputs, attrs, scope).shape)


def reduce(inputs: Sequence[Spec], attrs: Attrs, scope: Scope) -> Spec:
    """Dimensions summed up: gone, or of size one."""
    shape, dims = inputs[0].shape, attrs["dims"]
    _need(len(dims) > 0, "it names no dimension to reduce")
    _need(all(shape[_dim(dim, shape)] > 0 for dim in dims), f"there is nothing to reduce in {list(shape)}")
    if attrs["keepdim"]:
        return Spec(tuple(1 if dim in dims else size for dim, size in enumerate(shape)))
    return Spec(tuple(size for dim, size in enumerate(shape) if dim not in dims))


def constant(inputs: Sequence[Spec], attrs: Attrs, scope: Scope) -> Spec:
    """A stored constant."""
    return Spec(scope.constants[attrs["constant"]])


def scalar(inputs: Sequence[Spec], attrs: Attrs, scope: Scope) -> Spec:
    """One number."""
    return Spec(())


def same(inputs: Sequence[Spec], attrs: Attrs, scope: Scope) -> Spec:
    """A function of single values."""
    return Spec(inputs[0].shape)


def prelu(inputs: Sequence[Spec], attrs: Attrs, scope: Scope) -> Spec:
    """One slope for all, or one for each channel (dimension 1)."""
    scope.constant(attrs["slope"], (1,), inputs[0].shape[1:2])
    return Spec(inputs[0].shape)


def broadcast_shapes(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that these broadcast to.

    >>> broadcast_shapes((2, 1, 3), (4, 1))
    (2, 4, 3)
    """
    rank = max(map(len, shapes))
    aligned = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    out: list[int] = []
    for sizes in zip(*aligned, strict=True):
        wide = {size for size in sizes if size != 1}
        _need(
            len(wide) <= 1,
            f"shapes {' and '.join(str(list(shape)) for shape in shapes)} do not fit each other",
        )
        out.append(wide.pop() if wide else 1)
    return tuple(out)


def broadcast(inputs: Sequence[Spec], attrs: Attrs, scope: Scope) -> Spec:
    """Two values, element by element."""
    return Spec(broadcast_shapes(*(spec.shape for spec in inputs)))


def cat(inputs: Sequence[Spec], attrs: Attrs, scope: Scope) -> Spec:
    """Values one after the other along a dimension."""
    first, dim = inputs[0].shape, _dim(attrs["dim"], inputs[0].shape)
    for spec in inputs:
        others = spec.shape[:dim] + spec.shape[dim + 1 :]
        fits = len(spec.shape) == len(first) and others == first[:dim] + first[dim + 1 :]
        _need(fits, f"{list(spec.shape)} does not continue {list(first)} along dimension {dim}")
    return Spec((*first[:dim], sum(spec.shape[dim] for spec in inputs), *first[dim + 1 :]))


def softmax(inputs: Sequence[Spec], attrs: Attrs, scope: Scope) -> Spec:
    """Along one dimension, which is not empty."""
    _need(inputs[0].shape[_dim(attrs["dim"], inputs[0].shape)] > 0, "there is nothing to take the softmax of")
    return Spec(inputs[0].shape)


def _affine(attrs: Attrs, shape: tuple[int, ...], scope: Scope) -> None:
    for name in (attrs["weight"], attrs["bias"]):
        if name is not None:
            scope.constant(name, shape)


def layer_norm(inputs: Sequence[Spec], attrs: Attrs, scope: Scope) -> Spec:
    """Over the last ``dims`` dimensions, whose shape weight and bias have."""
    shape, dims = inputs[0].shape, attrs["dims"]
    _need(
        dims <= len(shape) and math.prod(shape[-dims:]) > 0,
        f"{list(shape)} has no {dims} dimensions to normalize",
    )
    _affine(attrs, shape[-dims:], scope)
    return Spec(shape)


def group_norm(inputs: Sequence[Spec], attrs: Attrs, scope: Scope) -> Spec:
    """Over groups of channels (dimension 1) and all that follows."""
    shape, groups, rank = inputs[0].shape, attrs["groups"], len(inputs[0].shape)
    _need(rank >= 2 and math.prod(shape[1:]) > 0, f"{list(shape)} has no channels to normalize")
    _need(shape[1] % groups == 0, f"{shape[1]} channels do not divide into {groups} groups")
    _affine(attrs, shape[1:2], scope)
    return Spec(shape)


def batch_norm(inputs: Sequence[Spec], attrs: Attrs, scope: Scope) -> Spec:
    """Scale and shift of each channel (dimension 1)."""
    _need(len(inputs[0].shape) >= 2, f"{list(inputs[0].shape)} has no channels to normalize")
    scope.constant(attrs["scale"], inputs[0].shape[1:2])
    scope.constant(attrs["shift"], inputs[0].shape[1:2])
    return Spec(inputs[0].shape)


def matmul(inputs: Sequence[Spec], attrs: Attrs, scope: Scope) -> Spec:
    """[..., m, k] times [..., k, n], leading dimensions broadcast."""
    a, b = (spec.shape for spec in inputs)
    _need(min(map(len, (a, b))) >= 2, "matrices have two dimensions or more")
    _need(a[-1] == b[-2], f"a matrix {list(a)} cannot be multiplied by a matrix {list(b)}")
    return Spec((*broadcast_shapes(a[:-2], b[:-2]), a[-2], b[-1]))


def attention(inputs: Sequence[Spec], attrs: Attrs, scope: Scope) -> Spec:
    """Queries [..., L, E], keys [..., S, E], values [..., S, V] to [..., L, V]."""
    q, k, v = (spec.shape for spec in inputs)
    _need(min(len(q), len(k), len(v)) >= 2, "queries, keys and values have two dimensions or more")
    _need(
        q[-1] == k[-1] and k[-2] == v[-2], f"queries {list(q)}, keys {list(k)}, values {list(v)} do not fit"
    )
    _need(k[-2] > 0, "there is nothing to attend to")
    leading = broadcast_shapes(q[:-2], k[:-2], v[:-2])
    scope.bound(math.prod((*leading, q[-2], k[-2])))
    return Spec((*leading, q[-2], v[-1]))
