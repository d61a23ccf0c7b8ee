from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from mixbits.data import load_imagefolder
from mixbits.data.imagefolder import random_box

Image = pytest.importorskip("PIL.Image")

ZEROS, ONES = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
COLORS = {"blue": (0, 0, 255), "red": (255, 0, 0)}


def save(path: Path, color, *, size=(40, 30), mode="RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, two training images and one test image each, of one color."""
    for name, color in COLORS.items():
        save(tmp_path / "train" / name / "1.png", color)
        save(tmp_path / "train" / name / "2.bmp", color, size=(33, 70))
        save(tmp_path / "test" / name / "1.PNG", color)
    return tmp_path


def test_classes_are_the_training_folders_by_name(folder):
    dataset = load_imagefolder(folder, size=16)

    assert dataset.classes == ("blue", "red")
    assert dataset.train.targets.tolist() == [0, 0, 1, 1]
    assert dataset.test.targets.tolist() == [0, 1]
    assert dataset.train.targets.dtype == np.int64
    assert dataset.input_shape == (3, 16, 16)
    assert dataset.name == folder.name


@pytest.mark.parametrize("size", [16, (16, 24), 50], ids=["square", "HxW", "larger than the image"])
@pytest.mark.parametrize("seed", [None, 0], ids=["test", "train"])
def test_image_of_one_color_stays_of_that_color(folder, size, seed):
    dataset = load_imagefolder(folder, size=size, mean=ZEROS, std=ONES)
    generator = None if seed is None else np.random.default_rng(seed)

    x, y = dataset.train.take(np.array([3, 0]), generator)

    assert x.dtype == np.float32
    assert x.shape == (2, *dataset.input_shape)
    assert y.tolist() == [1, 0]
    np.testing.assert_array_equal(x[0] - np.reshape([1, 0, 0], (3, 1, 1)), 0)
    np.testing.assert_array_equal(x[1] - np.reshape([0, 0, 1], (3, 1, 1)), 0)


def test_default_normalization_is_that_of_imagenet(folder):
    x, _ = load_imagefolder(folder, size=8).test.take(np.array([1]))

    np.testing.assert_allclose(
        x[0, :, 0, 0], [(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225], rtol=1e-6
    )


def test_centre_crop_without_resizing_is_the_centre(folder):
    pixels = np.random.default_rng(0).integers(0, 256, (10, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "test" / "red" / "1.PNG")

    x, _ = load_imagefolder(folder, size=10, crop=1.0, mean=ZEROS, std=ONES).test.take(np.array([1]))

    np.testing.assert_array_equal(np.rint(x[0] * 255), pixels[:, 3:13].transpose(2, 0, 1))


def test_shorter_side_becomes_size_by_crop(folder):
    ramp = np.broadcast_to(np.arange(0, 256, 2, dtype=np.uint8)[None, :, None], (64, 128, 3))
    Image.fromarray(np.ascontiguousarray(ramp)).save(folder / "test" / "red" / "1.PNG")

    x, _ = load_imagefolder(folder, size=28, mean=ZEROS, std=ONES).test.take(np.array([1]))

    # 64 x 128 becomes 32 x 64; its centre is columns 18 .. 45, and column i averages columns 2i and 2i + 1.
    row = np.rint(x[0, 0, 0] * 255)
    np.testing.assert_allclose(row, 2 * (2 * np.arange(18, 46) + 0.5), atol=1)


def test_val_stands_in_for_test(folder):
    (folder / "test").rename(folder / "val")

    assert len(load_imagefolder(folder).test) == 2


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [("L", 51, (51, 51, 51)), ("RGBA", (1, 2, 3, 255), (1, 2, 3)), ("1", 1, (255, 255, 255))],
    ids=["grey", "transparent", "black and white"],
)
def test_image_of_any_mode_becomes_rgb(folder, mode, color, expected):
    save(folder / "test" / "red" / "1.PNG", color, mode=mode)

    x, _ = load_imagefolder(folder, size=8, mean=ZEROS, std=ONES).test.take(np.array([1]))

    assert np.rint(x[0, :, 0, 0] * 255).tolist() == list(expected)


def test_same_generator_seed_draws_the_same_batch(folder):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "train" / "red" / "1.png")
    part = load_imagefolder(folder, size=16).train
    indices = np.full(8, 2)

    first, again, other = (part.take(indices, np.random.default_rng(seed))[0] for seed in (1, 1, 2))

    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first[0], first[1])


@pytest.mark.parametrize(("width", "height"), [(40, 30), (1, 1), (1000, 3), (3, 1000)])
def test_training_crop_lies_inside_the_image(width, height):
    generator = np.random.default_rng(0)

    boxes = np.array([random_box(width, height, generator.random((10, 4))) for _ in range(200)])

    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] < boxes[:, 2:]).all()
    assert (boxes[:, 2:] <= [width, height]).all()


def test_broken_image_is_named_when_it_is_taken(folder):
    good = (folder / "train" / "red" / "1.png").read_bytes()
    (folder / "train" / "red" / "1.png").write_bytes(good[: len(good) // 2])
    part = load_imagefolder(folder, size=8).train

    part.take(np.array([0, 1, 3]))
    with pytest.raises(ValueError, match=r"cannot decode .*red.1\.png: .*Replace or remove the file"):
        part.take(np.array([0, 2]))


def test_file_that_is_no_image_is_named_when_it_is_taken(folder):
    (folder / "test" / "blue" / "1.PNG").write_text("not an image")

    with pytest.raises(ValueError, match=r"cannot decode .*blue.1\.PNG"):
        load_imagefolder(folder, size=8).test.take(np.array([0]))


def test_folder_without_train_says_what_it_has(tmp_path):
    save(tmp_path / "cats" / "1.png", 0)

    with pytest.raises(ValueError, match=r"needs the folders train and test \(or val\).*\(have: cats\)"):
        load_imagefolder(tmp_path)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere needs the folders train and test .*\(have: no folder\)"):
        load_imagefolder(tmp_path / "nowhere")


def test_class_without_images_is_named(folder):
    (folder / "train" / "green").mkdir()

    with pytest.raises(ValueError, match=r"no image in .*train/green \(looked for \.png, \.jpg"):
        load_imagefolder(folder)


def test_class_of_test_only_is_named(folder):
    save(folder / "test" / "green" / "1.png", (0, 255, 0))

    with pytest.raises(ValueError, match=r"test has classes that .*train has not: green"):
        load_imagefolder(folder)


@pytest.mark.parametrize("options", [{"size": 0}, {"crop": 0.0}, {"crop": 1.5}], ids=str)
def test_impossible_sizes_are_refused(folder, options):
    with pytest.raises(ValueError, match="expected size >= 1 and 0 < crop <= 1"):
        load_imagefolder(folder, **options)


def test_missing_pillow_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)

    with pytest.raises(ImportError, match=r"pip install 'mixbits\[images\]'"):
        load_imagefolder(folder)
