"""Exact Winograd: what its proof admits is exact at the extremes, and what it refuses would not fit a byte."""

from __future__ import annotations

import numpy as np
import pytest

from contracts.test_kernels import NONE, Layer, Shape, check, layer
from mixbits.core.grid import Codebook, Grid, Uniform
from mixbits.pack.bits import native_available

if native_available():
    from mixbits import _native

    KERNELS = [name for name, usable, _ in _native.kernels() if usable and name.startswith("winograd_")]
else:
    KERNELS = []
every_winograd = pytest.mark.parametrize("kernel", KERNELS)

# Largest input byte beside the widest weights: V has 8 bits; on AVX2, two products of bytes have 16.
LARGEST_BYTE = {"winograd_avx512vnni": 63, "winograd_avx2": 32}

# Lavin and Gray (2016): B^T of the inputs, 2 G of the weights, A^T of the outputs.
B = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
G = np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]])
A = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])

WIDEST = Codebook(5, tuple(range(-14, 15)))
SHAPE = Shape(64, 48, (5, 7))


def spans(transform: np.ndarray, low: int, high: int) -> list[tuple[int, int]]:
    """Lowest and highest number at each position, over all tiles of values low .. high; both are reached."""
    found = []
    for row in transform:
        for column in transform:
            signs = np.outer(row, column)
            highest, lowest = np.where(signs > 0, high, low), np.where(signs > 0, low, high)
            found.append((int(row @ lowest @ column), int(row @ highest @ column)))
    return found


def extreme(weight_grid: Grid, input_grid: Grid, shape: Shape = SHAPE) -> Layer:
    return layer(shape, weight_grid, input_grid, seed=3, extreme=True)


def test_the_transforms_give_four_times_a_convolution():
    rng = np.random.default_rng(1)
    w, x = rng.integers(-9, 9, (3, 3)), rng.integers(0, 63, (4, 4))
    direct = [[int((w * x[y : y + 3, z : z + 3]).sum()) for z in range(2)] for y in range(2)]
    np.testing.assert_array_equal(A @ ((G @ w @ G.T) * (B @ x @ B.T)) @ A.T, 4 * np.array(direct))


@every_winograd
@pytest.mark.parametrize(
    "weight_grid",
    [
        WIDEST,
        Codebook(5, tuple(range(29))),  # counted from its middle
        Codebook(5, tuple(range(-128, -99))),
        Uniform(4, True, "bipolar"),
        Uniform(4, False),
        Uniform(4, True, "full"),
    ],
    ids=str,
)
@pytest.mark.parametrize("low", [0, -5])
def test_the_widest_grids_are_exact_at_their_extremes(kernel: str, weight_grid: Grid, low: int):
    input_grid = Codebook(6, tuple(range(low, low + LARGEST_BYTE[kernel] + 1)))
    assert check(kernel, extreme(weight_grid, input_grid))


def test_the_widest_ranges_fit_a_byte_and_the_next_do_not():
    def signed(positions: list[tuple[int, int]]) -> bool:
        return all(low >= -128 and high <= 127 for low, high in positions)

    def unsigned(positions: list[tuple[int, int]]) -> bool:  # after an offset of each position's own
        return all(high - low <= 255 for low, high in positions)

    assert signed(spans(G, -14, 14))
    assert not any(signed(spans(G, low, low + 29)) for low in range(-60, 60))  # wherever the middle is
    assert unsigned(spans(B, 0, 63))
    assert not unsigned(spans(B, 0, 64))


def test_two_of_the_largest_products_fit_16_bits_and_the_next_do_not():
    def largest(a_max: int) -> int:
        widths = [high - low for low, high in spans(B, 0, a_max)]
        sizes = [max(-low, high) for low, high in spans(G, -14, 14)]
        return max(2 * width * size for width, size in zip(widths, sizes, strict=True))

    assert largest(32) <= 2**15 - 1 < largest(33)


@every_winograd
@pytest.mark.parametrize("position", range(16))
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("weight_grid", "bits"),
    [(WIDEST, 5), (Uniform(4, True), 4), (Uniform(3, True), 3), (Uniform(1, True, "bipolar"), 1)],
    ids=str,
)
def test_the_largest_products_of_every_position_are_exact(
    kernel: str, position: int, sign: int, weight_grid: Grid, bits: int
):
    """All channels have the weights and inputs that get the most of one position."""
    shape = Shape(401, 16, (4, 4), padding=NONE)
    y, x = divmod(position, 4)
    input_grid = Uniform(bits, False)
    weights = np.where(sign * np.outer(G[y], G[x]) > 0, weight_grid.level_max, weight_grid.level_min)
    inputs = np.where(np.outer(B[y], B[x]) > 0, input_grid.level_max, 0)
    conv = layer(shape, weight_grid, input_grid, seed=1).conv
    levels = np.broadcast_to(weights.astype(np.int16), (16, 401, 3, 3)).copy()
    stored = np.zeros((4, 4, conv.pixel_stride), np.uint8)
    stored[..., :401] = inputs[..., None]
    sums, expected = np.zeros((2, 2, 16), np.int32), np.zeros((2, 2, 16), np.int32)
    _native.convolve(kernel, conv, stored, levels, sums, 2, 64)
    _native.convolve("direct_portable", conv, stored, levels, expected, 2, 64)
    np.testing.assert_array_equal(sums, expected)


@every_winograd
@pytest.mark.parametrize(
    "weight_grid",
    [Codebook(5, tuple(range(-15, 15))), Uniform(5, True, "narrow"), Codebook(5, (0, 29))],
    ids=str,
)
def test_weights_that_do_not_fit_a_byte_are_refused(kernel: str, weight_grid: Grid):
    problem = extreme(weight_grid, Uniform(1, False))
    assert "transformed weights need more than 8 bits" in _native.refuses(kernel, problem.conv)


@every_winograd
def test_inputs_that_do_not_fit_are_refused(kernel: str):
    problem = extreme(WIDEST, Codebook(7, (0, LARGEST_BYTE[kernel] + 1)))
    assert "transformed" in _native.refuses(kernel, problem.conv)


@every_winograd
def test_sums_that_would_wrap_are_refused(kernel: str):
    conv = extreme(WIDEST, Codebook(6, (0, LARGEST_BYTE[kernel]))).conv
    conv.c = (2**31 - 1) // (4 * 9 * 14 * LARGEST_BYTE[kernel])
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
