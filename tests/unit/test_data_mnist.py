from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from mixbits.data import load_mnist, open_dataset


def idx(values: np.ndarray) -> bytes:
    return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


@pytest.fixture
def files() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        "train-images-idx3-ubyte": draw.integers(0, 256, (20, 6, 5), np.uint8),
        "train-labels-idx1-ubyte": draw.integers(0, 4, 20).astype(np.uint8),
        "t10k-images-idx3-ubyte": draw.integers(0, 256, (8, 6, 5), np.uint8),
        "t10k-labels-idx1-ubyte": np.arange(8, dtype=np.uint8) % 4,
    }


@pytest.fixture(params=["plain", "gzip"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, files: dict[str, np.ndarray]) -> Path:
    for name, values in files.items():
        if request.param == "gzip":
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx(values)))
        else:
            (tmp_path / name).write_bytes(idx(values))
    return tmp_path


def test_images_and_labels_are_those_of_the_files(folder, files):
    dataset = open_dataset(f"mnist:{folder}")
    x, y = dataset.test.take(np.array([3, 0]))

    assert (len(dataset.train), len(dataset.test), dataset.input_shape) == (20, 8, (1, 6, 5))
    assert dataset.classes == ("0", "1", "2", "3")
    assert y.tolist() == [3, 0]
    pixels = np.rint((x * dataset.std[0] + dataset.mean[0]) * 255)
    np.testing.assert_array_equal(pixels[:, 0], files["t10k-images-idx3-ubyte"][[3, 0]])


def test_training_pixels_have_mean_zero_and_deviation_one(folder):
    x, _ = load_mnist(folder).train.take(np.arange(20))

    assert abs(float(x.mean())) < 1e-6
    assert float(x.std()) == pytest.approx(1.0, abs=1e-6)


def test_a_missing_folder_or_file_is_named(folder):
    with pytest.raises(ValueError, match=r"mnist: no directory .*nowhere\. Expected are train-images"):
        load_mnist(folder / "nowhere")
    for path in folder.glob("t10k-labels*"):
        path.unlink()
    with pytest.raises(
        ValueError, match=r"mnist: no file t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte\.gz"
    ):
        load_mnist(folder)


def damaged(tmp_path: Path, files: dict[str, np.ndarray], name: str, data: bytes) -> Path:
    for other, values in files.items():
        (tmp_path / other).write_bytes(idx(values))
    (tmp_path / name.removesuffix(".gz")).unlink()
    (tmp_path / name).write_bytes(data)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "train-images-idx3-ubyte",
            b"",
            r"train-images-idx3-ubyte does not begin as an IDX file of bytes in 3",
        ),
        ("train-labels-idx1-ubyte", idx(np.zeros((2, 2), np.uint8)), r"bytes in 1 dimensions"),
        ("train-labels-idx1-ubyte", idx(np.zeros(20, np.uint8))[:-1], r"holds 19 values; its header says 20"),
        ("train-labels-idx1-ubyte", idx(np.zeros(19, np.uint8)), r"has 20 train images and 19 labels"),
        (
            "t10k-images-idx3-ubyte",
            idx(np.zeros((8, 6, 6), np.uint8)),
            r"are \[6, 5\] and test images \[6, 6\]",
        ),
        (
            "t10k-images-idx3-ubyte.gz",
            gzip.compress(b"a" * 99, mtime=0)[:-9],
            r"t10k-images.*\.gz is not a whole gzip",
        ),
        ("t10k-images-idx3-ubyte.gz", b"neither", r"t10k-images.*\.gz is not a whole gzip"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path, files, name, data, message):
    with pytest.raises(ValueError, match=message):
        load_mnist(damaged(tmp_path, files, name, data))
