"""DDQ: forward, gates and gradients by the numbers, and learned levels that are run as they were trained."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from mixbits.core.budget import parse_budget
from mixbits.core.grid import Codebook, Uniform, dequantize, quantize
from mixbits.core.profile import Op, Profile, Site
from mixbits.graph.quant_graph import QuantGraph, capture, put_
from mixbits.lower import lower
from mixbits.methods.ddq import (
    CELLS,
    DDQ,
    GateGradient,
    LearnedLevels,
    Pressure,
    _Nearest,
    density_levels,
    merged_levels,
    open_gates,
    start_gates,
)
from mixbits.quant.functional import fake_quantize
from mixbits.quant.quantizer import LearnedStep
from mixbits.runtime.executor import Executor
from mixbits.train.checkpoint import Checkpoint
from mixbits.train.finetune import Finetune, finetune, place_policy
from mixbits.train.method import Target, learn
from mixbits.train.steps import Loop
from mixbits.train.task import Task, make_task

# The numbers are for these levels, values and gradients from above. Levels are multiples of STEP, so that their
# integers are exact, and so is every mean of two or four of them but the one of the widest block.
Q = (-1.0, -0.6, -0.35, -0.1, 0.1, 0.4, 0.7, 1.0)
X = (-1.2, -0.55, -0.2, 0.0, 0.3, 0.62, 1.2)
UPSTREAM = (1.0, -1.0, 0.5, 2.0, 1.0, -0.5, 0.25)
STEP = 0.0125
PRINTED = 1e-4  # the numbers are given with four to six digits
BELOW_THE_TIE = -1e-9  # 0 lies between two levels, where the numbers take the lower one and a grid the upper


def quantizer(gates: tuple[float, ...], **options: Any) -> LearnedLevels:
    return LearnedLevels(
        torch.tensor(Q) / STEP,
        torch.tensor(gates),
        torch.tensor(STEP),
        **{
            "signed": True,
            "keeps_zero": False,
            "least_bits": 1,
            "shared_by": 1,
            "gate_gradient": "constant",
        }
        | options,
    )


def gradients(made: LearnedLevels, values: tuple[float, ...] = X, upstream: tuple[float, ...] = UPSTREAM):
    """Output and the gradients of input, levels (in units of values) and gates."""
    x = torch.tensor([value or BELOW_THE_TIE for value in values], requires_grad=True)
    out = made(x)
    out.backward(torch.tensor(upstream))
    scale = made._gradient_scale(open_gates(made.gates).detach())
    assert x.grad is not None and made.levels.grad is not None and made.gates.grad is not None
    to_levels = made.levels.grad / scale / STEP
    return out.tolist(), x.grad.tolist(), to_levels.tolist(), made.gates.grad.tolist()


def approx(values: list[float]) -> Any:
    return pytest.approx(values, abs=PRINTED)


@pytest.mark.parametrize("gradient", ["constant", "difference"])
@pytest.mark.parametrize(
    ("gates", "wanted"),
    [
        ((1, 1, 1), Q),
        ((1, 1, 0), (-0.8, -0.225, 0.25, 0.85)),
        ((1, 0, 0), (-0.5125, 0.55)),
        ((0, 0, 0), (0.01875,)),
    ],
    ids=["8 levels", "4 levels", "2 levels", "1 level"],
)
def test_closed_gates_leave_the_means_of_blocks(gates, wanted, gradient):
    levels, _ = merged_levels(torch.tensor(Q), torch.tensor(gates, dtype=torch.float32), gradient)

    expanded = [level for level in wanted for _ in range(8 // len(wanted))]
    assert levels.tolist() == approx(expanded)


def kronecker(gates: tuple[int, ...]) -> Tensor:
    """``U``, column by column."""
    columns = [
        merged_levels(unit, torch.tensor(gates, dtype=torch.float32), "constant")[0]
        * 2.0 ** (len(gates) - sum(gates))
        for unit in torch.eye(2 ** len(gates))
    ]
    return torch.stack(columns)


@pytest.mark.parametrize(
    "gates", [(1, 1, 1), (1, 1, 0), (1, 0, 0), (0, 0, 0), (0, 1, 1), (1, 0, 1), (0, 1, 0)]
)
def test_the_matrix_is_a_block_diagonal_of_ones_exactly_when_the_gates_are_sorted(gates):
    size = 2 ** (3 - sum(gates))
    blocks = torch.block_diag(*[torch.ones(size, size)] * (8 // size))

    assert torch.equal(kronecker(gates), blocks) is (list(gates) == sorted(gates, reverse=True))


def test_unsorted_gates_would_merge_levels_that_are_no_neighbours():
    levels, _ = merged_levels(torch.tensor(Q), torch.tensor([0.0, 1.0, 1.0]), "constant")

    assert sorted(set(levels.tolist())) == approx([-0.45, -0.1, 0.175, 0.45])
    sorted_gates = open_gates(torch.tensor([-0.5, 0.5, 0.5]))
    assert sorted_gates.tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("gates", "strength", "out", "dx", "dq", "dgates"),
    [
        (
            (0.5, 0.5, 0.5),
            0.0,
            [-1, -0.6, -0.1, -0.1, 0.4, 0.7, 1],
            [0, -1, 0.5, 2, 1, -0.5, 0],
            [1, -1, 0, 2.5, 0, 1, -0.5, 0.25],
            [-1.75, 0.7, 0.7],
        ),
        (
            (0.5, 0.5, -0.5),
            0.0,
            [-0.8, -0.8, -0.225, -0.225, 0.25, 0.85, 0.85],
            [0, -1, 0.5, 2, 1, -0.5, 0],
            [0, 0, 1.25, 1.25, 0.5, 0.5, -0.125, -0.125],
            [-1.38125, 1.2125, 0.05],
        ),
        (
            (0.5, 0.5, -0.5),
            0.1,
            [-0.8, -0.8, -0.225, -0.225, 0.25, 0.85, 0.85],
            [0, -1, 0.5, 2, 1, -0.5, 0],
            [0.0075, 0.0075, 1.2375, 1.2375, 0.4975, 0.4975, -0.131, -0.131],
            [-1.37045, 1.20312, 0.06025],
        ),
        (
            (-0.5, 0.5, 0.5),
            0.0,
            [-0.8, -0.8, -0.225, -0.225, 0.25, 0.85, 0.85],
            [0, -1, 0.5, 2, 1, -0.5, 0],
            [0, 0, 1.25, 1.25, 0.5, 0.5, -0.125, -0.125],
            [0.05, -1.38125, 1.2125],
        ),
    ],
    ids=["all open", "one closed", "corrected", "permuted"],
)
def test_outputs_and_gradients_are_those_of_the_formulas(gates, strength, out, dx, dq, dgates):
    # The correction is relative to size and power of the values, and in units of the step.
    made = quantizer(gates, correction=strength * len(X), power=1 / STEP**2)
    made.power.fill_(STEP**-2)

    got = gradients(made)

    assert got[0] == approx(out)
    assert got[1] == approx(dx)
    assert got[2] == approx(dq)
    assert got[3] == approx(dgates)


def test_a_gate_outside_of_its_window_gets_no_gradient():
    made = quantizer((1.0, 0.5, -0.5))
    with torch.no_grad():
        made.gates[0] = 2.0

    _, _, _, dgates = gradients(made)

    assert dgates[0] == 0
    assert all(dgates[1:])


@pytest.mark.parametrize(
    ("gradient", "wanted"),
    [("constant", [-0.1, 0.35, 0.6]), ("difference", [-0.55, -0.325, -0.2])],
)
def test_the_gradient_of_the_gates_for_one_value(gradient, wanted):
    _, _, _, dgates = gradients(quantizer((0.5,) * 3, gate_gradient=gradient), (-0.9,), (1.0,))

    assert dgates == approx(wanted)


def test_a_gradient_with_the_normalization_inside_is_another():
    levels, gates = torch.tensor(Q), torch.ones(3, requires_grad=True)
    merged, _ = merged_levels(levels, gates, "constant")

    (merged[0] / torch.exp2(3.0 - gates.sum())).backward()
    assert gates.grad is not None

    # That of the constant, and Z's own: ln 2 a gate times the level.
    assert gates.grad.tolist() == approx([-0.1 - math.log(2), 0.35 - math.log(2), 0.6 - math.log(2)])


@pytest.mark.parametrize("gate", [0, 1, 2])
@pytest.mark.parametrize("state", [(1, 1, 1), (1, 1, 0), (1, 0, 0)])
def test_the_gradient_of_a_gate_is_the_difference_that_it_makes(gate, state):
    def merged(value: float) -> Tensor:
        gates = torch.tensor(state, dtype=torch.float64)
        gates[gate] = value
        return merged_levels(torch.tensor(Q, dtype=torch.float64), gates, "difference")[0]

    gates = torch.tensor(state, dtype=torch.float64, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(
        lambda g: merged_levels(torch.tensor(Q, dtype=torch.float64), g, "difference")[0], gates
    )

    assert isinstance(jacobian, Tensor)
    assert torch.allclose(jacobian[:, gate], merged(1.0) - merged(0.0))


def test_the_gradients_of_merging_are_those_of_its_formula():
    draw = torch.Generator().manual_seed(0)
    levels = torch.rand(16, generator=draw, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(4, generator=draw, dtype=torch.float64, requires_grad=True)  # unsorted, not binary

    assert torch.autograd.gradcheck(lambda q, g: merged_levels(q, g, "difference")[0], (levels, gates))
    assert torch.autograd.gradcheck(lambda q: merged_levels(q, gates.detach(), "constant")[0], (levels,))


def test_moving_all_levels_leaves_the_difference_and_not_the_constant_formula():
    def gradient(kind: GateGradient, shift: float) -> Tensor:
        gates = torch.ones(3, requires_grad=True)
        first = merged_levels(torch.tensor(Q) + shift, gates, kind)[0][2]
        return torch.autograd.grad(first, gates)[0]

    assert torch.allclose(gradient("difference", 0.0), gradient("difference", 5.0), atol=1e-6)
    assert not torch.allclose(gradient("constant", 0.0), gradient("constant", 5.0), atol=1.0)


@pytest.mark.parametrize("gate", [0.5, -0.5], ids=["open", "closed"])
def test_with_correction_a_gate_s_gradient_is_how_the_squared_error_changes(gate):
    """No gradient from above: what is left is the error of one bit less (or more), to second order too."""
    x = torch.tensor([-0.95, -0.7, -0.5, -0.3, 0.15, 0.3, 0.6, 0.9])
    state = (0.9, 0.8, gate)
    made = quantizer(state, correction=float(len(x)), gate_gradient="difference")

    made(x).backward(torch.zeros_like(x))

    def error(last: float) -> float:
        fixed = quantizer((0.9, 0.8, last), gate_gradient="difference")
        with torch.no_grad():
            return 0.5 * ((fixed(x) - x) / STEP).square().sum().item()

    change = error(0.5) - error(-0.5)
    assert made.gates.grad is not None
    # Values may choose another level when levels merge, so the least error is at most what was foreseen.
    assert change < 0
    assert made.gates.grad[2].item() == pytest.approx(change, rel=0.35)


def test_uniform_levels_are_a_uniform_quantizer():
    step = 0.5
    levels = torch.arange(-3, 4.0)
    made = LearnedLevels(
        torch.cat([levels[:4], levels[3:]]) * 32,  # zero twice, as in the paper's grid
        torch.full((3,), 0.5),
        torch.tensor(step / 32),
        signed=True,
        keeps_zero=False,
        least_bits=1,
        shared_by=1,
    )
    x = torch.linspace(-2, 2, 4001)
    x = x[((x / step) % 1 - 0.5).abs() > 1e-3]  # rounding ties left out

    assert torch.equal(made(x), fake_quantize(x, torch.tensor(step), Uniform(3, signed=True, form="narrow")))


def two_layers(sizes: tuple[int, int]) -> Profile:
    sites = tuple(Site(name, "weight", (size,), True, ()) for name, size in zip("ab", sizes, strict=True))
    return Profile((1,), sites, (Op("a", "linear", 1, "a", "a", 1, 1),), (), 0)


def test_the_memory_factor_is_the_printed_one():
    budget = parse_budget("weights=750B")  # 6000 bits
    pressure = Pressure({"weights": 750.0}, budget, ramp=0.5)
    profile = two_layers((1000, 2000))

    def factor(a: float, b: float) -> float:
        ratios = pressure.excess(profile, {"a": torch.tensor(a), "b": torch.tensor(b)})
        return pressure.factor(ratios).item()

    assert factor(3, 2) == pytest.approx(1.003088, abs=1e-6)
    assert factor(2, 2) == 1.0
    assert factor(1, 2) == 1.0


def test_the_gradient_of_memory_to_a_gate_is_the_size_of_its_tensor():
    made = {site: quantizer((0.5, 0.5, gate)) for site, gate in (("a", 0.5), ("b", -0.5))}
    used = 1000 * made["a"].bits() + 2000 * made["b"].bits()

    to_a, to_b = torch.autograd.grad(used, [made["a"].gates, made["b"].gates])

    assert used.item() == 7000
    assert to_a.tolist() == [1000.0] * 3
    assert to_b.tolist() == [2000.0] * 3


def test_a_limit_comes_down_and_its_exponent_grows_while_it_is_exceeded():
    budget = parse_budget("weights=100B,act=2bit")
    pressure = Pressure({"weights": 400.0, "act_bits": 2.0}, budget, ramp=0.5)
    profile = two_layers((100, 100))
    sites = (*profile.sites, Site("c", "activation", (4,), True, ()))
    profile = replace(profile, sites=sites)
    bits = {"a": torch.tensor(8.0), "b": torch.tensor(8.0), "c": torch.tensor(2.0)}

    def ratios() -> list[float]:
        return [float(ratio) for ratio in pressure.excess(profile, bits) if ratio is not None]

    assert ratios() == pytest.approx([0.5, 1.0])
    for _ in range(10):
        pressure.update_(pressure.excess(profile, bits), 0.025)
    assert ratios() == pytest.approx([1.0, 1.0], rel=1e-5)
    for _ in range(20):
        pressure.update_(pressure.excess(profile, bits), 0.025)
    assert pressure.exponents[0] > 10 * pressure.exponents[1]


def test_a_site_keeps_at_least_one_gate_open():
    made = quantizer((-0.2, -3.0, -0.1))

    made.project_()

    assert made.gates.tolist() == pytest.approx([-0.2, -1.0, 0.0])
    assert made.bits().item() == 1
    assert len(made.freeze().grid.levels) == 2


def test_levels_that_training_disordered_rise_again():
    made = quantizer((0.5, 0.5, -0.5))
    with torch.no_grad():
        made.levels.copy_(torch.tensor([10.0, 20.0, -30.0, -20.0, 60.0, 70.0, 40.0, 50.0]))

    made.project_()

    assert made.levels.tolist() == [-30.0, -20.0, 10.0, 20.0, 40.0, 50.0, 60.0, 70.0]


def test_a_merged_level_far_from_its_mean_comes_back_into_its_cell():
    made = quantizer((0.5, 0.5, -0.5))
    with torch.no_grad():
        made.levels.copy_(torch.tensor([-50.0, -30.0, -60.0, 20.0, 5.0, 15.0, 90.0, 110.0]))

    made.project_()

    means = made.levels.reshape(4, 2).mean(1)
    assert means.tolist() == [-40.0, -20.0, 10.0, 100.0]
    assert (made.levels.diff() >= 0).all()


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_levels_in_order_keep_their_places_however_many_gates_are_open(bits):
    values = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(0)).mul_(0.05)
    levels = density_levels(values, 256, signed=True) * 400

    made = LearnedLevels(
        levels,
        start_gates(bits, 8),
        torch.tensor(1 / 400),
        signed=True,
        keeps_zero=False,
        least_bits=1,
        shared_by=1,
    )

    torch.testing.assert_close(made.levels.detach(), levels.clamp(-128, 127))


def test_gates_slow_down_once_the_limits_are_down():
    pressure = Pressure({"weights": 100.0}, parse_budget("weights=100B"), ramp=0.4)

    paces = []
    for _ in range(11):
        paces.append(pressure.pace())
        pressure.update_([torch.tensor(1.0)], 0.1)

    assert paces[:5] == pytest.approx([1.0] * 5)
    assert paces[7] == pytest.approx(0.5)
    assert paces[10] == pytest.approx(0.0, abs=1e-6)


def test_levels_that_fell_together_become_two_codes_again():
    made = quantizer((0.5, -0.5, -0.5))
    with torch.no_grad():
        made.levels.fill_(127.0)

    made.project_()

    assert len(made.freeze().grid.levels) == 2


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("bits", [2, 3, 5, 7])
def test_zero_is_a_level_where_padding_needs_it(signed, bits):
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0)) + 0.3
    levels = density_levels(values if signed else values.relu(), 256, signed=signed)
    step = levels.abs().max() / (127 if signed else 255)
    made = LearnedLevels(
        levels / step,
        start_gates(bits, 8),
        step,
        signed=signed,
        keeps_zero=True,
        least_bits=1,
        shared_by=100,
    )

    grid = made.freeze().grid

    assert 0 in grid.levels
    assert grid.signed is signed
    assert made(torch.zeros(3)).tolist() == [0.0] * 3


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_density_levels_keep_a_small_error_however_many_gates_close(bits):
    """Against the least squared errors of a normal distribution (Max 1960, table 1)."""
    least = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}[bits]
    above = 1.35 if bits == 1 else 1.15
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    levels = density_levels(x, 256, signed=True)
    step = levels.abs().max() / 127
    made = LearnedLevels(
        levels / step,
        start_gates(bits, 8),
        step,
        signed=True,
        keeps_zero=False,
        least_bits=1,
        shared_by=1,
    )

    error = (made(x) - x).square().mean().item()

    assert least * 0.95 < error < least * above


@pytest.mark.parametrize("bits", range(1, 8))
def test_a_codebook_of_any_width_is_offered_to_repair(bits):
    levels = density_levels(torch.linspace(-1, 1, 999), 256, signed=True)
    made = LearnedLevels(
        levels * 127,
        start_gates(3, 8),
        torch.tensor(0.1),
        signed=True,
        keeps_zero=True,
        least_bits=1,
        shared_by=1,
    )

    grid = made.codebook(bits)

    assert grid.bits == bits
    assert 2 ** (bits - 1) < len(grid.levels) <= 2**bits


def test_steps_per_channel_share_the_levels():
    steps = torch.tensor([0.0125, 0.05]).reshape(2, 1, 1)
    made = quantizer((0.5, 0.5, -0.5), gate_gradient="difference")
    made.step = steps
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))

    frozen = made.freeze()
    wanted = dequantize(quantize(x.numpy(), steps.numpy(), frozen.grid), steps.numpy(), frozen.grid)

    assert frozen.step.tolist() == steps.flatten().tolist()
    assert torch.equal(made(x), torch.from_numpy(wanted))


class Padded(nn.Module):
    """Signed and unsigned activations, padded; a depthwise layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.depth = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.fc = nn.Linear(8 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.relu(self.conv2(self.depth(x))).flatten(1))


