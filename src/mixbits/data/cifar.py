"""CIFAR-10 from the official binary files.

A file holds 10,000 records of 3073 bytes, row by row within a plane::

    | label : 1 | red : 32 x 32 | green : 32 x 32 | blue : 32 x 32 |
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mixbits.data.dataset import ArraySamples, Dataset

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
INPUT_SHAPE = (3, 32, 32)
RECORD_BYTES = 1 + 3 * 32 * 32
FILE_RECORDS = 10_000
TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST_FILES = ("test_batch.bin",)
# ImageNet's, which the usual pretrained CIFAR-10 networks were trained with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
REMEDY = (
    "Unpack https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz and pass its folder cifar-10-batches-bin."
)


def load_cifar10(
    directory: str | Path, *, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD
) -> Dataset:
    """CIFAR-10: 50,000 training and 10,000 test RGB images of 32 x 32, 184 MB held in memory.

    Training pads each image by 4 black pixels, crops it back at a random place and mirrors every second one.

    Raises:
        ValueError: The directory or one of its six files is missing, or a file is not 10,000 records of
            classes 0..9.
    """
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise ValueError(f"cifar10: no directory {directory}. {REMEDY}")

    def part(names: tuple[str, ...]) -> ArraySamples:
        records = np.empty((len(names), FILE_RECORDS, RECORD_BYTES), np.uint8)
        for slot, name in zip(records, names, strict=True):
            slot[:] = _read_records(directory / name)
        records = records.reshape(-1, RECORD_BYTES)
        pixels = records[:, 1:].reshape(-1, *INPUT_SHAPE)
        return ArraySamples(pixels, records[:, 0], mean=mean, std=std, augment="crop_flip", pad=4)

    return Dataset(
        name="cifar10",
        train=part(TRAIN_FILES),
        test=part(TEST_FILES),
        classes=CLASSES,
        input_shape=INPUT_SHAPE,
        mean=mean,
        std=std,
    )


def _read_records(path: Path) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"cifar10: no file {path.name} in {path.parent}. {REMEDY}")
    size, expected = path.stat().st_size, FILE_RECORDS * RECORD_BYTES
    if size != expected:
        raise ValueError(
            f"cifar10: {path} has {size} bytes; expected {expected}, "
            f"{FILE_RECORDS} records of {RECORD_BYTES} bytes. {REMEDY}"
        )
    records = np.fromfile(path, np.uint8).reshape(FILE_RECORDS, RECORD_BYTES)
    wrong = np.flatnonzero(records[:, 0] >= len(CLASSES))
    if len(wrong):
        raise ValueError(
            f"cifar10: {path} ({size} bytes) has label {records[wrong[0], 0]} in record {wrong[0]}; "
            f"expected labels 0..9. {REMEDY}"
        )
    return records
