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
needs_bytes = pytest.mark.parametrize("kernel", [k for k in KERNELS if k == "winograd_avx512vnni"])

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
@pytest.mark.parametrize("input_grid", [Uniform(6, False), Uniform(6, True, "full")], ids=str)
def test_the_widest_grids_are_exact_at_their_extremes(kernel: str, weight_grid: Grid, input_grid: Grid):
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


@needs_bytes
@pytest.mark.parametrize(
    ("weight_grid", "input_grid", "why"),
    [
        (Codebook(5, tuple(range(-15, 15))), Uniform(4, False), "weights"),
        (Uniform(5, True, "narrow"), Uniform(4, False), "weights"),
        (Codebook(5, (0, 29)), Uniform(4, False), "weights"),
        (Uniform(4, True, "full"), Codebook(7, (0, 64)), "inputs"),
        (Uniform(1, True, "bipolar"), Uniform(7, False), "inputs"),
    ],
    ids=str,
)
def test_what_does_not_fit_a_byte_is_refused(kernel: str, weight_grid: Grid, input_grid: Grid, why: str):
    problem = extreme(weight_grid, input_grid)
    assert f"transformed {why} need more than 8 bits" in _native.refuses(kernel, problem.conv)


@every_winograd
def test_sums_that_would_wrap_are_refused(kernel: str):
    conv = extreme(WIDEST, Uniform(6, False)).conv
    conv.c = (2**31 - 1) // (4 * 9 * 14 * 63)
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
