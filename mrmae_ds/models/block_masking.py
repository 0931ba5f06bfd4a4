"""Block-wise masking: blocks of random area and aspect are removed until enough tokens are (BEiT, Bao et al. 2021)."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_TRIES, _LOG_ASPECTS = 10, (math.log(0.3), math.log(1 / 0.3))


def block_masks(
    seeds: Iterable[int | bytes],
    grid: tuple[int, int],
    masked: int,
    min_block: int = 16,
    max_block: int | None = None,
    exact: bool = False,
) -> Tensor:
    """Draw the removed tokens of images, each from its own seed.

    Args:
        seeds: one an image.
        grid: rows and columns of the token grid.
        masked: largest number of removed tokens of an image; most images have it.
        min_block: smallest area of a block, in tokens.
        max_block: largest number of tokens that one block removes; None is no bound.
        exact: draw until ``masked`` tokens are removed, instead of stopping where no block fits (CAE).

    Returns:
        True where a token is removed, bool [B, L].
    """
    limit = masked if max_block is None else max_block
    masks = [block_mask(random.Random(seed), grid, masked, min_block, limit, exact) for seed in seeds]
    return torch.tensor(np.stack(masks)).flatten(1)


def block_mask(
    rng: random.Random, grid: tuple[int, int], masked: int, min_block: int, max_block: int, exact: bool
) -> npt.NDArray[np.bool_]:
    """Draw the removed tokens of one image, [rows, columns]; see :func:`block_masks`."""
    removed = np.zeros(grid, dtype=bool)
    count = tries = 0
    while count < masked and (exact or tries < _TRIES):
        left = min(masked - count, max_block)
        area, aspect = rng.uniform(min_block, left), math.exp(rng.uniform(*_LOG_ASPECTS))
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        tries += 1
        if rows >= grid[0] or columns >= grid[1]:
            continue
        top, first = rng.randint(0, grid[0] - rows), rng.randint(0, grid[1] - columns)
        block = removed[top : top + rows, first : first + columns]
        new = block.size - int(block.sum())
        if 0 < new <= left:
            block[:] = True
            count, tries = count + new, 0
    return removed
