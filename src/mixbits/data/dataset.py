"""Labelled samples in memory: what a data set is, and functions from one to another. No torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import ArrayLike

Augment = Literal["none", "crop", "crop_flip"]


class Samples(Protocol):
    """An indexed set of labelled samples, read a batch at a time."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    @property
    def targets(self) -> np.ndarray:
        """Class of every sample, int64 [len]."""
        ...

    def take(
        self, indices: np.ndarray, generator: np.random.Generator | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Normalised inputs, float32 [n, C, ...], and classes, int64 [n], of the samples at ``indices``.

        With a generator the training augmentation of the samples is drawn from it; without one there is none.
        """
        ...


@dataclass(frozen=True)
class Dataset:
    """Training and test samples of one classification task, normalised alike."""

    name: str
    train: Samples
    test: Samples
    classes: tuple[str, ...]  # name of class i at place i
    input_shape: tuple[int, ...]  # of one sample, channels first: C, H, W of an image
    mean: tuple[float, ...]  # a channel, of inputs scaled to [0, 1]
    std: tuple[float, ...]  # a channel, of inputs scaled to [0, 1]

    def __post_init__(self) -> None:
        """Refuse a normalisation that does not fit the channels and targets that are not classes."""
        _check_normalization(self.name, self.mean, self.std, channels=self.input_shape[0])
        for part, samples in (("train", self.train), ("test", self.test)):
            _check_targets(f"{self.name}, {part}", samples.targets, classes=len(self.classes))


class ArraySamples:
    """Samples held in memory as one array, which is kept in the type it came in and never copied.

    ``inputs`` is [N, C, ...]: uint8, divided by ``scale`` on the way out, or float32, taken as it is. Both
    are then normalised, ``(x - mean) / std``, with one mean a channel.

    ``augment`` says what training draws for each image, [C, H, W]: ``crop`` shifts it by -``pad`` .. ``pad``
    pixels a direction, the rest filled with pixel value 0 (black, before normalisation, as torchvision's
    ``RandomCrop`` does); ``crop_flip`` then also mirrors every second image on average.

    >>> grey = np.full((2, 1, 8, 8), 255, np.uint8)
    >>> x, y = ArraySamples(grey, np.array([0, 1]), mean=(0.5,), std=(0.25,)).take(np.array([1]))
    >>> x.shape, float(x[0, 0, 0, 0]), y
    ((1, 1, 8, 8), 2.0, array([1]))
    """

    def __init__(
        self,
        inputs: np.ndarray,
        targets: np.ndarray,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        scale: float = 255.0,
        augment: Augment = "none",
        pad: int = 4,
    ) -> None:
        images = augment != "none"
        if inputs.ndim < 2 or (images and inputs.ndim != 4) or inputs.dtype not in (np.uint8, np.float32):
            raise ValueError(
                f"inputs are {inputs.dtype} {list(inputs.shape)}; expected uint8 or float32 "
                f"{'[N, C, H, W]' if images else '[N, C, ...]'}."
            )
        if len(targets) != len(inputs):
            raise ValueError(f"{len(inputs)} inputs but {len(targets)} targets; expected as many.")
        if augment not in get_args(Augment):
            raise ValueError(f"augment={augment!r} is unknown (have: {', '.join(get_args(Augment))}).")
        _check_normalization("ArraySamples", mean, std, channels=inputs.shape[1])
        self.inputs = inputs
        self.mean = mean
        self.std = std
        self.scale = scale
        self.augment = augment
        self.pad = pad
        self._targets = np.asarray(targets, np.int64)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.inputs)

    @property
    def targets(self) -> np.ndarray:
        """Class of every sample, int64 [len]."""
        return self._targets

    def take(
        self, indices: np.ndarray, generator: np.random.Generator | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Normalised inputs, float32 [n, C, ...], and classes, int64 [n], of the samples at ``indices``."""
        indices = np.asarray(indices)
        pixels = self.inputs[indices]
        if generator is not None and self.augment != "none":
            pixels = random_crop(pixels, self.pad, generator)
            if self.augment == "crop_flip":
                pixels = random_flip(pixels, generator)
        x = pixels.astype(np.float32, order="C")
        if pixels.dtype == np.uint8:
            x /= np.float32(self.scale)
        normalize_(x, self.mean, self.std)
        return x, self._targets[indices]


@dataclass(frozen=True, eq=False)
class _Subset:
    samples: Samples
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def targets(self) -> np.ndarray:
        return self.samples.targets[self.indices]

    def take(
        self, indices: np.ndarray, generator: np.random.Generator | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        return self.samples.take(self.indices[np.asarray(indices)], generator)


@dataclass(frozen=True, eq=False)
class _Renormalized:
    samples: Samples
    gain: np.ndarray  # float32 [C, 1, ...]
    offset: np.ndarray  # float32 [C, 1, ...]

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def targets(self) -> np.ndarray:
        return self.samples.targets

    def take(
        self, indices: np.ndarray, generator: np.random.Generator | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        x, targets = self.samples.take(indices, generator)
        return x * self.gain + self.offset, targets


def normalize_(x: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Turn float32 ``x`` [n, C, ...] into ``(x - mean) / std``, channel by channel, in place."""
    x -= _per_channel(mean, x.ndim - 1)
    x /= _per_channel(std, x.ndim - 1)


def _per_channel(values: ArrayLike, dims: int) -> np.ndarray:
    """Float32 [C, 1, ...] of as many dimensions as a sample."""
    return np.asarray(values, np.float32).reshape(-1, *(1,) * (dims - 1))


def random_crop(pixels: np.ndarray, pad: int, generator: np.random.Generator) -> np.ndarray:
    """``pixels`` [n, C, H, W] padded with ``pad`` zeros on every side, cut back to H x W at random places."""
    n, channels, height, width = pixels.shape
    top, left = generator.integers(0, 2 * pad + 1, size=(2, n))
    padded = np.zeros((n, channels, height + 2 * pad, width + 2 * pad), pixels.dtype)
    padded[:, :, pad : pad + height, pad : pad + width] = pixels
    # windows is a view [n, C, 2 pad + 1, 2 pad + 1, H, W]: one indexing copies the n chosen crops.
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    return windows[np.arange(n), :, top, left]


def random_flip(pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """``pixels`` [n, C, H, W], each image mirrored left to right with probability one half."""
    flipped = generator.random(len(pixels)) < 0.5
    return np.where(flipped[:, None, None, None], pixels[..., ::-1], pixels)


def subset(samples: Samples, indices: np.ndarray) -> Samples:
    """The samples at ``indices``, in that order: a view, nothing is read or copied.

    >>> digits = ArraySamples(np.zeros((3, 1, 8, 8), np.uint8), np.array([7, 8, 9]), mean=(0.0,), std=(1.0,))
    >>> subset(digits, np.array([2, 0])).targets
    array([9, 7])
    """
    indices = np.asarray(indices, np.int64)
    if len(indices) and (indices.min() < 0 or indices.max() >= len(samples)):
        raise ValueError(
            f"indices run from {indices.min()} to {indices.max()}; expected 0 .. {len(samples) - 1}, "
            f"as there are {len(samples)} samples."
        )
    return _Subset(samples, indices)


def split_held_out(samples: Samples, fraction: float, seed: int) -> tuple[Samples, Samples]:
    """``samples`` in two parts, the rest and ``fraction`` of them held out, each class in proportion.

    The split depends on the targets, the fraction and the seed only. Both parts still augment when they are
    given a generator; held-out samples are for measuring, so read them without one.

    >>> digits = ArraySamples(np.zeros((20, 1, 8, 8), np.uint8), np.arange(20) % 2, mean=(0.0,), std=(1.0,))
    >>> rest, held_out = split_held_out(digits, 0.2, seed=0)
    >>> len(rest), sorted(held_out.targets.tolist())
    (16, [0, 0, 1, 1])
    """
    count = round(fraction * len(samples))
    if not 0 < count < len(samples):
        raise ValueError(
            f"fraction={fraction} holds out {count} of {len(samples)} samples; "
            "expected a fraction between 0 and 1 that leaves samples on both sides."
        )
    rest, held_out = stratified_indices(samples.targets, count, seed=seed)
    return subset(samples, rest), subset(samples, held_out)


def take_images(samples: Samples, count: int, seed: int) -> Samples:
    """``count`` of the samples, each class in proportion, chosen by the seed.

    >>> digits = ArraySamples(np.zeros((20, 1, 8, 8), np.uint8), np.arange(20) % 2, mean=(0.0,), std=(1.0,))
    >>> sorted(take_images(digits, 4, seed=0).targets.tolist())
    [0, 0, 1, 1]
    """
    if not 0 < count <= len(samples):
        raise ValueError(
            f"{count} training images are asked for; expected 1 .. {len(samples)}, or 0 for all."
        )
    return subset(samples, stratified_indices(samples.targets, count, seed=seed)[1])


def stratified_indices(targets: np.ndarray, count: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ascending indices of the rest, and of ``count`` samples that hold each class in proportion to its size.

    The fractions of a sample that proportions leave over go to the classes with the largest, the first of
    equals.
    """
    generator = np.random.default_rng(seed)
    _, inverse, sizes = np.unique(targets, return_inverse=True, return_counts=True)
    exact = sizes * (count / len(targets))
    quota = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(quota - exact, kind="stable")
    quota[by_remainder[: count - quota.sum()]] += 1
    chosen = np.zeros(len(targets), bool)
    for label, size in enumerate(quota):
        chosen[generator.permutation(np.flatnonzero(inverse == label))[:size]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def with_normalization(dataset: Dataset, mean: tuple[float, ...], std: tuple[float, ...]) -> Dataset:
    """``dataset`` with its inputs normalised by ``mean`` and ``std``, those of the images scaled to [0, 1].

    Inputs that were normalised by m, s are mapped by ``x * s / std + (m - mean) / std``; this equals
    normalising the images afresh up to float32 rounding.

    >>> samples = ArraySamples(np.zeros((1, 1, 2, 2), np.uint8), np.array([0]), mean=(0.0,), std=(1.0,))
    >>> dataset = Dataset("black", samples, samples, ("nothing",), (1, 2, 2), mean=(0.0,), std=(1.0,))
    >>> float(with_normalization(dataset, (0.5,), (0.25,)).test.take(np.array([0]))[0].max())
    -2.0
    """
    mean, std = tuple(mean), tuple(std)
    _check_normalization(dataset.name, mean, std, channels=dataset.input_shape[0])
    if (mean, std) == (dataset.mean, dataset.std):
        return dataset
    dims = len(dataset.input_shape)
    gain = _per_channel(np.divide(dataset.std, std), dims)
    offset = _per_channel(np.subtract(dataset.mean, mean) / std, dims)
    return dataclasses.replace(
        dataset,
        train=_Renormalized(dataset.train, gain, offset),
        test=_Renormalized(dataset.test, gain, offset),
        mean=mean,
        std=std,
    )


def _check_normalization(
    name: str, mean: tuple[float, ...], std: tuple[float, ...], *, channels: int
) -> None:
    if not len(mean) == len(std) == channels:
        raise ValueError(
            f"{name}: mean has {len(mean)} values and std has {len(std)}; expected {channels}, one a channel."
        )
    if min(std) <= 0:
        raise ValueError(f"{name}: std is {std}; expected values above 0.")


def _check_targets(name: str, targets: np.ndarray, *, classes: int) -> None:
    if len(targets) == 0:
        raise ValueError(f"{name}: no samples.")
    if targets.min() < 0 or targets.max() >= classes:
        raise ValueError(
            f"{name}: targets run from {targets.min()} to {targets.max()}; "
            f"expected 0 .. {classes - 1}, as there are {classes} classes."
        )
