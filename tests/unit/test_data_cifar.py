from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mixbits.data import load_cifar10

RECORD_BYTES = 3073
FILES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


@pytest.fixture
def cifar_dir(tmp_path: Path) -> Path:
    """Six files of the right size, black airplanes throughout (sparse on disk)."""
    for name in FILES:
        with (tmp_path / name).open("wb") as file:
            file.truncate(10_000 * RECORD_BYTES)
    return tmp_path


def write_record(path: Path, index: int, label: int, pixels: np.ndarray) -> None:
    with path.open("r+b") as file:
        file.seek(index * RECORD_BYTES)
        file.write(bytes([label]) + pixels.astype(np.uint8).tobytes())


def test_cifar_reads_50000_and_10000_images(cifar_dir):
    dataset = load_cifar10(cifar_dir)

    assert (len(dataset.train), len(dataset.test)) == (50_000, 10_000)
    assert dataset.input_shape == (3, 32, 32)
    assert dataset.classes[:2] == ("airplane", "automobile")


def test_record_is_a_label_and_three_planes_of_rows(cifar_dir):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32))
    write_record(cifar_dir / "data_batch_3.bin", 17, 9, pixels)
    dataset = load_cifar10(cifar_dir, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    x, y = dataset.train.take(np.array([20_017, 20_016]))

    np.testing.assert_array_equal(np.rint(x[0] * 255), pixels)
    assert not x[1].any()
    assert y.tolist() == [9, 0]


def test_default_normalization_is_that_of_imagenet(cifar_dir):
    x, _ = load_cifar10(cifar_dir).test.take(np.array([0]))

    np.testing.assert_allclose(x[0, :, 0, 0], [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225], rtol=1e-6)


def test_missing_directory_says_what_to_download(tmp_path):
    with pytest.raises(
        ValueError, match=r"cifar10: no directory .*nowhere\. Unpack https://.*binary\.tar\.gz"
    ):
        load_cifar10(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["data_batch_4.bin", "test_batch.bin"])
def test_missing_file_is_named(cifar_dir, name):
    (cifar_dir / name).unlink()

    with pytest.raises(ValueError, match=rf"cifar10: no file {name} in .* Unpack https://"):
        load_cifar10(cifar_dir)


@pytest.mark.parametrize("size", [0, 10_000 * RECORD_BYTES - 1, 10_000 * RECORD_BYTES + 1])
def test_file_of_a_wrong_size_is_named_with_both_sizes(cifar_dir, size):
    with (cifar_dir / "data_batch_2.bin").open("r+b") as file:
        file.truncate(size)

    message = rf"data_batch_2\.bin has {size} bytes; expected 30730000, 10000 records of 3073 bytes\. Unpack"
    with pytest.raises(ValueError, match=message):
        load_cifar10(cifar_dir)


def test_label_above_9_is_named_with_its_record(cifar_dir):
    write_record(cifar_dir / "test_batch.bin", 123, 10, np.zeros(3072))

    message = r"test_batch\.bin \(30730000 bytes\) has label 10 in record 123; expected labels 0\.\.9"
    with pytest.raises(ValueError, match=message):
        load_cifar10(cifar_dir)
