"""Task: what the user supplies to train and to judge a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler

from mixbits.data.dataset import ArraySamples, Dataset, Samples, split_held_out, take_images
from mixbits.train.processes import ALONE, Processes
from mixbits.train.randomness import RandomStates, set_random_states


class Batches(Protocol):
    """Batches ``(inputs float [n, ...], targets)`` in the same order again for the same epoch number."""

    def __len__(self) -> int:
        """Batches of one epoch."""
        ...

    def epoch(
        self, number: int, first: int = 0, rng: RandomStates | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from position ``first`` on.

        ``rng`` are the random states just before batch ``first`` is read, when a run is resumed there.
        """
        ...


@dataclass(frozen=True)
class SampleBatches:
    """Batches of a data set in memory; order and augmentation depend on seed, epoch and position only."""

    samples: Samples
    batch_size: int
    training: bool  # shuffle, augment, drop a last short batch
    seed: int = 0

    def __len__(self) -> int:
        """Batches of one epoch, at least one."""
        whole, rest = divmod(len(self.samples), self.batch_size)
        return max(whole if self.training else whole + bool(rest), 1)

    def epoch(
        self, number: int, first: int = 0, rng: RandomStates | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from position ``first`` on; torch's random state plays no part."""
        count = len(self.samples)
        order = (
            np.random.default_rng([self.seed, number]).permutation(count)
            if self.training
            else np.arange(count)
        )
        for position in range(first, len(self)):
            chosen = order[position * self.batch_size : (position + 1) * self.batch_size]
            draw = np.random.default_rng([self.seed, number, position]) if self.training else None
            inputs, targets = self.samples.take(chosen, draw)
            yield torch.from_numpy(inputs), torch.from_numpy(targets)


@dataclass(frozen=True)
class LoaderBatches:
    """Batches of the user's ``DataLoader``.

    Its shuffling is made repeatable by seeding torch, and the loader's own generator if it has one, before
    each epoch. A sampler that draws from anywhere else cannot be resumed bit for bit.
    """

    loader: DataLoader[Any]
    seed: int = 0

    def __len__(self) -> int:
        """Batches of one epoch."""
        return len(self.loader)

    def epoch(
        self, number: int, first: int = 0, rng: RandomStates | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from position ``first`` on; earlier ones are read and passed over."""
        seed = self.seed * 1_000_003 + number
        torch.manual_seed(seed)
        if isinstance(self.loader.generator, torch.Generator):
            self.loader.generator.manual_seed(seed)
        for position, batch in enumerate(self.loader):
            if not isinstance(batch, list | tuple) or len(batch) != 2:
                raise ValueError(
                    f"the DataLoader gives a {type(batch).__name__}, not (inputs, targets); "
                    "give it a collate_fn that does, or a tensor of inputs where no targets are needed"
                )
            if position >= first:
                inputs, targets = batch
                yield inputs, targets
            elif position == first - 1 and rng is not None:
                set_random_states(rng)


@dataclass(frozen=True)
class InputBatches:
    """Batches of inputs in one tensor, float ``[n, ...]``, for what needs no targets (they are empty)."""

    inputs: Tensor
    batch_size: int = 128

    def __len__(self) -> int:
        """Batches of one epoch."""
        return math.ceil(len(self.inputs) / self.batch_size)

    def epoch(
        self, number: int, first: int = 0, rng: RandomStates | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches from position ``first`` on, in the order of the tensor."""
        for inputs in self.inputs.split(self.batch_size)[first:]:
            yield inputs, torch.empty(0)


Inputs = Tensor | DataLoader[Any] | Batches


def batches_of(inputs: Inputs) -> Batches:
    """Batches to look at, of whatever the user has: a tensor of inputs, a ``DataLoader``, batches."""
    if isinstance(inputs, Tensor):
        return InputBatches(inputs)
    return LoaderBatches(inputs) if isinstance(inputs, DataLoader) else inputs


class TwoHalves:
    """Training data in two halves, for methods that learn two things from different samples.

    An epoch yields the batches of one half; meanwhile ``other`` is the batch of the other half that goes with
    the last one. Data in memory are split by samples (classes in proportion), the same way in every epoch.
    Other batches are taken in turns: the halves of one epoch are disjoint, but a loader that shuffles deals
    them anew for the next.
    """

    other: tuple[Tensor, Tensor]

    def __init__(self, batches: Batches) -> None:
        """Raises ``ValueError`` if there are not two batches (for data in memory: samples) to divide."""
        self._whole = batches
        self._parts: tuple[SampleBatches, SampleBatches] | None = None
        if isinstance(batches, SampleBatches):
            one, two = split_held_out(batches.samples, 0.5, batches.seed)
            self._parts = replace(batches, samples=one), replace(batches, samples=two)
        elif len(batches) < 2:
            raise ValueError("one batch of training data cannot be halved; choose a smaller batch size")

    def __len__(self) -> int:
        """Batches of one half."""
        return min(map(len, self._parts)) if self._parts else len(self._whole) // 2

    def epoch(
        self, number: int, first: int = 0, rng: RandomStates | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one half; both of a pair are read before the first is given."""
        if self._parts:
            pairs = zip(*(part.epoch(number, first) for part in self._parts), strict=False)
        else:
            batches = self._whole.epoch(number, 2 * first, rng)
            pairs = zip(batches, batches, strict=False)
        for batch, other in islice(pairs, len(self) - first):
            self.other = other
            yield batch


class AlternateHalves(Sampler[list[int]]):
    """Indices of batches, in turns of one half of the data and of the other: a ``batch_sampler``.

    Of a ``DataLoader``, for methods that learn two things in turns (EBS), in a loop of the user's. The halves
    are drawn once, by ``seed``; their order for every epoch, from torch's random numbers. What makes no whole
    turn is left out.

    >>> halves = AlternateHalves(9, batch_size=2)
    >>> first, second = (list(halves) for _ in range(2))  # epochs
    >>> sorted(first[0] + first[2]) == sorted(second[0] + second[2])
    True
    >>> len(set(first[0] + first[1] + first[2] + first[3]))
    8
    """

    def __init__(self, samples: int, batch_size: int, *, seed: int = 0, in_a_row: int = 1) -> None:
        """``in_a_row``: batches of a half before the other's turn, as many as one update accumulates.

        Raises ``ValueError`` if a half has too few samples for one turn.
        """
        self._size, self._in_a_row = batch_size, in_a_row
        order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
        self._halves = order[: samples // 2], order[samples // 2 : 2 * (samples // 2)]
        self._turns = samples // 2 // (batch_size * in_a_row)
        if not self._turns:
            raise ValueError(
                f"half of {samples} samples are fewer than {in_a_row} x {batch_size}; make batches smaller"
            )

    def __len__(self) -> int:
        """Batches of one epoch, of both halves."""
        return 2 * self._turns * self._in_a_row

    def __iter__(self) -> Iterator[list[int]]:
        """The batches of an epoch."""
        shuffled = [half[torch.randperm(len(half))].split(self._size) for half in self._halves]
        for turn in range(self._turns):
            for batches in shuffled:
                for batch in batches[turn * self._in_a_row :][: self._in_a_row]:
                    yield batch.tolist()


def count_correct(outputs: Tensor, targets: Tensor) -> Tensor:
    """How many samples have their class at the largest output: the sum behind top-1 accuracy."""
    return (outputs.argmax(-1) == targets).sum()


@dataclass(frozen=True)
class Task:
    """Data, loss and metric. ``held_out`` is never the test set: it is a part of the training data."""

    train: Batches
    held_out: Batches
    test: Batches
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    metric: Callable[[Tensor, Tensor], Tensor] = count_correct  # summed over a batch; 1 a sample is perfect


def task_of(
    dataset: Dataset,
    *,
    batch_size: int = 128,
    held_out: float = 0.1,
    seed: int = 0,
    train_images: int = 0,
) -> Task:
    """A data set's task; ``held_out`` is the part of the training set that decides and is not trained on.

    With ``train_images`` only so many of the rest are trained on, each class in proportion, chosen by
    ``seed``; held-out and test data are the same as without.
    """
    train, kept = split_held_out(dataset.train, held_out, seed)
    if train_images:
        train = take_images(train, train_images, seed)
    return Task(
        SampleBatches(train, batch_size, training=True, seed=seed),
        SampleBatches(kept, 2 * batch_size, training=False),
        SampleBatches(dataset.test, 2 * batch_size, training=False),
    )


Source = Samples | DataLoader[Any] | tuple[Any, Any]


def make_task(
    train: Source,
    test: Source,
    held_out: Source | None = None,
    *,
    batch_size: int = 128,
    seed: int = 0,
    **options: Any,
) -> Task:
    """A task from ``DataLoader``s or ``(inputs, targets)`` arrays, float ``[n, ...]`` and integers ``[n]``.

    Without ``held_out`` a tenth of the training arrays is kept; a ``DataLoader`` cannot be split, so then it
    must be given. ``options`` are the ``loss`` and ``metric`` of :class:`Task`.

    >>> inputs, targets = np.zeros((40, 1, 4, 4), np.float32), np.arange(40) % 4
    >>> task = make_task((inputs, targets), (inputs[:4], targets[:4]))
    >>> next(task.train.epoch(0))[0].shape
    torch.Size([36, 1, 4, 4])
    """
    if held_out is None:
        if isinstance(train, DataLoader):
            raise ValueError(
                "a DataLoader cannot be split: pass held_out= too, a part of the training data kept aside"
            )
        train, held_out = split_held_out(_samples(train), 0.1, seed)

    def batches(source: Source, *, training: bool) -> Batches:
        if isinstance(source, DataLoader):
            return LoaderBatches(source, seed)
        size = batch_size if training else 2 * batch_size
        return SampleBatches(_samples(source), size, training=training, seed=seed)

    return Task(
        batches(train, training=True),
        batches(held_out, training=False),
        batches(test, training=False),
        **options,
    )


def _samples(source: Samples | tuple[Any, Any]) -> Samples:
    if isinstance(source, tuple):
        inputs, targets = (np.asarray(part) for part in source)
        channels = inputs.shape[1]
        return ArraySamples(inputs, targets, mean=(0.0,) * channels, std=(1.0,) * channels)
    return source


@torch.no_grad()
def evaluate(
    network: Callable[[Tensor], Tensor],
    task: Task,
    batches: Batches,
    device: torch.device,
    processes: Processes = ALONE,
) -> dict[str, float]:
    """Mean loss and metric (percent) of a network in eval mode: ``{"loss": ..., "top1": ...}``.

    Several ``processes`` share every batch, and all get the figures of the whole.
    """
    loss, score, count = 0.0, 0.0, 0
    for batch in batches.epoch(0):
        inputs, targets = processes.part(batch)
        if not len(inputs):
            continue  # of a batch of fewer samples than processes
        outputs, wanted = network(inputs.to(device)), targets.to(device)
        loss += float(task.loss(outputs, wanted)) * len(inputs)
        score += float(task.metric(outputs, wanted))
        count += len(inputs)
    sums = torch.tensor([loss, score, count], dtype=torch.float64, device=processes.device)
    loss, score, count = processes.sum(sums).tolist()
    return {"loss": loss / count, "top1": 100.0 * score / count}