def padded() -> QuantGraph:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return capture(Padded(), torch.zeros(2, 2, 8, 8))


def task() -> Task:
    draw = np.random.default_rng(0)
    targets = draw.integers(0, 4, 96)
    patterns = draw.normal(size=(4, 2, 8, 8))
    inputs = (patterns[targets] + draw.normal(size=(96, 2, 8, 8))).astype(np.float32)
    return make_task((inputs, targets), (inputs[:32], targets[:32]), batch_size=16)


TARGET = Target(parse_budget("weights=3bit,act=3bit"), (1, 2, 3, 4, 5), (2, 3, 4, 5))


def test_what_was_learned_is_what_is_packed_and_run():
    found_policy, found = learn(DDQ(epochs=3), padded(), task(), TARGET, Loop())
    trained = finetune(found.graph, found_policy, task(), Finetune(epochs=1), start=found.frozen)
    codebooks = [site for site, grid in found_policy.grids.items() if isinstance(grid, Codebook)]
    kinds = {(found.graph.profile.site(s).kind, found.graph.profile.site(s).signed) for s in codebooks}
    assert kinds == {("weight", True), ("activation", True), ("activation", False)}

    program = lower(trained)
    inputs, _ = next(task().test.epoch(0))
    ran = Executor(program)(inputs.numpy())

    trained.module.double()
    with torch.no_grad():
        wanted = trained.module(inputs.double())
    # float32 against float64: sums of a few hundred products of values near 1.
    assert np.abs(ran - wanted.numpy()).max() < 1e-4


