"""Bit Fusion: what a layer takes on an array of fusion units, by the widths of its two operands.

Sharma et al., ISCA 2018 (arXiv 1712.01507). A fusion unit is 16 bricks, each of which multiplies 2 bits by
2 bits in a cycle; bricks fuse into products of 2, 4 or 8 bits a side, and products of 16 bits take several
cycles. Operands of other widths are rounded up. The products that add up to one output lie along the rows
of the array, output channels along its columns.

Deviation: the authors' simulator (github.com/hsharma35/bitfusion) lays the whole window along the rows in
the first layer only, in others the input channels, one place of the window after the other. Here it is the
whole window everywhere, else no layer of up to 16 channels would gain from fewer than 8 bits. Groups of a
convolution, which that simulator does not have, follow each other: they read different inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from mixbits.core.profile import Op

OPERANDS = (2, 4, 8, 16)  # bits; the next wider one is taken
BRICKS = 16  # of a fusion unit
BRICK_BITS = 2  # a side

# Energy as the authors' simulator counts it, without its on-chip buffers, whose traffic depends on tiling:
# 4 x 4 units at 500 MHz draw 3.6735 mW while they work (results/systolic_array_synth.csv, 8 to 2 bits), which
# is 0.459 pJ a unit and cycle, busy or not; DRAM takes 15 pJ a bit (the default of its Stats.get_energy).
UNIT_FJ = 459  # a cycle
DRAM_FJ = 15_000  # a bit, read or written


@dataclass(frozen=True)
class Array:
    """Fusion units: ``rows`` add up products of one output, ``columns`` hold one output channel each."""

    rows: int
    columns: int


# What the paper compares with Eyeriss, of equal area (bf_e_conf.ini in the authors' simulator).
PAPER = Array(16, 32)


def cycles(op: Op, array: Array, weight_bits: int, input_bits: int) -> int:
    """Cycles of a layer for one sample, its operands being ready; widths are of ``OPERANDS``.

    >>> conv = Op("conv", "conv2d", 1024 * 32 * 144, "conv.weight", "input", channels=32, reduction=144)
    >>> cycles(conv, PAPER, 2, 2), cycles(conv, PAPER, 4, 8), cycles(conv, PAPER, 16, 16)
    (1024, 5120, 36864)
    """
    bricks = (weight_bits // BRICK_BITS) * (input_bits // BRICK_BITS)  # a power of two
    lanes, turns = max(BRICKS // bricks, 1), max(bricks // BRICKS, 1)  # products a cycle, cycles a product
    positions = _ceil(op.macs, op.channels * op.reduction)
    passes = op.groups * _ceil(op.channels // op.groups, array.columns)
    return positions * passes * _ceil(op.reduction, array.rows * lanes) * turns


def energy_fj(op: Op, array: Array, weight_bits: int, input_bits: int, *, weights: int, moved: int) -> int:
    """Femtojoules of a layer for one sample: the array's, and the DRAM's for its operands.

    ``weights`` values are read once; ``moved`` counts the input's values once a reading or writing.
    """
    array_fj = cycles(op, array, weight_bits, input_bits) * array.rows * array.columns * UNIT_FJ
    return array_fj + (weights * weight_bits + moved * input_bits) * DRAM_FJ


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)
