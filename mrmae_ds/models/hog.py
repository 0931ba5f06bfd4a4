"""Histograms of oriented gradients as the targets of tokens (MaskFeat, Wei et al. 2022)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BINS, CELL = 9, 8


def cell_size(patch: int) -> int:
    """Return the side of a cell in pixels: 8, or that of a token if it is smaller."""
    return min(CELL, patch)


def hog_width(patch: int) -> int:
    """Return the number of values of a token of ``patch`` pixels a side."""
    return 3 * BINS * (patch // cell_size(patch)) ** 2


def hog_of_pixels(pixels: Tensor, patch: int) -> Tensor:
    """Compute the histograms of decoded images, without rounding errors in their gradients.

    Many gradients of 8-bit images are vertical, at the edge of the first and the last bin: a rounding error of their
    horizontal part would decide in which of the two their whole magnitude is counted. In whole multiples of 1/256 of an
    8-bit level, sums and differences are exact in float32, on every device; 8-bit images lie on them, whichever way
    they were divided by 255, and other images are changed by at most 1/512 of a level.

    Args:
        pixels: decoded, not normalized images in [0, 1], [B, 3, H, W] in full precision.
        patch: as for :func:`hog_tokens`.

    Returns:
        As :func:`hog_tokens`, without a gradient.
    """
    return hog_tokens((pixels * (255 * 256)).round(), patch)


def hog_tokens(images: Tensor, patch: int) -> Tensor:
    """Compute the histograms of the cells of each token.

    Gradients are Sobel's, by shifts: TF32 convolutions would move pixels to the next bin. A histogram has unit length
    (a flat cell is 0), so neither the scale of the images nor an offset matters, except that rounding moves vertical
    gradients to another bin: see :func:`hog_of_pixels`.

    Args:
        images: [B, 3, H, W] in full precision; of whole numbers, at most 2²¹, no gradient is rounded in float32.
        patch: side p of a token in pixels, a multiple of its cells'.

    Returns:
        [B, L, 3 * 9 * c * c] for c = p / 8 cells a side, ordered color, direction, row, column of the cell.
    """
    cell = cell_size(patch)
    x = F.pad(images, (1, 1, 1, 1), mode="reflect")
    rows = x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]
    columns = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    horizontal = rows[..., :-2] - rows[..., 2:]
    vertical = columns[..., :-2, :] - columns[..., 2:, :]
    magnitude = torch.stack([horizontal, vertical]).norm(dim=0)
    # Of 20 degrees each; opposite directions share one.
    direction = (torch.atan2(horizontal, vertical) / math.pi * BINS).floor() % BINS
    # A sum per direction instead of a scatter, whose order of additions varies on GPUs.
    histograms = torch.stack(
        [
            (magnitude * (direction == i)).unflatten(3, (-1, cell)).unflatten(2, (-1, cell)).sum((3, 5))
            for i in range(BINS)
        ],
        dim=2,
    )
    side = patch // cell
    cells = F.normalize(histograms, dim=2).unflatten(4, (-1, side)).unflatten(3, (-1, side))
    return cells.permute(0, 3, 5, 1, 2, 4, 6).flatten(3).flatten(1, 2)
