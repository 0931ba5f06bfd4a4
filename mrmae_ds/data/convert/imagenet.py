"""ImageNet-1K (ILSVRC 2012) as it is handed out: labels in the order of the sorted WordNet ids, like everyone's."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mrmae_ds.data.beton.sidecar import BetonInfo
from mrmae_ds.data.convert.folder import ImageFolder, find_classes, scan, write_parts
from mrmae_ds.data.convert.imagenet_labels import VAL_FILE, WORDNET_ID, read_class_names, read_val_labels
from mrmae_ds.data.convert.options import WriteOptions
from mrmae_ds.errors import UserError
from mrmae_ds.imagenet import IMAGENET_CLASSES, IMAGENET_EVAL_SAMPLES, IMAGENET_TRAIN_SAMPLES

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


def open_imagenet(
    source: Path,
    *,
    val_labels: str | Path | None = None,
    synsets: str | Path | None = None,
    allow_partial: bool = False,
) -> tuple[ImageFolder, ImageFolder, list[str]]:
    """The training set, the validation set and the WordNet ids in the order of the labels.

    The images lie in SRC (or SRC/ILSVRC/Data/CLS-LOC, as Kaggle has it): train/ID/*.JPEG, and val/ID/*.JPEG or
    val/ILSVRC2012_val_*.JPEG with a file of labels.

    Args:
        val_labels: see ``imagenet_labels.read_val_labels``; None: one of the usual names in SRC.
        synsets: see ``imagenet_labels.read_synsets``; None: map_clsloc.txt in SRC, if it is there.
        allow_partial: take a set of other than the published counts.

    Raises:
        UserError: for a tree of another shape, labels that do not fit, and other counts.
    """
    root = next((source / place for place in _ROOTS if (source / place / "train").is_dir()), None)
    if root is None:
        raise UserError(f"{source}: has no train/; expected {source}/train/n01440764/*.JPEG and {source}/val/")
    wnids = find_classes(root / "train")
    strangers = [name for name in wnids if not WORDNET_ID.fullmatch(name)]
    if strangers:
        raise UserError(f"{root}/train: {strangers[0]} is no WordNet id (n01440764); for other folders: data/folder.py")
    train = scan(root / "train", wnids)
    val = _open_val(source, root / "val", wnids, val_labels, synsets, allow_partial)
    _check_counts(source, len(wnids), len(train), len(val), allow_partial)
    return train, val, wnids


def _open_val(
    source: Path,
    folder: Path,
    wnids: list[str],
    val_labels: str | Path | None,
    synsets: str | Path | None,
    allow_partial: bool,
) -> ImageFolder:
    """The validation images, from class folders or from a single one."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; unpack ILSVRC2012_img_val.tar there")
    sorted_in = [entry.name for entry in folder.iterdir() if entry.is_dir() and WORDNET_ID.fullmatch(entry.name)]
    if sorted_in:
        differing = sorted(set(sorted_in) ^ set(wnids))
        if differing:
            raise UserError(f"{folder.parent}: train/ and val/ differ in the classes {', '.join(differing[:10])}")
        return scan(folder, wnids)
    labels_file = Path(val_labels) if val_labels else _find(source, _LABEL_FILES)
    if labels_file is None:
        raise UserError(
            f"{folder}: holds no class folders, so the labels are needed: put {_LABEL_FILES[0]} or "
            f"{Path(_LABEL_FILES[3]).name} into {source}, or pass a file with --val-labels"
        )
    synsets_file = Path(synsets) if synsets else _find(source, _SYNSET_FILES)
    known = read_val_labels(labels_file, wnids, synsets_file)
    return _flat(folder, known, wnids, labels_file, allow_partial)


def _flat(
    folder: Path, known: dict[int, str], wnids: Sequence[str], labels_file: Path, allow_partial: bool
) -> ImageFolder:
    """Join the images of one folder with their WordNet ids by the numbers in their names."""
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    paths, labels, ignored = [], [], Counter[str]()
    for path in sorted(folder.iterdir()):
        named = VAL_FILE.fullmatch(path.name)
        if named is None or not named[2]:
            ignored[path.suffix.lower() or "no extension"] += 1
            continue
        wnid = known.get(int(named[1]))
        if wnid is None:
            raise UserError(f"{labels_file}: has no label of {path.name}")
        if wnid in label_of:
            paths.append(str(path))
            labels.append(label_of[wnid])
        elif allow_partial:
            ignored["of classes that train/ has not"] += 1
        else:
            raise UserError(f"{labels_file}: {path.name} is of {wnid}, of which train/ has no folder")
    if not paths:
        raise UserError(f"{folder}: no images ILSVRC2012_val_*.JPEG of the classes of train/")
    return ImageFolder(paths, np.array(labels, dtype=np.int64), ignored)


def _check_counts(source: Path, classes: int, train: int, val: int, allow_partial: bool) -> None:
    """Compare with what is published."""
    counts = {
        "classes": (classes, IMAGENET_CLASSES),
        "training": (train, IMAGENET_TRAIN_SAMPLES),
        "validation": (val, IMAGENET_EVAL_SAMPLES),
    }
    wrong = [f"{found:,} of {whole:,} {what}" for what, (found, whole) in counts.items() if found != whole]
    if not wrong:
        return
    message = f"{source}: not ImageNet-1K as published: {', '.join(wrong)} images"
    message = message.replace(" classes images", " classes")
    if not allow_partial:
        raise UserError(f"{message}; unpack it again, or pass --allow-partial")
    print(f"warning: {message}", file=sys.stderr)


def _find(source: Path, names: Sequence[str]) -> Path | None:
    return next((source / name for name in names if (source / name).is_file()), None)


def write_imagenet(
    source: str | Path,
    out: str | Path,
    options: WriteOptions | None = None,
    *,
    val_labels: str | Path | None = None,
    synsets: str | Path | None = None,
    class_names: str | Path | None = None,
    allow_partial: bool = False,
    train_count: int | None = None,
    val_count: int | None = None,
    name: str = "ImageNet-1K",
) -> list[BetonInfo]:
    """Write OUT/train.beton and OUT/val.beton.

    Args:
        source, val_labels, synsets, allow_partial: see ``open_imagenet``. class_names: see
            ``imagenet_labels.read_class_names``; None: the WordNet ids.
        options: see there.
        train_count, val_count: class-balanced subsets of at most so many; None: all.
        name: of the data set, as tables show it.

    Returns what was written. Raises UserError.
    """
    source = Path(source)
    how = {
        "val_labels": str(val_labels) if val_labels else None,
        "synsets": str(synsets) if synsets else None,
        "allow_partial": allow_partial,
    }
    train, val, wnids = open_imagenet(source, val_labels=val_labels, synsets=synsets, allow_partial=allow_partial)
    counts = {"train": train_count, "val": val_count}
    parts = {"train": train.limited(train_count, "train"), "val": val.limited(val_count, "val")}
    return write_parts(
        parts,
        out,
        options,
        class_names=read_class_names(Path(class_names), wnids) if class_names else wnids,
        name=name,
        source=source,
        origins={part: {"layout": "imagenet", "part": part, "count": counts[part], **how} for part in parts},
    )
