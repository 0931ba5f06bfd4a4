"""Size of a .beton, estimated from a sample of its images before it is written."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import numpy as np

from mrmae_ds.data.beton.file import ALLOCATION, DIGESTED_SAMPLE, FIELD, HEADER
from mrmae_ds.data.beton.file_writer import gap_before, page_size
from mrmae_ds.data.convert.options import WriteOptions
from mrmae_ds.data.convert.pool import map_in_order
from mrmae_ds.errors import UserError
from mrmae_ds.units import counted

logger = logging.getLogger(__name__)

_SAMPLE = 64
_LIMIT_S = 10.0  # after which a part of the sample is enough
_DRAWN = 4096  # images of the sample's sizes that are put into pages, which large ones do not fill
_FIELDS = len(DIGESTED_SAMPLE.names or ())


def announce_size(
    path: Path, convert: Callable[[int], tuple[int, bool] | None], count: int, options: WriteOptions
) -> None:
    """Log the expected size of a .beton and the free space, with a warning if that is less.

    Nothing is logged if no image of the sample can be converted: the conversion itself reports why.

    Args:
        path: the .beton.
        convert: returns the bytes of an image by its row, and whether they are raw pixels; None if it is unreadable.
        count: number of images.
        options: of the conversion.
    """
    rows = np.unique(np.linspace(0, count - 1, _SAMPLE, dtype=int))
    rows = np.random.default_rng(0).permutation(rows).tolist()
    results = map_in_order(
        lambda item: convert(rows[item]),
        len(rows),
        workers=options.num_workers,
        timeout_s=min(_LIMIT_S, options.timeout_s),
        name=lambda item: str(rows[item]),
    )
    found, end = [], time.monotonic() + _LIMIT_S
    with closing(results), suppress(UserError):
        for result in results:
            if result is not None:
                found.append(result)
            if time.monotonic() > end:
                break
    if not found:
        return
    sizes, raw = np.array([size for size, _ in found]), sum(raw for _, raw in found)
    mean, page = sizes.mean(), page_size(options.max_side)
    drawn = np.random.default_rng(0).choice(sizes, min(count, _DRAWN))
    end = 0
    for size in drawn.tolist():
        end += gap_before(end, size, page) + size
    tables = HEADER.itemsize + _FIELDS * FIELD.itemsize + count * DIGESTED_SAMPLE.itemsize
    # The images start at a whole page; the table of their places follows the last one.
    expected = -(-tables // page) * page + count * (end / len(drawn) + ALLOCATION.itemsize)
    free = shutil.disk_usage(path.parent).free
    modes = {0: "JPEGs", len(found): "raw pixels"}.get(raw, f"{raw / len(found):.0%} raw pixels, else JPEGs")
    message = (
        f"{path}: about {expected / 1e6:,.0f} MB for {counted(count, 'image')} of {mean:,.0f} bytes ({modes}), "
        f"by a sample of {len(found)}; {free / 1e6:,.0f} MB are free"
    )
    if expected > free:
        logger.warning("%s, which is not enough", message)
    else:
        logger.info("%s", message)
