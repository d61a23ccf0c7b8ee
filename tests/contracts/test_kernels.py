"""Every kernel gives the reference's integers: all widths and forms of grids, shapes at the edges of its tiles."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass

import numpy as np
import pytest

from mixbits.core.grid import Codebook, Grid, Uniform
from mixbits.pack.bits import native_available
from mixbits.runtime.kernels import bytes_of, convolution
from mixbits.runtime.reference import REFERENCE
from mixbits.runtime.values import Codes, Weight

pytestmark = pytest.mark.skipif(not native_available(), reason="built without the native extension")
if native_available():
    from mixbits import _native

    KERNELS = [name for name, usable, _ in _native.kernels() if usable]
else:
    KERNELS = []
every_kernel = pytest.mark.parametrize("kernel", KERNELS)

WEIGHT_GRIDS: list[Grid] = [
    *(Uniform(bits, True, "full") for bits in range(1, 9)),
    *(Uniform(bits, True, "narrow") for bits in range(2, 9)),
    *(Uniform(bits, True, "bipolar") for bits in range(1, 9)),
    *(Uniform(bits, False) for bits in (1, 2, 5, 8)),
    Codebook(2, (-7, -1, 0, 5)),
    Codebook(3, (-128, -64, -5, 0, 1, 90, 127)),
    Codebook(4, (0, 1, 2, 4, 8, 16, 32, 64, 128, 255)),
    Codebook(8, tuple(range(-100, 101))),
]
INPUT_GRIDS: list[Grid] = [
    *(Uniform(bits, False) for bits in range(1, 9)),
    *(Uniform(bits, True, "full") for bits in (1, 2, 3, 4, 6, 8)),
    *(Uniform(bits, True, "narrow") for bits in (2, 4, 8)),
    *(Uniform(bits, True, "bipolar") for bits in (1, 2, 3, 7)),
    Codebook(2, (0, 1, 4, 9)),
    Codebook(4, (-128, -3, 0, 2, 127)),
]


@dataclass(frozen=True)
class Shape:
    channels: int  # of all groups
    outputs: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((1, 1), (1, 1))
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


NONE = ((0, 0), (0, 0))
SHAPES = [
    Shape(1, 1, (1, 1), (1, 1), padding=NONE),
    Shape(64, 64, (7, 7)),
    Shape(16, 16, (8, 9)),
    Shape(32, 48, (6, 5), stride=(2, 2)),
    Shape(64, 128, (5, 6), (1, 1), stride=(2, 2), padding=NONE),
    Shape(3, 17, (11, 13), (7, 7), stride=(2, 2), padding=((3, 3), (3, 3))),
    Shape(65, 67, (4, 3), padding=((0, 2), (1, 0))),
    Shape(13, 31, (9, 4), (2, 5), stride=(1, 3), padding=((1, 0), (2, 3))),
    Shape(8, 24, (9, 9), dilation=(2, 3), padding=((2, 2), (3, 3))),
    Shape(24, 24, (7, 10), groups=24),
    Shape(72, 72, (9, 15), stride=(2, 2), groups=72),
    Shape(17, 17, (6, 6), (5, 5), padding=((2, 2), (2, 2)), groups=17),
    Shape(12, 24, (5, 5), groups=3),
    Shape(20, 20, (5, 5), groups=4, dilation=(1, 2)),
    Shape(10, 20, (4, 4), groups=10),  # two outputs a channel
    Shape(100, 100, (4, 70), groups=100),
    Shape(160, 160, (6, 9), stride=(2, 2), groups=160),
    Shape(20, 20, (9, 8), (7, 3), stride=(2, 1), padding=((3, 3), (1, 1)), dilation=(2, 1), groups=20),
    Shape(96, 80, (3, 30), (3, 1), padding=((1, 1), (0, 0))),
    Shape(2, 40, (7, 33), (4, 4)),
    Shape(40, 48, (1, 3), (1, 1), padding=NONE),
    Shape(64, 130, (1, 1), (1, 1), padding=NONE),
    Shape(512, 10, (1, 1), (1, 1), padding=NONE),
    Shape(129, 257, (1, 5), (1, 1), padding=NONE),
    Shape(192, 64, (3, 3)),
    Shape(1, 8, (12, 12), (5, 5), padding=NONE),
]


@dataclass(frozen=True)
class Layer:
    """A convolution with its numbers, and the sums that the reference has for it."""

    conv: _native.Conv
    input: np.ndarray  # uint8 [in_h, in_w, pixel_stride]
    levels: np.ndarray  # int16 [O, C / groups, kh, kw]
    sums: np.ndarray  # float32 [out_h, out_w, O]: the integer sums, rounded where they are above 2**24


def layer(shape: Shape, weight_grid: Grid, input_grid: Grid, *, seed: int, extreme: bool = False) -> Layer:
    """Random or extreme codes."""
    rng = np.random.default_rng(seed)
    weight_levels, input_levels = (np.array(g.levels, np.int16) for g in (weight_grid, input_grid))
    if extreme:
        weight_levels, input_levels = weight_levels[[0, -1]], input_levels[[0, -1]]
    w = rng.choice(weight_levels, (shape.outputs, shape.channels // shape.groups, *shape.kernel))
    x = rng.choice(input_levels, (1, shape.channels, *shape.size))
    largest = int(np.abs(w.astype(np.int64)).reshape(len(w), -1).sum(1).max())
    storage = bytes_of(input_grid)
    border = 0 if storage.zero is not None else storage.offset  # a kernel takes whatever the border holds
    y = REFERENCE["conv2d"](
        Codes(np.pad(x, ((0, 0), (0, 0), *shape.padding), constant_values=border), np.float32(1), input_grid),
        weight=Weight(w, largest),  # scale 1 and bias 0: outputs are the sums
        scale=np.ones(len(w), np.float32),
        bias=np.zeros(len(w), np.float32),
        stride=shape.stride,
        padding=NONE,
        dilation=shape.dilation,
        groups=shape.groups,
    )
    conv = convolution(
        w.shape,
        weight_grid,
        input_grid,
        size=shape.size,
        stride=shape.stride,
        padding=shape.padding,
        dilation=shape.dilation,
        groups=shape.groups,
    )
    stored = np.zeros((conv.in_h, conv.in_w, conv.pixel_stride), np.uint8)
    stored[..., : shape.channels] = storage.zero or 0
    (top, _), (left, _) = shape.padding
    h, w_ = shape.size
    codes = (x[0].transpose(1, 2, 0) - storage.offset) // storage.scale
    stored[top : top + h, left : left + w_, : shape.channels] = codes
    return Layer(conv, stored, w, y[0].transpose(1, 2, 0))


def check(kernel: str, problem: Layer, *, rows: int | None = None, channels: int = 4096) -> bool:
    """Whether the kernel takes the layer; it must then give the reference's sums."""
    if _native.refuses(kernel, problem.conv):
        return False
    _, preferred, step = _native.kernel_cost(kernel, problem.conv)
    assert preferred % step == 0
    sums = np.full(problem.sums.shape, -(2**31), np.int32)
    _native.convolve(
        kernel,
        problem.conv,
        problem.input,
        problem.levels,
        sums,
        rows * step if rows else preferred,
        channels,
    )
    np.testing.assert_array_equal(sums.astype(np.float32), problem.sums)
    return True


