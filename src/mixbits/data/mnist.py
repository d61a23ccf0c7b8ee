"""MNIST and data sets in its form (Fashion-MNIST, KMNIST): four IDX files, as published or unpacked.

An IDX file is big-endian::

    | 0 : 2 | type, 8 = unsigned byte : 1 | dimensions d : 1 | sizes : d x 4 | values, row by row |
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from mixbits.data.dataset import ArraySamples, Dataset

UNSIGNED_BYTE = 8
GREY_LEVELS = 255.0
REMEDY = (
    "Expected are train-images-idx3-ubyte, train-labels-idx1-ubyte and the same of t10k, each may end in .gz."
)


def load_mnist(directory: str | Path) -> Dataset:
    """Grey images and classes 0 .. k - 1; normalization is by the training pixels' own mean and deviation.

    Training shifts each image by up to two pixels a direction and mirrors none: a mirrored digit is no digit.

    Raises:
        ValueError: The directory or a file is missing, or a file is not IDX, or not of bytes, or the files
            do not go together.
    """
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise ValueError(f"mnist: no directory {directory}. {REMEDY}")
    parts = []
    for part in ("train", "t10k"):
        images = _read_idx(_find(directory, f"{part}-images-idx3-ubyte"), dimensions=3)
        labels = _read_idx(_find(directory, f"{part}-labels-idx1-ubyte"), dimensions=1)
        if len(images) != len(labels) or not len(images):
            raise ValueError(
                f"mnist: {directory} has {len(images)} {part} images and {len(labels)} labels; "
                f"expected as many, and some. {REMEDY}"
            )
        parts.append((images[:, None], labels.astype(np.int64)))
    (x_train, y_train), (x_test, y_test) = parts
    if x_train.shape[1:] != x_test.shape[1:]:
        raise ValueError(
            f"mnist: training images are {list(x_train.shape[2:])} and test images {list(x_test.shape[2:])}; "
            "expected one size."
        )
    counts = np.bincount(x_train.reshape(-1), minlength=256)  # exact sums, without a float copy
    levels = np.arange(256) / GREY_LEVELS
    center = float(counts @ levels / counts.sum())
    deviation = math.sqrt(counts @ (levels - center) ** 2 / counts.sum())
    mean, std = (center,), (deviation or 1.0,)
    return Dataset(
        name="mnist",
        train=ArraySamples(x_train, y_train, mean=mean, std=std, augment="crop", pad=2),
        test=ArraySamples(x_test, y_test, mean=mean, std=std),
        classes=tuple(str(i) for i in range(int(max(y_train.max(), y_test.max())) + 1)),
        input_shape=x_train.shape[1:],
        mean=mean,
        std=std,
    )


def _find(directory: Path, name: str) -> Path:
    for path in (directory / name, directory / f"{name}.gz"):
        if path.is_file():
            return path
    raise ValueError(f"mnist: no file {name} or {name}.gz in {directory}. {REMEDY}")


def _read_idx(path: Path, *, dimensions: int) -> np.ndarray:
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"mnist: {path} is not a whole gzip file: {error}.") from None
    header = 4 + 4 * dimensions
    if len(data) < header or data[:4] != bytes((0, 0, UNSIGNED_BYTE, dimensions)):
        raise ValueError(
            f"mnist: {path} does not begin as an IDX file of bytes in {dimensions} dimensions. {REMEDY}"
        )
    sizes = tuple(int(size) for size in np.frombuffer(data, ">u4", dimensions, offset=4))
    if len(data) - header != math.prod(sizes):
        raise ValueError(
            f"mnist: {path} holds {len(data) - header} values; its header says "
            f"{' x '.join(map(str, sizes))} = {math.prod(sizes)}."
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(sizes)
