"""Fixed 2-D sin-cos position embeddings and resizing of position embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_pos_embed(dim: int, grid: tuple[int, int], prefix_tokens: int = 0) -> Tensor:
    """Compute MAE's position embedding (the authors' ``util/pos_embed.py``).

    The first half of the channels encodes the column (x), the second half the row (y), each as [sin | cos] of
    position * 10000^(-i / (dim/4)); prefix tokens (a class token) get zeros. Computed in float64.

    Args:
        dim: number of channels.
        grid: rows and columns of the token grid.
        prefix_tokens: number of tokens before the grid's.

    Returns:
        Position embedding, float32 [1, prefix_tokens + rows*columns, dim].

    Raises:
        ValueError: if ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"a sin-cos position embedding needs a width that is a multiple of 4, got {dim}")
    rows, columns = grid
    y, x = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles = torch.stack([x.flatten(), y.flatten()])[..., None] * omega  # [2, L, dim/4]
    halves = torch.cat([angles.sin(), angles.cos()], dim=-1)  # [2, L, dim/2]
    tokens = torch.cat([halves[0], halves[1]], dim=-1)
    return torch.cat([torch.zeros(prefix_tokens, dim, dtype=torch.float64), tokens]).float()[None]


def resize_pos_embed(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int], prefix_tokens: int = 0) -> Tensor:
    """Resize a position embedding to another grid: bicubic, align_corners=False, in float32 (MAE, MCMAE).

    Args:
        pos_embed: position embedding [1, prefix_tokens + old rows*columns, C].
        old: its rows and columns.
        new: rows and columns of the result.
        prefix_tokens: number of tokens before the grid's, whose rows do not change.

    Returns:
        Position embedding [1, prefix_tokens + new rows*columns, C] of the same dtype; ``pos_embed`` itself if the grids
        are equal.
    """
    if old == new:
        return pos_embed
    prefix, patches = pos_embed[:, :prefix_tokens], pos_embed[:, prefix_tokens:]
    grid_map = patches.float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(grid_map, size=new, mode="bicubic", align_corners=False)
    resized = resized.permute(0, 2, 3, 1).reshape(1, new[0] * new[1], -1).to(pos_embed.dtype)
    return torch.cat([prefix, resized], dim=1)
