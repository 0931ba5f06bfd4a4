"""Large-scale jitter (flip, resize, crop) as a pure function of (seed, epoch, sample), and the resizing of evaluation.

Sizes and offsets are rounded as Detectron2 does (``RandomFlip``, ``ResizeScale``, ``FixedSizeCrop``,
``ResizeShortestEdge``), so that the pixels are equal.

Shapes: n objects, H x W pixels of the stored image, h x w of the result, S side of the model's square input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from mrmae_ds.data.types import FloatArray, ImageArray, IntArray
from mrmae_ds.detection.rle import Rle, mask_api

_DRAWS = 3  # flip, scale, crop
# Third word of Philox's counter, which no order of an epoch (data/loaders/sampler.py) reaches.
_PURPOSE = 0x6A6974


@dataclass(frozen=True)
class JitterSettings:
    """Random resizing and cropping of a training image.

    Attributes:
        image_size: S, pixels.
        scale: bounds of the size, relative to the largest that fits the square.
        flip: probability of mirroring left to right.
    """

    image_size: int
    scale: tuple[float, float] = (0.1, 2.0)
    flip: float = 0.5


class Jitter(NamedTuple):
    """One draw. Sizes and corners are (vertical, horizontal) in pixels.

    Attributes:
        mirrored: left to right, first of all.
        resized: size before the crop.
        corner: top and left of the crop.
        size: of the crop, h and w, at most S; the rest of the square is padded.
    """

    mirrored: bool
    resized: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]


def jitter_numbers(seed: int, epoch: int, row: int) -> FloatArray:
    """Return the numbers in [0, 1) for flip, scale and crop of a sample in an epoch, [3], with 53 random bits each."""
    generator = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64), counter=[row, 0, _PURPOSE, 0])
    return (generator.random_raw(_DRAWS) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def jitter_of(numbers: Sequence[float] | FloatArray, height: int, width: int, settings: JitterSettings) -> Jitter:
    """Compute the jitter of an image from its three numbers.

    Args:
        numbers: in [0, 1), for flip, scale and crop; both axes share the last.
        height: H.
        width: W.
        settings: bounds.
    """
    flip, scale, crop = (float(number) for number in numbers)
    low, high = settings.scale
    target = settings.image_size * (low + (high - low) * scale)
    ratio = min(target / height, target / width)
    resized = max(1, round(height * ratio)), max(1, round(width * ratio))  # a half is rounded to the even number
    top, left = (round(max(side - settings.image_size, 0) * crop) for side in resized)
    height, width = (min(side, settings.image_size) for side in resized)
    return Jitter(flip < settings.flip, resized, (top, left), (height, width))


def eval_jitter(height: int, width: int, image_size: int) -> Jitter:
    """Return the resizing of evaluation: the longer side to S, the other in proportion, a half rounded up."""
    longer = max(height, width)
    resized = [max(1, (2 * side * image_size + longer) // (2 * longer)) for side in (height, width)]
    size = resized[0], resized[1]
    return Jitter(False, size, (0, 0), size)


def jitter_image(image: Image.Image, jitter: Jitter) -> ImageArray:
    """Transform an RGB image; bilinear with antialiasing.

    Returns:
        uint8 [h, w, 3].
    """
    if jitter.mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.resize(jitter.resized[::-1], Image.Resampling.BILINEAR)
    (top, left), (height, width) = jitter.corner, jitter.size
    return np.asarray(image.crop((left, top, left + width, top + height)))


def jitter_masks(masks: Sequence[Rle], jitter: Jitter) -> ImageArray:
    """Transform masks; nearest pixel.

    Only the crop is computed, in the memory order of RLE, columns first.

    Args:
        masks: n, at the stored image's size.
        jitter: of the image.

    Returns:
        uint8 [n, w, h]: columns first.
    """
    if not masks:
        return np.zeros((0, jitter.size[1], jitter.size[0]), dtype=np.uint8)
    height, width = masks[0]["size"]
    rows, columns = (
        _nearest(side, resized, first, count)
        for side, resized, first, count in zip((height, width), jitter.resized, jitter.corner, jitter.size, strict=True)
    )
    if jitter.mirrored:
        columns = width - 1 - columns
    by_column = mask_api.decode(list(masks)).transpose(2, 1, 0)  # [n, W, H], contiguous
    return by_column.take(columns, axis=1).take(rows, axis=2)


def _nearest(side: int, resized: int, first: int, count: int) -> IntArray:
    """Return the source pixel of each of ``count`` resized pixels from ``first`` on, by Pillow's nearest neighbor."""
    numbers = Image.fromarray(np.arange(side, dtype=np.int32)[None])
    return np.asarray(numbers.resize((resized, 1), Image.Resampling.NEAREST))[0, first : first + count].astype(np.int64)


def boxes_of_masks(masks: ImageArray) -> FloatArray:
    """Return the bounding boxes of masks that are not empty.

    Args:
        masks: uint8 [n, w, h], columns first.

    Returns:
        float64 [n, 4]: left, top, right, bottom, in pixels; right and bottom are the last pixel plus 1.
    """
    boxes = np.zeros((len(masks), 4))
    for first, axis in ((0, 2), (1, 1)):
        used = np.asarray(masks.any(axis=axis))
        boxes[:, first] = used.argmax(axis=1)
        boxes[:, first + 2] = used.shape[1] - used[:, ::-1].argmax(axis=1)
    return boxes
