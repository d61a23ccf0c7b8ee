"""Programs as data, and the checks that they pass before they run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mixbits.core.check import check, specs
from mixbits.core.grid import Uniform, grid_to_json
from mixbits.core.program import Instruction, PackedWeight, Program, last_reads
from mixbits.pack.bits import pack
from mixbits.runtime import Executor
from mixbits.runtime.values import floats_of

SIGNED = Uniform(3, signed=True)
QUANTIZE = Instruction(
    "quantize", "input", ("input",), "codes", {"grid": grid_to_json(SIGNED), "step": "step"}
)
CONV = Instruction(
    "conv2d",
    "conv",
    ("codes",),
    "maps",
    {
        "weight": "conv.weight",
        "scale": "scale",
        "bias": "bias",
        "stride": [1, 1],
        "padding": [[1, 1], [1, 1]],
        "dilation": [1, 1],
        "groups": 1,
    },
)
MEAN = Instruction("mean", "mean", ("maps",), "y", {"dims": [2, 3], "keepdim": False})
CODES = (np.arange(2 * 3 * 9) % 8).astype(np.uint8)


def program(*steps: Instruction, **changes) -> Program:
    """Quantize, a convolution of 3 to 2 channels, the mean of its maps."""
    whole = Program(
        (3, 4, 4),
        "y",
        steps or (QUANTIZE, CONV, MEAN),
        {"conv.weight": PackedWeight((2, 3, 3, 3), SIGNED, pack(CODES, 3))},
        {
            "step": np.array(0.25, np.float32),
            "scale": np.ones(2, np.float32),
            "bias": np.zeros(2, np.float32),
        },
    )
    return replace(whole, **changes)


def changed(step: Instruction, /, **attrs) -> Instruction:
    return replace(step, attrs={**step.attrs, **attrs})


def test_shapes_and_grids_are_known_before_running():
    found = specs(program(), 5)
    assert {name: spec.shape for name, spec in found.items()} == {
        "input": (5, 3, 4, 4),
        "codes": (5, 3, 4, 4),
        "maps": (5, 2, 4, 4),
        "y": (5, 2),
    }
    assert found["codes"].grid == SIGNED
    assert found["maps"].grid is None


def test_sizes_count_packed_weights_and_constants():
    assert program().weight_bytes == 54 * 3 // 8 + 1
    assert program().stored_floats == 5
    assert program().size_bytes == 21 + 20


def test_a_value_lives_until_its_last_read():
    assert last_reads(program()) == {"input": 0, "codes": 1, "maps": 2, "y": 3}


BROKEN = {
    "unknown instruction 'fly'": program(replace(QUANTIZE, op="fly")),
    "reads 'maps' before": program(QUANTIZE, MEAN),
    "output 'codes' exists already": program(QUANTIZE, replace(CONV, output="codes")),
    "no weight 'x'": program(QUANTIZE, changed(CONV, weight="x"), MEAN),
    "no constant 'x'": program(changed(QUANTIZE, step="x")),
    "step must be the name": program(changed(QUANTIZE, step=1)),
    "grid must be a grid": program(changed(QUANTIZE, grid={"bits": 9})),
    "stride must be": program(QUANTIZE, changed(CONV, stride=[0, 1]), MEAN),
    "padding must be": program(QUANTIZE, changed(CONV, padding=[[1, 1]]), MEAN),
    "groups must be": program(QUANTIZE, changed(CONV, groups=True), MEAN),
    "has the attributes": program(QUANTIZE, CONV, changed(MEAN, more=1)),
    "reads codes; quantize it first": program(replace(CONV, inputs=("input",)), MEAN),
    "takes 1 inputs": program(replace(QUANTIZE, inputs=("input", "input"))),
    "larger than the padded input": program(QUANTIZE, changed(CONV, dilation=[5, 1]), MEAN),
    "does not exist in shape": program(QUANTIZE, CONV, changed(MEAN, dims=[4])),
    "has shape .2., wanted is ..": program(changed(QUANTIZE, step="scale"), CONV, MEAN),
    "output 'z' is not a value": program(output="z"),
    "not batch first": program(QUANTIZE, CONV, changed(MEAN, dims=[0])),
    "input has 3 channels, its weight reads 3 x 2": program(QUANTIZE, changed(CONV, groups=2), MEAN),
    "more than the limit of": program(
        QUANTIZE,
        CONV,
        Instruction("pad", "pad", ("maps",), "y", {"pads": [[0, 2**26]] * 4, "mode": "constant", "value": 0}),
    ),
    "does not fit the shape": program(
        QUANTIZE, CONV, Instruction("reshape", "view", ("maps",), "y", {"shape": [1, -1, 7]})
    ),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_program_is_refused(message):
    with pytest.raises(ValueError, match=message):
        check(BROKEN[message])


def test_a_batch_size_written_into_the_program_is_refused():
    fixed = Instruction("reshape", "view", ("maps",), "y", {"shape": [1, 32]})
    with pytest.raises(ValueError, match="does not fit the shape"):
        check(program(QUANTIZE, CONV, fixed))


def test_what_is_alive_at_once_is_bounded():
    maps = ["maps", *(f"copy{i}" for i in range(19))]
    copies = tuple(Instruction("exp", "exp", ("maps",), name) for name in maps[1:])
    total = Instruction("cat", "cat", tuple(maps), "all", {"dim": 1})
    whole = program(QUANTIZE, CONV, *copies, total, replace(MEAN, inputs=("all",)))
    check(whole, max_elements=20 * 32)
    with pytest.raises(
        ValueError, match=r"exp: .* elements would be in memory at once, more than the limit of 480"
    ):
        check(whole, max_elements=120)


INPUTS = {
    "not a NumPy array": [[0.0]],
    "float64 is not float32": np.zeros((1, 3, 4, 4)),
    "shape .1, 3, 4, 5. does not fit": np.zeros((1, 3, 4, 5), np.float32),
    "shape .. does not fit": np.zeros((), np.float32),
    "infinities or NaN": np.full((1, 3, 4, 4), np.nan, np.float32),
}


@pytest.mark.parametrize("message", INPUTS)
def test_an_input_that_does_not_fit_is_refused(message):
    with pytest.raises(ValueError, match=f"^input: .*{message}.*pass"):
        Executor(program())(INPUTS[message])


def test_values_are_freed_after_their_last_read():
    executor = Executor(program())
    x = np.ones((2, 3, 4, 4), np.float32)
    assert set(executor.trace(x)) == {"input", "codes", "maps", "y"}
    assert np.array_equal(executor(x), floats_of(executor.trace(x)["y"]))
