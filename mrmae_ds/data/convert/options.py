"""How images are written: one set of options for every kind of source."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from PIL import ImageColor

from mrmae_ds.errors import UserError

MAX_SIDE = 8192  # FFCV keeps sides in 16 bits, and an image must fit into a page of the file


@dataclass(frozen=True)
class WriteOptions:
    """Checked when made; UserError names the option that is out of range.

    Attributes:
        max_side: larger images are reduced to this many pixels on the longer side. quality: of the JPEGs, 1..100.
        workers: processes; None: the cores this process may use, 8 at most.
        max_bad: how many images may be left out because they cannot be read: an int is a number, a float a share
            of the set, rounded up; 0: none.
        max_pixels: images of more pixels are not decoded, and count as bad. A worker needs up to 14 bytes
            for each, 22 where they are of 32 bits.
        background: color shown through transparent pixels, as Pillow names colors.
        timeout_s: that a worker may spend on one image, seconds.
    """

    max_side: int = 512
    quality: int = 90
    workers: int | None = None
    max_bad: int | float = 0.01
    max_pixels: int = 100_000_000
    background: str = "white"
    timeout_s: float = 300

    def __post_init__(self) -> None:
        if not 1 <= self.max_side <= MAX_SIDE or not 1 <= self.quality <= 100:
            raise UserError(
                f"max_side must be in 1..{MAX_SIDE} and quality in 1..100, not {self.max_side} and {self.quality}"
            )
        if self.workers is not None and self.workers < 1:
            raise UserError(f"workers must be at least 1, not {self.workers}")
        if self.max_bad < 0 or (isinstance(self.max_bad, float) and not self.max_bad <= 1):
            raise UserError(f"max_bad must be a number (10) or a share (0.01 or 1%), not {self.max_bad}")
        if self.max_pixels < 1 or not self.timeout_s > 0:
            raise UserError(f"max_pixels and timeout must be positive, not {self.max_pixels} and {self.timeout_s}")
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            raise UserError(f"background must be a color (white, #808080), not {self.background!r}") from None

    @property
    def processes(self) -> int:
        """How many workers that makes."""
        return min(len(os.sched_getaffinity(0)), 8) if self.workers is None else self.workers

    def bad_limit(self, count: int) -> int:
        """How many of ``count`` images may be left out."""
        return math.ceil(self.max_bad * count) if isinstance(self.max_bad, float) else self.max_bad


def parse_max_bad(text: str) -> int | float:
    """``10`` is a number, ``0.01`` and ``1%`` are shares. Raises ValueError for anything else."""
    if text.endswith("%"):
        return float(text[:-1]) / 100
    return float(text) if "." in text else int(text)
