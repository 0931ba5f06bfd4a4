"""Choice of the visible tokens, and their mapping to every stage's grid.

Shape legend: B images, L tokens of the final grid (rows * columns, raster order), K visible tokens,
s cells of a stage per token side, C channels.

Convolutional stages compute visible cells only, as blocks [B, K, s, s, C]: a block is the area that one token of the
final grid covers in that stage. This is MCMAE's block-wise multi-scale mask (the final mask repeated by nearest
neighbor), without computing cells that are never used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

MaskingMode = Literal["random", "sample", "topk"]


def num_visible(num_tokens: int, keep_ratio: float) -> int:
    """Return the number of visible tokens, ``int(L * keep_ratio)`` as in MAE (49 of 196 at 0.25)."""
    return int(num_tokens * keep_ratio)


@dataclass(frozen=True)
class TokenMask:
    """The removed tokens of a batch whose encoder computes all of them, with a mask token in place of a removed one.

    Attributes:
        removed: True where a token is removed, bool [B, L]; images may differ in their number.
        grid: rows and columns of the final grid, rows * columns = L.
    """

    removed: Tensor
    grid: tuple[int, int]

    @property
    def mask(self) -> Tensor:
        """Return the mask, float32 [B, L]: 1 where a token is removed."""
        return self.removed.float()

    def take(self, tokens: Tensor) -> Tensor:
        """Return the encoder's tokens, all of them, [B, L, ...], of all tokens [B, L, ...] or [1, L, ...]."""
        return tokens.expand(len(self.removed), *tokens.shape[1:])

    def fill(self, tokens: Tensor, mask_token: Tensor) -> Tensor:
        """Replace the removed tokens of [B, L, C] by ``mask_token`` [1, 1, C]."""
        # mask_token is fp32, while the tokens may be bf16 under autocast.
        return torch.where(self.removed[..., None], mask_token.to(tokens.dtype), tokens)

    @classmethod
    def whole(cls, batch: int, grid: tuple[int, int], device: torch.device) -> TokenMask:
        """Return a mask that removes nothing of ``batch`` images on ``device``."""
        return cls(torch.zeros(batch, grid[0] * grid[1], dtype=torch.bool, device=device), grid)

    @classmethod
    def of_units(cls, visible: VisibleSet, grid: tuple[int, int]) -> TokenMask:
        """Return the mask of a visible set on a coarser grid, whose cells are squares of tokens of ``grid``."""
        removed, side = visible.mask.bool().unflatten(1, visible.grid), grid[0] // visible.grid[0]
        return cls(removed.repeat_interleave(side, 1).repeat_interleave(side, 2).flatten(1), grid)