@every_kernel
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(kernel: str, shape: Shape):
    pick = random.Random(f"{kernel} {shape}")
    taken = 0
    for seed in range(40):
        weight_grid, input_grid = pick.choice(WEIGHT_GRIDS), pick.choice(INPUT_GRIDS)
        problem = layer(shape, weight_grid, input_grid, seed=seed)
        taken += check(
            kernel, problem, rows=pick.choice([None, 1, 2, 5]), channels=pick.choice([64, 128, 4096])
        )
    if kernel == "direct_portable":
        assert taken == 40


@every_kernel
@pytest.mark.parametrize("weight_grid", WEIGHT_GRIDS, ids=str)
def test_every_pair_of_grids_at_its_extremes(kernel: str, weight_grid: Grid):
    for input_grid, (shape, extreme) in itertools.product(
        INPUT_GRIDS,
        [
            (Shape(32, 32, (6, 6)), False),
            (Shape(64, 64, (4, 9)), True),
            (Shape(128, 64, (3, 3), (1, 1), padding=NONE), True),
        ],
    ):
        check(kernel, layer(shape, weight_grid, input_grid, seed=1, extreme=extreme))


@every_kernel
@pytest.mark.parametrize("size", [0, 1, 2, 3])
def test_sizes_around_tiles(kernel: str, size: int):
    """Widths and channels of a multiple of every tile, one less and one more, and primes."""
    pick = random.Random(f"{kernel} {size}")
    for seed in range(25):
        channels, outputs = (pick.choice([1, 3, 4, 5, 15, 16, 17, 31, 33, 63, 64, 66, 97]) for _ in range(2))
        window = pick.choice([(1, 1), (3, 3), (3, 3), (2, 2), (5, 3)])
        shape = Shape(
            channels,
            outputs,
            (max(window[0], pick.choice([1, 2, 4, 5, 7])), max(window[1], 7 * size + pick.randrange(9))),
            window,
            stride=(pick.choice([1, 1, 2]),) * 2,
            padding=NONE if pick.random() < 0.5 else ((1, 0), (0, 1)),
        )
        few = [g for g in INPUT_GRIDS if g.bits <= 4]
        narrow = [g for g in WEIGHT_GRIDS if g.bits <= 4]
        grids = (narrow, few) if pick.random() < 0.7 else (WEIGHT_GRIDS, INPUT_GRIDS)
        problem = layer(shape, pick.choice(grids[0]), pick.choice(grids[1]), seed=seed)
        check(kernel, problem, rows=pick.choice([None, 1, 3]), channels=64)


@every_kernel
def test_the_cost_of_what_a_kernel_refuses_is_an_error(kernel: str):
    """Of a codebook, say, with whose step of 0 estimates would divide."""
    problem = layer(Shape(16, 16, (4, 4)), Codebook(2, (-7, -1, 0, 5)), Uniform(8, False), seed=0)
    why = _native.refuses(kernel, problem.conv)
    if why:
        with pytest.raises(ValueError, match=re.escape(why)):
            _native.kernel_cost(kernel, problem.conv)
    else:
        assert _native.kernel_cost(kernel, problem.conv)[0] > 0
