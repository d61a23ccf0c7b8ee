"""Exact Winograd: what its proof admits is exact at the extremes, and what it refuses would not fit a byte."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from contracts.test_kernels import NONE, Layer, Shape, check, layer
from mixbits.core.grid import Codebook, Grid, Uniform
from mixbits.pack.bits import native_available

if native_available():
    from mixbits import _native

    KERNELS = [name for name, usable, _ in _native.kernels() if usable and name.startswith("winograd")]
else:
    KERNELS = []
every_winograd = pytest.mark.parametrize("kernel", KERNELS)


@dataclass(frozen=True)
class Transform:
    """Of inputs, weights and outputs (Lavin and Gray 2016), and what outputs are multiplied with in all."""

    b: np.ndarray
    g: np.ndarray
    a: np.ndarray
    factor: int


TWO = Transform(
    b=np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]),
    g=np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]]),
    a=np.array([[1, 1, 1, 0], [0, 1, -1, -1]]),
    factor=4,
)
THREE = Transform(
    b=np.array([[2, -1, -2, 1, 0], [0, -2, -1, 1, 0], [0, 2, -3, 1, 0], [0, -1, 0, 1, 0], [0, 2, -1, -2, 1]]),
    g=np.array([[3, 0, 0], [-1, -1, -1], [-1, 1, -1], [1, 2, 4], [0, 0, 6]]),
    a=np.array([[1, 3, 1, 1, 0], [0, 3, -1, 2, 0], [0, 3, 1, 4, 1]]),
    factor=36,
)


@dataclass(frozen=True)
class Limits:
    """What a kernel takes at most: weights -weight .. weight, and beside these input bytes 0 .. byte."""

    transform: Transform
    weight: int
    byte: int


LIMITS = {
    "winograd_avx512vnni": Limits(TWO, 14, 63),
    "winograd_avx2": Limits(TWO, 14, 32),  # two products of bytes have 16 bits
    "winograd3_avx512vnni": Limits(THREE, 2, 7),
}
SHAPE = Shape(64, 48, (5, 7))


def patterns(transform: np.ndarray) -> list[np.ndarray]:
    """What each position multiplies its values with."""
    return [np.outer(row, column) for row in transform for column in transform]


def spans(transform: np.ndarray, low: int, high: int) -> list[tuple[int, int]]:
    """Lowest and highest number at each position, over all tiles of values low .. high; both are reached."""
    return [
        (int((p * np.where(p > 0, low, high)).sum()), int((p * np.where(p > 0, high, low)).sum()))
        for p in patterns(transform)
    ]


def fits_signed(positions: list[tuple[int, int]]) -> bool:
    return all(low >= -128 and high <= 127 for low, high in positions)


def fits_unsigned(positions: list[tuple[int, int]]) -> bool:
    """After an offset of each position's own."""
    return all(high - low <= 255 for low, high in positions)


def levels_from(low: int, count: int) -> Codebook:
    return Codebook(max(1, (count - 1).bit_length()), tuple(range(low, low + count)))


def extreme(weight_grid: Grid, input_grid: Grid, shape: Shape = SHAPE) -> Layer:
    return layer(shape, weight_grid, input_grid, seed=3, extreme=True)


@pytest.mark.parametrize("transform", [TWO, THREE], ids=["2x2", "3x3"])
def test_the_transforms_give_a_multiple_of_a_convolution(transform: Transform):
    rng = np.random.default_rng(1)
    size, outputs = len(transform.b), len(transform.a)
    w, x = rng.integers(-9, 9, (3, 3)), rng.integers(0, 63, (size, size))
    direct = [[int((w * x[i : i + 3, j : j + 3]).sum()) for j in range(outputs)] for i in range(outputs)]
    a, b, g = transform.a, transform.b, transform.g
    np.testing.assert_array_equal(
        a @ ((g @ w @ g.T) * (b @ x @ b.T)) @ a.T, transform.factor * np.array(direct)
    )


@every_winograd
@pytest.mark.parametrize("weight_low", [None, 0, -128], ids=["symmetric", "unsigned", "far"])
@pytest.mark.parametrize("input_low", [0, -5])
def test_the_widest_grids_are_exact_at_their_extremes(kernel: str, weight_low: int | None, input_low: int):
    limits = LIMITS[kernel]
    low = -limits.weight if weight_low is None else weight_low
    problem = extreme(levels_from(low, 2 * limits.weight + 1), levels_from(input_low, limits.byte + 1))
    assert check(kernel, problem)


WORST = [
    (kernel, position, grid, bits)
    for kernel in KERNELS
    for position in range(len(LIMITS[kernel].transform.b) ** 2)
    for grid, bits in [
        (levels_from(-14, 29), 5),
        (Uniform(4, True), 4),
        (Uniform(3, True), 3),
        (levels_from(-2, 5), 3),
        (Uniform(1, True, "bipolar"), 1),
    ]
    if -grid.level_min <= LIMITS[kernel].weight
]


