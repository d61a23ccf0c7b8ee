"""Labelled images for the recipes, in NumPy. Users may bring any loader of their own."""

from __future__ import annotations

from mixbits.data.cifar import load_cifar10
from mixbits.data.dataset import (
    ArraySamples,
    Dataset,
    Samples,
    split_held_out,
    subset,
    with_normalization,
)
from mixbits.data.digits import load_digits
from mixbits.data.imagefolder import load_imagefolder
from mixbits.data.mnist import load_mnist
from mixbits.data.open import open_dataset

__all__ = [
    "ArraySamples",
    "Dataset",
    "Samples",
    "load_cifar10",
    "load_digits",
    "load_imagefolder",
    "load_mnist",
    "open_dataset",
    "split_held_out",
    "subset",
    "with_normalization",
]
