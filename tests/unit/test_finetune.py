"""Finetuning: steps fit the values, gradients are LSQ's, batch norms are true averages, teachers stay as they are."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixbits.core.grid import Codebook, Grid, Uniform
from mixbits.core.policy import Policy
from mixbits.graph.quant_graph import QuantGraph, capture
from mixbits.quant.functional import fake_quantize, saving_inputs_only
from mixbits.quant.observe import mse_step
from mixbits.quant.quantizer import SMALLEST_STEP, Frozen, LearnedStep
from mixbits.train.finetune import (
    Finetune,
    finetune,
    observe,
    parameter_groups,
    place_policy,
    rescaled_step,
    restore_policy,
)
from mixbits.train.norms import reestimate_batch_norm_
from mixbits.train.steps import Loop
from mixbits.train.task import Task, evaluate, make_task

CPU = torch.device("cpu")
# Ten epochs at 3 bit brought the loss from 1.11 to 0.49: less than half.
LEARNT = 0.75
# Means of a few hundred float32 values, summed in another order.
FLOAT32_MEAN = 1e-5


class Small(nn.Module):
    """A convolution, a batch norm, a ReLU, another convolution, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4, momentum=0.3)
        self.conv2, self.linear = nn.Conv2d(4, 2, 1), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.relu(self.conv2(F.relu(self.bn(self.conv1(x))))).flatten(1))


@pytest.fixture(scope="module")
def captured() -> QuantGraph:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return capture(Small(), torch.zeros(2, 1, 6, 6))


@pytest.fixture(scope="module")
def task() -> Task:
    """Three classes that differ in their mean, so that a little training helps."""
    draw = np.random.default_rng(0)
    targets = draw.integers(0, 3, 90)
    inputs = (draw.normal(size=(90, 1, 6, 6)) + targets[:, None, None, None] - 1).astype(np.float32)
    return make_task((inputs, targets), (inputs[:30], targets[:30]), batch_size=20)


def policy_of(graph: QuantGraph, weights: int, activations: int) -> Policy:
    grids: dict[str, Grid] = {
        site.name: Uniform(weights if site.kind == "weight" else activations, site.signed)
        for site in graph.profile.sites
    }
    return Policy(grids)


def state_of(graph: QuantGraph) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in graph.module.state_dict().items()}


def unchanged(graph: QuantGraph, before: dict[str, Tensor]) -> bool:
    after = graph.module.state_dict()
    return list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)


# x, output, gradient to x, gradient to the step (LSQ eqs. (2), (3): level - x / step inside, the level outside), step 0.5.
FAKE_QUANTIZE = {
    "3 bit signed": (
        Uniform(3, signed=True),
        [-9.0, -2.2, -2.0, -0.6, 0.0, 0.2, 0.3, 1.4, 1.6, 9.0],
        [-2.0, -2.0, -2.0, -0.5, 0.0, 0.0, 0.5, 1.5, 1.5, 1.5],
        [0, 0, 1, 1, 1, 1, 1, 1, 0, 0],
        [-4, -4, 0, 0.2, 0, -0.4, 0.4, 0.2, 3, 3],
    ),
    "2 bit unsigned": (
        Uniform(2, signed=False),
        [-9.0, -0.1, 0.0, 0.4, 1.4, 1.6],
        [0.0, 0.0, 0.0, 0.5, 1.5, 1.5],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0.2, 0.2, 3],
    ),
    "1 bit bipolar": (
        Uniform(1, signed=True, form="bipolar"),
        [-2.0, -0.3, 0.3, 2.0],
        [-0.5, -0.5, 0.5, 0.5],
        [0, 1, 1, 0],
        [-1, -0.4, 0.4, 1],
    ),
    "codebook": (
        Codebook(2, (-4, -1, 1, 4)),
        [-3.0, -1.5, -0.3, 0.4, 1.4, 2.5],
        [-2.0, -2.0, -0.5, 0.5, 2.0, 2.0],
        [0, 1, 1, 1, 1, 0],
        [-4, -1, -0.4, 0.2, 1.2, 4],
    ),
}


@pytest.mark.parametrize(("grid", "x", "out", "dx", "dstep"), FAKE_QUANTIZE.values(), ids=FAKE_QUANTIZE)
def test_values_and_gradients_of_a_learned_step_are_those_of_lsq(grid, x, out, dx, dstep):
    values = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    step = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    found = fake_quantize(values, step, grid)
    slopes = [torch.autograd.grad(one, step, retain_graph=True)[0].item() for one in found]
    found.sum().backward()

    assert found.tolist() == out
    assert values.grad.tolist() == dx
    assert slopes == pytest.approx(dstep, abs=1e-12)  # float64


