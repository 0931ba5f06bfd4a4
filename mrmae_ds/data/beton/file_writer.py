"""Sequential writer of .beton files (FFCV's format 2) from encoded JPEGs and raw pixels.

FFCV's own ``DatasetWriter`` waits forever if one of its processes dies or its disk is full, and its file layout depends
on the timing of its processes; this one writes the same bytes for the same images.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from mrmae_ds.data.beton.file import ALLOCATION, DIGESTED_SAMPLE, FIELD, HEADER, JPEG, RAW, SAMPLE, VERSION

MIN_PAGE = 1 << 21  # bytes
_IMAGE_FIELD, _INTEGER_FIELD = 2, 1  # FFCV's numbers for the kinds of field


class StoredImage(NamedTuple):
    """All that the tables need of an image.

    Attributes:
        length: bytes.
        width: pixels.
        height: pixels.
        label: its class.
        adler32: of the bytes.
        pixels: digest of its pixels; None where the file has none.
        raw: True for raw pixels, False for a JPEG.
    """

    length: int
    width: int
    height: int
    label: int
    adler32: int
    pixels: int | None
    raw: bool


def page_size(max_side: int) -> int:
    """Return the bytes of a page, which holds any image of sides up to ``max_side``."""
    # A JPEG of noise takes more bytes than the pixels themselves, but not twice as many.
    return max(MIN_PAGE, 1 << (6 * max_side * max_side - 1).bit_length())


def gap_before(end: int, length: int, page: int) -> int:
    """Return the bytes to leave free after ``end``, so that an image of ``length`` bytes crosses no page border."""
    left = -end % page
    return left if length > left else 0


class BetonWriter:
    """A .beton being written, as a context manager. No image crosses a page border, as FFCV requires.

    Args:
        path: the file.
        capacity: number of images, at most.
        max_side: of the images, pixels, at most.
        digests: True if each image has a digest of its pixels.
        stored: images that an interrupted writer left in the file; what follows them is cut off.
    """

    def __init__(
        self, path: Path, capacity: int, max_side: int, digests: bool, stored: Sequence[StoredImage] = ()
    ) -> None:
        self._page = page_size(max_side)
        self._samples = np.zeros(capacity, dtype=DIGESTED_SAMPLE if digests else SAMPLE)
        self._names = self._samples.dtype.names or ()
        self._allocations = np.zeros(capacity, dtype=ALLOCATION)
        self._count = 0
        self._table = HEADER.itemsize + len(self._names) * FIELD.itemsize
        self._end = -(-(self._table + self._samples.nbytes) // self._page) * self._page
        for image in stored:
            self._add(image)
        self._file = path.open("r+b" if stored else "wb")
        self._file.truncate(self._end)
        self._file.seek(self._end)

    def __enter__(self) -> BetonWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self._finish()
        else:
            self._discard()

    def append(
        self, content: bytes, width: int, height: int, label: int, pixels: int | None, raw: bool = False
    ) -> StoredImage:
        """Write an image.

        Args:
            content: its JPEG or raw pixels.
            width: pixels.
            height: pixels.
            label: its class.
            pixels: digest of its pixels; None where the file has none.
            raw: True for raw pixels.

        Raises:
            OSError: of the disk, for example if it is full.
        """
        image = StoredImage(len(content), width, height, label, zlib.adler32(content), pixels, raw)
        self._file.write(bytes(self._add(image)))
        self._file.write(content)
        return image

    def _add(self, image: StoredImage) -> int:
        """Add an image to the tables; return the number of bytes that are left free before it."""
        if image.length > self._page:
            raise ValueError(f"an image of {image.length:,} bytes does not fit into a page of {self._page:,}")
        gap = gap_before(self._end, image.length, self._page)
        place = self._end + gap
        stored = (RAW if image.raw else JPEG, image.width, image.height, place)
        numbers = (stored, image.label, self._count, image.adler32, image.pixels)
        self._samples[self._count] = numbers[: len(self._names)]
        self._allocations[self._count] = (self._count, place, image.length)
        self._end = place + image.length
        self._count += 1
        return gap

    def sync(self) -> int:
        """Write all images to the disk (fsync); return the number of bytes up to their end."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._end

    def _finish(self) -> None:
        """Write the header and the tables. If there are fewer images than ``capacity``, a gap remains."""
        header = np.zeros(1, dtype=HEADER)
        header[0] = (VERSION, len(self._names), self._page, self._count, self._end)
        fields = np.zeros(len(self._names), dtype=FIELD)
        for field, name in zip(fields, self._names, strict=True):
            field["kind"] = _IMAGE_FIELD if name == "image" else _INTEGER_FIELD
            field["name"][: len(name)] = np.frombuffer(name.encode("ascii"), dtype=np.uint8)
        with self._file as file:
            file.write(self._allocations[: self._count].tobytes())
            file.seek(0)
            file.write(header.tobytes() + fields.tobytes() + self._samples[: self._count].tobytes())
            file.flush()
            os.fsync(file.fileno())

    def _discard(self) -> None:
        """Close the file as it is; closing writes the buffer, which fails again on a full disk."""
        try:
            self._file.close()
        except OSError:
            return