def test_the_learned_network_is_its_frozen_codebooks():
    _, found = learn(DDQ(epochs=2), padded(), task(), TARGET, Loop())
    network = found.graph.module.eval()
    fixed = found.graph.copy()
    placed = {}
    for site, frozen in found.frozen.items():
        weight = found.graph.profile.site(site).kind == "weight"
        shape = (-1, *[1] * (found.graph.weight(site).dim() - 1)) if weight else ()
        placed[site] = LearnedStep(frozen.grid, frozen.step.reshape(shape), shared_by=1)
    put_(fixed, placed)
    inputs, _ = next(task().test.epoch(0))

    with torch.no_grad():
        assert torch.equal(fixed.module.eval()(inputs), network(inputs))


def test_tensors_that_could_be_negative_and_are_not_get_levels_that_run():
    draw = np.random.default_rng(0)
    inputs, targets = draw.uniform(size=(64, 2, 8, 8)).astype(np.float32), draw.integers(0, 4, 64)
    data = make_task((inputs, targets), (inputs[:16], targets[:16]), batch_size=16)
    graph = padded()
    with torch.no_grad():
        graph.weight("depth.weight").fill_(1 / 9)  # a box filter
    policy, found = learn(DDQ(epochs=1), graph, data, TARGET, Loop())
    assert not policy.grids["input"].signed

    trained = finetune(found.graph, policy, data, Finetune(epochs=1), start=found.frozen)

    batch = next(data.test.epoch(0))[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(Executor(lower(trained))(batch.numpy())), trained(batch))


