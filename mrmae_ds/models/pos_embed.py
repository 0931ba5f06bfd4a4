"""Fixed 2-D sin-cos position embeddings and their resizing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_pos_embed(dim: int, grid: tuple[int, int], prefix_tokens: int = 0) -> Tensor:
    """MAE's position embedding, float32 [1, prefix_tokens + rows*columns, dim].

    The first half of the channels encodes the column (x), the second half the row (y), each as [sin | cos] of
    position * 10000^(-i / (dim/4)); prefix tokens (a class token) get zeros. Computed in float64.

    Raises:
        ValueError: if ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sin-cos positions need a width that is a multiple of 4, got {dim}")
    rows, columns = grid
    y, x = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles = torch.stack([x.flatten(), y.flatten()])[..., None] * omega  # [2, L, dim/4]
    halves = torch.cat([angles.sin(), angles.cos()], dim=-1)  # [2, L, dim/2]
    tokens = torch.cat([halves[0], halves[1]], dim=-1)
    return torch.cat([torch.zeros(prefix_tokens, dim, dtype=torch.float64), tokens]).float()[None]


def resize_pos_embed(positions: Tensor, old: tuple[int, int], new: tuple[int, int], prefix_tokens: int = 0) -> Tensor:
    """Positions [1, prefix_tokens + old rows*columns, C] for another grid: bicubic, align_corners=False, in float32.

    Prefix tokens (a class token) keep theirs.
    """
    if old == new:
        return positions
    prefix, patches = positions[:, :prefix_tokens], positions[:, prefix_tokens:]
    grid_map = patches.float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(grid_map, size=new, mode="bicubic", align_corners=False)
    resized = resized.permute(0, 2, 3, 1).reshape(1, new[0] * new[1], -1).to(positions.dtype)
    return torch.cat([prefix, resized], dim=1)
