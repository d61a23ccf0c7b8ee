"""A data set from one line of text, as the command line and recipes name it."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from mixbits.core.locate import NotLocatedError, locate
from mixbits.data.cifar import load_cifar10
from mixbits.data.dataset import ArraySamples, Dataset
from mixbits.data.digits import load_digits
from mixbits.data.imagefolder import load_imagefolder
from mixbits.data.mnist import load_mnist

ACCEPTED = """\
  digits                   8 x 8 grey digits that come with scikit-learn
  cifar10:DIR              CIFAR-10, official binary files in DIR
  mnist:DIR                MNIST, Fashion-MNIST or others of that form, IDX files (or .gz) in DIR
  imagefolder:DIR          DIR/train/CLASS/* and DIR/test/CLASS/* (or val): png, jpg, jpeg, webp, bmp;
                           options: imagefolder:DIR?size=224&crop=0.875 (size may be HxW)
  module:function          your own: returns a Dataset or (x_train, y_train, x_test, y_test)
  path/to/file.py:function   the same, from a file"""


def open_dataset(spec: str) -> Dataset:
    """Data set that ``spec`` names.

    ``digits``, ``cifar10:DIR``, ``mnist:DIR``, ``imagefolder:DIR`` (``imagefolder:DIR?size=224&crop=0.875``),
    or ``module:function`` and ``path/to/file.py:function`` for your own. The function takes no argument and
    returns a ``Dataset`` or the arrays ``(x_train, y_train, x_test, y_test)``: images [N, C, H, W] in
    uint8 (divided by 255) or float inputs [N, ...] (taken as they are), and integer classes [N].

    Raises:
        ValueError: The spec, or what it names, is not a data set.

    >>> dataset = open_dataset("digits")
    >>> len(dataset.train), len(dataset.test), dataset.input_shape
    (1437, 360, (1, 8, 8))
    """
    kind, _, rest = spec.partition(":")
    if spec == "digits":
        return load_digits()
    if kind == "cifar10" and rest:
        return load_cifar10(rest)
    if kind == "mnist" and rest:
        return load_mnist(rest)
    if kind == "imagefolder" and rest:
        directory, _, query = rest.partition("?")
        return load_imagefolder(directory, **_imagefolder_options(query, spec))
    if kind in ("digits", "cifar10", "mnist", "imagefolder") or not rest:
        raise ValueError(f"{spec!r} names no data set. Accepted are:\n{ACCEPTED}")
    try:
        function = locate(spec)
    except NotLocatedError as error:
        raise ValueError(f"{error}\nAccepted data sets are:\n{ACCEPTED}") from None
    return _dataset_of(function, spec)


def _imagefolder_options(query: str, spec: str) -> dict[str, Any]:
    readers = {"size": _height_width, "crop": float}
    options = {}
    for name, text in parse_qsl(query, keep_blank_values=True):
        if name not in readers:
            raise ValueError(f"{spec}: unknown option {name!r} (have: {', '.join(readers)}).")
        try:
            options[name] = readers[name](text)
        except ValueError:
            raise ValueError(
                f"{spec}: cannot read {name}={text!r}. Write size=224 or size=160x224 (HxW), crop=0.875."
            ) from None
    return options


def _height_width(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def _dataset_of(function: object, spec: str) -> Dataset:
    if not callable(function):
        raise ValueError(f"{spec} is a {type(function).__name__}; expected a function without arguments.")
    made = function()
    if isinstance(made, Dataset):
        return made
    if not isinstance(made, tuple | list) or len(made) != 4:
        what = (
            f"{type(made).__name__} of {len(made)}" if isinstance(made, tuple | list) else type(made).__name__
        )
        raise ValueError(
            f"{spec} returned a {what}; expected a Dataset or the arrays (x_train, y_train, x_test, y_test)."
        )
    x_train, y_train, x_test, y_test = made
    x_train, x_test = _inputs(x_train, f"{spec}: x_train"), _inputs(x_test, f"{spec}: x_test")
    y_train, y_test = _targets(y_train, f"{spec}: y_train"), _targets(y_test, f"{spec}: y_test")
    for part, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        if len(x) != len(y):
            raise ValueError(
                f"{spec}: x_{part} has {len(x)} samples and y_{part} {len(y)}; expected as many."
            )
    if x_train.shape[1:] != x_test.shape[1:] or x_train.dtype != x_test.dtype:
        raise ValueError(
            f"{spec}: x_train is {x_train.dtype} {list(x_train.shape)} and x_test {x_test.dtype} "
            f"{list(x_test.shape)}; expected one type and one shape of a sample."
        )
    channels = x_train.shape[1]
    mean, std = (0.0,) * channels, (1.0,) * channels
    return Dataset(
        name=spec,
        train=ArraySamples(x_train, y_train, mean=mean, std=std),
        test=ArraySamples(x_test, y_test, mean=mean, std=std),
        classes=tuple(str(i) for i in range(max(y_train.max(), y_test.max()) + 1)),
        input_shape=x_train.shape[1:],
        mean=mean,
        std=std,
    )


def _inputs(values: object, name: str) -> np.ndarray:
    x = np.asarray(values)
    if x.dtype == np.uint8 and x.ndim != 4:
        raise ValueError(
            f"{name} has shape {list(x.shape)}; expected [N, C, H, W] of uint8. "
            "Reshape it there: x[:, None] for grey images [N, H, W]."
        )
    if x.ndim < 2:
        raise ValueError(f"{name} has shape {list(x.shape)}; expected samples first, [N, ...].")
    if x.dtype == np.uint8 and x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        raise ValueError(
            f"{name} has shape {list(x.shape)}, which looks like [N, H, W, C]; expected [N, C, H, W]. "
            "Return x.transpose(0, 3, 1, 2)."
        )
    if x.dtype == np.uint8:
        return x
    if not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"{name} is {x.dtype}; expected uint8 (divided by 255) or float (taken as it is).")
    return x.astype(np.float32, copy=False)


def _targets(values: object, name: str) -> np.ndarray:
    y = np.asarray(values)
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"{name} is {y.dtype} {list(y.shape)}; expected integer classes [N].")
    if len(y) == 0:
        raise ValueError(f"{name} is empty.")
    return y.astype(np.int64)
