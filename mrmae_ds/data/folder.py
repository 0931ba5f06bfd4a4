"""Folders of pictures, one a class, as training and validation sets (like torchvision's ``ImageFolder``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mrmae_ds.data.beton import BetonInfo
from mrmae_ds.data.subset import IntArray, balanced_subset, split_off
from mrmae_ds.errors import UserError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})


class PictureFolder:
    """Picture files with labels; see ``writer.PictureDataset``."""

    def __init__(self, paths: Sequence[Path], labels: IntArray) -> None:
        """paths: N files. labels: int64 [N]."""
        self.paths = list(paths)
        self.labels = labels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with Image.open(self.paths[index]) as picture:
            picture.load()
            return picture, int(self.labels[index])

    def name(self, index: int) -> str:
        """The file, for messages."""
        return str(self.paths[index])

    def take(self, rows: IntArray) -> PictureFolder:
        """Some of the samples, by row."""
        return PictureFolder([self.paths[row] for row in rows], self.labels[rows])

    def limited(self, count: int | None, part: str) -> PictureFolder:
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
        raise UserError(f"{root}: holds no class folders; expected {root}/CLASS/PICTURE")
    return names


def scan(root: Path, class_names: Sequence[str]) -> PictureFolder:
    """All pictures of ROOT/CLASS, sorted by name, at any depth.

    Raises UserError if a class has none.
    """
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        files = (path for path in (root / name).rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
        found = sorted(path for path in files if not path.name.startswith("."))
        if not found:
            endings = ", ".join(sorted(EXTENSIONS))
            raise UserError(f"{root / name}: no pictures ({endings}); add some or remove the folder")
        paths += found
        labels += [label] * len(found)
    return PictureFolder(paths, np.array(labels, dtype=np.int64))


def open_folder(source: Path, val_fraction: float) -> tuple[PictureFolder, PictureFolder, list[str]]:
    """The training set, the validation set and the class names of a tree.

    SRC/train/CLASS with SRC/val/CLASS is taken as it is. From SRC/train/CLASS alone, or SRC/CLASS,
    ``val_fraction`` of every class is split off for validation, the same pictures each time.

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
        raise UserError(f"{train_root}: every class has a single picture, none is left for validation")
    return train.take(first), train.take(second), class_names


def write_folder(
    source: str | Path,
    out: str | Path,
    *,
    name: str | None = None,
    max_side: int = 512,
    quality: int = 90,
    val_fraction: float = 0.1,
    train_count: int | None = None,
    val_count: int | None = None,
    workers: int | None = None,
    skip_bad: bool = False,
) -> list[BetonInfo]:
    """Write OUT/train.beton and OUT/val.beton from a tree of pictures.

    Args:
        name: of the data set, as tables show it; None: the folder's.
        source: see ``open_folder``. val_fraction: used where the tree has no val/.
        max_side, quality, workers, skip_bad: see ``writer.write_beton``.
        train_count, val_count: class-balanced subsets of at most so many; None: all.

    Returns what was written. Raises UserError.
    """
    # Imported late: only writing needs ffcv.
    from mrmae_ds.data.writer import write_beton

    source = Path(source)
    train, val, class_names = open_folder(source, val_fraction)
    parts = {"train": train.limited(train_count, "train"), "val": val.limited(val_count, "val")}
    return [
        write_beton(
            dataset,
            Path(out) / f"{part}.beton",
            max_side=max_side,
            quality=quality,
            workers=workers,
            class_names=class_names,
            name=name or source.resolve().name,
            source=f"{source.resolve()}, {part}, {len(dataset)} pictures",
            skip_bad=skip_bad,
        )
        for part, dataset in parts.items()
    ]
