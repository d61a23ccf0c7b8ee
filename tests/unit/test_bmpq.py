"""BMPQ against numbers computed in float64 and against brute force (Kundu et al., arXiv 2112.13843)."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mixbits.cli.main import main
from mixbits.core.budget import Budget, parse_budget
from mixbits.core.cost import COSTS
from mixbits.core.grid import dequantize, quantize
from mixbits.core.profile import Profile, Site
from mixbits.fit.recipe import method_of, read_toml, recipe_from_dict
from mixbits.graph.quant_graph import QuantGraph, capture, put_
from mixbits.lower.lower import lower
from mixbits.methods.bmpq import (
    BMPQ,
    Clipped,
    Sums,
    SwitchedWeight,
    mean_magnitude,
    normalized_bit_gradient,
    one_activation_width,
    solve,
    solving_steps,
)
from mixbits.pack.bits import pack, unpack
from mixbits.runtime.executor import Executor
from mixbits.search.greedy import InfeasibleError, choices
from mixbits.train.checkpoint import Checkpoint
from mixbits.train.finetune import Finetune, finetune, place_policy
from mixbits.train.method import Target, learn
from mixbits.train.steps import Loop
from mixbits.train.task import Task, make_task
from mixbits.zoo import resnet18, vgg16_bn

# Reference numbers are printed with seven digits after the point.
SEVEN_DIGITS = 1e-7
# Two ways to compute the same float64 numbers.
FLOAT64 = 1e-12
# Sums of solutions are compared as floats.
SAME_OBJECTIVE = 1e-9

W = [0.9, -0.35, 0.12, -0.62]


def float64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def full_range(values: Tensor, bits: int) -> SwitchedWeight:
    """The quantizer of the paper's scale in float64."""
    made = SwitchedWeight(bits, values, scale="max").double().train()
    made(values)  # takes the step in float64
    return made


def place_values(bits: int) -> Tensor:
    """What each bit of two's complement is worth, least first."""
    return float64([2.0**j for j in range(bits - 1)] + [-(2.0 ** (bits - 1))])


def bits_of(levels: Tensor, bits: int) -> Tensor:
    """Two's complement, ``[n, bits]``, least first."""
    codes = levels.long() % (1 << bits)
    return float64([[(int(code) >> j) & 1 for j in range(bits)] for code in codes])


def bit_gradients(gradient: Tensor, step: Tensor, bits: int) -> Tensor:
    """Eq. (1) written out, ``[n, bits]``: what the method never makes."""
    return step * gradient[:, None] * place_values(bits)


QUANTIZED = {
    4: ([7, -3, 1, -5], ["0111", "1101", "0001", "1011"], [0.9, -0.3857143, 0.1285714, -0.6428571]),
    2: ([1, 0, 0, -1], ["01", "00", "00", "11"], [0.9, 0, 0, -0.9]),
}


@pytest.mark.parametrize("bits", QUANTIZED)
def test_e1_weights_are_rounded_to_symmetric_levels_with_the_largest_at_the_top(bits):
    levels, codes, values = QUANTIZED[bits]
    made = full_range(float64(W), bits)

    out = made(float64(W))
    found = torch.round(out / made.step)

    assert made.step.item() == pytest.approx(0.9 / (2 ** (bits - 1) - 1), rel=FLOAT64)
    assert found.tolist() == levels
    assert ["".join(str(int(b)) for b in reversed(row)) for row in bits_of(found, bits)] == codes
    assert out.tolist() == pytest.approx(values, abs=SEVEN_DIGITS)