def test_finetuning_starts_from_the_learned_levels_and_steps():
    policy, found = learn(DDQ(epochs=2), padded(), task(), TARGET, Loop())
    kept = [site for site, frozen in found.frozen.items() if frozen.grid == policy.grids[site]]
    assert {"weight", "activation"} == {found.graph.profile.site(site).kind for site in kept}

    placed = place_policy(found.graph, policy, task().train, start=found.frozen).quantizers

    for site in kept:
        assert torch.equal(placed[site].freeze().step, found.frozen[site].step), site


@pytest.mark.parametrize(
    ("budget", "options", "weight", "activation"),
    [
        ("weights=2bit,act=3bit", {}, 3, 4),
        ("weights=2.9bit,act=2bit", {}, 3, 3),
        ("weights=3bit", {}, 4, 5),
        ("weights=3bit,act=3bit", {"start_bits": 8}, 5, 5),
        ("weights=3bit,act=3bit", {"start_bits": 1}, 1, 2),
    ],
    ids=["one above", "part of a bit", "no limit", "too wide", "too narrow"],
)
def test_widths_start_one_above_the_widest_that_all_could_have_within_the_candidates(
    budget, options, weight, activation
):
    target = Target(parse_budget(budget), (1, 2, 3, 4, 5), (2, 3, 4, 5))

    found = DDQ(epochs=0, **options).learn(padded(), task(), target, Loop())

    assert {found.bits[site.name] for site in found.graph.profile.weights} == {weight}
    assert {found.bits[site.name] for site in found.graph.profile.activations} == {activation}


