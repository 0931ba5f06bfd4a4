"""Self-attention of a map, in windows or global, with decomposed relative positions (ViTDet, Li et al. 2022).

Shape legend: B maps (or windows), h x w their cells, N = h*w, C width, M heads of width d.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from torch import Tensor, nn


class WindowAttention(Attention):
    """Attention for timm's ``Block``, which otherwise treats cells independently, and so accepts maps.

    Args:
        dim: width C.
        num_heads: M.
        window: side of a window in cells; 0 attends over the whole map. A map that windows do not tile is padded with
            zeros on the right and at the bottom. Padding takes part as keys, as in ViTDet.
        grid: rows and columns of the map that a global block's tables are built for.
    """

    def __init__(self, dim: int, num_heads: int, window: int, grid: tuple[int, int]) -> None:
        super().__init__(dim, num_heads, qkv_bias=True)
        self.window = window
        rows, columns = (window, window) if window else grid
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * rows - 1, self.head_dim))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * columns - 1, self.head_dim))

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """Map [B, h, w, C] to the same shape; the other arguments are the block's, and not used."""
        if not self.window:
            return self._attend(x)
        windows, padded = split_windows(x, self.window)
        return join_windows(self._attend(windows), self.window, padded, (x.shape[1], x.shape[2]))

    def received(self, x: Tensor) -> Tensor:
        """Return the attention that the cells of a map [B, h, w, C] receive: mean over heads and queries, [B, N].

        The block must be global. Heads follow one another, because a map of N x N of each is large.
        """
        q, k, _, rows, columns = self._terms(x)
        total = torch.zeros(len(x), q.shape[2], device=x.device)
        for head in range(self.num_heads):
            bias = (rows[:, head, :, :, None] + columns[:, head, :, None, :]).flatten(-2)
            logits = (q[:, head] * self.scale) @ k[:, head].transpose(1, 2) + bias
            total += logits.float().softmax(dim=-1).mean(dim=1)
        return total / self.num_heads

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v, rows, columns = self._terms(x)
        folds = q.is_cuda and q.dtype == torch.bfloat16
        out = (attend_folded if folds else attend_masked)(q, k, v, rows.to(q.dtype), columns.to(q.dtype))
        return self.proj(out.transpose(1, 2).reshape(*x.shape[:3], self.attn_dim))

    def _terms(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return queries, keys and values [B, M, N, d] of a map, and its relative terms [B, M, N, h], [B, M, N, w]."""
        batch, height, width, _ = x.shape
        qkv = self.qkv(x).reshape(batch, height * width, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q_map = q.unflatten(2, (height, width))
        # The relative terms take the query without the scale.
        rows = torch.einsum("bmyxd,ykd->bmyxk", q_map, relative_table(self.rel_pos_h, height)).flatten(2, 3)
        columns = torch.einsum("bmyxd,xkd->bmyxk", q_map, relative_table(self.rel_pos_w, width)).flatten(2, 3)
        return q, k, v, rows, columns


def relative_table(table: Tensor, side: int) -> Tensor:
    """Look up the relative positions of all pairs of cells of an axis.

    Args:
        table: row i belongs to the distance i - (rows - 1) / 2, [rows, d]; resized linearly to 2*side - 1 rows.
        side: number of cells.

    Returns:
        Rows of query cell minus key cell, [side, side, d].
    """
    if len(table) != 2 * side - 1:
        table = F.interpolate(table.float().T[None], size=2 * side - 1, mode="linear")[0].T.to(table.dtype)
    cells = torch.arange(side, device=table.device)
    return table[cells[:, None] - cells + side - 1]


def attend_masked(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Attend with the relative terms as an additive mask [B, M, N, N], which is materialized.

    Args:
        q: queries [B, M, N, d].
        k: keys [B, M, N, d].
        v: values [B, M, N, d].
        rows: relative term of each query and row of keys, [B, M, N, h].
        columns: relative term of each query and column of keys, [B, M, N, w].

    Returns:
        [B, M, N, d].
    """
    mask = (rows[..., :, None] + columns[..., None, :]).flatten(-2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attend_folded(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Attend with the relative terms as further channels of the queries, and one-hot cells as those of the keys.

    Without a mask flash kernels apply, and no map of N x N is stored: at 1024 pixels it has 400 MB an image and block.
    They take heads up to 256 wide: d + h + w, which all of q, k and v are zero-padded to, and to a multiple of 8.

    Args:
        q: queries [B, M, N, d].
        k: keys [B, M, N, d].
        v: values [B, M, N, d].
        rows: relative term of each query and row of keys, [B, M, N, h].
        columns: relative term of each query and column of keys, [B, M, N, w].

    Returns:
        [B, M, N, d].
    """
    d, height, width = q.shape[-1], rows.shape[-1], columns.shape[-1]
    row_of = torch.eye(height, dtype=k.dtype, device=k.device).repeat_interleave(width, dim=0)
    column_of = torch.eye(width, dtype=k.dtype, device=k.device).repeat(height, 1)
    cells = torch.cat([row_of, column_of], dim=1).expand(*k.shape[:2], -1, -1)
    queries = torch.cat([q * d**-0.5, rows, columns], dim=-1)
    keys = torch.cat([k, cells], dim=-1)
    wide = -(-keys.shape[-1] // 8) * 8
    queries, keys, values = (F.pad(t, (0, wide - t.shape[-1])) for t in (queries, keys, v))
    return F.scaled_dot_product_attention(queries, keys, values, scale=1.0)[..., :d]


def split_windows(x: Tensor, window: int) -> tuple[Tensor, tuple[int, int]]:
    """Pad a map with zeros on the right and at the bottom, and split it into windows.

    Args:
        x: map [B, h, w, C].
        window: side of a window in cells.

    Returns:
        Windows [B * rows * columns of windows, window, window, C], and rows and columns of windows.
    """
    rows, columns = -(-x.shape[1] // window), -(-x.shape[2] // window)
    x = F.pad(x, (0, 0, 0, columns * window - x.shape[2], 0, rows * window - x.shape[1]))
    x = x.unflatten(2, (columns, window)).unflatten(1, (rows, window)).transpose(2, 3)
    return x.flatten(0, 2), (rows, columns)


def join_windows(windows: Tensor, window: int, count: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Join windows into maps and remove their padding.

    Args:
        windows: [B * rows * columns, window, window, C].
        window: side of a window in cells.
        count: rows and columns of windows.
        size: h and w of the map.

    Returns:
        [B, h, w, C].
    """
    x = windows.unflatten(0, (-1, *count)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x[:, : size[0], : size[1]]