@pytest.mark.parametrize("bits", range(2, 9))
def test_t1_packing_keeps_every_level_and_the_lowest_code_of_twos_complement_never_appears(bits):
    grid = SwitchedWeight(bits, torch.ones(2), scale="max").freeze().grid
    top = 2 ** (bits - 1) - 1
    values = np.arange(-top, top + 1, dtype=np.float32)

    codes = quantize(np.append(values, [-1e9, 1e9]).astype(np.float32), 1.0, grid)
    back = unpack(pack(codes, bits), bits, len(codes))

    assert dequantize(back, 1.0, grid).tolist() == [*values, -top, top]
    assert min(grid.levels) == -top


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_t2_the_largest_scale_rounds_by_half_a_step_keeps_the_peak_and_follows_a_factor(bits):
    values = torch.randn(500, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    made = full_range(values, bits)

    out, step = made(values), made.step.clone()

    assert ((out - values).abs() <= step / 2 * (1 + FLOAT64)).all()
    peak = values.abs().argmax()
    assert out[peak].item() == pytest.approx(values[peak].item(), rel=FLOAT64)
    assert torch.equal(made.eval()(out), out)
    assert made.train()(3.0 * values).tolist() == pytest.approx((3.0 * out).tolist(), rel=FLOAT64)


@pytest.mark.parametrize(
    ("count", "peak", "zeros_2", "zeros_4", "error_2"),
    [
        (1_728, 3.15, 0.899, 0.199, 0.67),
        (36_864, 4.29, 0.967, 0.238, 0.91),
        (147_456, 4.96, 0.987, 0.277, 0.96),
        (2_359_296, 5.45, 0.993, 0.303, 0.98),
    ],
)
def test_the_largest_scale_at_two_bits_rounds_large_layers_to_zero(count, peak, zeros_2, zeros_4, error_2):
    values = torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values.clamp_(-peak, peak)[0] = peak

    narrow, wide = (full_range(values, bits)(values) for bits in (2, 4))

    # The reference is one draw a size.
    assert float((narrow == 0).double().mean()) == pytest.approx(zeros_2, abs=0.02)
    assert float((wide == 0).double().mean()) == pytest.approx(zeros_4, abs=0.02)
    assert float((narrow - values).square().mean()) == pytest.approx(error_2, abs=0.05)


@pytest.mark.parametrize(("bits", "step", "error"), [(2, 1.22, 0.190), (4, 0.35, 0.0129)])
def test_a_learned_scale_starts_at_the_least_error(bits, step, error):
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0))

    made = SwitchedWeight(bits, values, scale="learned")

    assert made.freeze().step.item() == pytest.approx(step, rel=0.05)
    assert float((made(values).detach() - values).square().mean()) == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize("scale", ["learned", "max"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_t2_a_weight_of_zeros_stays_zero(scale, bits):
    made = SwitchedWeight(bits, torch.zeros(2, 3), scale=scale).train()

    assert made(torch.zeros(2, 3)).tolist() == torch.zeros(2, 3).tolist()
    assert torch.isfinite(made(torch.ones(2, 3))).all()


@pytest.mark.parametrize("scale", ["learned", "max"])
def test_the_gradient_to_a_weight_is_that_to_the_quantized_weight_clipped_or_not(scale):
    x = torch.linspace(-3, 3, 31).requires_grad_()
    upstream = torch.linspace(1, 2, 31)

    (SwitchedWeight(2, x.detach() / 4, scale=scale).train()(x) * upstream).sum().backward()

    assert torch.equal(x.grad, upstream)


def test_a_learned_step_of_weights_has_the_gradient_of_lsq():
    made = SwitchedWeight(3, torch.ones(4), scale="learned")
    with torch.no_grad():
        made.step.fill_(0.5)

    made(torch.tensor([0.7, -0.4, 9.0, -9.0])).sum().backward()

    # ratios 1.4, -0.8 round to 1, -1; the others are clipped to 3, -3; n = 4 values, 3 positive levels
    assert made.step.grad.item() == pytest.approx((1 - 1.4 + -1 + 0.8 + 3 - 3) / (4 * 3) ** 0.5, abs=1e-6)


def test_setting_a_width_keeps_the_clip_and_chooses_the_step_anew():
    weight, clipped = (
        SwitchedWeight(4, torch.tensor(W), scale="max"),
        Clipped(4, torch.tensor(1.5), signed=False),
    )

    weight.set_width_(2, torch.tensor(W))
    clipped.set_width_(2)

    assert (weight.bits().item(), weight.freeze().grid.levels, weight.step.item()) == (
        2,
        (-1, 0, 1),
        pytest.approx(0.9),
    )
    assert (clipped.bits().item(), clipped.freeze().step.item(), clipped.alpha.item()) == (2, 0.5, 1.5)


E2 = {
    4: (
        [-0.6214286, -1.2428571, 0.6214286, -0.3107143],
        [
            [-0.0798980, -0.1597959, 0.0798980, -0.0399490],
            [-0.1597959, -0.3195918, 0.1597959, -0.0798980],
            [-0.3195918, -0.6391837, 0.3195918, -0.1597959],
            [0.6391837, 1.2783673, -0.6391837, 0.3195918],
        ],
        [1.1984694, 2.3969388, 1.1984694, 0.5992347],
        [0.7366228, 1.4732456, 0.7366228, 0.3683114],
    ),
    2: (
        [0.15, 0.3, -0.15, 0.075],
        [[0.135, 0.27, -0.135, 0.0675], [-0.27, -0.54, 0.27, -0.135]],
        [0.405, 0.81, 0.405, 0.2025],
        None,
    ),
}


@pytest.mark.parametrize("bits", E2)
def test_e2_t3_bit_gradients_are_those_of_autograd_with_bits_as_leaves(bits):
    gradient, rows, absolute, norms = E2[bits]
    made, x = full_range(float64(W), bits), float64([1, 2, -1, 0.5])
    step = made.step
    leaves = bits_of(torch.round(made(float64(W)) / step), bits).requires_grad_()
    value = (step * (leaves @ place_values(bits))).detach().requires_grad_()
    (0.5 * (x @ value - 0.3) ** 2).backward()
    (0.5 * (x @ (step * (leaves @ place_values(bits))) - 0.3) ** 2).backward()

    found = bit_gradients(value.grad, step, bits)

    assert value.grad.tolist() == pytest.approx(gradient, abs=SEVEN_DIGITS)
    assert (found - leaves.grad).abs().max().item() <= FLOAT64
    for row, wanted in zip(found.T, rows, strict=True):
        assert row.tolist() == pytest.approx(wanted, abs=SEVEN_DIGITS)
    assert found.abs().sum(1).tolist() == pytest.approx(absolute, abs=SEVEN_DIGITS)
    if norms:
        assert found.norm(dim=1).tolist() == pytest.approx(norms, abs=SEVEN_DIGITS)


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_t4_sums_of_bit_gradients_are_factors_of_the_gradient(bits):
    gradient = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = float64(0.37)

    found = bit_gradients(gradient, step, bits)

    assert found.sum(1).tolist() == pytest.approx((-step * gradient).tolist(), rel=1e-9)
    whole = step * (2**bits - 1) * gradient.abs()
    assert found.abs().sum(1).tolist() == pytest.approx(whole.tolist(), rel=FLOAT64)
    norm = step * ((4**bits - 1) / 3) ** 0.5 * gradient.abs()
    assert found.norm(dim=1).tolist() == pytest.approx(norm.tolist(), rel=FLOAT64)
    sign = found[:, -1].abs() / found.abs().sum(1)
    assert sign.tolist() == pytest.approx([2 ** (bits - 1) / (2**bits - 1)] * 50, rel=FLOAT64)


@pytest.mark.parametrize(
    ("weight", "bit", "rises"),
    [(0, 3, -0.5142857), (1, 0, 0.1285714), (3, 2, 0.1285714)],
    ids=["sign of the first", "lowest of the second", "third of the fourth"],
)
def test_e3_a_bit_flip_changes_a_linear_loss_by_its_gradient(weight, bit, rises):
    slope = float64([0.5, -1, 2, 0.25])
    made = full_range(float64(W), 4)
    bits = bits_of(torch.round(made(float64(W)) / made.step), 4)
    flipped = bits.clone()
    flipped[weight, bit] = 1 - bits[weight, bit]

    change = slope @ (made.step * ((flipped - bits) @ place_values(4)))
    predicted = (
        bit_gradients(slope, made.step, 4)[weight, bit] * (flipped[weight, bit] - bits[weight, bit]).item()
    )

    assert change.item() == pytest.approx(rises, abs=SEVEN_DIGITS)
    assert change.item() == pytest.approx(predicted.item(), abs=FLOAT64)


@pytest.mark.parametrize(("weight", "bit"), list(itertools.product(range(4), range(4))))
def test_t5_a_bit_flip_changes_a_quadratic_loss_by_its_gradient_and_half_a_square(weight, bit):
    x, made = float64([1, 2, -1, 0.5]), full_range(float64(W), 4)
    bits = bits_of(torch.round(made(float64(W)) / made.step), 4)

    def loss(chosen: Tensor) -> Tensor:
        return 0.5 * (x @ (made.step * (chosen @ place_values(4))) - 0.3) ** 2

    gradient = (x @ (made.step * (bits @ place_values(4))) - 0.3) * x
    flipped = bits.clone()
    flipped[weight, bit] = 1 - bits[weight, bit]
    predicted = bit_gradients(gradient, made.step, 4)[weight, bit] * (flipped - bits)[weight, bit]

    rest = loss(flipped) - loss(bits) - predicted

    wanted = 0.5 * (x[weight] * made.step * place_values(4)[bit]) ** 2
    assert rest.item() == pytest.approx(wanted.item(), rel=1e-9)


LAYERS = {"A": (W, [0.2, -0.1, 0.05, 0.4]), "B": ([0.3, -0.3, 0.1], [-0.6, 0.2, 0.1])}
E4 = {
    ("none", 4): (0.3616071, 0.1928571),
    ("none", 2): (0.5062500, 0.2700000),
    ("per_bit", 4): (0.0904018, 0.0482143),
    ("per_bit", 2): (0.2531250, 0.1350000),
    ("max_level", 4): (0.0241071, 0.0128571),
    ("max_level", 2): (0.1687500, 0.0900000),
    ("unit", 4): (0.1875, 0.3),
    ("unit", 2): (0.1875, 0.3),
    ("ref_q", 4): (0.3616071, 0.1928571),
    ("ref_q", 2): (0.3616071, 0.1928571),
}


def statistic(layers: list[tuple[Tensor, Tensor]], bits: list[int], normalizer: str) -> Tensor:
    """The method's statistic of ``(weight, gradient)`` pairs at these widths, ``[layers]``."""
    made = [full_range(w, q) for (w, _), q in zip(layers, bits, strict=True)]
    return normalized_bit_gradient(
        torch.stack([mean_magnitude(g, w) for w, g in layers]),
        peak=torch.stack([w.abs().amax() for w, _ in layers]),
        step=torch.stack([q.step for q in made]),
        high=torch.stack([q.high for q in made]),
        bits=torch.stack([q.width for q in made]),
        normalizer=normalizer,
        reference=4,
    )


@pytest.mark.parametrize(("normalizer", "bits"), E4, ids=str)
def test_e4_normalized_bit_gradients_are_the_reference_ones(normalizer, bits):
    layers = [(float64(w), float64(g)) for w, g in LAYERS.values()]

    found = statistic(layers, [bits, bits], normalizer)

    assert found.tolist() == pytest.approx(E4[normalizer, bits], abs=SEVEN_DIGITS)


@pytest.mark.parametrize(("bits", "a", "b"), [(4, -0.0176786, 0.0042857), (2, -0.1237500, 0.0300000)])
def test_e4_the_signed_sum_is_the_lowest_bit_alone(bits, a, b):
    for (w, g), wanted in zip(LAYERS.values(), (a, b), strict=True):
        found = bit_gradients(float64(g), full_range(float64(w), bits).step, bits).sum() / len(w)
        assert found.item() == pytest.approx(wanted, abs=SEVEN_DIGITS)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("normalizer", ["none", "per_bit", "max_level", "ref_q"])
def test_t6_one_gradient_gives_what_the_written_out_bits_give(normalizer, bits):
    draw = torch.Generator().manual_seed(bits)
    w, g = (torch.randn(40, generator=draw, dtype=torch.float64) for _ in range(2))
    width = 4 if normalizer == "ref_q" else bits
    count = {"none": 1, "ref_q": 1, "per_bit": bits, "max_level": 2**bits - 1}[normalizer]

    written = bit_gradients(g, full_range(w, width).step, width).abs().sum() / (40 * count)

    assert statistic([(w, g)], [bits], normalizer).item() == pytest.approx(written.item(), rel=FLOAT64)


@pytest.mark.parametrize(
    ("normalizer", "ratio"),
    [("ref_q", 1.0), ("unit", 1.0), ("none", 1.4), ("per_bit", 2.8), ("max_level", 7.0)],
    ids=str,
)
def test_t7_a_narrower_layer_looks_as_sensitive_only_where_the_width_does_not_count(normalizer, ratio):
    layer = [(float64(W), float64([0.2, -0.1, 0.05, 0.4]))]

    found = statistic(layer, [2], normalizer) / statistic(layer, [4], normalizer)

    assert found.item() == pytest.approx(ratio, rel=FLOAT64)


def test_one_bit_moves_a_weight_by_two_steps():
    w, g = float64([[0.5, -1.5], [1.0, 1.0]]), float64([1.0, -3.0])

    assert full_range(w, 1).step.item() == 1.0
    assert statistic([(w, g)], [1], "none").item() == 2 * 1.0 * 2.0


def test_e5_t8_sensitivity_is_the_mean_over_the_steps_since_the_last_solution():
    steps = float64([[0.20, 0.10, 0.06, 0.04], [0.03, 0.05, 0.02, 0.02], [0.10, 0.14, 0.09, 0.07]]).T
    sums = Sums(3)

    for values in steps:
        sums.add_(values)

    assert sums.take_().tolist() == pytest.approx([0.10, 0.03, 0.10], rel=FLOAT64)
    assert sums.count.item() == 0
    sums.add_(steps[0])
    assert sums.take_().tolist() == steps[0].tolist()


def test_a_step_that_is_not_finite_does_not_count():
    sums = Sums(2)
    for values in ([1.0, 2.0], [float("inf"), 5.0], [3.0, float("nan")], [3.0, 4.0]):
        sums.add_(float64(values))

    assert sums.take_().tolist() == [2.0, 3.0]
    assert sums.take_().tolist() == [2.0, 3.0], "no step since: those of the solution before"


def layers_of(counts: list[int]) -> Profile:
    sites = tuple(Site(f"w{i}", "weight", (n,), signed=True, readers=()) for i, n in enumerate(counts))
    return Profile((1,), sites, (), (), 0)


def solution(
    counts: list[int], s: list[float], widths: tuple[int, ...], budget: Budget | str, *, concave: bool = False
) -> list[int]:
    profile = layers_of(counts)
    target = Target(parse_budget(budget) if isinstance(budget, str) else budget, widths, (8,))
    allowed = choices(profile, widths, (8,))
    sensitivity = {f"w{i}": value for i, value in enumerate(s)}
    return list(solve(profile, target, allowed, sensitivity, concave=concave).values())


N6, S6 = [1000, 2000, 4000, 8000, 16000], [0.100, 0.030, 0.100, 0.015, 0.060]
E6 = {
    2.0: ([2, 2, 2, 2, 2], 62_000, 0.61, [2, 2, 2, 2, 2], 0.61),
    2.2: ([4, 4, 2, 2, 2], 68_000, 0.87, [4, 2, 3, 2, 2], 0.91),
    2.5: ([4, 4, 4, 2, 2], 76_000, 1.07, [4, 4, 4, 2, 2], 1.07),
    3.0: ([4, 4, 4, 4, 2], 92_000, 1.10, [4, 4, 4, 2, 3], 1.13),
    3.5: ([4, 4, 4, 2, 4], 108_000, 1.19, [4, 4, 4, 2, 4], 1.19),
    4.0: ([4, 4, 4, 4, 4], 124_000, 1.22, [4, 4, 4, 4, 4], 1.22),
}


@pytest.mark.parametrize("mean_bits", E6)
def test_e6_solutions_are_the_reference_ones(mean_bits):
    two, used, objective, three, objective_three = E6[mean_bits]
    budget = f"weights={mean_bits}bit"

    found, found_three = solution(N6, S6, (2, 4), budget), solution(N6, S6, (2, 3, 4), budget)

    assert found == two
    assert sum(n * q for n, q in zip(N6, found, strict=True)) == used
    assert sum(s * q for s, q in zip(S6, found, strict=True)) == pytest.approx(objective)
    assert found_three == three
    assert sum(s * q for s, q in zip(S6, found_three, strict=True)) == pytest.approx(objective_three)


@pytest.mark.parametrize("widths", [(2, 4), (2, 3, 4)], ids=str)
def test_e6_a_budget_below_the_narrowest_widths_is_infeasible(widths):
    with pytest.raises(InfeasibleError, match=r"weights=1\.9bit: reachable are 2\.000 bit to 4\.000 bit"):
        solution(N6, S6, widths, "weights=1.9bit")


def brute_force(counts: list[int], value: list[dict[int, float]], capacity: float) -> float:
    """The best value of all choices that fit, all of them written out."""
    used, got = np.zeros(1), np.zeros(1)
    for count, table in zip(counts, value, strict=True):
        used = np.add.outer(used, [count * q for q in table]).ravel()
        got = np.add.outer(got, list(table.values())).ravel()
    return got[used <= capacity].max()


@pytest.mark.parametrize("seed", range(200))
def test_t9_a_solution_is_the_best_of_all_and_fits(seed):
    draw = random.Random(seed)
    layers, widths = draw.randint(1, 10), tuple(sorted(draw.sample(range(1, 9), draw.randint(1, 4))))
    counts = [draw.randint(1, 5000) for _ in range(layers)]
    s = [draw.uniform(0.001, 1.0) for _ in range(layers)]
    concave = draw.random() < 0.3
    mean_bits = round(draw.uniform(widths[0], widths[-1]) + 0.001, 3)

    found = solution(counts, s, widths, f"weights={mean_bits}bit", concave=concave)

    value = [{q: -one * 4.0**-q if concave else one * q for q in widths} for one in s]
    capacity = mean_bits * sum(counts)
    assert sum(n * q for n, q in zip(counts, found, strict=True)) <= capacity
    best = brute_force(counts, value, capacity)
    got = sum(table[q] for table, q in zip(value, found, strict=True))
    # The solver compares objectives relative to their largest coefficient.
    assert got == pytest.approx(best, abs=1e-6 * max(abs(v) for table in value for v in table.values()))


@pytest.mark.parametrize("seed", range(10))
def test_t9_a_larger_budget_is_never_worse_and_a_factor_or_an_order_changes_nothing(seed):
    draw = random.Random(seed)
    counts = [draw.randint(1, 5000) for _ in range(8)]
    s = [draw.uniform(0.001, 1.0) for _ in range(8)]
    order = draw.sample(range(8), 8)

    found = {b: solution(counts, s, (2, 3, 4), f"weights={b}bit") for b in (2.0, 2.5, 3.0, 3.5, 4.0)}
    scaled = solution(counts, [1e-6 * v for v in s], (2, 3, 4), "weights=2.5bit")
    moved = solution([counts[i] for i in order], [s[i] for i in order], (2, 3, 4), "weights=2.5bit")

    objectives = [sum(a * q for a, q in zip(s, bits, strict=True)) for bits in found.values()]
    assert all(a <= b + SAME_OBJECTIVE for a, b in itertools.pairwise(objectives))
    assert scaled == found[2.5]
    assert moved == [found[2.5][i] for i in order]


def test_t9_equal_layers_have_the_same_solution_each_time():
    once = [solution([100] * 8, [1.0] * 8, (2, 4), "weights=3bit") for _ in range(3)]

    assert once[0] == once[1] == once[2]
    assert sum(once[0]) == 24


def test_a_concave_value_gives_middle_widths_where_a_linear_one_gives_ends():
    equal = ([1000] * 6, [1.0, 1.01, 1.02, 1.03, 1.04, 1.05])

    assert sorted(solution(*equal, (2, 4, 6), "weights=4bit")) == [2, 2, 2, 6, 6, 6]
    assert solution(*equal, (2, 4, 6), "weights=4bit", concave=True) == [4] * 6


X7 = [-0.5, 0.1, 0.3, 0.7, 0.95, 1.7]


@pytest.mark.parametrize(
    ("bits", "values"),
    [(2, [0, 0, 0.4, 0.8, 0.8, 1.2]), (4, [0, 0.08, 0.32, 0.72, 0.96, 1.2])],
    ids=["2 bit", "4 bit"],
)
def test_e7_clipped_values_and_gradients_are_the_reference_ones(bits, values):
    made, x = Clipped(bits, torch.tensor(1.2), signed=False).double(), float64(X7).requires_grad_()
    with torch.no_grad():
        made.alpha.fill_(1.2)

    out = made(x)
    out.sum().backward()

    assert out.tolist() == pytest.approx(values, abs=FLOAT64)
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0]
    assert made.alpha.grad.item() == 1


def test_e7_at_the_clip_itself_the_gradient_goes_to_the_clip():
    made = Clipped(3, torch.tensor(1.25), signed=False)
    x = torch.tensor([0.0, 1.25]).requires_grad_()

    made(x).sum().backward()

    assert (x.grad.tolist(), made.alpha.grad.item()) == ([0, 0], 1)


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_t10_the_clip_has_the_upstream_gradient_of_what_it_clips_and_few_values_come_out(bits, signed):
    draw = torch.Generator().manual_seed(bits)
    x, upstream = torch.randn(4000, generator=draw), torch.randn(4000, generator=draw)
    made = Clipped(bits, torch.tensor(0.8), signed=signed)

    out = made(x)
    (out * upstream).sum().backward()

    wanted = upstream[x >= 0.8].sum() - (upstream[x <= -0.8].sum() if signed else 0)
    assert made.alpha.grad.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert len(out.unique()) <= 2**bits


def weight_counts(model: nn.Module) -> list[int]:
    return [p.numel() for p in model.parameters() if p.dim() > 1]


# network, classes, weights, and the reduction with all inner layers at 2 bits and ends at 16, at 4 and 16, at
# 2 and 32, at 2 and 8
SECTION8 = {
    "VGG-16, 10 classes": (vgg16_bn, 10, 14_715_584, 15.948, 7.989, 15.889, 15.978),
    "VGG-16, 100 classes": (vgg16_bn, 100, 14_761_664, 15.608, 7.915, 15.183, 15.830),
    "VGG-16, 200 classes": (vgg16_bn, 200, 14_812_864, 15.250, 7.835, 14.474, 15.670),
    "ResNet-18, 10 classes": (resnet18, 10, 11_164_352, 15.932, 7.985, 15.854, 15.971),
    "ResNet-18, 100 classes": (resnet18, 100, 11_210_432, 15.488, 7.888, 14.942, 15.777),
    "ResNet-18, 200 classes": (resnet18, 200, 11_261_632, 15.027, 7.784, 14.051, 15.568),
}


@cache
def counts_of(network: Any, classes: int) -> tuple[int, ...]:
    with torch.device("meta"):  # sizes alone
        return tuple(weight_counts(network(num_classes=classes)))


def reduction(counts: tuple[int, ...], inner: list[int], ends: int) -> float:
    """Bits of float32 weights over those of these widths."""
    bits = [ends, *inner, ends]
    return 32 * sum(counts) / sum(n * q for n, q in zip(counts, bits, strict=True))


@pytest.mark.parametrize("case", SECTION8.values(), ids=SECTION8)
def test_t11_sizes_and_reductions_of_the_papers_networks_are_the_computed_ones(case):
    network, classes, weights, *wanted = case
    counts = counts_of(network, classes)
    inner = len(counts) - 2

    found = [reduction(counts, [bits] * inner, ends) for bits, ends in ((2, 16), (4, 16), (2, 32), (2, 8))]

    assert sum(counts) == weights
    assert (counts[0], counts[-1]) == (1728, 512 * classes)
    assert [round(value, 3) for value in found] == wanted


def test_t11_three_choices_of_widths_reduce_vgg16_by_15_4():
    counts = counts_of(vgg16_bn, 10)

    found = {
        "".join(map(str, inner)): round(reduction(counts, list(inner), 16), 3)
        for inner in itertools.product((2, 4), repeat=12)
        if 15.35 <= reduction(counts, list(inner), 16) < 15.45
    }

    assert found == {"444422222222": 15.372, "244422222222": 15.409, "424422222222": 15.447}


def test_t11_the_prefixes_of_wider_layers_reduce_as_computed():
    vgg, resnet = counts_of(vgg16_bn, 10), counts_of(resnet18, 10)

    def prefix(counts: tuple[int, ...], wide: int, ends: int = 16) -> float:
        return reduction(counts, [4] * wide + [2] * (len(counts) - 2 - wide), ends)

    found = [round(prefix(vgg, k), 2) for k in range(9)]
    assert found == [15.95, 15.91, 15.83, 15.67, 15.37, 14.80, 14.27, 13.32, 11.75]
    assert round(prefix(vgg, 4, ends=8), 3) == 15.400
    assert round(prefix(vgg, 4, ends=32), 3) == 15.318
    assert [round(prefix(resnet, k), 3) for k in (6, 7)] == [15.424, 15.414]


@pytest.mark.parametrize(("network", "wide"), [(vgg16_bn, 525_398), (resnet18, 387_039)])
def test_t11_the_headline_leaves_few_weights_at_four_bits(network, wide):
    counts = counts_of(network, 10)
    room = 32 * sum(counts) / 15.4 - 16 * (counts[0] + counts[-1]) - 2 * sum(counts[1:-1])

    assert room / 2 == pytest.approx(wide, abs=1)


def test_t11_with_batch_norms_counted_the_headline_is_missed():
    with torch.device("meta"):
        norms = [m for m in vgg16_bn(num_classes=10).modules() if isinstance(m, nn.BatchNorm2d)]
    counts, channels = counts_of(vgg16_bn, 10), sum(norm.num_features for norm in norms)
    bits = 32 * sum(counts) / reduction(counts, [4] * 4 + [2] * 8, 16)

    # The reduction of everything that is stored: norms have 32 bits on both sides.
    found = [32 * (sum(counts) + n * channels) / (bits + 32 * n * channels) for n in (2, 4)]

    assert [round(value, 3) for value in found] == [15.247, 15.123]


@pytest.mark.parametrize(
    ("target", "wide", "reached"),
    [(15.37, 4, 15.372), (15.4, 3, None), (14.8, 5, None), (12.0, 7, 13.320), (10.0, 9, 10.514)],
    ids=["15.37", "15.4, more than one solution", "14.8, more than one solution", "12", "10"],
)
def test_t11_equal_sensitivities_give_vgg16_as_many_wider_layers_as_computed(target, wide, reached):
    counts = counts_of(vgg16_bn, 10)
    inner = list(counts[1:-1])
    room = 32 * sum(counts) / target - 16 * (counts[0] + counts[-1])

    found = solution(inner, [1.0] * 12, (2, 4), f"weights={room / sum(inner):.9f}bit")

    assert found.count(4) == wide
    assert reduction(counts, found, 16) >= target
    if reached is not None:
        # Layers of one size may change places.
        assert round(reduction(counts, found, 16), 3) == reached


def test_sensitivities_that_grow_with_the_size_only_fill_the_budget():
    counts = counts_of(vgg16_bn, 10)
    inner = list(counts[1:-1])
    room = 32 * sum(counts) / 12 - 16 * (counts[0] + counts[-1])

    found = solution(inner, [n / 1e6 for n in inner], (2, 4), f"weights={room / sum(inner):.9f}bit")

    assert round(reduction(counts, found, 16), 3) == 12.017


@pytest.mark.parametrize(
    ("normalizer", "flips"),
    [("ref_q", 0), ("unit", 0), ("none", 6), ("per_bit", 8), ("max_level", 8)],
    ids=str,
)
def test_t13_constant_importances_keep_their_widths_unless_the_width_counts(normalizer, flips):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, generator=generator, dtype=torch.float64)
    importances = [1.0 + 0.07 * i for i in range(8)]
    layers = [(weight, torch.full((64,), value, dtype=torch.float64)) for value in importances]
    widths, changed = [4] * 8, []

    for _ in range(10):
        found = solution([100] * 8, statistic(layers, widths, normalizer).tolist(), (2, 4), "weights=3bit")
        changed.append(sum(a != b for a, b in zip(widths, found, strict=True)))
        widths = found

    assert changed == [4] + [flips] * 9


