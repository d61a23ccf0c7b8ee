"""Grids: which values exist, how values are rounded onto them, and what a file may say about them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixbits.core.grid import (
    Codebook,
    Uniform,
    dequantize,
    describe,
    grid_from_json,
    grid_to_json,
    levels_of,
    quantize,
    uniform_range,
)
from strategies import UNIFORM_GRIDS, codebooks, grids, powers_of_two, ratios, steps

# Levels by hand from the definitions of the forms.
LEVELS = {
    "1 bit unsigned": (Uniform(1, signed=False), (0, 1)),
    "1 bit signed": (Uniform(1, signed=True), (-1, 0)),
    "1 bit bipolar": (Uniform(1, signed=True, form="bipolar"), (-1, 1)),
    "2 bit narrow": (Uniform(2, signed=True, form="narrow"), (-1, 0, 1)),
    "2 bit bipolar": (Uniform(2, signed=True, form="bipolar"), (-3, -1, 1, 3)),
    "3 bit signed": (Uniform(3, signed=True), (-4, -3, -2, -1, 0, 1, 2, 3)),
    "3 bit narrow": (Uniform(3, signed=True, form="narrow"), (-3, -2, -1, 0, 1, 2, 3)),
    "3 bit unsigned": (Uniform(3, signed=False), (0, 1, 2, 3, 4, 5, 6, 7)),
}

# (value / step, level), by hand. Ties go to even levels; a bipolar grid has odd levels only, there to even
# codes.
ROUNDING = {
    "signed ties": (Uniform(3, signed=True), [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], [-2, -2, 0, 0, 2, 2]),
    "unsigned ties": (Uniform(2, signed=False), [0.5, 1.5, 2.5], [0, 2, 2]),
    "narrow ties": (Uniform(2, signed=True, form="narrow"), [-1.5, -0.5, 0.5, 1.5], [-1, 0, 0, 1]),
    "bipolar ties": (Uniform(2, signed=True, form="bipolar"), [-2.0, 0.0, 2.0], [-3, 1, 1]),
    "bipolar": (Uniform(1, signed=True, form="bipolar"), [-5.0, -0.1, 0.1, 5.0], [-1, -1, 1, 1]),
    "next to ties": (Uniform(3, signed=True), [0.49999, 0.50001, -0.49999, -0.50001], [0, 1, 0, -1]),
    "signed saturation": (Uniform(2, signed=True), [-1e30, -2.6, 1.4, 1.6, 1e30], [-2, -2, 1, 1, 1]),
    "unsigned saturation": (Uniform(2, signed=False), [-1e30, -0.1, 3.4, 3.6, 1e30], [0, 0, 3, 3, 3]),
    "infinities": (Uniform(4, signed=True), [-np.inf, np.inf], [-8, 7]),
    "8 bit ends": (Uniform(8, signed=True), [-128.4, -127.6, 126.6, 127.4], [-128, -128, 127, 127]),
    "codebook, midpoints": (
        Codebook(2, (-4, -1, 1, 4)),
        [-9, -2.6, -2.5, 0, 2.4, 2.5],
        [-4, -4, -1, 1, 1, 4],
    ),
    "codebook, own edges": (Codebook(2, (0, 1, 4), (0.7, 2.8)), [0.69, 0.7, 2.79, 2.8, 99], [0, 1, 1, 4, 4]),
}

WRONG_GRIDS = {
    "0 bits": (lambda: Uniform(0, signed=True), "a grid of 0 bits does not exist; widths are 1 to 8"),
    "9 bits": (lambda: Uniform(9, signed=False), "a grid of 9 bits does not exist"),
    "unknown form": (
        lambda: Uniform(4, signed=True, form="odd"),
        "unknown form 'odd'; .*full, narrow, bipolar",
    ),
    "unsigned narrow": (lambda: Uniform(4, signed=False, form="narrow"), "'narrow' needs signed=True"),
    "unsigned bipolar": (lambda: Uniform(1, signed=False, form="bipolar"), "'bipolar' needs signed=True"),
    "1 bit narrow": (lambda: Uniform(1, signed=True, form="narrow"), "for 1 bit use form='bipolar'"),
    "codebook of 9 bits": (lambda: Codebook(9, (0, 1)), "a codebook of 9 bits does not exist"),
    "one level": (lambda: Codebook(2, (0,)), r"1 levels do not fit 2 bits \(2 to 4\)"),
    "too many levels": (lambda: Codebook(1, (0, 1, 2)), "3 levels do not fit 1 bits"),
    "equal levels": (lambda: Codebook(2, (0, 1, 1)), "levels must increase strictly"),
    "level above a byte": (lambda: Codebook(2, (0, 256)), r"fit one byte \(0 .. 255\), got 0 .. 256"),
    "level above int8": (lambda: Codebook(2, (-1, 128)), r"fit one byte \(-128 .. 127\), got -1 .. 128"),
    "level below int8": (lambda: Codebook(2, (-129, 0)), r"fit one byte \(-128 .. 127\)"),
    "an edge too many": (lambda: Codebook(2, (0, 1), (0.5, 0.6)), "edges must lie between"),
    "edge at the lower level": (lambda: Codebook(2, (0, 1), (0.0,)), "edges must lie between"),
    "edge above": (lambda: Codebook(2, (0, 1, 2), (0.5, 2.5)), "edges must lie between"),
    "edge not a number": (lambda: Codebook(2, (0, 1), (float("nan"),)), "edges must lie between"),
}

WRONG_JSON = {
    "not an object": ([4], "a grid is an object"),
    "no bits": ({"signed": True}, r"a grid has the keys .*got \['signed'\]"),
    "unknown key": (
        {"bits": 4, "step": 0.1},
        r"has the keys \['bits', 'form', 'signed'\], got \['bits', 'step'\]",
    ),
    "form of a codebook": ({"bits": 2, "levels": [0, 1], "form": "full"}, r"\['bits', 'edges', 'levels'\]"),
    "bits a fraction": ({"bits": 4.0}, "bits must be an integer, got 4.0"),
    "bits true": ({"bits": True}, "bits must be an integer, got True"),
    "bits too many": ({"bits": 16}, "a grid of 16 bits does not exist"),
    "signed a number": ({"bits": 4, "signed": 1}, "signed must be true or false, got 1"),
    "form a list": ({"bits": 4, "form": ["full"]}, "unknown form"),
    "levels a number": ({"bits": 2, "levels": 3}, "levels must be a list of integers"),
    "levels of fractions": ({"bits": 2, "levels": [0, 0.5]}, "levels must be a list of integers"),
    "levels of booleans": ({"bits": 2, "levels": [False, True]}, "levels must be a list of integers"),
    "edges a number": ({"bits": 2, "levels": [0, 1], "edges": 0.5}, "edges must be a list of numbers"),
    "edges of words": ({"bits": 2, "levels": [0, 1], "edges": ["half"]}, "edges must be a list of numbers"),
    "levels that fall": ({"bits": 2, "levels": [1, 0]}, "levels must increase strictly"),
}


@pytest.mark.parametrize(("grid", "levels"), LEVELS.values(), ids=LEVELS)
def test_a_grid_has_its_levels(grid, levels):
    assert grid.levels == levels
    assert (grid.level_min, grid.level_max) == (levels[0], levels[-1])


@pytest.mark.parametrize("grid", UNIFORM_GRIDS, ids=describe)
def test_a_grid_uses_all_codes_unless_it_is_narrow(grid):
    assert len(grid.levels) == 2**grid.bits - (grid.form == "narrow")


@pytest.mark.parametrize(("grid", "ratio", "levels"), ROUNDING.values(), ids=ROUNDING)
def test_values_round_to_their_levels(grid, ratio, levels):
    codes = quantize(np.array(ratio, np.float32) * np.float32(0.25), 0.25, grid)

    assert levels_of(codes, grid).tolist() == levels


def test_the_division_is_done_in_float32():
    # The float32 neighbours of 0.05 and 0.02 have the ratio 2.50000009: 2.5, a tie, once rounded to float32.
    assert quantize(np.float32(0.05), np.float32(0.02), Uniform(4, signed=False)) == 2


@given(grids(), steps(), st.data())
def test_quantizing_a_value_of_the_grid_gives_its_code_back(grid, step, data):
    count = len(grid.levels)
    codes = np.array(data.draw(st.lists(st.integers(0, count - 1), max_size=20)), np.uint8)

    assert quantize(dequantize(codes, step, grid), step, grid).tolist() == codes.tolist()


@given(grids(), powers_of_two(), ratios())
def test_a_value_goes_to_a_level_that_none_is_nearer_than(grid, step, ratio):
    chosen = levels_of(quantize(ratio * np.float32(step), step, grid), grid).astype(float)

    distances = np.abs(np.asarray(grid.levels, float) - ratio.astype(float)[..., None])
    # The definition counts from the lowest level in float32: that near a tie, either level is right.
    rounding = np.finfo(np.float32).eps * max(grid.level_max, -grid.level_min)
    assert np.all(np.abs(chosen - ratio.astype(float)) <= distances.min(-1) + rounding)


@given(grids(), steps(), ratios())
def test_a_larger_value_has_no_smaller_level(grid, step, ratio):
    values = np.sort(ratio.ravel()) * step

    levels = levels_of(quantize(values, step, grid), grid)

    assert (np.diff(levels) >= 0).all()


@given(grids(), steps(), ratios())
def test_codes_are_bytes_of_the_input_shape_below_the_number_of_levels(grid, step, ratio):
    codes = quantize(ratio * step, step, grid)

    assert (codes.dtype, codes.shape) == (np.uint8, ratio.shape)
    assert (codes < len(grid.levels)).all()


@given(st.sampled_from([grid for grid in UNIFORM_GRIDS if grid.form == "narrow"]), steps(), ratios())
def test_a_narrow_grid_is_symmetric(grid, step, ratio):
    up, down = (levels_of(quantize(sign * ratio * step, step, grid), grid) for sign in (1, -1))

    assert np.array_equal(up, -down)


def test_a_step_per_channel_belongs_to_the_first_dimension():
    x = np.array([[1.0, -3.0], [1.0, -3.0]], np.float32)
    step, grid = np.array([[1.0], [0.5]], np.float32), Uniform(4, signed=True)

    codes = quantize(x, step, grid)

    assert levels_of(codes, grid).tolist() == [[1, -3], [2, -6]]
    assert dequantize(codes, step, grid).tolist() == x.tolist()


def test_bipolar_levels_of_8_bits_do_not_overflow():
    grid = Uniform(8, signed=True, form="bipolar")

    assert levels_of(np.array([0, 255], np.uint8), grid).tolist() == [-255, 255]
    assert dequantize(np.array([0, 255], np.uint8), 0.5, grid).dtype == np.float32


@given(st.integers(1, 8), st.booleans(), st.data())
def test_a_uniform_range_has_all_levels_up_to_its_largest(bits, signed, data):
    least = 2 if signed else 1
    bits = max(bits, least)
    level_max = data.draw(st.integers(1, 2 ** (bits - signed) - 1))

    grid = uniform_range(bits, level_max, signed=signed)

    assert grid.bits == bits
    assert grid.levels == tuple(range(-level_max if signed else 0, level_max + 1))


@given(st.integers(1, 8), st.booleans(), ratios())
def test_a_uniform_range_rounds_as_a_whole_grid_does_but_for_ties(bits, signed, ratio):
    # Thresholds of a codebook are fixed points on the line, so ties go up there and to even levels here.
    ratio = ratio[(ratio * 2 != np.rint(ratio * 2)) | (ratio == np.rint(ratio))]
    level_max = max(2 ** (max(bits, 2) - 1) - 2, 1)

    grid = uniform_range(max(bits, 2), level_max, signed=signed)

    levels = levels_of(quantize(ratio, 1.0, grid), grid)
    assert np.array_equal(levels, np.clip(np.rint(ratio), grid.level_min, grid.level_max))


@given(grids())
def test_a_grid_survives_json(grid):
    assert grid_from_json(json.loads(json.dumps(grid_to_json(grid)))) == grid


@given(codebooks(), st.data())
def test_a_codebook_with_edges_of_its_own_survives_json(book, data):
    between = zip(book.levels, book.levels[1:], strict=False)
    edges = tuple(data.draw(st.floats(low, high, exclude_min=True)) for low, high in between)
    book = Codebook(book.bits, book.levels, edges)

    assert grid_from_json(json.loads(json.dumps(grid_to_json(book)))) == book


def test_a_grid_written_by_hand_is_signed_and_full_unless_it_says_so():
    assert grid_from_json({"bits": 4}) == Uniform(4, signed=True, form="full")


@pytest.mark.parametrize(("make", "message"), WRONG_GRIDS.values(), ids=WRONG_GRIDS)
def test_a_grid_that_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("entry", "message"), WRONG_JSON.values(), ids=WRONG_JSON)
def test_json_that_is_no_grid_is_refused(entry, message):
    with pytest.raises(ValueError, match=message):
        grid_from_json(entry)
