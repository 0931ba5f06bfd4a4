"""Data sets that come as several archives or tables: WebDataset's tars, Hugging Face's Parquet and Arrow files."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from mrmae_ds.data.beton.sidecar import BetonInfo
from mrmae_ds.data.convert.adopt import read_classes
from mrmae_ds.data.convert.index import ImageIndex
from mrmae_ds.data.convert.options import Output
from mrmae_ds.data.convert.parquet import open_tables
from mrmae_ds.data.convert.parts import split_validation, write_parts
from mrmae_ds.data.convert.splits import ARCHIVES, check_is_folder, check_look_alikes, is_hidden, part_of_file
from mrmae_ds.data.convert.tar_files import open_shards
from mrmae_ds.errors import UserError
from mrmae_ds.units import counted, first_few

logger = logging.getLogger(__name__)

Kind = Literal["tars", "parquet"]
_SUFFIXES = {"tars": (".tar",), "parquet": (".parquet", ".arrow")}
_NUMBER_OF_TOTAL = re.compile(r"(\d+)[-_]of[-_](\d+)")  # train-00000-of-00004.parquet


@dataclass(frozen=True)
class ShardOptions:
    """Options of reading shards.

    Attributes:
        val_fraction: share of each class that becomes validation data where no shard is named like val.
        class_names: file of the names, a line for each label from 0; None takes those of the files, or the numbers.
        image_column: of tables; None is the one of a usual type or name.
        label_column: the same for labels.
    """

    val_fraction: float = 0.1
    class_names: str | None = None
    image_column: str | None = None
    label_column: str | None = None


def find_shards(source: Path, kind: Kind) -> dict[str, list[Path]]:
    """Find the files below a folder by their part, and print which are taken for what.

    Args:
        source: the folder; ``part_of_file`` says which names are parts.
        kind: of the files.

    Returns:
        The files, sorted, by "train", "val" and "test". Files without a part's name are "train".

    Raises:
        UserError: if there are none, some are compressed, some have a part's name and some do not, none is for
            training, or those of one part are not one complete set by their folders and numbers.
    """
    check_is_folder(source)
    found: dict[str | None, list[Path]] = defaultdict(list)
    for path in sorted(source.rglob("*")):
        inner = path.relative_to(source)
        hidden = any(map(is_hidden, inner.parts)) or path.name.startswith("cache-")
        if path.is_file() and path.suffix in _SUFFIXES[kind] and not hidden:
            found[part_of_file(str(inner))].append(path)
        elif kind == "tars" and path.name.lower().endswith(ARCHIVES) and not hidden:
            raise UserError(f"{path}: a compressed archive, of which no part can be read alone; unpack it to .tar")
    unnamed = found.pop(None, [])
    if unnamed and found:
        raise UserError(f"{source}: {unnamed[0].name} is named like no part, other files are; rename or move it away")
    parts = {"train": unnamed} if unnamed else {str(part): paths for part, paths in found.items()}
    if "train" not in parts:
        raise UserError(f"{source}: no {' or '.join(_SUFFIXES[kind])} files for training; expected train-*")
    for part, paths in parts.items():
        if part != "test":
            _check_set(source, part, paths)
        use = "not used" if part == "test" else f"taken as {part}"
        shown = paths[0].name if len(paths) == 1 else f"{paths[0].name} ... {paths[-1].name}"
        logger.info("%s: %s, %s: %s", source, counted(len(paths), "file"), shown, use)
    return parts


def _check_set(source: Path, part: str, paths: Sequence[Path]) -> None:
    """Check that the files of a part are one complete set; a gap in numbers without a total is only a warning."""
    folder, *others = dict.fromkeys(path.parent for path in paths)
    if others:
        raise UserError(
            f"{source}: {folder} and {others[0]} both hold files for {part}; name one of them, or link the files of "
            "one data set into one folder"
        )
    found = [(path.name, _NUMBER_OF_TOTAL.search(path.name)) for path in paths]
    sets = {(name[: match.start()], int(match[2])) if match else None: name for name, match in found}
    if len(sets) > 1:
        one, other = list(sets.values())[:2]
        raise UserError(f"{folder}: {one} and {other} are of different sets; move one set away")
    if None in sets:
        _warn_of_gaps(folder, [path.name for path in paths])
        return
    total = max(key[1] for key in sets if key)
    numbered = {int(match[1]): name for name, match in found if match}
    first = int(total in numbered)  # some writers count from 1
    expected = range(first, first + total)
    if missing := _first_missing(numbered, expected):
        raise UserError(f"{folder}: of {counted(total, 'file')} for {part}, these are missing: {missing}; fetch them")
    extra = [path.name for path in paths if path.name not in numbered.values()]
    extra += [name for number, name in numbered.items() if number not in expected]
    if extra:
        raise UserError(f"{folder}: {extra[0]} is beyond the {counted(total, 'file')} for {part}; move old ones away")


def _warn_of_gaps(folder: Path, names: Sequence[str]) -> None:
    """Print a warning where the last numbers in names that are equal otherwise are not consecutive."""
    groups: dict[tuple[str, str], set[int]] = defaultdict(set)
    for name in names:
        if match := re.fullmatch(r"(.*?)(\d+)(\D*)", name):
            groups[match[1], match[3]].add(int(match[2]))
    for (before, after), numbers in groups.items():
        if missing := _first_missing(numbers, range(min(numbers), max(numbers))):
            logger.warning("%s: no %s*%s is numbered %s; are files missing?", folder, before, after, missing)


def _first_missing(numbers: Container[int], expected: range) -> str:
    return first_few(list(islice((number for number in expected if number not in numbers), 4)), 3)


def open_parts(source: Path, kind: Kind, options: ShardOptions) -> tuple[ImageIndex, ImageIndex, list[str]]:
    """Open a data set of shards.

    Args:
        source: the folder.
        kind: of the files.
        options: of reading.

    Returns:
        The training set, the validation set and the class names.

    Raises:
        UserError: for files of another form, labels without a class, and classes without images.
    """
    parts = find_shards(source, kind)
    names = read_classes(Path(options.class_names)) if options.class_names else None
    train, stated = _open(parts["train"], kind, options)
    if not (names or stated):
        logger.info("%s: names no classes, which are called by their numbers; --class-names FILE names them", source)
    names = names or stated or [str(label) for label in range(int(train.labels.max()) + 1)]
    check_look_alikes(source, names)
    if "val" in parts:
        val, of_val = _open(parts["val"], kind, options)
        if of_val != stated:
            raise UserError(f"{source}: the files for train and for val state different classes")
    else:
        _check_labels(train, names, source)
        train, val = split_validation(train, options.val_fraction, names, source)
    for images in (train, val):
        _check_labels(images, names, source)
    return train, val, names


def _open(paths: Sequence[Path], kind: Kind, options: ShardOptions) -> tuple[ImageIndex, list[str] | None]:
    if kind == "tars":
        return open_shards(paths), None
    return open_tables(paths, options.image_column, options.label_column)


def _check_labels(images: ImageIndex, names: Sequence[str], source: Path) -> None:
    """Check that every label has a class, and every class an image."""
    highest = int(images.labels.max())
    if highest >= len(names):
        raise UserError(f"{source}: has the label {highest}, but only {counted(len(names), 'class')}, from 0")
    counts = np.bincount(images.labels, minlength=len(names))
    empty = [name for name, count in zip(names, counts.tolist(), strict=True) if count == 0]
    if empty:
        raise UserError(f"{source}: no image of the class {first_few(empty, 10)} in one of train and val")


def write_shards(source: str | Path, output: Output, kind: Kind, options: ShardOptions) -> list[BetonInfo]:
    """Write a data set of shards as train.beton and val.beton.

    Args:
        source: the folder.
        output: the files; the default name is the folder's.
        kind: of the files.
        options: of reading.

    Returns:
        The written data sets.

    Raises:
        UserError: as ``open_parts`` and ``write_beton`` do.
    """
    source = Path(source)
    train, val, names = open_parts(source, kind, options)
    return write_parts(train, val, output, names, source, {"layout": kind, **asdict(options)})
