"""Conversion of COCO's masks to compressed RLE, checked before, because pycocotools checks nothing.

Points far outside an image, odd polygons and torn runs make it write outside its memory or take all of the machine's.
Boxes are compared with their masks.

Letters: A annotations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np
import numpy.typing as npt

from mrmae_ds.data.types import FloatArray, IntArray
from mrmae_ds.detection.rle import Rle, mask_api
from mrmae_ds.errors import UserError
from mrmae_ds.units import counted, first_few

_POINTS = 3  # of the smallest polygon
_NUMBERS = {int, float}
_DIGITS = 7  # of a run in compressed counts, 5 bits each
_CHUNK = 10_000  # masks that are unpacked at once
_SLACK, _SHARE = 3.0, 0.25  # edges of a box may differ from the mask's by pixels plus this share of its side


def encode_mask(path: Path, annotation: dict[str, Any], size: list[int]) -> Rle:
    """Convert a segmentation of any form to compressed RLE.

    Args:
        path: of the JSON, for messages.
        annotation: its ``id`` and ``segmentation``.
        size: height and width of its image.

    Raises:
        UserError: if pycocotools cannot convert it.
    """
    segmentation, where = annotation["segmentation"], f"{path}: annotation {annotation['id']}"
    if isinstance(segmentation, list):
        for polygon in segmentation:
            if fault := _polygon_fault(polygon, *size):
                raise UserError(f"{where} has a polygon in its segmentation {fault}")
        return mask_api.merge(mask_api.frPyObjects(segmentation, *size))
    if not isinstance(segmentation, dict):
        raise UserError(
            f"{where} has the segmentation {short(segmentation)}; it must be a list of polygons [x1, y1, x2, y2, ...] "
            "or RLE with size and counts"
        )
    if segmentation.get("size") != size:
        raise UserError(
            f"{where} has a mask of size {short(segmentation.get('size'))}, its image is {size} (height, width); "
            "correct segmentation.size or the image's entry"
        )
    counts: Any = segmentation.get("counts")
    fault = _counts_fault(counts, size[0] * size[1])
    if fault:
        raise UserError(f"{where} has a torn mask: its segmentation.counts {fault}; download or write the file again")
    if isinstance(counts, list):
        return mask_api.frPyObjects({"size": size, "counts": counts}, *size)
    return {"size": size, "counts": counts.encode()}


def _polygon_fault(polygon: Any, height: int, width: int) -> str:
    """Return the reason why a polygon cannot be drawn, and the fix; "" if it can.

    pycocotools walks along the outline, also outside the image, and takes memory for every step.
    """
    if type(polygon) is not list or not _NUMBERS.issuperset(map(type, polygon)):
        return f"that is {short(polygon)}; it must be a flat list of numbers [x1, y1, x2, y2, ...]"
    if len(polygon) < 2 * _POINTS or len(polygon) % 2:
        return f"of {counted(len(polygon), 'number')}; it needs x and y of at least {_POINTS} points"
    reach = max(height, width)
    for values, side in ((polygon[::2], width), (polygon[1::2], height)):
        low, high = -reach, side + reach
        # A NaN is the lowest value if it is the first, else it makes the sum NaN.
        if not (low <= min(values) and max(values) <= high and math.isfinite(sum(values))):
            wrong = next(value for value in values if not low <= value <= high)
            return (
                f"with the coordinate {short(wrong)}, far outside its image of {width} x {height} pixels (width x "
                "height); correct it, or the image's entry"
            )
    return ""


def _counts_fault(counts: Any, pixels: int) -> str:
    """Return the fault of the run lengths of a mask, compressed or not; "" if they cover the image."""
    if isinstance(counts, list):
        if any(type(count) is not int for count in counts):
            return "are not all integers"
        lowest, total = min(counts, default=0), sum(counts)
    elif isinstance(counts, str):
        runs = run_lengths(counts.encode(errors="replace")) if counts.isascii() else None
        if runs is None:
            return "are no compressed runs"
        lowest, total = int(runs.min()), int(runs.sum())
    else:
        return f"are {short(counts)}, neither a list nor a text"
    if lowest < 0:
        return f"have the negative run {lowest}"
    return "" if total == pixels else f"cover {total} of {pixels} pixels"


def run_lengths(counts: bytes) -> npt.NDArray[np.int64] | None:
    """Read compressed counts: numbers of 5 bits a character, each from the fourth on less the one two before it.

    Returns:
        The lengths; None if the text is empty, has other characters, or ends within a number.
    """
    digits = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - ord("0")
    last = digits & 0x20 == 0
    if len(digits) == 0 or not last[-1] or digits.min() < 0 or digits.max() > 0x3F:
        return None
    starts = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
    lengths = np.diff([*starts, len(digits)])
    if lengths.max() > _DIGITS:
        return None
    places = np.arange(len(digits)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((digits & 0x1F) << (5 * places), starts)
    runs -= np.where(digits[last] & 0x10, 1 << (5 * lengths), 0)  # negative numbers
    for first in (1, 2):
        runs[first::2] = runs[first::2].cumsum()
    return runs


def boxes_of_rle(masks: Sequence[Rle]) -> FloatArray:
    """Return the bounding boxes of A masks, float64 [A, 4]: left, top, width, height; zeros for an empty mask."""
    chunks = [masks[first : first + _CHUNK] for first in range(0, len(masks), _CHUNK)]
    return np.concatenate([np.zeros((0, 4)), *(mask_api.toBbox(list(chunk)) for chunk in chunks)])


def check_boxes(path: Path, ids: IntArray, boxes: FloatArray, sizes: IntArray) -> None:
    """Refuse boxes that are farther outside their images than these are long; drawing one could take minutes.

    Args:
        path: of the JSON, for messages.
        ids: of the annotations, [A].
        boxes: left, top, width, height, [A, 4].
        sizes: height and width of the annotations' images, [A, 2].

    Raises:
        UserError: for the first such box.
    """
    reach = sizes.max(axis=1, initial=0)[:, None]
    start, end = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    far = ((start < -reach) | (end > sizes[:, ::-1] + reach)).any(axis=1)
    if far.any():
        first = int(far.argmax())
        height, width = sizes[first].tolist()
        raise UserError(
            f"{path}: annotation {ids[first]} has the bbox {boxes[first].tolist()}, far outside its image of {width} x "
            f"{height} pixels (width x height); write left, top, width, height in pixels of this image, or correct its "
            "entry"
        )


def describe_doubts(ids: IntArray, boxes: FloatArray, mask_boxes: FloatArray, sizes: IntArray) -> str:
    """Count boxes whose center is outside their image, and boxes that contradict their masks.

    Empty masks contradict nothing.

    Args:
        ids: of the annotations, [A].
        boxes: as stored: left, top, width, height, [A, 4].
        mask_boxes: of the masks, in the same form, [A, 4].
        sizes: height and width of the annotations' images, [A, 2].

    Returns:
        A sentence with the first ids and the usual causes; "" without such boxes.
    """
    center = boxes[:, :2] + boxes[:, 2:] / 2
    outside = ((center < 0) | (center > sizes[:, ::-1])).any(axis=1)
    sides = mask_boxes[:, 2:]
    limits = _SLACK + _SHARE * np.tile(sides, 2)
    differ = (np.abs(_edges(boxes) - _edges(mask_boxes)) > limits).any(axis=1) & (sides > 0).all(axis=1)
    kinds = ((outside, "have their center outside the image"), (differ, "contradict their masks"))
    parts = [
        f"{found.sum():,} of {len(boxes):,} boxes {text} (annotations {first_few(ids[found].tolist(), 3)})"
        for found, text in kinds
        if found.any()
    ]
    if not parts:
        return ""
    return (
        f"{', '.join(parts)}: bbox must be left, top, width, height in pixels, neither x1, y1, x2, y2 nor relative to "
        "the image's size; correct the file, because boxes are evaluated as they are stored"
    )


def _edges(boxes: FloatArray) -> FloatArray:
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