class StoppedLoop:
    """A loop that is asked to stop after so many updates."""

    def __init__(self, path: Path, after: int | None) -> None:
        self.stop, self.after, self.count = threading.Event(), after, 0
        self.loop = Loop(checkpoint=Checkpoint(path, stop=self.stop), watch=self.watch)

    def watch(self, row: Mapping[str, Any]) -> None:
        if "step" in row:
            self.count += 1
            if self.count == self.after:
                self.stop.set()


@pytest.mark.parametrize("after", [3, 7])
def test_learning_goes_on_bit_for_bit_where_it_was_stopped(tmp_path, after):
    method = DDQ(epochs=2)
    _, wanted = learn(method, padded(), task(), TARGET, Loop())
    with pytest.raises(KeyboardInterrupt):
        learn(method, padded(), task(), TARGET, StoppedLoop(tmp_path / "learn.pt", after).loop)

    _, resumed = learn(method, padded(), task(), TARGET, StoppedLoop(tmp_path / "learn.pt", None).loop)

    after_resuming = resumed.graph.module.state_dict()
    for key, value in wanted.graph.module.state_dict().items():
        assert torch.equal(after_resuming[key], value), key


@pytest.mark.parametrize("budget", ["weights=2bit", "bops=120k", "act=3bit,weights=400B"])
def test_learning_itself_comes_down_to_the_budget(budget):
    rows: list[Mapping[str, Any]] = []
    target = Target(parse_budget(budget))

    learn(DDQ(epochs=12), padded(), task(), target, Loop(watch=rows.append))

    last = [row["used"] for row in rows if "used" in row][-1]
    assert max(last.values()) < 1.15