def test_the_gradient_of_a_step_is_scaled_by_the_values_that_share_it():
    # LSQ section 2.2: 1 / sqrt(n * level_max) with n = 25 values and level_max = 3; three values beyond give 3 each.
    quantizer = LearnedStep(Uniform(3, signed=True), torch.tensor(0.5), shared_by=25)

    quantizer(torch.tensor([9.0, 8.0, 7.0])).sum().backward()

    assert quantizer.step.grad.item() == pytest.approx(9 / math.sqrt(25 * 3), rel=1e-6)  # float32


def test_a_step_per_channel_gets_the_gradient_of_its_channel():
    quantizer = LearnedStep(Uniform(3, signed=True), torch.tensor([[0.5], [0.25]]), shared_by=1)

    quantizer(torch.tensor([[9.0, 0.2], [0.1, -9.0]])).sum().backward()

    scale = 3**-0.5
    assert quantizer.step.grad.flatten().tolist() == pytest.approx([2.6 * scale, -4.4 * scale], rel=1e-6)


IN_USE = {
    "8 bit": (Uniform(8, signed=True), 127),
    "bipolar": (Uniform(2, signed=True, form="bipolar"), 3),
    "levels": (Codebook(2, (-127, -20, 30, 90), (-70.0, 5.0, 60.0)), 127),
}


@pytest.mark.parametrize(("grid", "top"), IN_USE.values(), ids=IN_USE)
def test_steps_of_weights_stay_where_their_levels_are_in_use(grid, top):
    weight = torch.tensor([[[0.5, -2.0]], [[0.1, 0.2]], [[0.0, 0.0]], [[1.0, 0.5]]])
    largest = torch.tensor([2.0, 0.2, 0.0, 1.0])
    kept = 0.5 / top
    quantizer = LearnedStep(grid, torch.tensor([99.0, 1e-6, 0.3, kept]).reshape(-1, 1, 1), shared_by=2)

    quantizer.follow_(weight)

    full = largest / top
    wanted = torch.stack([full[0], full[1] / 64, torch.tensor(SMALLEST_STEP), torch.tensor(kept)])
    torch.testing.assert_close(quantizer.step.flatten(), wanted)


def test_training_at_a_large_rate_leaves_8_bit_weights_their_levels(captured, task):
    trained = finetune(captured, policy_of(captured, 8, 8), task, Finetune(epochs=3, lr=0.5))

    for site in captured.profile.weights:
        step = trained.quantizers[site.name].step.flatten()
        largest = trained.weight(site.name).detach().flatten(1).abs().amax(1)
        assert (step * 127 <= largest * (1 + 1e-5)).all(), site.name
        assert (step * 127 * 64 >= largest * (1 - 1e-5)).all(), site.name


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("form", ["full", "narrow", "bipolar"])
def test_a_step_chosen_by_squared_error_beats_the_one_that_avoids_clipping(bits, form):
    grid = Uniform(bits, signed=True, form=form)
    values = torch.randn(3, 500, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[0.1], [1.0], [10.0]]
    )

    step = mse_step(values, grid)

    def error(steps: Tensor) -> Tensor:
        return (fake_quantize(values, steps[:, None], grid) - values).square().sum(1)

    unclipped = values.abs().amax(1) / grid.level_max
    assert step.shape == (3,)
    assert (error(step) <= error(unclipped)).all()
    # A tenth to either side is no better than a percent: the error has one minimum, tried in steps of a 48th.
    assert (error(step) <= 1.01 * torch.minimum(error(step * 1.1), error(step * 0.9))).all()


def test_values_that_are_all_zero_get_a_positive_step():
    assert (mse_step(torch.zeros(2, 5), Uniform(4, signed=True)) > 0).all()


def test_a_placed_policy_has_a_positive_step_for_every_channel_and_every_activation(captured, task):
    policy, before = policy_of(captured, 3, 4), state_of(captured)

    student = place_policy(captured, policy, task.train)

    steps = {site: quantizer.step for site, quantizer in student.quantizers.items()}
    assert {site: tuple(step.shape) for site, step in steps.items()} == {
        "input": (),
        "conv1.weight": (4, 1, 1, 1),
        "relu": (),
        "conv2.weight": (2, 1, 1, 1),
        "relu.1": (),
        "linear.weight": (3, 1),
    }
    assert all((step > 0).all() for step in steps.values())
    assert {site: quantizer.grid for site, quantizer in student.quantizers.items()} == dict(policy.grids)
    assert unchanged(captured, before)
    assert captured.quantizers == {}