@pytest.mark.parametrize(("kernel", "position", "weight_grid", "bits"), WORST)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_products_of_every_position_are_exact(
    kernel: str, position: int, weight_grid: Grid, bits: int, sign: int
):
    """All channels have the weights and inputs that get the most of one position."""
    transform, input_grid = LIMITS[kernel].transform, Uniform(bits, False)
    size, outputs, channels = len(transform.b), len(transform.a), 401
    shape = Shape(channels, 16, (size, size), padding=NONE)
    conv = layer(shape, weight_grid, input_grid, seed=1).conv
    extremes = sign * patterns(transform.g)[position] > 0
    weights = np.where(extremes, weight_grid.level_max, weight_grid.level_min).astype(np.int16)
    inputs = np.where(patterns(transform.b)[position] > 0, input_grid.level_max, 0)
    levels = np.broadcast_to(weights, (16, channels, 3, 3)).copy()
    stored = np.zeros((size, size, conv.pixel_stride), np.uint8)
    stored[..., :channels] = inputs[..., None]
    sums, expected = (np.zeros((outputs, outputs, 16), np.int32) for _ in range(2))
    _native.convolve(kernel, conv, stored, levels, sums, outputs, 64)
    _native.convolve("direct_portable", conv, stored, levels, expected, outputs, 64)
    np.testing.assert_array_equal(sums, expected)


@pytest.mark.parametrize("limits", [LIMITS["winograd_avx512vnni"], LIMITS["winograd3_avx512vnni"]], ids=str)
def test_the_widest_ranges_fit_a_byte_and_the_next_do_not(limits: Limits):
    b, g, weight = limits.transform.b, limits.transform.g, limits.weight
    assert fits_signed(spans(g, -weight, weight))
    wherever = range(-60, 60)  # the middle is
    assert not any(fits_signed(spans(g, low, low + 2 * weight + 1)) for low in wherever)
    assert fits_unsigned(spans(b, 0, limits.byte))
    assert not fits_unsigned(spans(b, 0, limits.byte + 1))


def test_two_of_the_largest_products_fit_16_bits_and_the_next_do_not():
    limits = LIMITS["winograd_avx2"]

    def largest(byte: int) -> int:
        widths = [high - low for low, high in spans(TWO.b, 0, byte)]
        sizes = [max(-low, high) for low, high in spans(TWO.g, -limits.weight, limits.weight)]
        return max(2 * width * size for width, size in zip(widths, sizes, strict=True))

    assert largest(limits.byte) <= 2**15 - 1 < largest(limits.byte + 1)


@every_winograd
@pytest.mark.parametrize("low", [None, 0, -128], ids=["symmetric", "unsigned", "far"])
def test_weights_that_do_not_fit_a_byte_are_refused(kernel: str, low: int | None):
    weight = LIMITS[kernel].weight
    weight_grid = levels_from(-weight if low is None else low, 2 * weight + 2)
    problem = extreme(weight_grid, Uniform(1, False))
    assert "transformed weights need more than 8 bits" in _native.refuses(kernel, problem.conv)


@every_winograd
def test_inputs_that_do_not_fit_are_refused(kernel: str):
    limits = LIMITS[kernel]
    problem = extreme(levels_from(-limits.weight, 2 * limits.weight + 1), Codebook(7, (0, limits.byte + 1)))
    assert "transformed" in _native.refuses(kernel, problem.conv)


@every_winograd
def test_weights_that_are_all_zero_are_exact(kernel: str):
    problem = extreme(Codebook(1, (0, 1)), Uniform(1, False))
    problem.levels[:] = problem.sums[:] = 0
    problem.conv.w_min = problem.conv.w_max = 0
    assert check(kernel, problem)


@every_winograd
def test_sums_that_would_wrap_are_refused(kernel: str):
    limits = LIMITS[kernel]
    conv = extreme(levels_from(-limits.weight, 2 * limits.weight + 1), Codebook(6, (0, limits.byte))).conv
    conv.c = (2**31 - 1) // (4 * 9 * limits.weight * limits.byte)
    assert not _native.refuses(kernel, conv)
    conv.c += 1
    assert "too large" in _native.refuses(kernel, conv)


@every_winograd
@pytest.mark.parametrize(
    "shape",
    [
        Shape(64, 64, (6, 6), stride=(2, 2)),
        Shape(64, 64, (6, 6), stride=(1, 2)),
        Shape(64, 64, (6, 6), dilation=(2, 2)),
        Shape(64, 64, (6, 6), groups=2),
        Shape(64, 64, (6, 6), (3, 1)),
        Shape(64, 64, (6, 6), (1, 1), padding=NONE),
    ],
    ids=str,
)
def test_other_convolutions_are_refused(kernel: str, shape: Shape):
    assert _native.refuses(kernel, layer(shape, Uniform(2, True), Uniform(2, False), seed=1).conv)
