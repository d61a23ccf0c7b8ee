"""A folder of image files, a folder a class, decoded a batch at a time."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from mixbits.data.dataset import Dataset, normalize_, random_flip

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MEAN = (0.485, 0.456, 0.406)  # ImageNet
STD = (0.229, 0.224, 0.225)  # ImageNet
AREA = (0.08, 1.0)  # share of the image that a training crop covers
RATIO = (3 / 4, 4 / 3)  # width by height of a training crop
TRIES = 10  # at a training crop that fits the image


@dataclass(frozen=True, eq=False)
class ImageSamples:
    """Samples that stay image files until they are taken; grey, palette and transparent images become RGB."""

    paths: tuple[Path, ...]
    targets: np.ndarray  # int64 [len]
    size: tuple[int, int]  # H, W of the inputs
    crop: float  # share of the resized image's sides that the centre crop keeps
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.paths)

    def take(
        self, indices: np.ndarray, generator: np.random.Generator | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Normalised inputs, float32 [n, 3, H, W], and classes, int64 [n], of the samples at ``indices``.

        With a generator: a random part of the image resized to H x W, mirrored every second time. Without
        one: the image resized, then its centre.
        """
        indices = np.asarray(indices)
        pixels = np.empty((len(indices), *self.size, 3), np.uint8)
        draws = None if generator is None else generator.random((len(indices), TRIES, 4))

        def read(i: int) -> None:
            image = _decode(self.paths[indices[i]])
            if draws is None:
                pixels[i] = np.asarray(_centre_crop(image, self.size, self.crop))
            else:
                pixels[i] = np.asarray(_random_resized_crop(image, self.size, draws[i]))

        with ThreadPoolExecutor() as pool:  # pillow decodes and resizes without the interpreter lock
            list(pool.map(read, range(len(indices))))
        pixels = pixels.transpose(0, 3, 1, 2)
        if generator is not None:
            pixels = random_flip(pixels, generator)
        x = np.ascontiguousarray(pixels, np.float32)
        x /= np.float32(255)
        normalize_(x, self.mean, self.std)
        return x, self.targets[indices]


def load_imagefolder(
    directory: str | Path,
    *,
    size: int | tuple[int, int] = 224,
    crop: float = 0.875,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> Dataset:
    """The images under ``directory/train/CLASS`` and ``directory/test/CLASS`` (or ``val/CLASS``).

    Class i is the i-th folder of ``train`` by name. Training takes torchvision's random resized crop and
    flip; a test image is resized until its shorter side is ``size / crop`` (256 for 224) and cut to ``size``
    at its centre.

    Args:
        directory: Folder with ``train`` and ``test`` (or ``val``), in each a folder a class of png, jpg,
            jpeg, webp or bmp files.
        size: Height and width of the inputs, in pixels.
        crop: Share of the resized image's sides that the centre crop keeps at test.
        mean: Channel means of images scaled to [0, 1].
        std: Channel standard deviations of images scaled to [0, 1].

    Raises:
        ImportError: Pillow is not installed.
        ValueError: A folder is missing or has no image. An image that cannot be decoded raises when it is
            taken.
    """
    _pillow()
    directory = Path(directory).expanduser()
    size = (size, size) if isinstance(size, int) else size
    if min(size) < 1 or not 0 < crop <= 1:
        raise ValueError(f"imagefolder: size={size}, crop={crop}; expected size >= 1 and 0 < crop <= 1.")
    train, test = directory / "train", directory / "test"
    if not test.is_dir():
        test = directory / "val"
    if not (train.is_dir() and test.is_dir()):
        raise ValueError(
            f"imagefolder: {directory} needs the folders train and test (or val), each with a folder a class "
            f"(have: {', '.join(_folders(directory)) or 'no folder'})."
        )
    classes = tuple(_folders(train))
    unknown = sorted(set(_folders(test)) - set(classes))
    if unknown:
        raise ValueError(f"imagefolder: {test} has classes that {train} has not: {', '.join(unknown)}.")
    empty = [name for name in classes if not _images(train / name)]
    if empty or not classes:
        raise ValueError(
            f"imagefolder: no image in {train}/{', '.join(empty) or 'CLASS'} "
            f"(looked for {', '.join(SUFFIXES)})."
        )

    def part(folder: Path) -> ImageSamples:
        paths = [_images(folder / name) for name in classes]
        targets = np.repeat(np.arange(len(classes)), [len(of_class) for of_class in paths])
        return ImageSamples(tuple(itertools.chain(*paths)), targets, size, crop, mean, std)

    return Dataset(
        name=directory.resolve().name,
        train=part(train),
        test=part(test),
        classes=classes,
        input_shape=(3, *size),
        mean=mean,
        std=std,
    )


def random_box(width: int, height: int, draws: np.ndarray) -> tuple[int, int, int, int]:
    """A training crop, (left, top, right, bottom), of an image; ``draws`` [tries, 4] are uniform in [0, 1).

    The first try that fits the image, or else the largest centred part of a legal ratio, as torchvision's
    ``RandomResizedCrop`` has it.
    """
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    for u_area, u_ratio, u_left, u_top in draws:
        area = width * height * (AREA[0] + u_area * (AREA[1] - AREA[0]))
        ratio = math.exp(low + u_ratio * (high - low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(u_left * (width - w + 1)), int(u_top * (height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * RATIO[1])))
    h = min(height, max(1, round(width / RATIO[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _random_resized_crop(image: Image, size: tuple[int, int], draws: np.ndarray) -> Image:
    height, width = size
    return image.resize((width, height), _pillow().Resampling.BILINEAR, box=random_box(*image.size, draws))


def _centre_crop(image: Image, size: tuple[int, int], crop: float) -> Image:
    height, width = size
    tall, wide = round(height / crop), round(width / crop)
    # The smallest size of the image's ratio that covers tall x wide; integers, as torchvision's Resize.
    if image.width * tall >= image.height * wide:
        wide = tall * image.width // image.height
    else:
        tall = wide * image.height // image.width
    left, top = round((wide - width) / 2), round((tall - height) / 2)
    resized = image.resize((wide, tall), _pillow().Resampling.BILINEAR)
    return resized.crop((left, top, left + width, top + height))


def _folders(directory: Path) -> list[str]:
    if not directory.is_dir():
        return []
    return sorted(path.name for path in directory.iterdir() if path.is_dir() and path.name[0] != ".")


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def _decode(path: Path) -> Image:
    try:
        with _pillow().open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # each of pillow's decoders fails in its own way, down to struct.error
        raise ValueError(
            f"imagefolder: cannot decode {path}: {error}. Replace or remove the file."
        ) from error


def _pillow() -> ModuleType:
    try:
        from PIL import Image  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ImportError("imagefolder reads images with pillow: pip install 'mixbits[images]'") from error
    return Image
