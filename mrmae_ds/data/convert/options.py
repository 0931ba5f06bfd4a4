"""Options of writing a data set, the same for every kind of source."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from PIL import ImageColor

from mrmae_ds.errors import UserError

Jpegs = Literal["auto", "keep", "encode"]
Storage = Literal["jpeg", "raw", "auto"]
RAW_SIDE = 96  # pixels: up to this longer side, "auto" stores images raw
MAX_SIDE = 8192  # FFCV stores sides in 16 bits, and an image must fit into a page of the file


@dataclass(frozen=True)
class WriteOptions:
    """Options of image conversion, recorded in the sidecar.

    Attributes:
        max_side: larger images are reduced to this many pixels on the longer side.
        quality: of the JPEGs, 1 to 100.
        storage: "jpeg" stores all images as JPEGs, "raw" the pixels of all, 3 bytes each, and "auto" the pixels of
            those whose longer side is at most ``RAW_SIDE`` and the others as JPEGs. Raw pixels have no loss and need no
            decoding.
        jpegs: treatment of JPEGs that are not reduced. "encode" encodes them again; "keep" transcodes them without
            loss; "auto" does so where jpegtran is installed and they are not of a higher quality than ``quality``.
        workers: number of processes; None is the number of available cores, at most 8.
        max_bad: limit of unreadable images, which are left out: an int is a number, a float a share of the set,
            rounded up; 0 allows none.
        max_pixels: images of more pixels are not decoded and count as unreadable. A worker needs up to 14 bytes per
            pixel, 22 for 32-bit pixels.
        background: color behind transparent pixels, as Pillow names colors.
        timeout_s: limit for one image in a worker, seconds.
    """

    max_side: int = 512
    quality: int = 90
    storage: Storage = "jpeg"
    jpegs: Jpegs = "auto"
    workers: int | None = None
    max_bad: int | float = 0.01
    max_pixels: int = 100_000_000
    background: str = "white"
    timeout_s: float = 300

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UserError: with the command's option that is out of range.
        """
        if not 1 <= self.max_side <= MAX_SIDE:
            raise UserError(f"--max-side must be 1 to {MAX_SIDE} pixels, not {self.max_side}")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality must be 1 to 100, not {self.quality}")
        if self.jpegs not in get_args(Jpegs):
            raise UserError(f"--jpegs must be one of {', '.join(get_args(Jpegs))}, not {self.jpegs!r}")
        if self.storage not in get_args(Storage):
            raise UserError(f"--format must be one of {', '.join(get_args(Storage))}, not {self.storage!r}")
        if self.storage == "raw" and self.jpegs == "keep":
            raise UserError("--format raw stores no JPEGs, so --jpegs keep has none to keep; leave one of them out")
        if self.workers is not None and self.workers < 1:
            raise UserError(f"--workers must be at least 1, not {self.workers}")
        if self.max_bad < 0 or (isinstance(self.max_bad, float) and not self.max_bad <= 1):
            raise UserError(f"--max-bad must be a number (10) or a share (0.01 or 1%), not {self.max_bad}")
        if self.max_pixels < 1:
            raise UserError(f"--max-pixels must be at least 1, not {self.max_pixels}")
        if not self.timeout_s > 0:
            raise UserError(f"--timeout must be more than 0 seconds, not {self.timeout_s}")
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            raise UserError(f"--background must be a color (white, #808080), not {self.background!r}") from None

    @property
    def num_workers(self) -> int:
        """Number of worker processes."""
        return min(len(os.sched_getaffinity(0)), 8) if self.workers is None else self.workers

    def stores_raw(self, size: tuple[int, int]) -> bool:
        """Return True if the pixels of an image of this size, as it is stored, are stored raw."""
        return self.storage == "raw" or (self.storage == "auto" and max(size) <= RAW_SIDE)

    def bad_limit(self, count: int) -> int:
        """Return the number of unreadable images allowed among ``count``."""
        return math.ceil(self.max_bad * count) if isinstance(self.max_bad, float) else self.max_bad


@dataclass(frozen=True)
class Output:
    """The train.beton and val.beton of a data set.

    Attributes:
        folder: in which both are written; created if missing.
        name: of the data set, as tables show it; None is the source's.
        options: of the conversion.
        train_count: size of a class-balanced subset for training, at most; None is all images.
        val_count: the same for validation.
    """

    folder: Path
    name: str | None = None
    options: WriteOptions = field(default_factory=WriteOptions)
    train_count: int | None = None
    val_count: int | None = None


def parse_max_bad(text: str) -> int | float:
    """Parse ``10`` as a number, ``0.01`` and ``1%`` as shares.

    Raises:
        ValueError: for anything else.
    """
    if text.endswith("%"):
        return float(text[:-1]) / 100
    return float(text) if "." in text else int(text)
