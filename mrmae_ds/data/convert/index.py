"""An ordered index of labeled images: files of a tree, members of archives or rows of tables."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from mrmae_ds.data.convert.images import open_image
from mrmae_ds.data.convert.subset import balanced_subset
from mrmae_ds.data.types import IntArray
from mrmae_ds.errors import UserError


class Store(Protocol):
    """Holder of the images. It is used in several processes after a fork, so it opens files when it reads them."""

    def open(self, place: Any) -> Image.Image:
        """Open an image without decoding it; any exception means that it is unreadable."""
        ...

    def name(self, place: Any) -> str:
        """Return the origin of an image, for messages."""
        ...

    def file(self, place: Any) -> str:
        """Return the path of the file that holds an image."""
        ...


class ImageIndex:
    """Images with labels, a data set for ``writer.write_beton``.

    Attributes:
        store: where the images are.
        places: of N images in the store.
        labels: int64 [N].
        ignored: number of files and folders of the source that are not used, by kind.
    """

    def __init__(
        self, store: Store, places: Sequence[Any], labels: IntArray, ignored: Mapping[str, int] | None = None
    ) -> None:
        self.store = store
        self.places = list(places)
        self.labels = labels
        self.ignored = {kind: count for kind, count in sorted((ignored or {}).items()) if count}

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Return an image, not decoded yet so that a large JPEG can be decoded at reduced size, and its label."""
        return self.store.open(self.places[index]), self.label(index)

    def name(self, index: int) -> str:
        """Return the origin of an image, for messages."""
        return self.store.name(self.places[index])

    def label(self, index: int) -> int:
        """Return a label without reading the image."""
        return int(self.labels[index])

    def stamp(self, index: int) -> str:
        """Return size and time of the file that holds an image."""
        try:
            status = os.stat(self.store.file(self.places[index]))
        except OSError as error:
            return str(error.errno)
        return f"{status.st_size} {status.st_mtime_ns}"

    def digest(self) -> str:
        """Return a checksum of all places and labels, without that of the files' content."""
        digest = hashlib.blake2b(self.labels.tobytes(), digest_size=16)
        for place in self.places:
            digest.update(f"{place!a}\n".encode("ascii"))
        return digest.hexdigest()

    def take(self, rows: IntArray) -> ImageIndex:
        """Return some of the samples, by row."""
        return ImageIndex(self.store, [self.places[row] for row in rows], self.labels[rows], self.ignored)

    def limited(self, count: int | None, part: str) -> ImageIndex:
        """Return a class-balanced subset.

        Args:
            count: at most this many samples; None is all.
            part: "train" or "val", for the error.

        Raises:
            UserError: if ``count`` is below the number of classes.
        """
        if count is None:
            return self
        check_subset_size(count, self.labels, part)
        return self if count >= len(self) else self.take(balanced_subset(self.labels, count))


def check_subset_size(count: int, labels: IntArray, part: str) -> None:
    """Check that a class-balanced subset leaves an image to every class.

    Args:
        count: size of the subset.
        labels: of all samples, int64 [N].
        part: "train" or "val", for the error.

    Raises:
        UserError: if there are more classes than ``count``.
    """
    classes = len(np.unique(labels))
    if count < 1:
        raise UserError(f"the {part} count must be at least 1, not {count}")
    if count < classes:
        raise UserError(
            f"--num-{part}-images {count}: fewer images than the {classes} classes would leave classes without one; "
            f"give {classes} or more"
        )


class FileStore:
    """Image files; a place is a path."""

    def open(self, place: str) -> Image.Image:
        """Open a file by its content."""
        return open_image(place)

    def name(self, place: str) -> str:
        """Return the path."""
        return place

    file = name
