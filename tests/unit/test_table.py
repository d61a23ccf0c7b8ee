"""Table kernels: no sum of entries may overflow, however long it is and however large its entries are."""

from __future__ import annotations

import numpy as np
import pytest

from contracts.test_kernels import NONE, Shape
from mixbits.core.grid import Codebook, Grid, Uniform
from mixbits.pack.bits import native_available
from mixbits.runtime.kernels import bytes_of, convolution

if native_available():
    from mixbits import _native

    KERNELS = [name for name, usable, _ in _native.kernels() if usable and name.startswith("table_")]
else:
    KERNELS = []
every_table = pytest.mark.parametrize("kernel", KERNELS)


def constant_sums(kernel: str, shape: Shape, grids: tuple[Grid, Grid], levels: tuple[int, int]) -> np.ndarray:
    """A kernel's sums where every weight is of one level, and every input of one."""
    (weight_grid, input_grid), (weight, value) = grids, levels
    w = np.full((shape.outputs, shape.channels, *shape.kernel), weight, np.int16)
    conv = convolution(w.shape, weight_grid, input_grid, size=shape.size, padding=NONE)
    storage = bytes_of(input_grid)
    stored = np.zeros((conv.in_h, conv.in_w, conv.pixel_stride), np.uint8)
    stored[..., : shape.channels] = (value - storage.offset) // storage.scale
    assert not _native.refuses(kernel, conv)
    sums = np.zeros((conv.out_h, conv.out_w, shape.outputs), np.int32)
    _native.convolve(kernel, conv, stored, w, sums, _native.kernel_cost(kernel, conv)[1], 4096)
    return sums


@every_table
@pytest.mark.parametrize("corner", [(0, 0), (0, -1), (-1, 0), (-1, -1)], ids=str)
@pytest.mark.parametrize("channels", [95, 30011], ids=str)  # a byte's room, and that of 16 bits
@pytest.mark.parametrize("input_grid", [Uniform(1, False), Uniform(2, False), Uniform(2, True)], ids=str)
@pytest.mark.parametrize(
    "weight_grid",
    [Uniform(1, True, "bipolar"), Uniform(2, True), Uniform(2, True, "bipolar"), Codebook(2, (-9, 0, 3, 12))],
    ids=str,
)
def test_the_largest_sums_are_exact(
    kernel: str, weight_grid: Grid, input_grid: Grid, channels: int, corner: tuple[int, int]
):
    shape = Shape(channels, 33, (1, 3), (1, 1), padding=NONE)
    levels = weight_grid.levels[corner[0]], input_grid.levels[corner[1]]
    sums = constant_sums(kernel, shape, (weight_grid, input_grid), levels)
    np.testing.assert_array_equal(sums, channels * levels[0] * levels[1])


@every_table
@pytest.mark.parametrize(
    ("weight_grid", "input_grid"),
    [
        (Uniform(4, True), Uniform(1, False)),  # too many weights
        (Uniform(1, True, "bipolar"), Uniform(5, False)),  # too many inputs
        (Codebook(2, (-100, 0, 1, 100)), Uniform(2, False)),  # entries that do not fit a byte
    ],
    ids=str,
)
def test_what_no_table_holds_is_refused(kernel: str, weight_grid: Grid, input_grid: Grid):
    conv = convolution((8, 8, 1, 1), weight_grid, input_grid, size=(4, 4))
    assert _native.refuses(kernel, conv)
