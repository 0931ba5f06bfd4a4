"""Trees of images with a folder per class, as training and validation sets (like torchvision's ``ImageFolder``)."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mrmae_ds.data.beton.sidecar import BetonInfo
from mrmae_ds.data.convert.index import FileStore, ImageIndex
from mrmae_ds.data.convert.options import Output
from mrmae_ds.data.convert.parts import split_validation, write_parts
from mrmae_ds.data.convert.splits import (
    check_same_classes,
    count_ignored,
    describe_ignored,
    find_classes,
    find_parts,
    is_folder,
    is_hidden,
    is_image,
    kind_of,
    list_folder,
)
from mrmae_ds.errors import UserError
from mrmae_ds.units import counted, printable

logger = logging.getLogger(__name__)


class _ClassFolder:
    """Images of one class folder.

    Args:
        folder: the class folder.
        nested: True leaves folders inside to other classes.
        owners: class folder of each folder that was read, by its real path; shared by the classes, and extended.
        ignored: count of other files and of links, by kind; shared by the classes, and extended.
    """

    def __init__(self, folder: Path, nested: bool, owners: dict[str, str], ignored: Counter[str]) -> None:
        self._class, self._nested, self._owners, self._ignored = str(folder), nested, owners, ignored
        self._visited: set[str] = set()
        self._others: Counter[str] = Counter()

    def images(self) -> list[str]:
        """Return the paths of the images, sorted.

        Raises:
            UserError: if there are none, a folder cannot be read, or a link leads to the folder of another class.
        """
        found = list(self._walk(self._class))
        linked = [(path, os.path.realpath(path)) for path, is_link in found if is_link]
        paths = [path for path, is_link in found if not is_link]
        if linked:
            known = set(map(os.path.realpath, paths))
            for path, target in linked:
                if target in known:
                    self._others["links to images already read"] += 1
                else:
                    known.add(target)
                    paths.append(path)
        if not paths:
            content = describe_ignored(dict(sorted(self._others.items()))) or "it is empty"
            raise UserError(f"{printable(self._class)}: no images ({content}); add some or remove the folder")
        self._ignored.update(self._others)
        return sorted(paths, key=lambda path: path.split(os.sep))

    def _walk(self, folder: str) -> Iterator[tuple[str, bool]]:
        """Yield the images at or below ``folder``, broken links included, and whether each is a link."""
        real = os.path.realpath(folder)
        if real in self._visited:
            self._others["links to folders already read"] += 1
            return
        if os.path.realpath(self._class).startswith(real.rstrip(os.sep) + os.sep):
            self._others["links to folders above"] += 1
            return
        owner = self._owners.setdefault(real, self._class)
        if owner != self._class:
            raise UserError(
                f"{printable(folder)}: is a link into the class {printable(owner)}; an image can have one class only"
            )
        self._visited.add(real)
        for entry in list_folder(folder):
            if is_hidden(entry.name):
                self._others["hidden folders" if is_folder(entry) else "hidden files"] += 1
            elif is_folder(entry):
                if not self._nested:
                    yield from self._walk(entry.path)
            elif is_image(entry.name):
                yield entry.path, entry.is_symlink()
            else:
                self._others[kind_of(entry.name)] += 1


def scan(root: Path, class_names: Sequence[str], nested: bool = False) -> ImageIndex:
    """Find all images of ROOT/CLASS at any depth, sorted by name. Files are recognized as images by their extension.

    Args:
        root: the tree.
        class_names: its class folders, in the order of the labels.
        nested: True takes only the images that lie directly in a class folder.

    Returns:
        The images.

    Raises:
        UserError: if a class has none, a folder cannot be read, or a link leads into another class.
    """
    paths: list[str] = []
    labels: list[int] = []
    ignored = count_ignored(root)
    owners = {os.path.realpath(root / name): str(root / name) for name in class_names}
    for label, name in enumerate(class_names):
        images = _ClassFolder(root / name, nested, owners, ignored).images()
        paths += images
        labels += [label] * len(images)
    return ImageIndex(FileStore(), paths, np.array(labels, dtype=np.int64), ignored)


def open_folder(
    source: Path, val_fraction: float, nested: bool | None = None
) -> tuple[ImageIndex, ImageIndex, list[str]]:
    """Open a tree of images, and print which folders are taken for what.

    SRC/train/CLASS with SRC/val/CLASS is used as it is, also under other usual names (``splits.part_of``). From
    SRC/train/CLASS alone, or SRC/CLASS, ``val_fraction`` of every class is split off for validation, the same images
    each time.

    Args:
        source: SRC.
        val_fraction: share of every class, between 0 and 1.
        nested: see ``splits.find_classes``.

    Returns:
        The training set, the validation set and the class names.

    Raises:
        UserError: for a tree of another shape.
    """
    train_root, val_root = find_parts(source)
    class_names, nested = find_classes(train_root, nested)
    train = scan(train_root, class_names, nested)
    if val_root is not None:
        if os.path.realpath(val_root) == os.path.realpath(train_root):
            raise UserError(f"{source}: {val_root.name} and {train_root.name} are the same folder")
        check_same_classes(source, class_names, find_classes(val_root, nested)[0])
        val = scan(val_root, class_names, nested)
        _report(train_root, "train", train, class_names)
        _report(val_root, "val", val, class_names)
        return train, val, class_names
    _report(train_root, f"train, and {val_fraction:g} of each class as val", train, class_names)
    return *split_validation(train, val_fraction, class_names, train_root), class_names


def _report(folder: Path, use: str, images: ImageIndex, class_names: Sequence[str]) -> None:
    ignored = f", ignored: {describe_ignored(images.ignored)}" if images.ignored else ""
    if all(name.isdecimal() for name in class_names):
        logger.info("%s: its classes are called by numbers; rename the folders if the classes have names", folder)
    if len(class_names) == 1:
        logger.warning("%s: a single class, %s; is each class a folder?", folder, printable(class_names[0]))
    counts = f"{counted(len(class_names), 'class')}, {counted(len(images), 'image')}"
    logger.info("%s: taken as %s: %s%s", folder, use, counts, ignored)


def write_folder(
    source: str | Path, output: Output, *, val_fraction: float = 0.1, nested: bool | None = None
) -> list[BetonInfo]:
    """Write a tree of images as train.beton and val.beton.

    Args:
        source: the tree; see ``open_folder``.
        output: the files; the default name is the tree's.
        val_fraction: share of every class that becomes the validation set where the tree has no val/.
        nested: see ``splits.find_classes``.

    Returns:
        The written data sets.

    Raises:
        UserError: for a tree of another shape, or as ``write_beton`` does.
    """
    source = Path(source)
    train, val, class_names = open_folder(source, val_fraction, nested)
    origin = {"layout": "folder", "val_fraction": val_fraction, "nested": nested}
    return write_parts(train, val, output, class_names, source, origin)
