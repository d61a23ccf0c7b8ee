"""Native operations equal the reference: every instruction but the integer layers, in every layout."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from mixbits.core.grid import Codebook, Grid, Uniform, levels_of
from mixbits.core.instructions import CONSTANT, INSTRUCTIONS, MAYBE_CONSTANT
from mixbits.pack.bits import native_available
from mixbits.runtime import Executor
from mixbits.runtime.kernels import bytes_of
from mixbits.runtime.reference import REFERENCE
from mixbits.runtime.values import Codes, Value, floats_of
from programs import LIMIT, SAMPLE, SEEDS, random_program

pytestmark = pytest.mark.skipif(not native_available(), reason="built without the native extension")
if native_available():
    from mixbits import _native

# Computed in double and rounded to float32 once, on both sides. Where the doubles differ in their last bits
# (another order of summation, another math library), the floats are the same or neighbours; where terms
# cancel, what is left differs by the error of doubles of the terms' size. How many floats may differ, of all:
NEAR_TIES = 1e-4  # a sum must lie within 1e-15 of a tie
FLOATS_THAT_DIFFER = {
    **dict.fromkeys(
        ("cos", "exp", "log", "mish", "rsqrt", "sigmoid", "silu", "sin", "tanh", "pow"), NEAR_TIES
    ),
    **dict.fromkeys(
        ("elu", "softplus", "sum", "mean", "adaptive_avg_pool", "layer_norm", "group_norm"), NEAR_TIES
    ),
    **dict.fromkeys(("softmax", "log_softmax", "matmul", "attention"), NEAR_TIES),
    "gelu": 1e-2,  # 1 + tanh(x) has few digits where tanh(x) is close to -1
    "upsample_bilinear": 5e-3,  # weights such as 1/6 and 1/2 put many sums of levels on ties
}
DOUBLE_ERROR = 2e-15  # a few roundings of terms of size one: 2**-53 each

INTEGER_LAYERS = {"quantize", "conv1d", "conv2d", "linear"}
GRIDS: list[Grid] = [
    Uniform(4, signed=True),
    Uniform(8, signed=False),
    Uniform(2, signed=True, form="bipolar"),
    Uniform(8, signed=True, form="narrow"),
    Codebook(3, (-100, -3, 0, 1, 127)),
    Codebook(2, (1, 5, 255)),
]


@dataclass(frozen=True)
class Case:
    """Shapes of the inputs, attributes, and shapes of those attributes that are constants."""

    shapes: tuple[tuple[int, ...], ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, tuple[int, ...]] = field(default_factory=dict)


def case(*shapes: tuple[int, ...], constants: dict[str, tuple[int, ...]] | None = None, **attrs: Any) -> Case:
    return Case(shapes, attrs, constants or {})


def window(kernel: int, stride: int, padding: int, dims: int = 2, **attrs: Any) -> dict[str, Any]:
    return {"kernel": [kernel] * dims, "stride": [stride] * dims, "padding": [padding] * dims, **attrs}


MAP = (2, 19, 6, 7)  # channels: no multiple of anything
WIDE = (1, 260, 5, 3)  # more channels than are worked on at a time
SHAPES = [(), (3,), (2, 600), MAP, WIDE, (0, 3, 2, 2), (2, 3, 1, 4, 2)]
PAIRS = [
    ((2, 3), (2, 3)),
    (MAP, MAP),
    (MAP, (1,)),
    ((), MAP),
    (MAP, (2, 19, 1, 1)),
    ((19, 1, 1), MAP),
    ((3, 1, 700), (5, 1)),
    (WIDE, (5, 1)),
]
SAME = [case(shape) for shape in SHAPES]
DIMS = [
    case(MAP, dims=[2, 3], keepdim=True),
    case(MAP, dims=[3, 2], keepdim=False),
    case(MAP, dims=[1], keepdim=True),
    case(MAP, dims=[0, 1, 2, 3], keepdim=False),
    case(WIDE, dims=[0, 2], keepdim=False),
    case((3, 1100), dims=[1], keepdim=False),
    case((1100, 3), dims=[0], keepdim=True),
    case((0, 3), dims=[1], keepdim=True),
]
SIZES = [
    *(case(MAP, size=size) for size in ([1, 1], [3, 2], [6, 7], [9, 11], [12, 21], [13, 7])),
    case(WIDE, size=[4, 3]),
    case((3, 4, 5), size=[4, 10]),
    case((2, 3, 1, 1), size=[2, 1]),
]
SIZES_OF_ONE = [case((2, 5, 9), size=[4]), case((2, 5, 9), size=[18]), case((5, 9), size=[11])]
POOLS = [
    (MAP, window(3, 2, 1)),
    (MAP, window(2, 2, 0)),
    (MAP, window(3, 1, 1)),
    (WIDE, window(3, 1, 0)),
    ((2, 3, 1, 2), window(2, 1, 1)),
    ((4, 9, 8), window(4, 3, 2)),
    ((2, 5, 11), window(3, 2, 1, dims=1)),
    ((5, 11), window(2, 3, 0, dims=1)),
    ((0, 2, 4, 4), window(2, 2, 0)),
]
AVERAGES = [
    case(shape, **windows, ceil=ceil, include_pad=include, divisor=divisor)
    for shape, windows in POOLS
    for ceil in (False, True)
    for include, divisor in ((False, None), (True, None), (True, 5))
]
MAXIMA = [
    case(shape, **windows, dilation=[dilation] * len(windows["kernel"]), ceil=ceil)
    for shape, windows in POOLS
    for ceil in (False, True)
    for dilation in (1, 2)
    if dilation == 1 or shape[-1] > 5
] + [case((1, 3, 2, 2), **window(2, 1, 1), dilation=[3, 3], ceil=False)]  # one window, nothing but padding
PADS = [
    case(MAP, pads=[[0, 0], [0, 0], [1, 2], [3, 0]], mode=mode, value=0)
    for mode in ("constant", "reflect", "edge", "wrap")
] + [
    case(MAP, pads=[[1, 0], [0, 2], [1, 1], [0, 0]], mode="constant", value=0),
    case(MAP, pads=[[0, 1], [-3, 2], [1, -1], [-2, -2]], mode="constant", value=1.5),
    case(MAP, pads=[[1, 1], [2, 18], [5, 5], [6, 6]], mode="reflect", value=0),
    case(MAP, pads=[[2, 2], [19, 0], [0, 6], [7, 7]], mode="wrap", value=0),
    case((0, 3), pads=[[0, 0], [1, 1]], mode="constant", value=0),
]
LINES = [
    *(case(MAP, dim=dim) for dim in range(4)),
    case((5, 197), dim=1),
    case((1,), dim=0),
    case((0, 3), dim=1),
]
CASES: dict[str, list[Case]] = {
    **{
        name: SAME for name in INSTRUCTIONS if INSTRUCTIONS[name].inputs == 1 and not INSTRUCTIONS[name].attrs
    },
    **{name: [case(*pair) for pair in PAIRS] for name in ("add", "div", "maximum", "minimum", "mul", "pow")},
    "sub": [case(*pair) for pair in PAIRS],
    "reshape": [
        case(MAP, shape=[2, -1]),
        case(MAP, shape=[-1, 6, 7]),
        case(MAP, shape=[2, 19, 3, 2, 7, 1]),
        case(MAP, shape=[7, 6, 19, 2]),
        case(MAP, shape=[2, 1, 38, 21]),
        case((0, 3, 2), shape=[-1, 6]),
        case((1, 1), shape=[1]),
        case((), shape=[1, 1, 1]),
    ],
    "permute": [
        case(MAP, dims=[0, 2, 3, 1]),
        case(MAP, dims=[3, 1, 0, 2]),
        case(WIDE, dims=[0, 2, 3, 1]),
        case((70, 90), dims=[1, 0]),
        case((), dims=[]),
    ],
    "slice": [
        case(MAP, dim=1, start=1, stop=17, step=2),
        case(MAP, dim=3, start=2, stop=100, step=1),
        case(MAP, dim=2, start=5, stop=2, step=1),
    ],
    "select": [case(MAP, dim=dim, index=1) for dim in range(4)],
    "expand": [
        case((2, 1, 6, 1), shape=["batch", 19, -1, 7]),
        case((3, 1), shape=[2, 4, -1, 5]),
        case((), shape=[3]),
    ],
    "pad": PADS,
    "upsample_nearest": SIZES + SIZES_OF_ONE,
    "upsample_bilinear": [
        Case(each.shapes, {**each.attrs, "align_corners": corners})
        for each in SIZES
        for corners in (False, True)
    ],
    "max_pool": MAXIMA,
    "adaptive_max_pool": SIZES + SIZES_OF_ONE,
    "avg_pool": AVERAGES,
    "adaptive_avg_pool": SIZES + SIZES_OF_ONE,
    **dict.fromkeys(("mean", "sum", "max"), DIMS),
    "constant": [case(constants={"constant": shape}) for shape in SHAPES],
    "scalar": [case(value=0.1), case(value=-3)],
    "clamp": [case(MAP, low=low, high=high) for low in (None, -0.5, 0) for high in (None, 1, 0.3)],
    "gelu": [case(shape, approximate=kind) for shape in SHAPES for kind in ("none", "tanh")],
    "elu": [case(shape, alpha=1.7, scale=1.05, input_scale=0.9) for shape in SHAPES],
    "leaky_relu": [case(shape, slope=0.1) for shape in SHAPES],
    "softplus": [case(shape, beta=1.5, threshold=2) for shape in SHAPES],
    "prelu": [case(MAP, constants={"slope": (size,)}) for size in (1, 19)]
    + [case((4, 3), constants={"slope": (3,)})],
    "batch_norm": [
        case(shape, constants={"scale": shape[1:2], "shift": shape[1:2]})
        for shape in (MAP, WIDE, (4, 3), (0, 2))
    ],
    "cat": [
        case(MAP, MAP, dim=0),
        case(MAP, (2, 3, 6, 7), (2, 1, 6, 7), dim=1),
        case((2, 0, 3), (2, 4, 3), dim=1),
        case((5,), dim=0),
    ],
    "softmax": LINES,
    "log_softmax": LINES,
    "layer_norm": [
        case(MAP, dims=dims, eps=1e-5, constants={"weight": MAP[-dims:], "bias": MAP[-dims:]})
        for dims in (1, 2, 3)
    ]
    + [
        case((4, 192), dims=1, weight=None, bias=None, eps=1e-6),
        case((4, 192), dims=1, bias=None, eps=1e-6, constants={"weight": (192,)}),
    ],
    "group_norm": [
        case((3, 12, 5, 4), groups=groups, eps=1e-5, constants={"weight": (12,), "bias": (12,)})
        for groups in (1, 3, 12)
    ]
    + [
        case((3, 12), groups=2, weight=None, eps=1e-5, constants={"bias": (12,)}),
        case((0, 4, 2), groups=2, weight=None, bias=None, eps=1e-5),
    ],
    "matmul": [
        case((3, 4), (4, 5)),
        case((2, 1, 3, 7), (5, 7, 6)),
        case((2, 197, 64), (2, 64, 33)),
        case((4, 1), (1, 4)),
        case((2, 3, 0), (2, 0, 4)),
        case((0, 3), (3, 2)),
        case((6, 600), (600, 2)),
    ],
    "attention": [
        case(*shapes, scale=0.3, causal=causal)
        for shapes in [
            ((2, 3, 4, 8), (2, 3, 6, 8), (2, 3, 6, 5)),
            ((2, 3, 197, 16), (2, 3, 197, 16), (2, 3, 197, 16)),
            ((5, 3), (2, 1, 4, 3), (7, 4, 1)),
        ]
        for causal in (False, True)
    ],
}


def test_every_instruction_is_an_operation_with_cases():
    operations = set(INSTRUCTIONS) - INTEGER_LAYERS
    assert set(_native.operation_names()) == operations
    assert set(CASES) == operations
    assert len(_native.operation_names()) == len(operations)


def in_layout(array: np.ndarray, layout: str) -> np.ndarray:
    """The same elements in another order in memory."""
    if layout == "channels_last" and array.ndim > 1:
        return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1)
    if layout == "bordered" and array.ndim > 0:  # a view into something larger, reversed order of dimensions
        larger = np.zeros([size + 3 for size in reversed(array.shape)], array.dtype).transpose()
        inner = larger[tuple(slice(1, 1 + size) for size in array.shape)]
        inner[...] = array
        return inner
    return np.array(array, order="C")


LAYOUTS = ("channels_first", "channels_last", "bordered")


def values_of(op: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Random floats, some equal, in a domain of the function."""
    x = rng.standard_normal(shape) * 3
    x = np.where(rng.random(shape) < 0.2, np.round(x), x)
    return np.asarray(np.abs(x) + 0.1 if op in ("log", "rsqrt", "sqrt", "pow") else x, np.float32)


