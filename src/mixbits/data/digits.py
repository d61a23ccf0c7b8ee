"""Handwritten digits, 8 x 8 grey: the data set that needs no download."""

from __future__ import annotations

import numpy as np

from mixbits.data.dataset import ArraySamples, Dataset, stratified_indices

INPUT_SHAPE = (1, 8, 8)
TEST_SAMPLES = 360  # of 1797
SPLIT_SEED = 0
LEVELS = 16.0  # a pixel counts the dark ones among 4 x 4 scanned points: 0 .. 16
MEAN = (0.3055,)  # of the training pixels / 16
STD = (0.3761,)  # of the training pixels / 16


def load_digits() -> Dataset:
    """The 1797 digits that come with scikit-learn (UCI Optical Recognition, test part): 1437 train, 360 test.

    The split is stratified by class and always the same; it mixes the writers. Training shifts each image by
    up to one pixel; a mirrored digit is not a digit, so there is no flip.
    """
    from sklearn import datasets  # noqa: PLC0415 - two seconds that users of other data sets need not wait

    rows, targets = datasets.load_digits(return_X_y=True)
    pixels = rows.astype(np.uint8).reshape(-1, *INPUT_SHAPE)
    train, test = stratified_indices(targets, TEST_SAMPLES, seed=SPLIT_SEED)

    def part(indices: np.ndarray) -> ArraySamples:
        return ArraySamples(
            pixels[indices],
            targets[indices],
            mean=MEAN,
            std=STD,
            scale=LEVELS,
            augment="crop",
            pad=1,
        )

    return Dataset(
        name="digits",
        train=part(train),
        test=part(test),
        classes=tuple("0123456789"),
        input_shape=INPUT_SHAPE,
        mean=MEAN,
        std=STD,
    )
