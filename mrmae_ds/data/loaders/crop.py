"""Crop boxes and flips as pure functions of (seed, epoch, sample), without a generator or other state.

FFCV draws its crops from numba's per-thread generators, so the same seed gives different pixels with another number of
threads or ranks and after a restart. Here every draw is a hash of its purpose, so that the augmentation is the same in
any process. Plain numpy, vectorized over the B samples of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mrmae_ds.data.types import FloatArray, IntArray, UIntArray
from mrmae_ds.errors import UserError
from mrmae_ds.imagenet import crop_share

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_TRIES = 10
# A sample's stream of draws: four for each try (area, ratio, top, left), then the flip.
_FLIP_DRAW = 4 * _TRIES


@dataclass(frozen=True)
class CropSettings:
    """Random crop and flip of a training image.

    Attributes:
        scale: bounds of the box's share of the image's area. No default: pre-training and fine-tuning differ.
        ratio: bounds of the box's width over its height.
        flip: probability of mirroring left to right.
    """

    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UserError: if one is out of range.
        """
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"crop scale must be 0 < low <= high <= 1, not {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(f"crop ratio must be 0 < low <= high, not {self.ratio}")
        if not 0 <= self.flip <= 1:
            raise UserError(f"flip must be a probability, not {self.flip}")


def splitmix64(state: UIntArray) -> UIntArray:
    """Apply the output function of SplitMix64 (Steele, Lea and Flood 2014), bijective on 64 bits; any shape."""
    z = state + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def sample_keys(seed: int, epoch: int, indices: IntArray) -> UIntArray:
    """Return the 64-bit key of each sample in one epoch, of which all its randomness is a function.

    Args:
        seed: not negative.
        epoch: not negative.
        indices: rows of the samples in the data set, int64 [B].

    Returns:
        uint64 [B].
    """
    key = splitmix64(np.array([seed], dtype=np.uint64))
    key = splitmix64(key ^ np.uint64(epoch))
    return splitmix64(key ^ indices.astype(np.uint64))


def _uniform(keys: UIntArray, draw: int | IntArray) -> FloatArray:
    """Return the ``draw``-th number of each stream, uniform in [0, 1) with 53 random bits, [B].

    ``draw`` [D, 1] gives [D, B].
    """
    state = keys + splitmix64(np.atleast_1d(np.asarray(draw, dtype=np.uint64)))
    return (splitmix64(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _largest_centered(heights: IntArray, widths: IntArray, ratio: tuple[float, float]) -> IntArray:
    """Return the largest centered boxes with width over height within ``ratio``, [B, 4]: top, left, height, width."""
    too_narrow = widths < ratio[0] * heights
    too_wide = widths > ratio[1] * heights
    box_heights = np.where(too_narrow, np.rint(widths / ratio[0]), heights).astype(np.int64).clip(1, heights)
    box_widths = np.where(too_wide, np.rint(heights * ratio[1]), widths).astype(np.int64).clip(1, widths)
    return np.stack([(heights - box_heights) // 2, (widths - box_widths) // 2, box_heights, box_widths], axis=1)


def random_boxes(
    heights: IntArray, widths: IntArray, indices: IntArray, *, seed: int, epoch: int, crop: CropSettings
) -> IntArray:
    """Draw random resized crops and flips by torchvision's rule (``RandomResizedCrop.get_params``).

    Ten tries of an area uniform in ``crop.scale`` times the image's and an aspect ratio log-uniform in
    ``crop.ratio``; where none fits, the largest centered box whose ratio is within the bounds.

    Args:
        heights: of the stored images, pixels, int64 [B].
        widths: of the stored images, pixels, int64 [B].
        indices: rows of the samples in the data set, int64 [B].
        seed: not negative.
        epoch: not negative.
        crop: bounds and flip probability.

    Returns:
        int64 [B, 5]: top, left, box height, box width (pixels, inside the image), 1 if mirrored.
    """
    keys = sample_keys(seed, epoch, indices)
    boxes = np.empty((len(indices), 5), dtype=np.int64)
    boxes[:, :4] = _largest_centered(heights, widths, crop.ratio)
    boxes[:, 4] = _uniform(keys, _FLIP_DRAW) < crop.flip
    low, high = np.log(crop.ratio)
    # All tries of all samples at once: a call of numpy costs more than a batch's arithmetic.
    area, ratio, down, across = (_uniform(keys, 4 * np.arange(_TRIES)[:, None] + draw) for draw in range(4))
    target = heights * widths * (crop.scale[0] + (crop.scale[1] - crop.scale[0]) * area)
    aspect = np.exp(low + (high - low) * ratio)
    box_heights = np.rint(np.sqrt(target / aspect)).astype(np.int64)
    box_widths = np.rint(np.sqrt(target * aspect)).astype(np.int64)
    fits = (box_heights > 0) & (box_heights <= heights) & (box_widths > 0) & (box_widths <= widths)
    tops = (down * (heights - box_heights + 1)).astype(np.int64)
    lefts = (across * (widths - box_widths + 1)).astype(np.int64)
    (found,) = fits.any(axis=0).nonzero()
    first = fits.argmax(axis=0)[found]
    boxes[found, :4] = np.stack([part[first, found] for part in (tops, lefts, box_heights, box_widths)], axis=1)
    return boxes


def resize_and_corner(sides: IntArray, short_sides: IntArray, image_size: int) -> tuple[IntArray, IntArray]:
    """Apply MAE's evaluation along one axis: resize the short side to ``image_size / 0.875``, crop the center.

    Above 224 pixels the short side is resized to ``image_size`` itself. Rounding is torchvision's (``Resize``,
    ``CenterCrop``).

    Args:
        sides: of the images along the axis, pixels, int64 [B].
        short_sides: the smaller of both axes, pixels, int64 [B].
        image_size: pixels.

    Returns:
        The sides after resizing, and the start of the crop in the resized image, both int64 [B].
    """
    short = int(image_size / crop_share(image_size))
    resized = short * sides // short_sides
    return resized, np.rint((resized - image_size) / 2).astype(np.int64)


def center_boxes(heights: IntArray, widths: IntArray, image_size: int) -> FloatArray:
    """Return the boxes of evaluation (``resize_and_corner``) in the stored images; never mirrored.

    Args:
        heights: of the stored images, pixels, int64 [B].
        widths: of the stored images, pixels, int64 [B].
        image_size: pixels.

    Returns:
        float64 [B, 5]: top, left, height, width (pixels, fractional), 0.
    """
    short = np.minimum(heights, widths)
    boxes = np.zeros((len(heights), 5))
    for axis, sides in enumerate((heights, widths)):
        resized, corner = resize_and_corner(sides, short, image_size)
        scale = sides / resized
        boxes[:, axis], boxes[:, axis + 2] = corner * scale, image_size * scale
    return boxes
