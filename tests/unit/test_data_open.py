from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from mixbits.data import open_dataset
from mixbits.data.dataset import with_normalization

ARRAYS = """
import numpy as np

def make(n=4, dtype=np.uint8, shape=(3, 5, 5), classes=3):
    return np.full((n, *shape), 51, dtype), np.arange(n) % classes
"""


@pytest.fixture
def write(tmp_path: Path):
    """Writes a file whose function ``load`` has the given body, and gives its spec."""

    def write(body: str) -> str:
        path = tmp_path / "mine.py"
        path.write_text(f"{ARRAYS}\ndef load():\n    {body}\n")
        return f"{path}:load"

    return write


def test_digits_opens_by_name():
    assert open_dataset("digits").name == "digits"


def test_cifar10_takes_its_directory(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"cifar10: no directory {tmp_path / 'none'}")):
        open_dataset(f"cifar10:{tmp_path / 'none'}")


@pytest.mark.parametrize(
    ("query", "shape"),
    [("", (3, 224, 224)), ("?size=32", (3, 32, 32)), ("?size=32x48&crop=1", (3, 32, 48))],
    ids=["default", "size", "HxW and crop"],
)
def test_imagefolder_takes_its_directory_and_options(tmp_path, query, shape):
    image = pytest.importorskip("PIL.Image")
    for part in ("train", "test"):
        (tmp_path / part / "cat").mkdir(parents=True)
        image.new("L", (64, 64)).save(tmp_path / part / "cat" / "1.png")

    dataset = open_dataset(f"imagefolder:{tmp_path}{query}")

    assert dataset.input_shape == dataset.test.take(np.array([0]))[0].shape[1:] == shape


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("size=big", r"cannot read size='big'\. Write size=224"),
        ("size=", r"cannot read size=''\. Write size=224"),
        ("width=4", r"unknown option 'width' \(have: size, crop\)"),
    ],
    ids=["not a number", "empty", "unknown"],
)
def test_imagefolder_options_are_checked(query, message):
    with pytest.raises(ValueError, match=message):
        open_dataset(f"imagefolder:photos?{query}")


@pytest.mark.parametrize(
    "spec",
    ["", "mnist", "cifar10:", "digits:8", "imagefolder", "mine:", "svhn:DIR", "cifar100:a/b", "x.py:load"],
)
def test_unknown_spec_lists_what_is_accepted(spec):
    with pytest.raises(ValueError, match=r"(?s)^.*(no|neither) .*Accepted ") as caught:
        open_dataset(spec)

    for accepted in (
        "digits",
        "cifar10:DIR",
        "imagefolder:DIR",
        "module:function",
        "path/to/file.py:function",
    ):
        assert accepted in str(caught.value)


def test_uint8_arrays_are_divided_by_255(write):
    dataset = open_dataset(write("return *make(4), *make(2)"))

    x, y = dataset.train.take(np.array([2]))
    assert np.unique(x).tolist() == [np.float32(0.2)]
    assert y.tolist() == [2]
    assert (len(dataset.train), len(dataset.test)) == (4, 2)
    assert dataset.classes == ("0", "1", "2")
    assert (dataset.mean, dataset.std) == ((0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize("dtype", ["np.float16", "np.float32", "np.float64"])
def test_float_arrays_are_taken_as_they_are(write, dtype):
    dataset = open_dataset(write(f"return *make(4, {dtype}), *make(2, {dtype})"))

    x, _ = dataset.test.take(np.array([0]))

    assert x.dtype == np.float32
    assert np.unique(x).tolist() == [51]


@pytest.mark.parametrize("shape", [(13,), (2, 50), (2, 3, 4, 5)], ids=["rows", "signals", "volumes"])
def test_samples_may_have_any_shape(write, shape):
    dataset = open_dataset(write(f"return *make(4, float, {shape}), *make(2, float, {shape})"))
    channels = shape[0]

    x, _ = with_normalization(dataset, (1.0,) * channels, (10.0,) * channels).test.take(np.array([0, 1]))

    assert x.shape == (2, *shape)
    assert np.unique(x).tolist() == [5]


def test_lists_are_arrays_too(write):
    dataset = open_dataset(write("return [[[[0.5]]]], [0], [[[[1.5]]]], [1]"))

    assert dataset.input_shape == (1, 1, 1)
    assert dataset.classes == ("0", "1")


def test_function_may_return_a_dataset(write):
    dataset = open_dataset(write("from mixbits.data import load_digits; return load_digits()"))

    assert dataset.name == "digits"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "return 3",
            r"returned a int; expected a Dataset or the arrays \(x_train, y_train, x_test, y_test\)",
        ),
        ("return make()", "returned a tuple of 2"),
        (
            "return *make(shape=(5, 5)), *make()",
            r"x_train has shape \[4, 5, 5\]; expected \[N, C, H, W\] of uint8",
        ),
        ("return *make(shape=(5, 5, 3)), *make()", r"looks like \[N, H, W, C\].*x\.transpose\(0, 3, 1, 2\)"),
        ("return *make(dtype=int), *make()", r"x_train is int64; expected uint8 .* or float"),
        (
            "return make()[0], np.zeros(4), *make()",
            r"y_train is float64 \[4\]; expected integer classes \[N\]",
        ),
        ("return make()[0], make(5)[1], *make()", "x_train has 4 samples and y_train 5"),
        ("return *make(0), *make()", "y_train is empty"),
        ("return *make(), *make(shape=(3, 6, 5))", r"x_test uint8 \[4, 3, 6, 5\]; expected one type"),
        ("return make()[0], make()[1] - 1, *make()", "targets run from -1 to 1"),
    ],
    ids=[
        "number",
        "pair",
        "no channels",
        "channels last",
        "int64",
        "float classes",
        "lengths",
        "empty",
        "shapes",
        "negative class",
    ],
)
def test_what_is_no_dataset_is_explained(write, body, message):
    spec = write(body)

    with pytest.raises(ValueError, match=message) as caught:
        open_dataset(spec)
    assert str(caught.value).startswith(spec)


def test_name_that_is_no_function_is_refused(tmp_path):
    (tmp_path / "mine.py").write_text("size = 3\n")

    with pytest.raises(ValueError, match=r"mine\.py:size is a int; expected a function without arguments"):
        open_dataset(f"{tmp_path}/mine.py:size")
