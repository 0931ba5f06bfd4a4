"""Exact copies among the stored images of one or two .beton files.

A conversion that encodes all images stores those whose decoded pixels are equal as equal bytes, whatever their files'
formats and metadata, and has their checksums in its tables: only the candidates are read, and nothing is decoded. One
that keeps JPEGs may store equal pixels in several ways; its tables have a digest of the pixels, and nothing is read.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from mrmae_ds.data.beton.file import BetonFile
from mrmae_ds.data.beton.sidecar import BetonInfo, read_sidecar
from mrmae_ds.data.types import UIntArray
from mrmae_ds.units import printable

_MAX_NAMED = 20
Name = Callable[[int], str]


@dataclass(frozen=True)
class Copies:
    """Exact copies in a data set.

    Attributes:
        repeated: pairs of rows of one class; one pair less than the equal images.
        across_classes: the same for images that are also in another class.
        of_train: pairs of a row and an equal row of the training set, one for each such row; None without one.
    """

    repeated: list[tuple[int, int]]
    across_classes: list[tuple[int, int]]
    of_train: list[tuple[int, int]] | None

    def describe(self, train: BetonInfo | None, name: Name, train_name: Name) -> dict[str, Any]:
        """Return the sidecar's description: counts, the training set they refer to, and the first names.

        Args:
            train: the training set.
            name: returns the name of a row.
            train_name: returns the name of a row of the training set.
        """
        pairs = [(name(row), train_name(other)) for row, other in (self.of_train or [])[:_MAX_NAMED]]
        others = [*self.across_classes, *self.repeated][: _MAX_NAMED - len(pairs)]
        pairs += [(name(row), name(other)) for row, other in others]
        return {
            "repeated": len(self.repeated),
            "across_classes": len(self.across_classes),
            "of_train": None if self.of_train is None else len(self.of_train),
            "train": train.sha256 if train else None,
            "examples": pairs,
        }


def find_copies(file: BetonFile, train: BetonFile | None = None) -> Copies:
    """Find the exact copies in a file, and those of the images of a training set."""
    digested = _have_digests(file, train)
    keys = _keys(file, digested)
    train_keys = _keys(train, digested) if train is not None else keys[:0]
    values, counts = np.unique(keys, return_counts=True)
    shared = np.union1d(values[counts > 1], np.intersect1d(keys, train_keys))
    equal: dict[bytes, list[int]] = defaultdict(list)
    for row in np.flatnonzero(np.isin(keys, shared)).tolist():
        equal[_digest(file, row, digested)].append(row)
    known: dict[bytes, int] = {}
    if train is not None:
        for row in np.flatnonzero(np.isin(train_keys, shared)).tolist():
            known.setdefault(_digest(train, row, digested), row)
    repeated: list[tuple[int, int]] = []
    across: list[tuple[int, int]] = []
    for rows in equal.values():
        for row in rows[1:]:
            (repeated if file.labels[row] == file.labels[rows[0]] else across).append((row, rows[0]))
    of_train = sorted((row, known[digest]) for digest, rows in equal.items() if digest in known for row in rows)
    return Copies(sorted(repeated), sorted(across), of_train if train is not None else None)


def count_val_copies(train: BetonInfo, val: BetonInfo) -> int | None:
    """Return the number of validation images that are exact copies of training images.

    It is None, unknown, if none are found in files that would store equal images differently.
    """
    if train.sha256 == val.sha256:
        return val.num_samples
    recorded = recorded_copies(val, {train.sha256})
    if recorded is not None:
        return recorded
    files = BetonFile(val), BetonFile(train)
    found, digested = len(find_copies(*files).of_train or ()), _have_digests(*files)
    return found if found or _compared(train, digested) == _compared(val, digested) else None


def _have_digests(*files: BetonFile | None) -> bool:
    return all(file.pixels is not None for file in files if file is not None)


def _compared(info: BetonInfo, digested: bool) -> tuple[Any, ...]:
    """Return all that what is compared depends on, beside the image; of FFCV's own files it is not known."""
    sidecar = read_sidecar(info.path)
    pixels = info.max_side, sidecar.get("background"), sidecar["versions"].get("libjpeg-turbo")
    if digested:
        return pixels
    jpegs = sidecar.get("storage", "jpeg"), sidecar.get("jpegs"), sidecar["versions"].get("jpegtran")
    return (info.quality, *pixels, *jpegs) if info.quality else ()


def recorded_copies(val: BetonInfo, trained_on: Collection[str | None]) -> int | None:
    """Return the recorded number of validation images that are copies of the images of a training set.

    Args:
        val: the validation set.
        trained_on: SHA-256 of training sets, of which the record may be of one.

    Returns:
        The number; None if it is not recorded.
    """
    recorded = read_sidecar(val.path).get("copies") or {}
    train = recorded.get("train")
    return recorded.get("of_train") if train is not None and train in trained_on else None


def _keys(file: BetonFile, digested: bool) -> UIntArray:
    """Return a number of each image, equal for equal ones: its digest, or its checksum and the length's lower bits."""
    if digested:
        assert file.pixels is not None
        return file.pixels.view(np.uint64)
    lengths = file.table[:, 1].astype(np.uint64) & np.uint64(0xFFFFFFFF)
    return (file.checksums.astype(np.uint64) << np.uint64(32)) | lengths


def _digest(file: BetonFile, row: int, digested: bool) -> bytes:
    height, width = file.table[row, 2:4].tolist()
    if digested:
        assert file.pixels is not None
        return b"%d %d %d" % (height, width, file.pixels[row])
    return hashlib.blake2b(b"%d %d " % (height, width) + file.jpeg(row), digest_size=16).digest()


def describe_copies(copies: dict[str, Any] | None, samples: int) -> list[str]:
    """Return lines for the terminal from the sidecar's description; none if there are no copies.

    Args:
        copies: ``Copies.describe``; None for files of earlier versions.
        samples: number of images of the data set.
    """
    if not copies:
        return []
    kinds = {
        "of_train": "are exact copies of training images",
        "across_classes": "are exact copies of an image of another class",
        "repeated": "are exact copies of another image of their class",
    }
    lines = [f"{copies[kind]:,} of {samples:,} images {text}" for kind, text in kinds.items() if copies[kind]]
    if lines:
        more = sum(copies[kind] or 0 for kind in kinds) - len(copies["examples"])
        lines += [f"  {printable(one)} = {printable(other)}" for one, other in copies["examples"]]
        lines += [f"  and {more:,} more"] if more > 0 else []
    return lines
