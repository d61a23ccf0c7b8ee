"""Trainings in a loop of the user's: the results of our own loop, and everything a loop may do between."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import mixbits
from mixbits.core.budget import parse_budget
from mixbits.core.grid import Uniform, dequantize, quantize
from mixbits.core.policy import Policy
from mixbits.graph.quant_graph import QuantGraph, capture
from mixbits.methods import find_methods
from mixbits.train.finetune import Finetune, begin_finetuning, finetune
from mixbits.train.method import Method, Target, begin_learning, learn
from mixbits.train.steps import DivergedError
from mixbits.train.task import AlternateHalves, Task, TwoHalves, make_task
from mixbits.train.training import Training

BATCHES, EPOCHS = 6, 2
UPDATES = BATCHES * EPOCHS
LEARNED = ("bmpq", "ddq", "ebs", "mpdnn", "sdq")
each_learned = pytest.mark.parametrize("name", LEARNED)
SUMS = 1e-5  # float32 sums in another order, over a dozen updates


@cache
def captured(*, norm: bool = True) -> QuantGraph:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        middle = [nn.BatchNorm2d(4)] if norm else []
        model = nn.Sequential(nn.Conv2d(1, 4, 3), *middle, nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
        return capture(model, torch.zeros(2, 1, 6, 6))


@cache
def task() -> Task:
    draw = np.random.default_rng(0)
    inputs, targets = draw.normal(size=(60, 1, 6, 6)).astype(np.float32), draw.integers(0, 3, 60)
    return make_task(
        (inputs[:48], targets[:48]), (inputs[48:], targets[48:]), (inputs[:8], targets[:8]), batch_size=8
    )


def policy(bits: int = 3, *, norm: bool = True) -> Policy:
    sites = captured(norm=norm).profile.sites
    return Policy({site.name: Uniform(bits, site.signed) for site in sites})


def target() -> Target:
    return Target(parse_budget("weights=3bit,act=4bit"))


def method(name: str) -> Method:
    options: dict[str, dict[str, Any]] = {
        "bmpq": {"interval": 0.25, "warmup": 0.0},
        "ebs": {"mixing": "gumbel"},
    }
    return replace(find_methods()[name](), epochs=EPOCHS, **options.get(name, {}))


def fixed(*, norm: bool = True) -> Training[QuantGraph]:
    return begin_finetuning(captured(norm=norm), policy(norm=norm), task().train)


def learning(name: str, updates: int = UPDATES) -> Training[Any]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return begin_learning(method(name), captured(), task().train, target(), updates=updates)


BEGIN: dict[str, Callable[[], Training[Any]]] = {
    "fixed widths": fixed,
    **{name: (lambda name=name: learning(name)) for name in LEARNED},
}
each_training = pytest.mark.parametrize("begin", BEGIN.values(), ids=BEGIN)


def sgd(training: Training[Any], lr: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.SGD(training.groups, lr=lr, momentum=0.9)


def update(
    training: Training[Any], optimizer: torch.optim.Optimizer, *batches: tuple[Tensor, Tensor]
) -> None:
    """One update of a plain loop; several batches accumulate their gradients."""
    optimizer.zero_grad()
    total = torch.zeros(())
    for inputs, targets in batches:
        loss = F.cross_entropy(training.module(inputs), targets) / len(batches)
        loss.backward()
        total += loss.detach()
    training.before_update(total)
    optimizer.step()
    training.after_update(optimizer)


def train(
    training: Training[Any], optimizer: torch.optim.Optimizer, first: int = 0, last: int = UPDATES
) -> None:
    training.module.train()
    for number in range(first, last):
        epoch, index = divmod(number, BATCHES)
        if "strengths" in training.keep:  # EBS: a batch of each half in turns
            halves = TwoHalves(task().train)
            batch = next(halves.epoch(epoch, index // 2))
            update(training, optimizer, halves.other if index % 2 else batch)
        else:
            update(training, optimizer, next(task().train.epoch(epoch, index)))


def constant(options: Any) -> Any:
    return replace(options, epochs=EPOCHS, lr=0.01, schedule="constant")


def test_fixed_widths_in_any_loop_are_those_of_finetuning_bit_for_bit():
    wanted = finetune(captured(), policy(), task(), constant(Finetune()))

    training = fixed()
    train(training, sgd(training))
    network = training.finish().module

    assert network.state_dict().keys() == wanted.module.state_dict().keys()
    assert all(
        torch.equal(value, network.state_dict()[key]) for key, value in wanted.module.state_dict().items()
    )
    assert not network.training


@each_learned
def test_widths_learned_in_any_loop_are_those_of_our_own(name):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        wanted, network = learn(constant(method(name)), captured(), task(), target())

    training = learning(name)
    train(training, sgd(training))
    found, learned = training.finish()

    assert found == wanted
    torch.testing.assert_close(
        learned.graph.module.state_dict(), network.graph.module.state_dict(), rtol=SUMS, atol=SUMS
    )


@each_training
@pytest.mark.parametrize("stop", [1, BATCHES + 2], ids=lambda stop: f"after {stop}")
def test_a_loop_that_saves_network_and_optimizer_goes_on_bit_for_bit(begin, stop, tmp_path):
    whole = begin()
    train(whole, sgd(whole))

    first = begin()
    optimizer = sgd(first)
    train(first, optimizer, last=stop)
    torch.save(
        {"network": first.module.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt"
    )
    second = begin()
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    optimizer = sgd(second)
    second.module.load_state_dict(saved["network"])
    optimizer.load_state_dict(saved["optimizer"])
    train(second, optimizer, first=stop)

    assert second.updates == UPDATES
    states = [training.module.state_dict() for training in (whole, second)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@each_training
def test_accumulated_gradients_are_one_update(begin):
    training = begin()
    optimizer = sgd(training)
    training.module.train()
    batches = [next(task().train.epoch(0, index)) for index in range(3)]

    update(training, optimizer, *batches)

    assert training.updates == 1


def test_accumulated_halves_of_a_batch_train_as_the_whole():
    inputs, targets = next(task().train.epoch(0))
    states = []
    for batches in ([(inputs, targets)], [(inputs[:4], targets[:4]), (inputs[4:], targets[4:])]):
        training = fixed(norm=False)  # batch norm sees what is in a batch
        update(training, sgd(training), *batches)
        states.append(training.finish().module.state_dict())

    torch.testing.assert_close(states[0], states[1], rtol=SUMS, atol=SUMS)


@each_training
def test_in_autocast_quantizers_stay_in_float32_and_learn(begin):
    training = begin()
    before = copy.deepcopy(training.module.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        train(training, sgd(training), last=4)

    after = training.module.state_dict()
    assert all(value.dtype == before[key].dtype for key, value in after.items())
    assert all(value.isfinite().all() for value in training.module.parameters())
    assert any(not torch.equal(q, before[key]) for key, q in after.items() if key.startswith("quantizers."))


@each_training
def test_a_network_cast_to_bfloat16_is_refused(begin):
    training = begin()
    training.module.to(torch.bfloat16)

    with pytest.raises(ValueError, match=r"^\S+: its \w+ was cast to torch\.bfloat16, .*use autocast"):
        training.before_update(1.0)


@each_training
def test_gradients_that_are_clipped_after_before_update_are_small(begin):
    training = begin()
    optimizer = torch.optim.SGD(training.groups, lr=1.0)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    training.module.train()
    inputs, targets = next(task().train.epoch(0))
    loss = 100.0 * F.cross_entropy(training.module(inputs), targets)
    loss.backward()
    training.before_update(loss)
    parameters = [p for group in training.groups for p in group["params"] if p.grad is not None]
    before = [p.detach().clone() for p in parameters]
    assert nn.utils.clip_grad_norm_(parameters, 0.1) > 0.1

    optimizer.step()

    moved = torch.stack([(p - q).detach().norm() for p, q in zip(parameters, before, strict=True)]).norm()
    assert moved.item() == pytest.approx(0.1, rel=1e-4)


def test_after_an_update_that_threw_steps_far_they_are_positive():
    training = fixed()
    train(training, sgd(training, lr=1e4), last=1)

    assert all((quantizer.step > 0).all() for quantizer in training.graph.quantizers.values())


def test_what_is_finished_lies_on_the_grids_of_the_policy():
    training = fixed()
    train(training, sgd(training), last=2)
    network = training.finish()

    for site in network.profile.weights:
        frozen = network.quantizers[site.name].freeze()
        assert frozen.grid == policy().grids[site.name]
        weight = network.weight(site.name).detach()
        step = frozen.step.reshape(-1, *[1] * (weight.dim() - 1)).numpy()
        codes = quantize(weight.numpy(), step, frozen.grid)
        assert np.allclose(
            network.quantizers[site.name](weight).detach(), dequantize(codes, step, frozen.grid)
        )


def test_a_checkpoint_of_other_widths_is_refused_with_the_site():
    saved = fixed().module.state_dict()
    other = begin_finetuning(captured(), policy(4), task().train)

    with pytest.raises(ValueError, match=r"another training: input is .*3 bit.* there and .*4 bit.* here"):
        other.module.load_state_dict(saved)


def test_a_checkpoint_of_another_method_is_refused():
    saved = learning("mpdnn", updates=5).module.state_dict()

    with pytest.raises(ValueError, match="updates is 5 there and 12 here"):
        learning("mpdnn").module.load_state_dict(saved)


@pytest.mark.parametrize("name", sorted(set(find_methods()) - set(LEARNED)))
def test_a_method_that_needs_a_loop_of_its_own_says_so(name):
    with pytest.raises(ValueError, match=r"cannot learn in another loop.*mixbits\.begin_finetuning"):
        begin_learning(find_methods()[name](), captured(), task().train, target(), updates=3)


def test_an_optimizer_of_another_network_is_refused():
    training = fixed()
    optimizer = torch.optim.SGD(captured().copy().module.parameters(), lr=0.1)

    with pytest.raises(ValueError, match=r"trains none of the network's parameters.*training\.groups"):
        update(training, optimizer, next(task().train.epoch(0)))


def test_weight_decay_on_steps_is_said():
    training = fixed()
    optimizer = torch.optim.AdamW(training.module.parameters(), lr=1e-3, weight_decay=0.01)

    with pytest.warns(UserWarning, match="decays parameters of quantizers"):
        update(training, optimizer, next(task().train.epoch(0)))
    update(training, optimizer, next(task().train.epoch(0)))  # once


def test_fewer_updates_than_planned_are_said_and_the_policy_fits_all_the_same():
    training = learning("sdq")
    train(training, sgd(training), last=2)

    with pytest.warns(UserWarning, match="2 of 12 updates are done"):
        found, _ = training.finish()

    assert parse_budget("weights=3bit,act=4bit").fits(captured().profile, found.bits)


def test_a_penalty_that_is_a_factor_of_the_loss_asks_for_it():
    training = learning("ddq")
    training.module(torch.zeros(2, 1, 6, 6)).sum().backward()

    with pytest.raises(ValueError, match=r"call before_update\(loss\)"):
        training.before_update()


def test_a_penalty_that_is_not_a_number_stops_the_loop():
    training = learning("ddq")
    training.module(torch.zeros(2, 1, 6, 6)).sum().backward()

    with pytest.raises(DivergedError, match="in update 1"):
        training.before_update(float("nan"))


def test_beginning_leaves_the_network_and_the_random_numbers_as_they_were():
    graph, data = captured().copy(), TensorDataset(*next(task().train.epoch(0)))
    before, state = copy.deepcopy(graph.module.state_dict()), torch.get_rng_state()

    begin_finetuning(graph, policy(), DataLoader(data, batch_size=2, shuffle=True))
    begin_learning(method("sdq"), graph, DataLoader(data, batch_size=2, shuffle=True), target(), updates=3)

    assert torch.equal(torch.get_rng_state(), state)
    after = graph.module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_weights_and_strengths_have_updates_in_turns():
    training = learning("ebs")
    named = training.module.named_parameters()
    strengths = {name: p for name, p in named if name.endswith("strengths.value")}
    optimizer = torch.optim.AdamW([*training.groups, {"params": strengths.values(), "weight_decay": 0.1}])
    states = [copy.deepcopy(training.module.state_dict())]
    for _ in range(4):
        train(training, optimizer, first=training.updates, last=training.updates + 1)
        states.append(copy.deepcopy(training.module.state_dict()))

    moved = [
        {name for name, p in training.module.named_parameters() if not torch.equal(one[name], two[name])}
        for one, two in itertools.pairwise(states)
    ]
    assert strengths
    assert moved[1] == moved[3] == strengths.keys()
    assert moved[0]
    assert moved[2]
    assert not (moved[0] | moved[2]) & strengths.keys()


def test_alternate_halves_are_the_same_in_every_epoch_and_in_turns():
    halves = AlternateHalves(21, batch_size=2, in_a_row=2, seed=3)
    epochs = [list(halves) for _ in range(3)]
    parts = [[{i for b in epoch[at::4] + epoch[at + 1 :: 4] for i in b} for at in (0, 2)] for epoch in epochs]

    assert all(len(epoch) == len(halves) == 8 for epoch in epochs)
    assert all(len(batch) == 2 for epoch in epochs for batch in epoch)
    one, two = (set().union(*(part[half] for part in parts)) for half in (0, 1))
    assert not one & two
    assert epochs[0] != epochs[1]
    assert sorted(next(iter(AlternateHalves(21, batch_size=10, seed=3)))) == sorted(
        next(iter(AlternateHalves(21, batch_size=10, seed=3)))
    )
    loader = DataLoader(TensorDataset(torch.arange(21)), batch_sampler=halves)
    assert {int(i) for (batch,) in list(loader)[:2] for i in batch} <= one
    with pytest.raises(ValueError, match="half of 21 samples are fewer than 2 x 6"):
        AlternateHalves(21, batch_size=6, in_a_row=2)


def test_a_tensor_of_inputs_will_do():
    training = mixbits.begin_finetuning(captured(), policy(), next(task().train.epoch(0))[0])
    train(training, sgd(training), last=1)

    assert not training.finish().module.training


def test_batches_that_are_no_pairs_are_refused():
    columns = DataLoader([{"pixel_values": torch.zeros(1, 6, 6), "labels": 0}], batch_size=1)

    with pytest.raises(ValueError, match="the DataLoader gives a dict"):
        begin_finetuning(captured(), policy(), columns)
