"""Run-length encoded masks, by pycocotools."""

from __future__ import annotations

from typing import TypedDict

from mrmae_ds.errors import UserError

try:
    from pycocotools import mask as mask_api
except ImportError as error:
    raise UserError(
        f"detection needs pycocotools ({error}); in the clone: pip install -e '.[detection]' -c constraints.txt"
    ) from error

__all__ = ["Rle", "mask_api"]


class Rle(TypedDict):
    """Mask as pycocotools encodes it.

    Attributes:
        size: height and width, pixels.
        counts: compressed run lengths, columns first.
    """

    size: list[int]
    counts: bytes
