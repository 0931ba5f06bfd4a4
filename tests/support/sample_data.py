"""Small sets of real images: Fashion-MNIST where Debian's package is installed, else matplotlib's."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from mrmae_ds.data.convert.fashion_mnist import CLASS_NAMES, FashionMNIST, debian_folder
from mrmae_ds.data.convert.options import WriteOptions
from mrmae_ds.data.convert.writer import ImageDataset, write_beton
from mrmae_ds.data.types import ImageArray

SIDE = 32


@cache
def photograph() -> Image.Image:
    """Return a photograph of a person, 512 wide and 600 high, RGB."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    with Image.open(path) as image:
        return image.convert("RGB")


@cache
def hard_images(size: int) -> tuple[ImageArray, ...]:
    """Return a photograph, noise, few values, one value, and single pixels that differ."""
    rng = np.random.default_rng(0)
    sparse = np.full((size, size, 3), 7, dtype=np.uint8)
    sparse[0, -1], sparse[-1, 0] = (255, 0, 8), (0, 255, 6)
    noise = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    plain = np.full((size, size, 3), 200, dtype=np.uint8)
    few = rng.choice(np.array([3, 4, 250], dtype=np.uint8), (size, size, 3))
    return np.asarray(photograph().resize((size, size))), noise, few, plain, sparse


class Crops:
    """Overlapping 32x32 crops of the photograph; the label is the tenth of its height that a crop starts in."""

    def __init__(self, count: int, first: int = 0) -> None:
        across, down = (512 - SIDE) // 8, (600 - SIDE) // 8
        # A step that shares no factor with the number of crops visits all of them, scattered.
        places = [(first + i) * 1009 % (across * down) for i in range(count)]
        self.corners = [(place % across * 8, place // across * 8) for place in places]

    def __len__(self) -> int:
        return len(self.corners)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        left, top = self.corners[index]
        return photograph().crop((left, top, left + SIDE, top + SIDE)), top * 10 // 600


def sample_sets(train: int, val: int) -> tuple[ImageDataset, ImageDataset]:
    """Return disjoint training and validation sets of real 32x32 RGB images in ten classes."""
    folder = debian_folder()
    if folder is None:
        return Crops(train), Crops(val, first=train)
    return FashionMNIST(folder, "train", train), FashionMNIST(folder, "val", val)


def write_sample_beton(folder: Path, train: int, val: int) -> tuple[Path, Path]:
    """Write FOLDER/train.beton and FOLDER/val.beton with these numbers of images; return both paths."""
    return _write_both(folder, sample_sets(train, val))


def write_crops_beton(folder: Path, train: int, val: int) -> tuple[Path, Path]:
    """Write crops of the photograph, whatever is installed, so that every machine gets the same bytes."""
    return _write_both(folder, (Crops(train), Crops(val, first=train)))


def _write_both(folder: Path, sets: tuple[ImageDataset, ImageDataset]) -> tuple[Path, Path]:
    paths = folder / "train.beton", folder / "val.beton"
    for path, dataset in zip(paths, sets, strict=True):
        options = WriteOptions(max_side=SIDE, quality=95, jpegs="encode", workers=1)
        write_beton(dataset, path, options, class_names=CLASS_NAMES, name="samples", source="test images")
    return paths


class Photographs:
    """Crops of the photograph of many sizes and shapes in two classes, wide and tall."""

    SIZES = ((200, 120), (64, 64), (50, 300), (301, 77), (33, 47), (256, 255), (512, 600), (90, 40))

    def __len__(self) -> int:
        return 2 * len(self.SIZES)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        width, height = self.SIZES[index % len(self.SIZES)]
        left, top = ((512 - width) // 2, (600 - height) // 3) if index < len(self.SIZES) else (0, 0)
        return photograph().crop((left, top, left + width, top + height)), int(height > width)
