"""Halves of the training data: disjoint, complete, and read again from any place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from mixbits.train.randomness import random_states
from mixbits.train.task import Batches, LoaderBatches, TwoHalves, make_task

SAMPLES, BATCH = 48, 5


def arrays() -> tuple[np.ndarray, np.ndarray]:
    """Images whose value is their number."""
    return np.arange(SAMPLES, dtype=np.float32).reshape(-1, 1, 1, 1), np.arange(SAMPLES) % 3


def in_memory() -> Batches:
    return make_task(arrays(), arrays(), arrays(), batch_size=BATCH).train


def loaded() -> Batches:
    class Noisy(TensorDataset):
        """Samples that change by torch's random numbers, by less than half a number."""

        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            inputs, targets = super().__getitem__(index)
            return inputs + 0.4 * torch.rand(()), targets

    data = Noisy(*(torch.from_numpy(part) for part in arrays()))
    return LoaderBatches(DataLoader(data, batch_size=BATCH, shuffle=True))


both_kinds = pytest.mark.parametrize("make", [in_memory, loaded], ids=["arrays", "DataLoader"])


def numbers(inputs: Tensor) -> list[int]:
    return [int(value) for value in inputs.flatten()]


def read(halves: TwoHalves, epoch: int, first: int = 0, rng: Any = None) -> list[tuple[Tensor, Tensor]]:
    return [(batch[0], halves.other[0]) for batch in halves.epoch(epoch, first, rng)]


@both_kinds
def test_the_halves_of_an_epoch_share_no_sample_and_have_as_many_batches(make):
    halves = TwoHalves(make())

    pairs = read(halves, 0)

    one, two = ([number for pair in pairs for number in numbers(pair[side])] for side in (0, 1))
    assert len(pairs) == len(halves) == SAMPLES // BATCH // 2 + (make is loaded)  # it keeps a short batch
    assert len(set(one)) == len(one) == len(halves) * BATCH
    assert len(set(two)) == len(two)
    assert set(one).isdisjoint(two)


def test_samples_in_memory_stay_in_their_half_and_classes_in_proportion():
    halves = TwoHalves(in_memory())

    seen = [set(), set()]
    for epoch in range(40):
        for pair in read(halves, epoch):
            for side in (0, 1):
                seen[side].update(numbers(pair[side]))

    assert seen[0] | seen[1] == set(range(SAMPLES))
    assert seen[0].isdisjoint(seen[1])
    assert [sum(number % 3 == k for number in seen[0]) for k in range(3)] == [8, 8, 8]


@both_kinds
@pytest.mark.parametrize("first", [1, 2, 3])
def test_an_epoch_goes_on_from_any_pair(make, first):
    whole, states = [], []
    halves = TwoHalves(make())
    with torch.random.fork_rng(devices=[]):
        for batch in halves.epoch(3):
            whole.append((batch[0], halves.other[0]))
            states.append(random_states())

        rest = read(TwoHalves(make()), 3, first, states[first - 1])

    for found, wanted in zip(rest, whole[first:], strict=True):
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])


def test_a_single_batch_cannot_be_halved():
    data = TensorDataset(*(torch.from_numpy(part) for part in arrays()))

    with pytest.raises(ValueError, match="choose a smaller batch size"):
        TwoHalves(LoaderBatches(DataLoader(data, batch_size=SAMPLES)))
