from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from mixbits.data import ArraySamples, Dataset, Samples, split_held_out, subset, with_normalization

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
# Inputs are of order 1 and pass through at most four float32 roundings.
FLOAT32_ROUNDING = 1e-6


def images(n: int, *, size: int = 8, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 256, (n, channels, size, size), dtype=np.uint8)


def samples(n: int = 12, *, classes: int = 3, **options) -> ArraySamples:
    return ArraySamples(images(n), np.arange(n) % classes, mean=MEAN, std=STD, **options)


def numbered(n: int, targets: np.ndarray) -> ArraySamples:
    """``n`` samples whose only pixel is their index."""
    inputs = np.arange(n, dtype=np.float32).reshape(n, 1, 1, 1)
    return ArraySamples(inputs, targets, mean=(0.0,), std=(1.0,))


def numbers(part: Samples) -> list[int]:
    x, _ = part.take(np.arange(len(part)))
    return x.ravel().astype(int).tolist()


def dataset_of(part: ArraySamples) -> Dataset:
    return Dataset("made", part, part, ("a", "b", "c"), (3, 8, 8), MEAN, STD)


def normalized(pixels: np.ndarray) -> np.ndarray:
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (MEAN, STD))
    return (pixels.astype(np.float32) / np.float32(255) - mean) / std


def test_uint8_inputs_are_scaled_and_normalised_a_channel():
    x, y = samples().take(np.array([5, 0]))

    assert x.dtype == np.float32
    assert x.flags.c_contiguous
    np.testing.assert_array_equal(x, normalized(images(12)[[5, 0]]))
    np.testing.assert_array_equal(y, [2, 0])


def test_float_inputs_are_normalised_but_not_scaled():
    inputs = np.full((1, 1, 2, 2), 3.0, np.float32)

    x, _ = ArraySamples(inputs, np.array([0]), mean=(1.0,), std=(0.5,)).take(np.array([0]))

    assert x.tolist() == [[[[4.0, 4.0], [4.0, 4.0]]]]


def test_scale_is_the_pixel_value_of_one():
    inputs = np.full((1, 1, 1, 1), 16, np.uint8)

    x, _ = ArraySamples(inputs, np.array([0]), mean=(0.0,), std=(1.0,), scale=16.0).take(np.array([0]))

    assert x.item() == 1.0


def test_array_is_kept_and_not_changed_by_taking():
    inputs = np.ones((2, 1, 2, 2), np.float32)
    kept = ArraySamples(inputs, np.array([0, 1]), mean=(0.5,), std=(0.5,))

    kept.take(np.array([0, 1]))

    assert kept.inputs is inputs
    assert inputs.min() == inputs.max() == 1.0


@pytest.mark.parametrize("augment", ["crop", "crop_flip"])
@pytest.mark.parametrize("pad", [1, 4])
def test_augmented_image_is_a_window_of_the_image_on_black(augment, pad):
    n = 400
    image = images(1)
    many = ArraySamples(image.repeat(n, 0), np.zeros(n), mean=MEAN, std=STD, augment=augment, pad=pad)
    x, _ = many.take(np.arange(n), np.random.default_rng(1))
    black = np.pad(image[0], ((0, 0), (pad, pad), (pad, pad)))
    offsets = [(top, left) for top in range(2 * pad + 1) for left in range(2 * pad + 1)]
    windows = [normalized(black[:, top : top + 8, left : left + 8]) for top, left in offsets]
    if augment == "crop_flip":
        windows += [window[..., ::-1] for window in windows]

    drawn = [{i for i, window in enumerate(windows) if np.array_equal(window, image_x)} for image_x in x]

    assert all(drawn)
    assert len(set.union(*drawn)) > 0.8 * len(windows)


def test_flip_mirrors_about_every_second_image():
    n = 1000
    ramp = np.broadcast_to(np.arange(8, dtype=np.uint8), (n, 1, 8, 8)).copy()
    part = ArraySamples(ramp, np.zeros(n), mean=(0.0,), std=(1.0,), augment="crop_flip", pad=0)

    x, _ = part.take(np.arange(n), np.random.default_rng(0))

    mirrored = x[:, 0, 0, 0] > x[:, 0, 0, -1]
    assert 400 < mirrored.sum() < 600


def test_same_generator_seed_draws_the_same_batch():
    part = samples(augment="crop_flip")

    first, again, other = (part.take(np.arange(12), np.random.default_rng(seed))[0] for seed in (3, 3, 4))

    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("augment", ["none", "crop", "crop_flip"])
def test_without_generator_nothing_is_augmented(augment):
    x, _ = samples(augment=augment).take(np.arange(12))

    np.testing.assert_array_equal(x, normalized(images(12)))


def test_empty_batch_has_the_shape_of_a_batch():
    x, y = samples(augment="crop_flip").take(np.array([], np.int64), np.random.default_rng(0))

    assert x.shape == (0, 3, 8, 8)
    assert y.shape == (0,)