class Small(nn.Module):
    """Two convolutions, one that is read twice, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.linear = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(self.conv2(x))))
        return self.linear(x.flatten(1))


@pytest.fixture(scope="module")
def small() -> QuantGraph:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return capture(Small(), torch.zeros(2, 1, 6, 6))


BATCHES = 4


def small_task() -> Task:
    draw = np.random.default_rng(0)
    inputs = draw.normal(size=(6 * BATCHES, 1, 6, 6)).astype(np.float32)
    images = (inputs, draw.integers(0, 3, 6 * BATCHES))
    return make_task(images, images, held_out=images, batch_size=6)


class Run:
    """One learning: its rows, the checkpoint's rows of sums, and what was learned."""

    def __init__(
        self,
        graph: QuantGraph,
        method: BMPQ,
        target: Target,
        checkpoint: Checkpoint | None = None,
        stop_after: int = 0,
    ) -> None:
        self.rows: list[Mapping[str, Any]] = []
        self.learned, self.policy = None, None

        def watch(row: Mapping[str, Any]) -> None:
            if "loss" in row:
                self.rows.append(dict(row))
            if checkpoint is not None and row.get("step") == stop_after:
                checkpoint.stop.set()

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            try:
                self.policy, self.learned = learn(
                    method, graph, small_task(), target, Loop("learn", checkpoint=checkpoint, watch=watch)
                )
            except KeyboardInterrupt:
                self.rows = self.rows[: stop_after + 1]