def test_the_step_of_a_channel_is_chosen_by_the_error_of_that_channel(captured, task):
    graph = captured.copy()
    with torch.no_grad():
        graph.weight("conv1.weight")[2] *= 100

    student = place_policy(graph, policy_of(graph, 4, 4), task.train)

    before = (
        place_policy(captured, policy_of(graph, 4, 4), task.train).quantizers["conv1.weight"].step.flatten()
    )
    after = student.quantizers["conv1.weight"].step.flatten()
    assert (after / before).tolist() == pytest.approx([1, 1, 100, 1], rel=1e-6)  # float32


def test_the_scale_of_a_gradient_counts_values_of_one_channel_and_of_one_sample(captured, task):
    student = place_policy(captured, policy_of(captured, 3, 2), task.train)

    scales = {site: quantizer.gradient_scale for site, quantizer in student.quantizers.items()}

    assert scales["conv1.weight"] == pytest.approx(
        (9 * 3) ** -0.5
    )  # 1 x 3 x 3 values of a channel, levels to 3
    assert scales["relu"] == pytest.approx((4 * 4 * 4 * 3) ** -0.5)


def test_activations_are_observed_in_eval_mode_without_a_trace(captured, task):
    graph, before = captured.copy(), state_of(captured)

    seen = observe(graph, ["input", "relu"], task.train, CPU)

    batches = torch.cat([inputs for inputs, _ in task.train.epoch(0)])
    assert seen["input"].sort().values.tolist() == batches.flatten().sort().values.tolist()
    assert (seen["relu"] >= 0).all()
    assert unchanged(graph, before)


def test_a_learned_step_is_the_start_of_an_activation(captured, task):
    start = {
        "relu": Frozen(Uniform(4, signed=False), torch.tensor(0.3)),
        "conv1.weight": Frozen(Uniform(4, signed=True), torch.tensor(9.0)),
    }

    student = place_policy(captured, policy_of(captured, 3, 4), task.train, start=start)

    without = place_policy(captured, policy_of(captured, 3, 4), task.train)
    assert student.quantizers["relu"].step.item() == pytest.approx(0.3)
    assert torch.equal(student.quantizers["relu.1"].step, without.quantizers["relu.1"].step)
    # The weight was learned at another width; its values are at hand, so steps are chosen anew.
    assert torch.equal(student.quantizers["conv1.weight"].step, without.quantizers["conv1.weight"].step)


def test_one_learned_step_of_a_weight_is_the_start_of_all_its_channels(captured, task):
    policy = policy_of(captured, 3, 4)
    start = {"conv1.weight": Frozen(policy.grids["conv1.weight"], torch.tensor(0.3))}

    step = place_policy(captured, policy, task.train, start=start).quantizers["conv1.weight"].step

    assert step.shape == (len(captured.weight("conv1.weight")), 1, 1, 1)
    assert (step == 0.3).all()


@pytest.mark.parametrize(
    ("bits", "step"), [(4, 0.3), (2, 1.5), (8, 0.3 / 17)], ids=["same levels", "fewer", "more"]
)
def test_a_learned_step_carried_to_another_width_keeps_its_range(bits, step):
    frozen = Frozen(Uniform(4, signed=False), torch.tensor(0.3))

    assert rescaled_step(frozen, Uniform(bits, signed=False)).item() == pytest.approx(step)


def test_codebooks_of_one_site_share_their_step():
    frozen = Frozen(Codebook(2, (0, 20, 50, 120)), torch.tensor(0.03))

    assert rescaled_step(frozen, Codebook(1, (0, 70))) == frozen.step
    assert rescaled_step(frozen, Uniform(8, signed=False)).item() == pytest.approx(0.03 * 120 / 255)


def test_finetuning_lowers_the_loss_and_leaves_the_given_network_alone(captured, task):
    policy, before = policy_of(captured, 3, 3), state_of(captured)
    start = place_policy(captured, policy, task.train)
    start.module.eval()

    student = finetune(captured, policy, task, Finetune(epochs=10, lr=0.1), Loop("finetune"))

    assert not student.module.training
    assert (
        evaluate(student, task, task.train, CPU)["loss"]
        < LEARNT * evaluate(start, task, task.train, CPU)["loss"]
    )
    assert all((quantizer.step > 0).all() for quantizer in student.quantizers.values())
    assert not torch.equal(student.quantizers["relu"].step, start.quantizers["relu"].step)
    assert unchanged(captured, before)