@pytest.mark.parametrize(
    ("inputs", "targets", "options", "message"),
    [
        (images(2)[0, 0, 0], [0], {}, r"inputs are uint8 \[8\]; expected uint8 or float32 \[N, C, \.\.\.\]"),
        (
            images(2)[0],
            [0],
            {"augment": "crop"},
            r"uint8 \[3, 8, 8\]; expected uint8 or float32 \[N, C, H, W\]",
        ),
        (images(2).astype(float), [0, 1], {}, "inputs are float64"),
        (images(2), [0], {}, "2 inputs but 1 targets"),
        (
            images(2),
            [0, 1],
            {"augment": "flip"},
            r"augment='flip' is unknown \(have: none, crop, crop_flip\)",
        ),
        (images(2), [0, 1], {"mean": (0.5,)}, "mean has 1 values and std has 3; expected 3, one a channel"),
        (images(2), [0, 1], {"std": (0.5, 0.0, 0.5)}, "expected values above 0"),
    ],
    ids=["1-d", "crop of 3-d", "float64", "targets", "augment", "mean", "std"],
)
def test_array_samples_refuse(inputs, targets, options, message):
    with pytest.raises(ValueError, match=message):
        ArraySamples(inputs, np.array(targets), **{"mean": MEAN, "std": STD} | options)


def test_subset_reads_the_chosen_samples_in_order():
    part = samples()

    x, y = subset(part, np.array([7, 2, 4])).take(np.array([2, 0]))

    expected_x, expected_y = part.take(np.array([4, 7]))
    np.testing.assert_array_equal(x, expected_x)
    np.testing.assert_array_equal(y, expected_y)


@pytest.mark.parametrize("indices", [[-1], [12]], ids=["negative", "beyond"])
def test_subset_refuses_indices_out_of_range(indices):
    with pytest.raises(ValueError, match=r"expected 0 \.\. 11, as there are 12 samples"):
        subset(samples(), np.array(indices))


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_held_out_samples_and_the_rest_are_all_samples_once(fraction):
    rest, held_out = split_held_out(numbered(120, np.arange(120) % 3), fraction, seed=0)

    assert len(held_out) == round(fraction * 120)
    assert sorted(numbers(rest) + numbers(held_out)) == list(range(120))


def test_held_out_samples_keep_the_proportions_of_the_classes():
    sizes = {0: 60, 1: 30, 2: 11}
    targets = np.concatenate([np.full(size, label) for label, size in sizes.items()])

    _, held_out = split_held_out(numbered(101, targets), 0.1, seed=0)

    # 10 of 101: 5.94, 2.97 and 1.09 samples; the two with the larger parts are rounded up.
    assert np.bincount(held_out.targets).tolist() == [6, 3, 1]


def test_split_depends_on_the_seed_only():
    part = numbered(120, np.arange(120) % 3)

    first, again, other = (numbers(split_held_out(part, 0.2, seed=seed)[1]) for seed in (5, 5, 6))

    assert first == again
    assert first != other


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 0.01], ids=["none", "all", "negative", "too small"])
def test_split_refuses_to_leave_a_side_empty(fraction):
    with pytest.raises(ValueError, match=r"of 12 samples; expected a fraction between 0 and 1"):
        split_held_out(samples(), fraction, seed=0)


def test_renormalised_inputs_equal_inputs_normalised_afresh():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    afresh = ArraySamples(images(12), np.arange(12) % 3, mean=mean, std=std, augment="crop_flip")

    changed = with_normalization(dataset_of(samples(augment="crop_flip")), mean, std)

    assert (changed.mean, changed.std) == (mean, std)
    x, y = changed.train.take(np.arange(12), np.random.default_rng(0))
    expected_x, expected_y = afresh.take(np.arange(12), np.random.default_rng(0))
    np.testing.assert_allclose(x, expected_x, rtol=0, atol=10 * FLOAT32_ROUNDING)
    np.testing.assert_array_equal(y, expected_y)
    assert x.dtype == np.float32


def test_same_normalization_is_the_same_dataset():
    dataset = dataset_of(samples())

    assert with_normalization(dataset, MEAN, STD) is dataset


def test_normalization_needs_one_value_a_channel():
    with pytest.raises(ValueError, match="made: mean has 1 values and std has 1; expected 3, one a channel"):
        with_normalization(dataset_of(samples()), (0.5,), (0.5,))


def test_dataset_refuses_targets_without_a_class():
    part = samples(classes=4)

    with pytest.raises(ValueError, match=r"made, train: targets run from 0 to 3; expected 0 \.\. 2"):
        dataset_of(part)


def test_data_never_imports_torch():
    code = "import sys, mixbits.data as d; d.open_dataset('digits'); print('torch' in sys.modules)"

    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert out.stdout.strip() == "False"