TARGET = Target(parse_budget("weights=3bit"), (2, 4), (4, 8), pins={"linear.weight": 8})
LIMIT = Target(parse_budget("weights=5.9bit"), (2, 4), (4, 8), pins={"linear.weight": 8})


def test_t12_widths_are_solved_for_at_multiples_of_the_interval_between_warm_up_and_freeze():
    assert solving_steps(200, interval=20, warmup=20, freeze=140) == [20, 40, 60, 80, 100, 120, 140]
    assert solving_steps(200, interval=20, warmup=50, freeze=139) == [60, 80, 100, 120]
    assert solving_steps(30, interval=20, warmup=25, freeze=30) == [30]
    assert solving_steps(3, interval=20, warmup=0, freeze=0) == [1]


def test_t12_every_solution_fits_and_pins_are_never_touched(small):
    method = BMPQ(epochs=6, interval=1.0, warmup=2.0, freeze=0.67)

    run = Run(small, method, LIMIT)

    ends = [row for row in run.rows if row["ends_epoch"]]
    used = [row["used"]["weight_bits"] for row in ends]
    assert used[0] > 1, "the warm-up has every layer at 4 bits"
    assert all(value <= 1 for value in used[1:])
    seen = [tuple(row["sensitivity"].values()) for row in ends]
    assert seen[0] == (), "none before the warm-up is over"
    assert len({seen[1], seen[2], seen[3]}) == 3, "solved after epochs 2, 3 and 4"
    assert seen[3] == seen[4] == seen[5], "and not after the freeze"
    assert run.policy.bits["linear.weight"] == 8