def test_weights_of_a_finetuned_network_are_on_their_grids(captured, task):
    student = finetune(captured, policy_of(captured, 2, 3), task, Finetune(epochs=1), Loop("finetune"))

    for site in ("conv1.weight", "conv2.weight", "linear.weight"):
        quantizer = student.quantizers[site]
        levels = (quantizer(student.weight(site)) / quantizer.step).round()
        assert torch.equal(levels * quantizer.step, quantizer(student.weight(site)))
        assert {-2, -1, 0, 1} >= set(levels.flatten().tolist())


def test_finetuning_for_no_epoch_only_places_quantizers(captured, task):
    policy = policy_of(captured, 3, 4)

    student = finetune(captured, policy, task, Finetune(epochs=0), Loop("finetune"))

    placed = place_policy(captured, policy, task.train)
    assert unchanged(student, state_of(placed))


def test_a_policy_for_another_network_is_refused_before_training(captured, task):
    policy = Policy({**policy_of(captured, 3, 4).grids, "conv3.weight": Uniform(3, signed=True)})

    with pytest.raises(ValueError, match=r"unknown site 'conv3\.weight'"):
        finetune(captured, policy, task, Finetune(), Loop("finetune"))


def test_steps_are_not_decayed_and_all_parameters_are_trained(captured, task):
    student = place_policy(captured, policy_of(captured, 3, 4), task.train)

    network, steps = parameter_groups(student, weight_decay=0.1)

    assert (network["weight_decay"], steps["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in student.module.named_parameters()}
    assert {names.pop(id(p)) for p in steps["params"]} == {
        f"quantizers.{site.replace('.', ':')}.step" for site in student.quantizers
    }
    assert {names.pop(id(p)) for p in network["params"]} == {
        name for name, _ in captured.module.named_parameters()
    }
    assert names == {}


def test_re_estimated_batch_norms_hold_the_true_averages(captured, task):
    graph = captured.copy()
    norm = graph.module.bn
    parameters = [p.clone() for p in graph.module.parameters()]

    reestimate_batch_norm_(graph, task.train, 3, CPU)

    seen = [F.conv2d(inputs, graph.module.conv1.weight) for inputs, _ in task.train.epoch(0)][:3]
    means = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    variances = torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0)
    assert torch.allclose(norm.running_mean, means, rtol=FLOAT32_MEAN, atol=FLOAT32_MEAN)
    assert torch.allclose(norm.running_var, variances, rtol=FLOAT32_MEAN, atol=FLOAT32_MEAN)
    assert norm.num_batches_tracked == 3
    assert norm.momentum == 0.3
    assert not any(module.training for module in graph.module.modules())
    assert all(
        torch.equal(p, before) for p, before in zip(graph.module.parameters(), parameters, strict=True)
    )


@pytest.mark.parametrize(("batches", "tracked"), [(2, 2), (0, 4)], ids=["re-estimated", "running ones kept"])
def test_finetuning_ends_with_re_estimated_batch_norms_unless_told_otherwise(
    captured, task, batches, tracked
):
    options = Finetune(epochs=1, norm_batches=batches)

    student = finetune(captured, policy_of(captured, 3, 4), task, options, Loop("finetune"))

    assert len(task.train) == 4
    assert student.module.bn.num_batches_tracked == tracked


def test_distillation_of_one_output_is_refused(task):
    torch.manual_seed(0)
    inputs = next(task.train.epoch(0))[0]
    network = nn.Sequential(nn.Flatten(), nn.Linear(inputs[0].numel(), 8), nn.ReLU(), nn.Linear(8, 1))
    single = capture(network, inputs[:2])
    with pytest.raises(ValueError, match="one output, whose softmax is always 1"):
        finetune(single, policy_of(single, 3, 4), task, Finetune(epochs=1, distill=1.0), teacher=single)


def test_distillation_needs_its_teacher(captured, task):
    with pytest.raises(ValueError, match="distillation needs the float network: pass teacher="):
        finetune(captured, policy_of(captured, 3, 4), task, Finetune(distill=0.5), Loop("finetune"))


def test_distillation_leaves_the_teacher_as_it_is_and_pulls_towards_it(captured, task):
    teacher, policy = captured.copy(), policy_of(captured, 3, 4)
    with torch.no_grad():  # a teacher that always says class 2
        teacher.module.linear.weight.zero_()
        teacher.module.linear.bias.copy_(torch.tensor([0.0, 0.0, 9.0]))
    before = state_of(teacher)

    alone, taught = (
        finetune(
            captured,
            policy,
            task,
            Finetune(epochs=10, lr=0.1, distill=distill),
            Loop("finetune"),
            teacher=teacher,
        )
        for distill in (0.0, 1.0)
    )

    inputs = torch.cat([inputs for inputs, _ in task.test.epoch(0)])
    with torch.no_grad():
        says_two = [F.softmax(network(inputs), -1)[:, 2].mean().item() for network in (alone, taught)]
    assert says_two[1] > 0.9 > says_two[0]
    assert unchanged(teacher, before)


def test_the_distillation_loss_is_hintons(captured, task):
    policy, rows = policy_of(captured, 3, 4), []
    options = Finetune(epochs=1, distill=0.25, temperature=3.0)

    finetune(captured, policy, task, options, Loop("finetune", watch=rows.append), teacher=captured.copy())

    inputs, targets = next(task.train.epoch(0))
    student = place_policy(captured, policy, task.train)
    student.module.train()
    with torch.no_grad():
        outputs, wanted = student(inputs), captured(inputs)
    p, q = (F.softmax(logits / 3.0, -1) for logits in (wanted, outputs))
    divergence = (p * (p / q).log()).sum(-1).mean()
    first = next(row["loss"] for row in rows if "loss" in row)
    expected = 0.75 * F.cross_entropy(outputs, targets) + 0.25 * 3.0**2 * divergence
    assert first == pytest.approx(expected.item(), rel=FLOAT32_MEAN)


def test_a_finetuned_network_is_restored_from_its_state(captured, task):
    policy = policy_of(captured, 3, 4)
    student = finetune(captured, policy, task, Finetune(epochs=1), Loop("finetune"))
    inputs = torch.cat([inputs for inputs, _ in task.test.epoch(0)])

    restored = restore_policy(captured, policy, copy.deepcopy(student.module.state_dict()))

    assert unchanged(restored, state_of(student))
    assert torch.equal(restored(inputs), student(inputs))


def convolution_of_quantized(*, inputs_only: bool, change: bool = False) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(4, 8, *size, generator=draw, requires_grad=True) for size in ((6, 6), (3, 3)))
    step = torch.tensor(0.3, requires_grad=True)
    with saving_inputs_only() if inputs_only else nullcontext():
        positive = x.square()
        quantized = fake_quantize(positive, step, Uniform(3, signed=False))
        out = torch.nn.functional.conv2d(quantized, weight).square().mean()
        if change:
            positive.add_(1.0)
    out.backward()
    return [leaf.grad for leaf in (x, weight, step) if leaf.grad is not None]


