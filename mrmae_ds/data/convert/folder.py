"""Trees of images with a folder per class, as training and validation sets (like torchvision's ``ImageFolder``)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mrmae_ds.data.beton.sidecar import BetonInfo
from mrmae_ds.data.convert.images import open_image
from mrmae_ds.data.convert.options import Output
from mrmae_ds.data.convert.subset import balanced_subset, split_off
from mrmae_ds.data.convert.writer import write_beton
from mrmae_ds.data.types import IntArray
from mrmae_ds.errors import UserError

# HEIC is included so that it is reported as unreadable instead of ignored.
_SUFFIXES = "jpg jpeg jpe jfif mpo png apng gif webp avif bmp dib ppm pgm pbm pnm tif tiff jp2 j2k jpx heic heif"
EXTENSIONS = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())


class ImageFolder:
    """Image files with labels.

    Attributes:
        paths: N files.
        labels: int64 [N].
        ignored: number of other files beside them, by extension.
    """

    def __init__(self, paths: Sequence[str], labels: IntArray, ignored: Mapping[str, int] | None = None) -> None:
        self.paths = list(paths)
        self.labels = labels
        self.ignored = dict(sorted((ignored or {}).items()))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Return an image, not decoded yet so that a large JPEG can be decoded at reduced size, and its label."""
        return open_image(self.paths[index]), self.label(index)

    def name(self, index: int) -> str:
        """Return the file, for messages."""
        return self.paths[index]

    def label(self, index: int) -> int:
        """Return a label without opening the file."""
        return int(self.labels[index])

    def take(self, rows: IntArray) -> ImageFolder:
        """Return some of the samples, by row."""
        return ImageFolder([self.paths[row] for row in rows], self.labels[rows], self.ignored)

    def limited(self, count: int | None, part: str) -> ImageFolder:
        """Return a class-balanced subset.

        Args:
            count: at most this many samples; None is all.
            part: "train" or "val", for the error.

        Raises:
            UserError: if ``count`` is below 1.
        """
        if count is not None and count < 1:
            raise UserError(f"the {part} count must be at least 1, not {count}")
        if count is None or count >= len(self):
            return self
        return self.take(balanced_subset(self.labels, count))


def find_classes(root: Path) -> list[str]:
    """Return the names of the class folders, sorted; hidden ones do not count.

    Raises:
        UserError: if there is none.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UserError(f"{root}: holds no class folders; expected {root}/CLASS/IMAGE")
    return names


def scan(root: Path, class_names: Sequence[str]) -> ImageFolder:
    """Find all images of ROOT/CLASS at any depth, sorted by name. Files are recognized as images by their extension.

    Args:
        root: the tree.
        class_names: its class folders, in the order of the labels.

    Returns:
        The images.

    Raises:
        UserError: if a class has none, or a folder cannot be read.
    """
    paths: list[str] = []
    labels: list[int] = []
    ignored: Counter[str] = Counter()
    for label, name in enumerate(class_names):
        images, others = [], Counter[str]()
        for file in _files(root / name):
            extension = os.path.splitext(file)[1].lower()
            if extension in EXTENSIONS and not os.path.basename(file).startswith("."):
                images.append(file)
            else:
                others[extension or "no extension"] += 1
        if not images:
            content = ", ".join(f"{count} {extension}" for extension, count in sorted(others.items())) or "it is empty"
            raise UserError(f"{root / name}: no images ({content}); add some or remove the folder")
        ignored += others
        paths += sorted(images, key=lambda file: file.split(os.sep))
        labels += [label] * len(images)
    return ImageFolder(paths, np.array(labels, dtype=np.int64), ignored)


def _files(folder: Path) -> Iterator[str]:
    """Yield all files below ``folder``, broken links included; raises UserError for unreadable folders."""

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error

    visited: set[str] = set()
    for parent, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        if os.path.realpath(parent) in visited:  # a link to a folder above
            folders.clear()
            continue
        visited.add(os.path.realpath(parent))
        yield from (os.path.join(parent, file) for file in files)


def open_folder(source: Path, val_fraction: float) -> tuple[ImageFolder, ImageFolder, list[str]]:
    """Open a tree of images.

    SRC/train/CLASS with SRC/val/CLASS is used as it is. From SRC/train/CLASS alone, or SRC/CLASS, ``val_fraction`` of
    every class is split off for validation, the same images each time.

    Args:
        source: SRC.
        val_fraction: share of every class, between 0 and 1.

    Returns:
        The training set, the validation set and the class names.

    Raises:
        UserError: for a tree of another shape.
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


def write_folder(source: str | Path, output: Output, *, val_fraction: float = 0.1) -> list[BetonInfo]:
    """Write a tree of images as train.beton and val.beton.

    Args:
        source: the tree; see ``open_folder``.
        output: the files; the default name is the tree's.
        val_fraction: share of every class that becomes the validation set where the tree has no val/.

    Returns:
        The written data sets.

    Raises:
        UserError: for a tree of another shape, or as ``write_beton`` does.
    """
    source = Path(source)
    train, val, class_names = open_folder(source, val_fraction)
    name = output.name or source.resolve().name
    return write_parts(
        train, val, replace(output, name=name), class_names, source, {"layout": "folder", "val_fraction": val_fraction}
    )


def write_parts(
    train: ImageFolder,
    val: ImageFolder,
    output: Output,
    class_names: Sequence[str],
    source: Path,
    origin: Mapping[str, Any],
) -> list[BetonInfo]:
    """Write OUT/train.beton and OUT/val.beton.

    Args:
        train: all training images.
        val: all validation images.
        output: the files.
        class_names: in the order of the labels.
        source: the tree, for the record.
        origin: arguments that open it again (``compare.open_origin``).

    Returns:
        The written data sets.
    """
    counts = {"train": output.train_count, "val": output.val_count}
    parts = {"train": train.limited(counts["train"], "train"), "val": val.limited(counts["val"], "val")}
    return [
        write_beton(
            dataset,
            output.folder / f"{part}.beton",
            output.options,
            class_names=class_names,
            name=output.name or "",
            source=f"{source.resolve()}, {part}, {len(dataset)} images",
            origin={**origin, "part": part, "count": counts[part]},
            ignored=dataset.ignored,
        )
        for part, dataset in parts.items()
    ]
