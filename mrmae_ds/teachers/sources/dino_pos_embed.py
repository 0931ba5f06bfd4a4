"""DINO's own way to another grid of position embeddings, which differs from timm's."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

OFFSET = 0.1


def resize_like_dino(positions: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    """A ViT's position embedding [1, prefix + n*n, C] for another grid, as DINO and DINOv2 compute it.

    Bicubic without antialias, and coordinates scaled by (new + 0.1) / n where new / n would give the grid: their
    guard against rounding, which the weights' published results include. (DINOv2's models with registers do without
    the offset and with antialias, which is what timm does.) In float32.

    Raises:
        ValueError: if the patches' positions are not square.
    """
    side = math.isqrt(positions.shape[1] - prefix)
    if side * side != positions.shape[1] - prefix:
        raise ValueError(f"{positions.shape[1] - prefix} position embeddings are no square grid")
    if (side, side) == grid:
        return positions
    patches = positions[:, prefix:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = ((grid[0] + OFFSET) / side, (grid[1] + OFFSET) / side)
    resized = F.interpolate(patches, scale_factor=scale, mode="bicubic", antialias=False)
    assert resized.shape[2:] == grid
    resized = resized.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)
    return torch.cat([positions[:, :prefix], resized], dim=1)
