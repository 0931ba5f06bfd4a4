"""ImageNet-1K (ILSVRC 2012) in its published layouts. Labels are indices of the sorted WordNet ids."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mrmae_ds.data.beton.sidecar import BetonInfo
from mrmae_ds.data.convert.folder import scan
from mrmae_ds.data.convert.imagenet_labels import VAL_FILE, WORDNET_ID, read_class_names, read_val_labels
from mrmae_ds.data.convert.index import FileStore, ImageIndex, Store
from mrmae_ds.data.convert.options import Output
from mrmae_ds.data.convert.parts import write_parts
from mrmae_ds.data.convert.splits import check_same_classes, find_classes, kind_of
from mrmae_ds.data.convert.tar_files import TarStore, index_bar, list_members
from mrmae_ds.errors import UserError
from mrmae_ds.imagenet import IMAGENET_CLASSES, IMAGENET_EVAL_SAMPLES, IMAGENET_TRAIN_SAMPLES
from mrmae_ds.units import printable

logger = logging.getLogger(__name__)

TRAIN_ARCHIVE, VAL_ARCHIVE = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_ROOTS = (".", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")  # the second is Kaggle's
_DEVKIT = "ILSVRC2012_devkit_t12/data"
_LABEL_FILES = (
    "LOC_val_solution.csv",
    "imagenet_2012_validation_synset_labels.txt",
    "val.txt",
    "ILSVRC2012_validation_ground_truth.txt",
    f"{_DEVKIT}/ILSVRC2012_validation_ground_truth.txt",
)
_SYNSET_FILES = ("map_clsloc.txt", f"{_DEVKIT}/map_clsloc.txt")


@dataclass(frozen=True)
class ImageNetSource:
    """An unpacked ImageNet-1K.

    The images lie in SRC (or SRC/ILSVRC/Data/CLS-LOC, as Kaggle has it): train/ID/*.JPEG, and val/ID/*.JPEG or
    val/ILSVRC2012_val_*.JPEG with a file of labels.

    Attributes:
        root: SRC.
        val_labels: file of the labels (``read_val_labels``); None is the first of the usual names in SRC.
        synsets: file of the devkit's class numbers (``read_synsets``); None is map_clsloc.txt in SRC, if it exists.
        allow_partial: accept counts other than the published ones.
    """

    root: Path
    val_labels: str | Path | None = None
    synsets: str | Path | None = None
    allow_partial: bool = False

    @property
    def has_tree(self) -> bool:
        """True if the training archive is unpacked."""
        return any((self.root / place / "train").is_dir() for place in _ROOTS)

    @property
    def images(self) -> Path:
        """Folder of train/ and val/.

        Raises:
            UserError: if there is none.
        """
        root = next((self.root / place for place in _ROOTS if (self.root / place / "train").is_dir()), None)
        if root is None:
            raise UserError(
                f"{self.root}: has neither train/ nor {TRAIN_ARCHIVE}; expected {self.root}/train/n01440764/*.JPEG and "
                "val/ beside"
            )
        return root

    @property
    def labels_file(self) -> Path | None:
        """File of the validation labels."""
        return Path(self.val_labels) if self.val_labels else self._first(_LABEL_FILES)

    @property
    def synsets_file(self) -> Path | None:
        """File of the devkit's class numbers."""
        return Path(self.synsets) if self.synsets else self._first(_SYNSET_FILES)

    def _first(self, names: Sequence[str]) -> Path | None:
        return next((self.root / name for name in names if (self.root / name).is_file()), None)


def open_imagenet(source: ImageNetSource) -> tuple[ImageIndex, ImageIndex, list[str]]:
    """Open the images.

    Args:
        source: the unpacked archives.

    Returns:
        The training set, the validation set and the WordNet ids in the order of the labels.

    Raises:
        UserError: for a tree of another shape, labels that do not match, and other counts than the published ones.
    """
    archive = source.root / TRAIN_ARCHIVE
    if not source.has_tree and archive.is_file():
        train, wnids = _open_train_archive(archive)
        val = _open_val(source, source.root / "val", wnids)
        _check_counts(source, len(wnids), len(train), len(val))
        return train, val, wnids
    images = source.images
    wnids, _ = find_classes(images / "train", nested=False)
    invalid = [name for name in wnids if not WORDNET_ID.fullmatch(name)]
    if invalid:
        raise UserError(
            f"{images}/train: {printable(invalid[0])} is no WordNet id (n01440764); for other folders: data/folder.py"
        )
    train = scan(images / "train", wnids)
    val = _open_val(source, images / "val", wnids)
    _check_counts(source, len(wnids), len(train), len(val))
    return train, val, wnids


def _open_val(source: ImageNetSource, folder: Path, wnids: list[str]) -> ImageIndex:
    """Open the validation images, from class folders or from a single one."""
    archive = source.root / VAL_ARCHIVE
    if not folder.is_dir() and archive.is_file():
        with index_bar([archive]) as bar:
            members = sorted((Path(member.name).name, member) for member in list_members(archive, progress=bar))
        return _join_labels(source, members, TarStore(), archive, wnids)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; unpack {VAL_ARCHIVE} there, or put it into {source.root}")
    class_folders = [entry.name for entry in folder.iterdir() if entry.is_dir() and WORDNET_ID.fullmatch(entry.name)]
    if class_folders:
        check_same_classes(folder.parent, wnids, class_folders)
        return scan(folder, wnids)
    files = [(path.name, str(path)) for path in sorted(folder.iterdir())]
    return _join_labels(source, files, FileStore(), folder, wnids)


def _join_labels(
    source: ImageNetSource, files: Sequence[tuple[str, Any]], store: Store, folder: Path, wnids: Sequence[str]
) -> ImageIndex:
    """Join named places of validation images with their WordNet ids by the numbers in their names."""
    labels_file = source.labels_file
    if labels_file is None:
        raise UserError(
            f"{folder}: holds no class folders, so the labels are needed: put {_LABEL_FILES[0]} or "
            f"{Path(_LABEL_FILES[3]).name} into {source.root}, or pass a file with --val-labels"
        )
    wnid_of = read_val_labels(labels_file, wnids, source.synsets_file)
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    places, labels, ignored = [], [], Counter[str]()
    for name, place in files:
        match = VAL_FILE.fullmatch(name)
        if match is None or not match[2]:
            ignored[kind_of(name)] += 1
            continue
        wnid = wnid_of.get(int(match[1]))
        if wnid is None:
            raise UserError(f"{labels_file}: has no label of {name}")
        if wnid in label_of:
            places.append(place)
            labels.append(label_of[wnid])
        elif source.allow_partial:
            ignored["of classes that train/ lacks"] += 1
        else:
            raise UserError(f"{labels_file}: {name} is of {wnid}, of which train/ has no folder")
    if not places:
        raise UserError(f"{folder}: no images ILSVRC2012_val_*.JPEG of the classes of train/")
    return ImageIndex(store, places, np.array(labels, dtype=np.int64), ignored)


def _open_train_archive(path: Path) -> tuple[ImageIndex, list[str]]:
    """Index the training archive, an archive of an archive for each class, without unpacking; returns the ids too."""
    archives = {Path(member.name).stem: member for member in list_members(path)}
    wnids = sorted(archives)
    invalid = [name for name in wnids if not WORDNET_ID.fullmatch(name)]
    if invalid or not wnids:
        raise UserError(f"{path}: holds {printable(invalid[0]) if invalid else 'nothing'}, expected n01440764.tar ...")
    places: list[Any] = []
    labels: list[int] = []
    with index_bar([path]) as bar:
        for label, wnid in enumerate(wnids):
            members = sorted(list_members(path, archives[wnid], bar), key=lambda member: member.name)
            places += members
            labels += [label] * len(members)
    return ImageIndex(TarStore(), places, np.array(labels, dtype=np.int64)), wnids


def _check_counts(source: ImageNetSource, classes: int, train: int, val: int) -> None:
    """Compare the counts with the published ones."""
    counts = (
        (classes, IMAGENET_CLASSES, "classes"),
        (train, IMAGENET_TRAIN_SAMPLES, "training images"),
        (val, IMAGENET_EVAL_SAMPLES, "validation images"),
    )
    wrong = [f"{count:,} of {published:,} {kind}" for count, published, kind in counts if count != published]
    if not wrong:
        return
    message = f"{source.root}: not ImageNet-1K as published: {', '.join(wrong)}"
    if not source.allow_partial:
        raise UserError(f"{message}; unpack it again, or pass --allow-partial")
    logger.warning("%s", message)


def write_imagenet(source: ImageNetSource, output: Output, *, class_names: str | Path | None = None) -> list[BetonInfo]:
    """Write ImageNet-1K as train.beton and val.beton.

    Args:
        source: the unpacked archives.
        output: the files; the default name is ImageNet-1K.
        class_names: file of readable names (``read_class_names``); None uses the WordNet ids.

    Returns:
        The written data sets.

    Raises:
        UserError: as ``open_imagenet`` and ``write_beton`` do.
    """
    train, val, wnids = open_imagenet(source)
    names = read_class_names(Path(class_names), wnids) if class_names else wnids
    origin = {
        "layout": "imagenet",
        "val_labels": str(source.val_labels) if source.val_labels else None,
        "synsets": str(source.synsets) if source.synsets else None,
        "allow_partial": source.allow_partial,
    }
    return write_parts(train, val, replace(output, name=output.name or "ImageNet-1K"), names, source.root, origin)