def codes_of(shape: tuple[int, ...], grid: Grid, rng: np.random.Generator) -> Codes:
    codes = rng.integers(0, len(grid.levels), shape).astype(np.uint8)
    largest = max(-grid.level_min, grid.level_max)
    return Codes(levels_of(codes, grid), np.float32(rng.uniform(1, 4) / largest), grid)


def tensor_of(value: Value, layout: str) -> _native.Tensor:
    if not isinstance(value, Codes):
        return _native.Tensor(in_layout(value, layout))
    storage = bytes_of(value.grid, padded=True)
    stored = ((value.levels - storage.offset) // storage.scale).astype(np.uint8)
    lowest = (value.grid.level_min - storage.offset) // storage.scale
    return _native.Tensor(
        in_layout(stored, layout),
        scale=storage.scale,
        offset=storage.offset,
        step=value.step,
        lowest=lowest,
    )


def run(op: str, attrs: dict[str, Any], inputs: list[Value], expected: Value, layouts: list[str], parts: int):
    """What the operation computes, in place of the reference's value."""
    operation = _native.Operation(op, attrs)
    tensors = [tensor_of(value, layout) for value, layout in zip(inputs, layouts[1:], strict=False)]
    if isinstance(expected, Codes):
        storage = bytes_of(expected.grid, padded=True)
        out = in_layout(np.full(expected.shape, 77, np.uint8), layouts[0])
        operation(
            tensors,
            _native.Tensor(out, scale=storage.scale, offset=storage.offset, step=expected.step),
            parts,
        )
        return out.astype(np.int16) * storage.scale + storage.offset
    out = in_layout(np.full(expected.shape, np.nan, np.float32), layouts[0])
    operation(tensors, _native.Tensor(out), parts)
    return out


def resolved(case: Case, rng: np.random.Generator) -> dict[str, Any]:
    constants = {
        name: rng.standard_normal(shape).astype(np.float32) for name, shape in case.constants.items()
    }
    return {**case.attrs, **constants}


def numbers(value: Value) -> np.ndarray:
    return value.levels if isinstance(value, Codes) else value


def check(op: str, actual: np.ndarray, expected: Value, inputs: list[Value]) -> int:
    """Number of elements that differ, as far as they may."""
    if isinstance(expected, Codes):
        np.testing.assert_array_equal(actual, expected.levels)
        return 0
    if op not in FLOATS_THAT_DIFFER:
        np.testing.assert_array_equal(actual, expected)
        return 0
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(actual[~finite], expected[~finite])
    ours, theirs = actual[finite].astype(np.float64), expected[finite]
    terms = max([1.0, *(float(np.abs(floats_of(value)).max(initial=0)) for value in inputs)])
    allowed = np.spacing(np.abs(theirs)) + DOUBLE_ERROR * terms
    assert (np.abs(ours - theirs) <= allowed).all()
    return int((ours != theirs).sum())


@pytest.mark.parametrize("codes", [False, True], ids=["floats", "codes"])
@pytest.mark.parametrize("op", sorted(CASES))
def test_operation_equals_reference(op: str, codes: bool):
    draw, elements, different = random.Random(op), 0, 0
    for number, each in enumerate(CASES[op]):
        rng = np.random.default_rng(number)
        attrs = resolved(each, rng)
        for layout in LAYOUTS:
            if codes:
                inputs: list[Value] = [codes_of(shape, draw.choice(GRIDS), rng) for shape in each.shapes]
            else:
                inputs = [values_of(op, shape, rng) for shape in each.shapes]
            theirs = {
                key: [2 if v == "batch" else v for v in a] if key == "shape" else a
                for key, a in attrs.items()
            }
            with np.errstate(all="ignore"):
                expected = REFERENCE[op](*inputs, **theirs)
            layouts = [draw.choice(LAYOUTS), *([layout] * len(inputs))]
            parts = draw.choice((1, 1, 2, 3, 8))
            actual = run(op, attrs, inputs, expected, layouts, parts)
            different += check(op, actual, expected, inputs)
            elements += actual.size
            assert np.array_equal(
                actual,
                run(op, attrs, inputs, expected, [layouts[0], *([layout] * len(inputs))], parts + 1),
                True,
            )
    assert different <= FLOATS_THAT_DIFFER.get(op, 0) * elements


@pytest.mark.parametrize("seed", range(SEEDS))
def test_every_step_of_a_random_program(seed: int):
    program, draw = random_program(seed), random.Random(seed)
    x = np.random.default_rng(seed).standard_normal((2, *SAMPLE)).astype(np.float32)
    try:
        values = Executor(program, max_elements=LIMIT).trace(x)
    except ValueError as error:
        pytest.skip(f"the program cannot be traced: {error}")
    for step in program.instructions:
        inputs = [values[name] for name in step.inputs]
        if step.op in INTEGER_LAYERS or not all(np.isfinite(numbers(value)).all() for value in inputs):
            continue
        kinds = INSTRUCTIONS[step.op].attrs
        named = {key for key in step.attrs if kinds[key] in (CONSTANT, MAYBE_CONSTANT)}
        constants = {key: program.constants.get(step.attrs[key]) for key in named}
        layouts = draw.choices(LAYOUTS, k=len(inputs) + 1)
        expected = values[step.output]
        actual = run(step.op, {**step.attrs, **constants}, inputs, expected, layouts, draw.randint(1, 4))
        check(step.op, actual, expected, inputs)


@pytest.mark.parametrize(
    "op", ["relu", "clamp", "leaky_relu", "maximum", "minimum", "max", "max_pool", "softmax"]
)
def test_what_is_not_a_number_stays_so(op: str):
    x = np.random.default_rng(0).standard_normal((1, 40, 4, 4)).astype(np.float32)
    x[0, 3:37, 1, 2] = np.nan
    attrs: dict[str, Any] = {
        "clamp": {"low": -1, "high": 1},
        "leaky_relu": {"slope": 0.1},
        "max": {"dims": [2, 3], "keepdim": True},
        "max_pool": {**window(3, 1, 1), "dilation": [1, 1], "ceil": False},
        "softmax": {"dim": 1},
    }.get(op, {})
    inputs: list[Value] = [x, x[:, :, ::-1]] if op in ("maximum", "minimum") else [x]
    expected = REFERENCE[op](*inputs, **attrs)
    assert isinstance(expected, np.ndarray)
    for layout in LAYOUTS:
        np.testing.assert_array_equal(
            np.isnan(run(op, attrs, inputs, expected, [layout] * 3, 1)), np.isnan(expected)
        )


VECTORIZED = (
    "exp",
    "mish",
    "sigmoid",
    "silu",
    "tanh",
    "gelu",
    "softmax",
    "log_softmax",
    "attention",
    "matmul",
    "max_pool",
)


def digests() -> list[str]:
    """What the operations that are compiled for several instruction sets give, to the bit."""
    found: list[str] = []
    for op in VECTORIZED:
        for each in CASES[op]:
            rng = np.random.default_rng(1)
            inputs: list[Value] = [values_of(op, shape, rng) for shape in each.shapes]
            expected = REFERENCE[op](*inputs, **each.attrs)
            actual = run(op, each.attrs, inputs, expected, ["channels_last"] * 4, 1)
            found.append(f"{op} {hashlib.sha256(actual.tobytes()).hexdigest()}")
    return found


@pytest.mark.parametrize("level", ["portable", "native"])
def test_results_do_not_depend_on_the_instruction_set(level: str):
    script = f"import sys; sys.path[:0] = {sys.path!r}; from contracts.test_operations import digests; print(*digests(), sep='|')"
    output = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "MIXBITS_ISA": level},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert output.strip().split("|") == digests()