def test_gradients_are_the_same_where_operations_quantize_again_in_the_backward_pass():
    usual, again = (convolution_of_quantized(inputs_only=only) for only in (False, True))

    assert len(usual) == len(again) == 3
    assert all(torch.equal(a, b) for a, b in zip(usual, again, strict=True))


@pytest.mark.parametrize("inputs_only", [False, True])
def test_a_change_in_place_of_what_the_backward_pass_needs_is_an_error(inputs_only):
    with pytest.raises(RuntimeError, match=r"in.?place"):
        convolution_of_quantized(inputs_only=inputs_only, change=True)


# Dynamo makes an instance of every autograd function that it meets.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("bits", [1, 2, 4, 5])
def test_a_codebook_has_the_same_values_and_gradients_compiled(bits):
    levels = tuple(range(-(2**bits), 2**bits, 2))
    grid = Codebook(bits, levels, tuple(level + 0.75 for level in levels[:-1]))
    edges = torch.tensor(grid.edges)
    x = torch.cat([edges, torch.nextafter(edges, torch.tensor(-1e9)), torch.tensor([-1e9, 1e9])])
    found = []
    for transform in (lambda f: f, lambda f: torch.compile(f, backend="aot_eager", fullgraph=True)):
        torch._dynamo.reset()
        values, step = x.clone().requires_grad_(), torch.tensor(1.0, requires_grad=True)
        out = transform(lambda values, step: fake_quantize(values, step, grid))(values, step)
        (out * torch.arange(1.0, len(x) + 1)).sum().backward()
        found.append((out, values.grad, step.grad))

    for eager, compiled in zip(*found, strict=True):
        assert torch.equal(eager, compiled)