@dataclass(frozen=True)
class VisibleSet:
    """The visible tokens of a batch, the only ones that the encoder computes.

    Attributes:
        ids_keep: indices of the visible tokens in the encoder's order, int64 [B, K].
        ids_restore: position of each token in [visible | removed], int64 [B, L].
        grid: rows and columns of the final grid, rows * columns = L.
    """

    ids_keep: Tensor
    ids_restore: Tensor
    grid: tuple[int, int]

    @property
    def mask(self) -> Tensor:
        """Return the mask, float32 [B, L]: 1 where a token is removed, 0 where it is visible."""
        return (self.ids_restore >= self.ids_keep.shape[1]).float()

    def take(self, tokens: Tensor) -> Tensor:
        """Return the visible tokens [B, K, ...] of all tokens [B, L, ...] (or [1, L, ...], shared by the batch)."""
        batch, keep = self.ids_keep.shape
        index = self.ids_keep.reshape(batch, keep, *([1] * (tokens.dim() - 2)))
        tokens = tokens.expand(batch, *tokens.shape[1:])
        return tokens.gather(1, index.expand(batch, keep, *tokens.shape[2:]))

    def restore(self, visible: Tensor, filler: Tensor) -> Tensor:
        """Merge visible tokens [B, K, D] and removed ones [B, L - K, D] into all tokens in raster order, [B, L, D].

        Args:
            visible: in the order of ``ids_keep``.
            filler: in the order of ``ids_removed``.
        """
        order = self.ids_restore[..., None].expand(-1, -1, visible.shape[-1])
        return torch.cat([visible, filler], dim=1).gather(1, order)

    @property
    def ids_removed(self) -> Tensor:
        """Return the indices of the removed tokens, int64 [B, L - K]."""
        return self.ids_restore.argsort(dim=1)[:, self.ids_keep.shape[1] :]

    @classmethod
    def whole(cls, batch: int, grid: tuple[int, int], device: torch.device) -> VisibleSet:
        """Return the set of all tokens, in raster order, of ``batch`` images on ``device``."""
        ids = torch.arange(grid[0] * grid[1], device=device).expand(batch, -1)
        return cls(ids, ids, grid)

    def cells(self) -> VisibleCells:
        """Return where the cells of the visible tokens lie in the map of any stage."""
        rows, columns = self.grid
        batch, keep = self.ids_keep.shape
        first = torch.arange(0, batch * rows * columns, rows * columns, device=self.ids_keep.device)
        tokens = (self.ids_keep + first[:, None]).flatten()
        return VisibleCells(tokens // columns, tokens % columns, (batch, keep), self.grid)


@dataclass(frozen=True)
class VisibleCells:
    """Places of the visible tokens' cells in the map [B, rows*s, columns*s, C] of a stage.

    A block is taken from the map and put into it as it lies there: the map keeps the layout that a convolution over
    channels-last tensors wants, and nothing is rearranged.

    Attributes:
        rows: row of each visible token among the token rows of all images, int64 [B * K].
        columns: its column in the final grid, int64 [B * K].
        counts: B and K.
        grid: rows and columns of the final grid.
    """

    rows: Tensor
    columns: Tensor
    counts: tuple[int, int]
    grid: tuple[int, int]

    def take(self, grid_map: Tensor) -> Tensor:
        """Return the visible blocks [B, K, s, s, C] of a map [B, rows*s, columns*s, C]."""
        s, channels = grid_map.shape[1] // self.grid[0], grid_map.shape[-1]
        grid_map = grid_map.reshape(-1, s, self.grid[1], s * channels)
        blocks: Tensor = _TakeBlocks.apply(grid_map, self.rows, self.columns)
        return blocks.reshape(*self.counts, s, s, channels)

    def put(self, blocks: Tensor) -> Tensor:
        """Scatter visible blocks [B, K, s, s, C] into a map of zeros [B, rows*s, columns*s, C]."""
        s, channels = blocks.shape[-2:]
        batch, (rows, columns) = self.counts[0], self.grid
        blocks = blocks.reshape(-1, s, s * channels)
        grid_map: Tensor = _PutBlocks.apply(blocks, self.rows, self.columns, (batch * rows, s, columns, s * channels))
        return grid_map.reshape(batch, rows * s, columns * s, channels)


def _put(blocks: Tensor, rows: Tensor, columns: Tensor, shape: tuple[int, ...]) -> Tensor:
    grid_map = blocks.new_zeros(shape)
    grid_map[rows, :, columns] = blocks
    return grid_map


# Each place occurs once: torch's own gradient would add what is only to be copied, atomically on a GPU.
class _TakeBlocks(torch.autograd.Function):
    """Blocks [B * K, s, s*C] of a map [B * rows, s, columns, s*C]."""

    @staticmethod
    def forward(ctx: Any, grid_map: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(rows, columns)
        ctx.shape = tuple(grid_map.shape)
        return grid_map[rows, :, columns]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, columns = ctx.saved_tensors
        return _put(grad, rows, columns, ctx.shape), None, None


class _PutBlocks(torch.autograd.Function):
    """Map [B * rows, s, columns, s*C] with blocks [B * K, s, s*C], and zeros elsewhere."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, rows: Tensor, columns: Tensor, shape: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(rows, columns)
        return _put(blocks, rows, columns, shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        rows, columns = ctx.saved_tensors
        return grad[rows, :, columns], None, None, None


class VisibleFeatures(TypedDict):
    """Output of an encoder for visible tokens (all of a :class:`TokenMask`), P prefix tokens first if there are any.

    Attributes:
        tokens: [B, P + K, C] after the last block, before any norm.
        stages: [B, K, s, s, c] after each convolutional stage; empty for a plain ViT.
        blocks: [B, P + K, C] after each transformer block that was requested.
    """

    tokens: Tensor
    stages: list[Tensor]
    blocks: list[Tensor]


def choose_visible(
    noise: Tensor,
    grid: tuple[int, int],
    keep_ratio: float,
    mode: MaskingMode = "random",
    importance: Tensor | None = None,
) -> VisibleSet:
    """Draw the visible set of each image.

    Args:
        noise: uniform in [0, 1), [B, L]; the only source of randomness.
        grid: rows and columns of the token grid.
        keep_ratio: visible share (the paper's "mask ratio 25 %" is 0.25 here).
        mode: ``random`` keeps the smallest noise (MAE); ``sample`` draws without replacement with probability
            proportional to importance (MILAN); ``topk`` keeps the most important tokens (the MR-MAE paper's wording).
        importance: non-negative importance of each token, the teacher's class-to-patch attention [B, L]; unused by
            ``random``.

    Raises:
        ValueError: for shapes that do not match, a missing importance, or a ratio that leaves no token visible.
    """
    rows, columns = grid
    if noise.dim() != 2 or noise.shape[1] != rows * columns:
        raise ValueError(f"noise is {tuple(noise.shape)}, expected [B, {rows * columns}] for the grid {grid}")
    if mode != "random" and (importance is None or importance.shape != noise.shape):
        shape = None if importance is None else tuple(importance.shape)
        raise ValueError(f"masking mode {mode!r} needs importance of shape {tuple(noise.shape)}, got {shape}")
    if mode == "random":
        score = noise
    elif mode == "sample":
        assert importance is not None
        # Exponential race: the K smallest -log(u)/p are a draw of K without replacement with weights p
        # (Efraimidis and Spirakis 2006). p is clamped below any positive float32, so that p = 0 comes after every
        # p > 0 and ties stay uniform; float64 has the range for the quotient.
        tiny = torch.finfo(torch.float32).tiny
        score = -noise.double().clamp_min(tiny).log() / importance.double().clamp_min(1e-60)
    else:
        assert importance is not None
        score = -importance.float()
    shuffle = score.argsort(dim=1, stable=True)
    keep = num_visible(rows * columns, keep_ratio)
    if keep < 1:
        raise ValueError(f"keep_ratio {keep_ratio} of {rows * columns} tokens leaves none visible")
    return VisibleSet(shuffle[:, :keep], shuffle.argsort(dim=1), grid)