WRONG = {"kernel": [0, 1], "size": "large", "dims": [9], "pads": [1, 2], "mode": "mirror", "weight": "a name"}


@pytest.mark.parametrize("op", sorted(CASES))
def test_attributes_that_are_missing_wrong_or_unknown_are_named(op: str):
    attrs = resolved(CASES[op][0], np.random.default_rng(0))
    for key in attrs:
        with pytest.raises(ValueError, match=f"{op}: attribute {key}: it is missing"):
            _native.Operation(op, {name: value for name, value in attrs.items() if name != key})
        with pytest.raises(ValueError, match=f"{op}: attribute {key}: "):
            _native.Operation(op, {**attrs, key: WRONG.get(key, [[1, 2, 3]])})
    with pytest.raises(ValueError, match=f"{op}: it has no attribute colour"):
        _native.Operation(op, {**attrs, "colour": 1})


@pytest.mark.parametrize("op", sorted(CASES))
def test_tensors_that_do_not_fit_are_refused(op: str):
    rng = np.random.default_rng(0)
    attrs = resolved(CASES[op][0], rng)
    inputs = [_native.Tensor(values_of(op, shape, rng)) for shape in CASES[op][0].shapes]
    operation = _native.Operation(op, attrs)
    with pytest.raises(ValueError, match="output"):
        operation(inputs, _native.Tensor(np.zeros((3, 5, 7, 11, 13), np.float32)))
    others = [] if op == "cat" else [*inputs, _native.Tensor(np.zeros(1, np.float32))]
    with pytest.raises(ValueError, match="input"):
        operation(others, _native.Tensor(np.zeros((), np.float32)))


def test_an_output_is_written_only_where_every_element_has_its_own_memory():
    operation, x = _native.Operation("relu", {}), _native.Tensor(np.zeros((2, 3), np.float32))
    for out in (
        np.broadcast_to(np.zeros(3, np.float32), (2, 3)),
        np.lib.stride_tricks.as_strided(np.zeros(4, np.float32), (2, 3), (4, 4)),
    ):
        with pytest.raises(ValueError, match="output"):
            operation([x], _native.Tensor(out))
