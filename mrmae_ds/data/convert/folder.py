"""Folders of images, one a class, as training and validation sets (like torchvision's ``ImageFolder``)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mrmae_ds.data.beton.sidecar import BetonInfo
from mrmae_ds.data.convert.images import open_image
from mrmae_ds.data.convert.options import WriteOptions
from mrmae_ds.data.convert.subset import balanced_subset, split_off
from mrmae_ds.data.convert.writer import write_beton
from mrmae_ds.data.types import IntArray
from mrmae_ds.errors import UserError

# HEIC is here to be named among the images that cannot be read, not passed over as no image at all.
_ENDINGS = "jpg jpeg jpe jfif mpo png apng gif webp avif bmp dib ppm pgm pbm pnm tif tiff jp2 j2k jpx heic heif"
EXTENSIONS = frozenset(f".{ending}" for ending in _ENDINGS.split())


class ImageFolder:
    """Image files with labels; see ``writer.ImageDataset``.

    Attributes:
        paths: N files. labels: int64 [N]. ignored: other files beside them, counted by extension.
    """

    def __init__(self, paths: Sequence[str], labels: IntArray, ignored: Mapping[str, int] | None = None) -> None:
        self.paths = list(paths)
        self.labels = labels
        self.ignored = dict(sorted((ignored or {}).items()))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """An image that is not decoded yet, so that a large JPEG can be decoded at a fraction of its size."""
        return open_image(self.paths[index]), self.label(index)

    def name(self, index: int) -> str:
        """The file, for messages."""
        return self.paths[index]

    def label(self, index: int) -> int:
        """Without opening the file."""
        return int(self.labels[index])

    def take(self, rows: IntArray) -> ImageFolder:
        """Some of the samples, by row."""
        return ImageFolder([self.paths[row] for row in rows], self.labels[rows], self.ignored)

    def limited(self, count: int | None, part: str) -> ImageFolder:
        """A class-balanced subset of at most ``count``, or all for None. Raises UserError for less than 1."""
        if count is not None and count < 1:
            raise UserError(f"the {part} count must be at least 1, not {count}")
        if count is None or count >= len(self):
            return self
        return self.take(balanced_subset(self.labels, count))


def find_classes(root: Path) -> list[str]:
    """The names of the class folders, sorted; hidden ones do not count.

    Raises UserError if there is none.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UserError(f"{root}: holds no class folders; expected {root}/CLASS/IMAGE")
    return names


def scan(root: Path, class_names: Sequence[str]) -> ImageFolder:
    """All images of ROOT/CLASS, sorted by name, at any depth. What is an image, its extension says.

    Raises UserError if a class has none, or a folder cannot be read.
    """
    paths: list[str] = []
    labels: list[int] = []
    ignored: Counter[str] = Counter()
    for label, name in enumerate(class_names):
        found, others = [], Counter[str]()
        for file in _files(root / name):
            ending = os.path.splitext(file)[1].lower()
            if ending in EXTENSIONS and not os.path.basename(file).startswith("."):
                found.append(file)
            else:
                others[ending or "no extension"] += 1
        if not found:
            held = ", ".join(f"{count} {ending}" for ending, count in sorted(others.items())) or "it is empty"
            raise UserError(f"{root / name}: no images ({held}); add some or remove the folder")
        ignored += others
        paths += sorted(found, key=lambda file: file.split(os.sep))
        labels += [label] * len(found)
    return ImageFolder(paths, np.array(labels, dtype=np.int64), ignored)


def _files(folder: Path) -> Iterator[str]:
    """All that is no folder below ``folder``, links that lead nowhere included. Raises UserError."""

    def failed(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error

    visited: set[str] = set()
    for where, folders, files in os.walk(folder, onerror=failed, followlinks=True):
        if os.path.realpath(where) in visited:  # a link to a folder above
            folders.clear()
            continue
        visited.add(os.path.realpath(where))
        yield from (os.path.join(where, file) for file in files)


def open_folder(source: Path, val_fraction: float) -> tuple[ImageFolder, ImageFolder, list[str]]:
    """The training set, the validation set and the class names of a tree.

    SRC/train/CLASS with SRC/val/CLASS is taken as it is. From SRC/train/CLASS alone, or SRC/CLASS,
    ``val_fraction`` of every class is split off for validation, the same images each time.

    Raises UserError for a tree of another shape.
    """
    if not source.is_dir():
        raise UserError(f"{source}: no such folder")
    train_root = source / "train" if (source / "train").is_dir() else source
    val_root = source / "val"
    if val_root.is_dir() and train_root is source:
        raise UserError(f"{source}: has val/ but no train/; expected {source}/train/CLASS and {source}/val/CLASS")
    class_names = find_classes(train_root)
    train = scan(train_root, class_names)
    if val_root.is_dir():
        differing = sorted(set(class_names) ^ set(find_classes(val_root)))
        if differing:
            raise UserError(f"{source}: train/ and val/ differ in the classes {', '.join(differing[:10])}")
        return train, scan(val_root, class_names), class_names
    if not 0 < val_fraction < 1:
        raise UserError(f"the validation fraction must be between 0 and 1, not {val_fraction}")
    first, second = split_off(train.labels, val_fraction)
    if len(second) == 0:
        raise UserError(f"{train_root}: every class has a single image, none is left for validation")
    return train.take(first), train.take(second), class_names


def write_folder(
    source: str | Path,
    out: str | Path,
    options: WriteOptions | None = None,
    *,
    name: str | None = None,
    val_fraction: float = 0.1,
    train_count: int | None = None,
    val_count: int | None = None,
) -> list[BetonInfo]:
    """Write OUT/train.beton and OUT/val.beton from a tree of images.

    Args:
        source: see ``open_folder``. val_fraction: used where the tree has no val/.
        options: see there.
        name: of the data set, as tables show it; None: the folder's.
        train_count, val_count: class-balanced subsets of at most so many; None: all.

    Returns what was written. Raises UserError.
    """
    source = Path(source)
    train, val, class_names = open_folder(source, val_fraction)
    parts = {"train": train.limited(train_count, "train"), "val": val.limited(val_count, "val")}
    counts = {"train": train_count, "val": val_count}
    return write_parts(
        parts,
        out,
        options,
        class_names=class_names,
        name=name or source.resolve().name,
        source=source,
        origins={
            part: {"layout": "folder", "part": part, "val_fraction": val_fraction, "count": counts[part]}
            for part in parts
        },
    )


def write_parts(
    parts: Mapping[str, ImageFolder],
    out: str | Path,
    options: WriteOptions | None,
    *,
    class_names: Sequence[str],
    name: str,
    source: Path,
    origins: Mapping[str, Mapping[str, Any]],
) -> list[BetonInfo]:
    """Write OUT/PART.beton of every part; see ``writer.write_beton``."""
    return [
        write_beton(
            dataset,
            Path(out) / f"{part}.beton",
            options,
            class_names=class_names,
            name=name,
            source=f"{source.resolve()}, {part}, {len(dataset)} images",
            origin=origins[part],
            ignored=dataset.ignored,
        )
        for part, dataset in parts.items()
    ]
