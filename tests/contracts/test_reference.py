"""Reference instructions: layers against a loop over integers, float operations against torch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mixbits.core import grid as grids
from mixbits.core.check import specs
from mixbits.core.grid import Codebook, Grid, Uniform
from mixbits.core.instructions import INSTRUCTIONS
from mixbits.core.program import Instruction, PackedWeight, Program
from mixbits.pack.bits import pack
from mixbits.runtime import integer
from mixbits.runtime.integer import exact_dtype
from mixbits.runtime.reference import REFERENCE
from mixbits.runtime.values import Codes, unpack_weight

# torch computes these in float32 and rounds many times; the reference rounds once. Relative to the largest
# output.
FLOAT_ROUNDING = 2e-6

STEP: Any = np.float32(0.37)
CALL: dict[str, Any] = {**REFERENCE}
GRIDS: list[Grid] = [
    *(Uniform(bits, signed) for bits in range(1, 9) for signed in (True, False)),
    *(Uniform(bits, True, "bipolar") for bits in range(1, 9)),
    *(Uniform(bits, True, "narrow") for bits in range(2, 9)),
    Codebook(8, (-128, -1, 0, 127)),
    Codebook(2, (0, 1, 255)),
]


def test_every_declared_instruction_has_a_reference():
    assert set(REFERENCE) == set(INSTRUCTIONS)


@dataclass(frozen=True)
class Layer:
    x: tuple[int, ...]
    w: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int


@st.composite
def layers(draw):
    dims = draw(st.integers(1, 2))
    groups, per_in, per_out = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel = [draw(st.integers(1, 3)) for _ in range(dims)]
    dilation = [draw(st.integers(1, 2)) for _ in range(dims)]
    padding = [(draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(dims)]
    windows = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    sizes = [max(draw(st.integers(1, 5)), w - a - b) for w, (a, b) in zip(windows, padding, strict=True)]
    return Layer(
        (draw(st.integers(0, 2)), groups * per_in, *sizes),
        (groups * per_out, per_in, *kernel),
        tuple(draw(st.integers(1, 3)) for _ in range(dims)),
        tuple(padding),
        tuple(dilation),
        groups,
    )


def naive(x, w, layer):
    """The sum of products at every output, one by one, in Python's integers."""
    x = np.pad(x, [(0, 0), (0, 0), *layer.padding]).astype(np.int64)
    kernel = w.shape[2:]
    out = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(x.shape[2:], kernel, layer.stride, layer.dilation, strict=True)
    ]
    acc = np.zeros((x.shape[0], w.shape[0], *out), np.int64)
    per_out = w.shape[0] // layer.groups
    for n, o, place in product(range(x.shape[0]), range(w.shape[0]), product(*map(range, out))):
        for c, tap in product(range(w.shape[1]), product(*map(range, kernel))):
            at = [p * s + t * d for p, s, t, d in zip(place, layer.stride, tap, layer.dilation, strict=True)]
            acc[(n, o, *place)] += int(x[(n, o // per_out * w.shape[1] + c, *at)]) * int(w[(o, c, *tap)])
    return acc


def codes_of(levels: np.ndarray, grid: Grid) -> np.ndarray:
    return np.searchsorted(grid.levels, levels).astype(np.uint8)


def random_codes(shape, grid: Grid, seed: int, *, extreme: bool) -> np.ndarray:
    """Codes of a grid: the lowest and the highest only, or all."""
    rng, last = np.random.default_rng(seed), len(grid.levels) - 1
    return (rng.integers(0, 2, shape) * last if extreme else rng.integers(0, last + 1, shape)).astype(
        np.uint8
    )


@settings(max_examples=120)
@given(layers(), st.sampled_from(GRIDS), st.sampled_from(GRIDS), st.integers(0, 99), st.booleans())
def test_convolution_is_the_exact_sum_scaled_in_float32(layer, grid_x, grid_w, seed, extreme):
    x = Codes(grids.levels_of(random_codes(layer.x, grid_x, seed, extreme=extreme), grid_x), STEP, grid_x)
    codes = random_codes(layer.w, grid_w, seed + 1, extreme=extreme)
    weight = unpack_weight("w", PackedWeight(layer.w, grid_w, pack(codes, grid_w.bits)))
    rng = np.random.default_rng(seed)
    scale, bias = (rng.standard_normal(layer.w[0]).astype(np.float32) for _ in range(2))
    attrs = {key: getattr(layer, key) for key in ("stride", "padding", "dilation", "groups")}
    y = CALL[f"conv{len(layer.stride)}d"](x, weight=weight, scale=scale, bias=bias, **attrs)
    acc = naive(x.levels, grids.levels_of(codes, grid_w), layer)
    channel = (slice(None), *(None,) * len(layer.stride))
    expected = acc.astype(np.float32) * scale[channel] + bias[channel]
    assert y.dtype == np.float32
    assert np.array_equal(y, expected)


@pytest.mark.parametrize("grid_w", GRIDS, ids=grids.describe)
def test_linear_layers_sum_the_extremes_of_all_width_pairs_exactly(grid_w):
    for grid_x in GRIDS:
        x = Codes(grids.levels_of(random_codes((2, 700), grid_x, 0, extreme=True), grid_x), STEP, grid_x)
        codes = random_codes((3, 700), grid_w, 1, extreme=True)
        weight = unpack_weight("w", PackedWeight((3, 700), grid_w, pack(codes, grid_w.bits)))
        ones, zeros = np.ones(3, np.float32), np.zeros(3, np.float32)
        acc = x.levels.astype(np.int64) @ weight.levels.astype(np.int64).T
        y = CALL["linear"](x, weight=weight, scale=ones, bias=zeros)
        assert np.array_equal(y, acc.astype(np.float32))


@pytest.mark.parametrize("over", [-1, 0, 1], ids=["below", "at", "above"])
def test_sums_are_exact_on_both_sides_of_the_change_to_float64(over):
    count = 2**24 // 2**14 + over  # 128 * 128 each
    signed = Uniform(8, signed=True)
    x = Codes(np.full((1, count), -128, np.int16), STEP, signed)
    weight = unpack_weight("w", PackedWeight((1, count), signed, pack(np.zeros((1, count), np.uint8), 8)))
    assert exact_dtype(weight, x) is (np.float64 if over > 0 else np.float32)
    y = integer.linear(x, weight=weight, scale=np.ones(1, np.float32), bias=np.zeros(1, np.float32))
    assert y.item() == count * 2**14


def test_convolution_does_not_depend_on_the_size_of_its_buffer(monkeypatch):
    grid, rng = Uniform(4, signed=True), np.random.default_rng(0)
    x = Codes(rng.integers(-8, 8, (3, 4, 6, 6)).astype(np.int16), STEP, grid)
    codes = rng.integers(0, 16, (6, 2, 3, 3)).astype(np.uint8)
    weight = unpack_weight("w", PackedWeight(codes.shape, grid, pack(codes, 4)))
    layer = Layer(x.shape, codes.shape, (1, 1), ((1, 1), (1, 1)), (1, 1), 2)
    expected = naive(x.levels, weight.levels, layer).astype(np.float32)
    attrs = {"stride": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1), "groups": 2}
    for columns in (1, 400, 2000, 10**6):
        monkeypatch.setattr(integer, "COLUMNS", columns)
        ones, zeros = np.ones(6, np.float32), np.zeros(6, np.float32)
        y = integer.convolution(x, weight=weight, scale=ones, bias=zeros, **attrs)
        assert np.array_equal(y, expected)


@given(hnp.arrays(np.float32, (7,), elements=st.floats(-100, 100, width=32)), st.sampled_from(GRIDS))
def test_quantize_is_the_definition_of_the_grid(x, grid):
    codes = CALL["quantize"](x, grid=grid, step=STEP)
    assert np.array_equal(codes.floats(), grids.dequantize(grids.quantize(x, STEP, grid), STEP, grid))
    again = CALL["quantize"](codes, grid=grid, step=STEP)
    assert np.array_equal(again.levels, codes.levels)


def test_quantize_refuses_what_is_not_a_number():
    with pytest.raises(ValueError, match="NaN"):
        CALL["quantize"](np.array([1, np.nan], np.float32), grid=GRIDS[0], step=STEP)


def run(op: str, *inputs: Any, constants: dict[str, np.ndarray] | None = None, **attrs) -> Any:
    """One instruction, with its shape as inferred checked against the result."""
    names = tuple(f"in{i}" for i in range(len(inputs)))
    y = CALL[op](*inputs, **(attrs | (constants or {})))
    if all(isinstance(value, np.ndarray) for value in inputs):
        stored = dict(zip(names, inputs, strict=True)) | (constants or {})
        attrs |= {key: key for key in constants or {}}
        for key in ("weight", "bias"):
            if key in INSTRUCTIONS[op].attrs:
                attrs.setdefault(key, None)
        reads = [Instruction("constant", name, (), name, {"constant": name}) for name in names]
        steps = (*reads, Instruction(op, op, names, "y", attrs))
        assert specs(Program((1,), "y", steps, {}, stored), len(inputs[0]))["y"].shape == y.shape
        assert {key for key, attr in INSTRUCTIONS[op].attrs.items() if not attr.holds(attrs[key])} == set()
    return y


def close(ours: np.ndarray, tensor: torch.Tensor) -> None:
    theirs = tensor.numpy()
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max(initial=0) <= FLOAT_ROUNDING * max(np.abs(theirs).max(initial=0), 1e-3)


def sample(*shape: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 3).astype(np.float32)


WIDE = np.array(
    [-60, -20, -7, -3, -2.5, -1, -0.3, -1e-8, 0, 1e-8, 0.2, 1, 2.7, 3, 6, 6.5, 21, 60], np.float32
)[None]
ELEMENTWISE = {
    "abs": torch.abs,
    "clamp": (lambda x: torch.clamp(x, -1, 2), {"low": -1, "high": 2}),
    "clamp-low": (lambda x: torch.clamp(x, min=0.5), {"low": 0.5, "high": None}),
    "cos": torch.cos,
    "elu": (lambda x: F.elu(x, 0.7), {"alpha": 0.7, "scale": 1.0, "input_scale": 1.0}),
    "elu-selu": (F.selu, {"alpha": 1.6732632423543772, "scale": 1.0507009873554805, "input_scale": 1.0}),
    "exp": torch.exp,
    "gelu": (F.gelu, {"approximate": "none"}),
    "gelu-tanh": (lambda x: F.gelu(x, approximate="tanh"), {"approximate": "tanh"}),
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.1), {"slope": 0.1}),
    "mish": F.mish,
    "neg": torch.neg,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sin": torch.sin,
    "softplus": (lambda x: F.softplus(x, 2, 10), {"beta": 2.0, "threshold": 10.0}),
    "square": torch.square,
    "tanh": torch.tanh,
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_operation_equals_torch(name):
    entry = ELEMENTWISE[name]
    function, attrs = entry if isinstance(entry, tuple) else (entry, {})
    close(run(name.split("-")[0], WIDE, **attrs), function(torch.from_numpy(WIDE)))


@pytest.mark.parametrize("name", ["log", "reciprocal", "rsqrt", "sqrt"])
def test_operation_on_positive_values_equals_torch(name):
    x = np.abs(sample(3, 5)) + np.float32(0.1)
    close(run(name, x), getattr(torch, name)(torch.from_numpy(x)))


@pytest.mark.parametrize("name", ["add", "div", "maximum", "minimum", "mul", "sub"])
def test_binary_operation_equals_torch_bit_for_bit_and_broadcasts(name):
    a, b = sample(2, 1, 4), sample(3, 1, seed=1)
    theirs = getattr(torch, name)(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    assert np.array_equal(run(name, a, b), theirs)


POOLS = [
    {"kernel": [2, 2], "stride": [2, 2], "padding": [0, 0]},
    {"kernel": [3, 3], "stride": [2, 2], "padding": [1, 1]},
    {"kernel": [3, 2], "stride": [1, 3], "padding": [1, 0]},
    {"kernel": [5, 4], "stride": [3, 4], "padding": [2, 2]},
]


@pytest.mark.parametrize("ceil", [False, True], ids=["floor", "ceil"])
@pytest.mark.parametrize("window", POOLS, ids=str)
def test_pools_equal_torch(window, ceil):
    x = sample(2, 3, 7, 8)
    t, args = torch.from_numpy(x), (window["kernel"], window["stride"], window["padding"])
    close(run("max_pool", x, **window, dilation=[1, 1], ceil=ceil), F.max_pool2d(t, *args, ceil_mode=ceil))
    for include, divisor in product((False, True), (None, 5)):
        theirs = F.avg_pool2d(t, *args, ceil_mode=ceil, count_include_pad=include, divisor_override=divisor)
        close(run("avg_pool", x, **window, ceil=ceil, include_pad=include, divisor=divisor), theirs)


@pytest.mark.parametrize("size", [[1, 1], [3, 2], [5, 5], [9, 7]], ids=str)
def test_adaptive_pools_equal_torch(size):
    x = sample(2, 3, 5, 7)
    close(run("adaptive_avg_pool", x, size=size), F.adaptive_avg_pool2d(torch.from_numpy(x), size))
    close(run("adaptive_max_pool", x, size=size), F.adaptive_max_pool2d(torch.from_numpy(x), size))


def test_pools_of_codes_are_pools_of_their_values():
    grid = Uniform(4, signed=True)
    levels = np.random.default_rng(0).integers(-8, 8, (2, 3, 6, 6)).astype(np.int16)
    x, t = Codes(levels, STEP, grid), torch.from_numpy(levels.astype(np.float32) * STEP)
    pooled = run("max_pool", x, kernel=[3, 3], stride=[2, 2], padding=[1, 1], dilation=[1, 1], ceil=False)
    assert np.array_equal(pooled.floats(), F.max_pool2d(t, 3, 2, 1).numpy())
    window: dict[str, Any] = {"kernel": [3, 3], "stride": [2, 2], "padding": [1, 1]}
    close(
        run("avg_pool", x, **window, ceil=False, include_pad=False, divisor=None),
        F.avg_pool2d(t, 3, 2, 1, False, False),
    )
    close(run("adaptive_avg_pool", x, size=[4, 3]), F.adaptive_avg_pool2d(t, (4, 3)))
    close(run("mean", x, dims=[2, 3], keepdim=True), t.mean((2, 3), keepdim=True))
    assert np.array_equal(
        run("mean", x, dims=[1], keepdim=False), levels.sum(1).astype(np.float32) * np.float32(STEP / 3)
    )


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
def test_pads_equal_torch(mode):
    x = sample(2, 3, 4, 5)
    names = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    theirs = F.pad(torch.from_numpy(x), (1, 2, 3, 0), mode=names[mode])
    close(run("pad", x, pads=[[0, 0], [0, 0], [3, 0], [1, 2]], mode=mode, value=0), theirs)


def test_negative_pads_cut():
    x = sample(2, 3, 4, 5)
    theirs = F.pad(torch.from_numpy(x), (-1, 2, 1, -2), value=7.0)
    close(run("pad", x, pads=[[0, 0], [0, 0], [1, -2], [-1, 2]], mode="constant", value=7.0), theirs)


def test_padding_of_codes_is_level_zero_even_on_a_grid_without_it():
    x = Codes(np.array([[[1, -1]]], np.int16), STEP, Uniform(1, signed=True, form="bipolar"))
    y = run("pad", x, pads=[[0, 0], [0, 0], [1, 1]], mode="constant", value=0)
    assert y.levels.tolist() == [[[0, 1, -1, 0]]]


@pytest.mark.parametrize("corners", [False, True], ids=["edges", "corners"])
@pytest.mark.parametrize("size", [[8, 10], [4, 5], [3, 11], [1, 1]], ids=str)
def test_bilinear_interpolation_equals_torch(size, corners):
    x = sample(2, 3, 4, 5)
    theirs = F.interpolate(torch.from_numpy(x), size=size, mode="bilinear", align_corners=corners)
    close(run("upsample_bilinear", x, size=size, align_corners=corners), theirs)


@pytest.mark.parametrize("size", [[8, 10], [2, 5], [12, 15]], ids=str)
def test_nearest_interpolation_equals_torch(size):
    x = sample(2, 3, 4, 5)
    assert np.array_equal(
        run("upsample_nearest", x, size=size), F.interpolate(torch.from_numpy(x), size=size).numpy()
    )


def test_norms_equal_torch():
    x, weight, bias = sample(2, 6, 4, 5), sample(6, seed=1), sample(6, seed=2)
    t, w, b = (torch.from_numpy(value) for value in (x, weight, bias))
    affine = {"weight": weight, "bias": bias}
    close(run("group_norm", x, groups=3, eps=1e-5, constants=affine), F.group_norm(t, 3, w, b))
    close(
        run("layer_norm", x.transpose(0, 2, 3, 1), dims=1, eps=1e-6, constants=affine),
        F.layer_norm(t.permute(0, 2, 3, 1), (6,), w, b, 1e-6),
    )
    ours = CALL["layer_norm"](x, dims=2, weight=None, bias=None, eps=1e-5)
    close(ours, F.layer_norm(t, (4, 5)))
    close(
        run("batch_norm", x, constants={"scale": weight, "shift": bias}),
        t * w[:, None, None] + b[:, None, None],
    )


def test_prelu_equals_torch():
    x, slope = sample(2, 6, 4), sample(6, seed=1)
    for a in (slope, slope[:1]):
        close(run("prelu", x, constants={"slope": a}), F.prelu(torch.from_numpy(x), torch.from_numpy(a)))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_softmax_equals_torch(dim):
    x = sample(3, 4, 5)
    close(run("softmax", x, dim=dim), torch.softmax(torch.from_numpy(x), dim))
    close(run("log_softmax", x, dim=dim), torch.log_softmax(torch.from_numpy(x), dim))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_attention_equals_torch(causal):
    q, k, v = sample(2, 3, 4, 8), sample(2, 3, 6, 8, seed=1), sample(2, 3, 6, 5, seed=2)
    tensors = [torch.from_numpy(value) for value in (q, k, v)]
    theirs = F.scaled_dot_product_attention(tensors[0], tensors[1], tensors[2], is_causal=causal, scale=0.3)
    close(run("attention", q, k, v, scale=0.3, causal=causal), theirs)


def test_matrix_products_equal_torch_and_broadcast():
    a, b = sample(2, 1, 3, 4), sample(5, 4, 6, seed=1)
    close(run("matmul", a, b), torch.from_numpy(a) @ torch.from_numpy(b))


def test_reductions_equal_torch():
    x = sample(2, 3, 4)
    t = torch.from_numpy(x)
    close(run("sum", x, dims=[1, 2], keepdim=False), t.sum((1, 2)))
    close(run("max", x, dims=[2], keepdim=True), t.amax(2, keepdim=True))
    close(run("mean", x, dims=[1], keepdim=False), t.mean(1))


def test_moves_equal_torch():
    x = sample(2, 6, 4)
    t = torch.from_numpy(x)
    assert np.array_equal(run("reshape", x, shape=[-1, 3, 8]), t.reshape(-1, 3, 8).numpy())
    assert np.array_equal(run("permute", x, dims=[2, 0, 1]), t.permute(2, 0, 1).numpy())
    assert np.array_equal(run("slice", x, dim=1, start=1, stop=6, step=2), t[:, 1:6:2].numpy())
    assert np.array_equal(run("select", x, dim=2, index=3), t[:, :, 3].numpy())
    assert np.array_equal(
        run("expand", x[:, :1], shape=[3, -1, 5, -1]), t[:, :1].expand(3, -1, 5, -1).numpy()
    )
    assert np.array_equal(run("cat", x, x[:, :2], dim=1), torch.cat([t, t[:, :2]], 1).numpy())
