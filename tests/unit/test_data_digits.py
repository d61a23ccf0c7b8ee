from __future__ import annotations

import numpy as np
import pytest
from sklearn import datasets

from mixbits.data import Samples, load_digits
from mixbits.data.digits import MEAN, STD


def pixels(part: Samples) -> np.ndarray:
    """Levels 0 .. 16 of every image, [N, 64]."""
    x, _ = part.take(np.arange(len(part)))
    return np.rint((x * STD + MEAN) * 16).reshape(len(part), -1)


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def test_digits_are_1437_for_training_and_360_for_test(digits):
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert digits.input_shape == digits.train.take(np.array([0]))[0].shape[1:] == (1, 8, 8)
    assert digits.classes == tuple("0123456789")


def test_every_digit_has_its_share_of_the_test_samples(digits):
    share = np.bincount(digits.test.targets) / np.bincount(digits.train.targets)

    np.testing.assert_allclose(share, 360 / 1437, atol=1 / 130)  # a sample more or less of about 140


def test_training_inputs_have_mean_zero_and_deviation_one(digits):
    x, _ = digits.train.take(np.arange(len(digits.train)))

    np.testing.assert_allclose([x.mean(), x.std()], [0, 1], atol=1e-3)  # the constants have four digits


def test_digits_are_the_same_every_time(digits):
    again = load_digits()

    np.testing.assert_array_equal(pixels(again.train), pixels(digits.train))
    np.testing.assert_array_equal(again.test.targets, digits.test.targets)


def test_every_image_is_either_for_training_or_for_test(digits):
    both = np.concatenate([pixels(digits.train), pixels(digits.test)])

    original, _ = datasets.load_digits(return_X_y=True)
    np.testing.assert_array_equal(np.unique(both, axis=0), np.unique(original, axis=0))
    assert len(both) == len(original)


def test_training_moves_a_digit_by_at_most_one_pixel(digits):
    index = np.array([0])
    still, _ = digits.train.take(index)
    moved, _ = digits.train.take(index.repeat(200), np.random.default_rng(0))

    inner = still[0, 0, 1:-1, 1:-1]
    shifts = [(top, left) for top in range(3) for left in range(3)]
    found = {
        shift
        for image in moved[:, 0]
        for shift in shifts
        if np.array_equal(image[shift[0] : shift[0] + 6, shift[1] : shift[1] + 6], inner)
    }
    assert found == set(shifts)