def test_with_a_step_a_channel_a_level_s_gradient_is_the_sum_over_all_channels():
    made = quantizer((0.5, 0.5, 0.5), gate_gradient="difference", correction=0.7, power=30.0)
    made.step = torch.tensor([[0.01], [0.0123], [0.02]])
    draw = torch.Generator().manual_seed(0)
    x, upstream = torch.randn(3, 400, generator=draw), torch.randn(3, 400, generator=draw)

    made(x).backward(upstream)

    levels, steps = torch.tensor(Q).double() / STEP, made.step.double()
    ratios = x.double() / steps
    codes = (ratios[..., None] - levels).abs().argmin(-1)
    pulls = upstream * steps + 0.7 / (1200 * 30.0) * (levels[codes] - ratios)
    wanted = torch.zeros(8, dtype=torch.float64).scatter_add_(0, codes.flatten(), pulls.flatten())
    scale = made._gradient_scale(torch.ones(3)).double()
    assert made.levels.grad is not None
    torch.testing.assert_close(made.levels.grad.double(), scale * wanted, rtol=1e-4, atol=1e-3)


# Dynamo makes an instance of every autograd function that it meets.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_widths_change_without_compiling_again():
    made = quantizer((0.5, 0.5, 0.5), gate_gradient="difference", keeps_zero=True)
    torch._dynamo.reset()
    counted = CompileCounter()
    compiled = torch.compile(made, backend=counted, fullgraph=True)
    x = torch.tensor(X)

    for gate in (0.5, -0.5):
        with torch.no_grad():
            made.gates[2] = gate
        assert torch.equal(compiled(x), made(x))

    assert counted.frame_count == 1


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("compiled", [False, True])
def test_the_gradient_of_a_level_is_exact_where_many_values_share_it(compiled):
    # Levels near the means of their values: the corrections of 300,000 values nearly cancel.
    ratios = 7.0 * torch.rand(2_000_000, generator=torch.Generator().manual_seed(0))
    levels = torch.arange(8.0, requires_grad=True)
    codes = torch.round(ratios).to(torch.int64)
    cells = 0.5 * torch.arange(CELLS)
    code_of_cell = torch.bucketize(cells, torch.arange(7.0) + 0.5, right=True)
    wanted = torch.zeros(8, dtype=torch.float64)
    wanted.scatter_add_(0, codes, (levels.detach()[codes] - ratios).double())

    def quantized(x):
        return _Nearest.apply(
            x, torch.tensor(1.0), levels, torch.zeros(8), code_of_cell, 0.0, torch.tensor(1.0)
        )

    out = (torch.compile(quantized, backend="aot_eager") if compiled else quantized)(ratios)
    out.backward(torch.zeros_like(out))

    assert levels.grad is not None
    torch.testing.assert_close(levels.grad.double(), wanted, rtol=1e-6, atol=1e-3)