@pytest.mark.parametrize("stop_after", [3, 5, 6, 11], ids=lambda step: f"after step {step}")
def test_t12_a_run_resumed_within_an_interval_is_the_uninterrupted_one(small, tmp_path, stop_after):
    method = BMPQ(epochs=4, interval=0.75, warmup=0.0, freeze=1.0, lr=0.05)
    whole = Run(small, method, LIMIT)

    first = Run(small, method, LIMIT, Checkpoint(tmp_path / "learn.pt"), stop_after)
    second = Run(small, method, LIMIT, Checkpoint(tmp_path / "learn.pt"))

    assert first.learned is None
    assert first.rows + second.rows == whole.rows
    state, wanted = second.learned.graph.module.state_dict(), whole.learned.graph.module.state_dict()
    assert all(torch.equal(state[key], value) for key, value in wanted.items())
    assert second.policy == whole.policy


@pytest.mark.parametrize("scale", ["learned", "max"])
def test_t14_the_packed_network_is_the_trained_one_in_the_bytes_of_its_widths(small, scale):
    task, target = small_task(), dataclasses.replace(LIMIT, weight_bits=(1, 2, 4))
    method = BMPQ(epochs=1, scale=scale)
    policy, learned = learn(method, small, task, target, Loop())
    trained = finetune(learned.graph, policy, task, Finetune(epochs=1), start=learned.frozen)

    program = lower(trained)

    sites = small.profile.weights
    assert program.weight_bytes == sum(-(-site.elements * policy.bits[site.name] // 8) for site in sites)
    for site in sites:
        packed, weight = program.weights[site.name], trained.weight(site.name).detach()
        levels = unpack(packed.packed, packed.grid.bits, site.elements).reshape(len(weight), -1)
        step = trained.quantizers[site.name].freeze().step.reshape(-1, 1).numpy()
        values = dequantize(levels, step, packed.grid)
        assert np.array_equal(values, trained.quantizers[site.name](weight).detach().flatten(1).numpy())
    images = next(task.test.epoch(0))[0]
    with torch.no_grad():
        assert np.array_equal(
            Executor(program)(images.numpy()).argmax(-1), trained(images).argmax(-1).numpy()
        )


def test_finetuning_begins_with_the_network_that_was_learned(small):
    task = small_task()
    policy, learned = learn(BMPQ(epochs=2), small, task, LIMIT, Loop())
    inputs = next(task.test.epoch(0))[0]

    placed = place_policy(learned.graph, policy, task.train, start=learned.frozen)

    with torch.no_grad():
        wanted = learned.graph.module.eval()(inputs)
        torch.testing.assert_close(placed.module.eval()(inputs), wanted, rtol=1e-4, atol=1e-5)


# Torch's own tracing makes an instance of every autograd function that it meets.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_narrower_width_changes_the_output_without_another_compilation(small):
    graph = small.copy()
    placed = {
        site.name: SwitchedWeight(4, graph.weight(site.name), scale="learned")
        if site.kind == "weight"
        else Clipped(4, torch.tensor(1.0), signed=site.signed)
        for site in graph.profile.sites
    }
    put_(graph, placed)
    compiled = torch.compile(graph.module.train(), dynamic=False, backend="aot_eager")
    x = torch.randn(6, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    before = compiled(x)
    before.sum().backward()

    with torch._dynamo.config.patch(error_on_recompile=True):
        for bits in (2, 1, 8):
            for site in graph.profile.sites:
                arguments = (graph.weight(site.name),) if site.kind == "weight" else ()
                placed[site.name].set_width_(bits, *arguments)
            out = compiled(x)
            out.sum().backward()
            assert not torch.equal(out, before)
            before = out


def tied_target(budget: str, **options: Any) -> Target:
    return Target(parse_budget(budget), (2, 3, 4, 5, 6, 7, 8), (2, 3, 4, 5, 6, 7, 8), **options)


def one_width(graph: QuantGraph, target: Target) -> dict[str, tuple[int, ...]]:
    profile = graph.profile
    return dict(one_activation_width(profile, target, target.choices(profile)).widths)


@pytest.mark.parametrize(
    ("budget", "width"),
    [("weights=3bit", 8), ("act=4.6bit", 4), ("act_max=40B", 5), ("bops=150k", 6)],
    ids=["weights alone", "average width", "largest activation", "operations"],
)
def test_activations_share_the_width_that_does_least_harm_with_the_weights_it_leaves(small, budget, width):
    profile = small.profile
    left = one_width(small, tied_target(budget))

    found = {left[site.name] for site in profile.activations}

    assert found == {(width,)}
    assert all(left[site.name] == (2, 3, 4, 5, 6, 7, 8) for site in profile.weights)


def test_pinned_activations_keep_their_width_and_tied_ones_stay_with_their_weight(small):
    first, second, *_ = [site.name for site in small.profile.activations if site.name != "input"]
    target = tied_target("act=4.6bit", pins={"input": 8, first: 3}, ties=[("linear.weight", second)])

    left = one_width(small, target)

    assert (left["input"], left[first]) == ((8,), (3,))
    assert left[second] == left["linear.weight"] == (2, 3, 4, 5, 6, 7, 8)


def test_searched_activations_are_as_sensitive_as_the_layers_that_read_them(small):
    profile, target = small.profile, tied_target("bops=150k")
    readers = {op.input: op.weight for op in profile.ops}
    sensitivity = {site.name: 1.0 for site in profile.weights}
    sensitivity["linear.weight"] = 1000.0

    found = solve(profile, target, target.choices(profile), sensitivity)

    read_by_linear = next(site for site, weight in readers.items() if weight == "linear.weight")
    assert (found["linear.weight"], found[read_by_linear]) == (8, 8)
    assert target.budget.fits(profile, found)


@pytest.mark.parametrize("options", [{"activations": "searched"}, {"value": "linear"}, {"layer_share": True}])
@pytest.mark.parametrize("normalizer", ["ref_q", "unit", "none", "per_bit", "max_level"])
def test_every_option_gives_widths_that_fit(small, normalizer, options):
    target = dataclasses.replace(tied_target("weights=3bit,bops=150k,act_max=40B"), weight_bits=(1, 2, 4, 8))

    policy, learned = learn(
        BMPQ(epochs=1, normalizer=normalizer, **options), small, small_task(), target, Loop()
    )

    assert target.budget.fits(small.profile, policy.bits)
    assert policy.bits == learned.bits, "the solution needed no repair"


@pytest.mark.parametrize("sensitivity", ["equal", "inverse_size"])
def test_the_sensitivities_to_compare_with_are_one_and_one_over_the_size(small, sensitivity):
    run = Run(small, BMPQ(epochs=1, sensitivity=sensitivity), LIMIT)

    found = run.rows[-1]["sensitivity"]

    sizes = {site.name: site.elements for site in small.profile.weights}
    assert found == {name: 1.0 if sensitivity == "equal" else 1.0 / n for name, n in sizes.items()}


def test_the_sensitivity_of_a_layer_is_its_bit_gradient_of_one_backward_pass(small):
    """One step at a learning rate of zero: the gradient is that of the network as it was placed."""
    run = Run(small, BMPQ(epochs=1, lr=0.0, interval=0.25, warmup=0.0, freeze=0.25), LIMIT)
    graph = run.learned.graph  # its weights never moved; the widths of the warm-up were 4 bits
    for site, quantizer in graph.quantizers.items():
        if isinstance(quantizer, SwitchedWeight) and site != "linear.weight":
            quantizer.set_width_(4, graph.weight(site))
    inputs, targets = next(small_task().train.epoch(0))
    graph.module.zero_grad()

    nn.functional.cross_entropy(graph.module.train()(inputs), targets).backward()

    for site, found in run.rows[-1]["sensitivity"].items():
        w = graph.weight(site)
        written = bit_gradients(w.grad.flatten().double(), w.detach().abs().max().double() / 7, 4)
        assert found == pytest.approx(written.abs().sum(1).mean().item(), rel=1e-5)


def test_finetuning_goes_on_at_the_last_learning_rate_where_that_is_asked_for():
    options = Finetune(epochs=3, lr=0.1)

    assert BMPQ().finetuning(options) is options
    assert BMPQ(lr_after=0.001).finetuning(options) == Finetune(epochs=3, lr=0.001, schedule="constant")


@pytest.mark.parametrize(
    "options", [{"epochs": 0}, {"interval": 0.0}, {"warmup": -1.0}, {"freeze": 0.0}, {"freeze": 1.5}], ids=str
)
def test_options_that_leave_nothing_to_solve_for_are_refused(options):
    with pytest.raises(ValueError, match=r"bmpq"):
        BMPQ(**options)


RECIPES = {"bmpq_vgg16_cifar10": (vgg16_bn, 553_363), "bmpq_resnet18_cifar10": (resnet18, 414_865)}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_reduces_the_bits_of_weights_by_15_4(name):
    network, inner_at_four = RECIPES[name]
    path = Path(__file__).parents[2] / "recipes" / f"{name}.toml"
    recipe = recipe_from_dict(read_toml(path), path.name)
    profile = capture(network(), torch.zeros(2, 3, 32, 32)).profile
    target, method = recipe.target(), method_of(recipe)
    sensitivity = {site.name: 1.0 for site in profile.weights}

    allowed = one_activation_width(profile, target, target.choices(profile))
    found = solve(profile, target, allowed, sensitivity)

    (limit,) = target.budget.limits
    inner = sum(site.elements for site in profile.weights if site.name not in target.pins)
    total = sum(site.elements for site in profile.weights)
    assert int((limit.asked * total - 8 * (total - inner) - 2 * inner) / 2) == inner_at_four
    assert 15.39 < 32 / limit.asked < 15.41
    assert 15.3 < 32 / COSTS["weight_bits"].of(profile, found) < 15.98
    assert {found[site.name] for site in profile.activations} == {4, 8}
    batches = 100
    solved = solving_steps(
        method.epochs * batches,
        interval=int(method.interval * batches),
        warmup=int(method.warmup * batches),
        freeze=round(method.freeze * method.epochs * batches),
    )
    assert [step / batches for step in solved] == [20, 40, 60, 80, 100, 120]
    assert method.epochs + recipe.finetune.epochs == recipe.float_training.epochs == 200


def test_a_run_from_scratch_ends_in_a_packed_network_and_a_report(tmp_path):
    out = tmp_path / "run"
    options = [
        *("--network", "mixbits.zoo:digits_cnn", "--data", "digits", "--budget", "weights=2.5bit"),
        *("--method", "bmpq", "--start", "scratch", "--threads", "1", "--no-baseline"),
        *(
            "--float-training.epochs",
            "1",
            "--bmpq.epochs",
            "2",
            "--bmpq.lr",
            "0.05",
            "--bmpq.lr-after",
            "0.005",
        ),
        *("--finetune.epochs", "1", "--batch-size", "64"),
    ]

    assert main(["fit", *options, "--out", str(out)]) == 0

    summary = json.loads((out / "summary.json").read_text())
    assert all(limit["used"] <= limit["asked"] for limit in summary["limits"])
    assert (out / "report.html").exists()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {row["lr"] for row in rows if row["stage"] == "finetune"} == {0.005}
    # Three epochs from scratch; a network whose clips fit values that were not normalized stays near chance.
    assert summary["mixed"]["top1"] > 50
