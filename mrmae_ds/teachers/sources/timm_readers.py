"""How tokens and importance are read out of a timm network: from a ViT's last block, or from a stage's feature map.

Shape legend: B images, L patch tokens in raster order, P prefix tokens (class, registers), N = P + L, C width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.models import vision_transformer
from torch import Tensor, nn

from mrmae_ds.errors import UserError
from mrmae_ds.teachers.base import LastBlockInput, check_tiles, class_attention, importance_words
from mrmae_ds.teachers.options import TeacherOptions


class WholeAttention:
    """Keeps a layer's attention matrix [B, heads, N, N] during one forward; the layer's fused path must be off."""

    def __init__(self, attn: nn.Module) -> None:
        self.attn = attn
        self.weights: Tensor | None = None

    def __enter__(self) -> WholeAttention:
        self.handle = self.attn.attn_drop.register_forward_pre_hook(self._keep)
        return self

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """The dropout's input is the matrix [B, heads, N, N]."""
        self.weights = inputs[0]

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


class BlockReader:
    """Tokens of a ViT's last block, and that block's attention.

    Where the layer is timm's plain one, a row of the attention is computed beside it; any other (rotary or relative
    positions, grouped heads, ...) computes its whole matrix itself, unfused, and is overheard.

    Args:
        network: with ``blocks`` of one grid, each with an ``attn``; pruned to what is needed.
        options: ``ln_post`` features apply the final norm.

    Raises:
        NotThisKind: if the last block's attention is not one between N tokens.
    """

    def __init__(self, network: nn.Module, options: TeacherOptions) -> None:
        self.normalized = options.features == "ln_post"
        self.prefix: int = network.num_prefix_tokens
        self.has_class = self.prefix > 0 and getattr(network, "cls_token", None) is not None
        self.importance = importance_words(self.has_class)
        block = network.blocks[-1]
        self.plain = type(block) is vision_transformer.Block and type(block.attn) is vision_transformer.Attention
        block.attn.fused_attn = block.attn.fused_attn and self.plain
        size = options.image_size
        with torch.no_grad(), WholeAttention(block.attn) as seen:
            tokens = self._tokens(network, torch.zeros(1, 3, size, size), "NCHW")
        self.grid, self.width = (tokens.shape[2], tokens.shape[3]), tokens.shape[1]
        if not self.plain and not _is_softmax(seen.weights, self.prefix + self.grid[0] * self.grid[1]):
            raise NotThisKind
        check_tiles(network.feature_info[-1]["reduction"], size, options.key)
        network.prune_intermediate_layers(1, prune_norm=not self.normalized, prune_head=True)

    def _tokens(self, network: nn.Module, images: Tensor, output_fmt: str) -> Tensor:
        """The last block's patch tokens of [B, 3, H, W]: [B, L, C] as ``NLC``, [B, C, rows, columns] as ``NCHW``."""
        return network.forward_intermediates(
            images, indices=1, norm=self.normalized, output_fmt=output_fmt, intermediates_only=True
        )[-1]

    def __call__(self, network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, L, C] and importance [B, L] of normalized images [B, 3, H, W]."""
        block = network.blocks[-1]
        attn = block.attn
        if not self.plain:
            with WholeAttention(attn) as seen:
                tokens = self._tokens(network, images, "NLC")
            assert seen.weights is not None
            rows = seen.weights[:, :, :1] if self.has_class else seen.weights[:, :, self.prefix :]
            return tokens, rows.float().mean(dim=(1, 2))[:, self.prefix :]
        with LastBlockInput(block) as seen_input:
            tokens = self._tokens(network, images, "NLC")
        importance = class_attention(
            block.norm1(seen_input.x),
            attn.qkv.weight,
            attn.qkv.bias,
            attn.num_heads,
            self.prefix,
            from_class=self.has_class,
            q_norm=attn.q_norm,
            k_norm=attn.k_norm,
        )
        return tokens, importance


class MapReader:
    """One stage's feature map as tokens, and its L2 norm over channels as importance.

    Args:
        network: with ``forward_intermediates``; pruned to what is needed.
        options: the stage, or the grid that it must have.

    Raises:
        UserError: if no stage has the student's grid, or the named one does not exist, or a stride does not tile the
            image.
    """

    def __init__(self, network: nn.Module, options: TeacherOptions) -> None:
        if options.features != "raw":
            raise UserError(f"{options.key}.features: a feature map of {options.source} is raw; use raw")
        size = options.image_size
        with torch.no_grad():
            maps = network.forward_intermediates(
                torch.zeros(1, 3, size, size), output_fmt="NCHW", intermediates_only=True
            )
        self.stage = _choose_stage([(m.shape[2], m.shape[3]) for m in maps], options)
        self.importance = f"feature norm of stage {self.stage} (of 0 to {len(maps) - 1})"
        chosen = maps[self.stage]
        check_tiles(network.feature_info[self.stage]["reduction"], size, options.key)
        self.grid, self.width = (chosen.shape[2], chosen.shape[3]), chosen.shape[1]
        network.prune_intermediate_layers([self.stage], prune_norm=True, prune_head=True)

    def __call__(self, network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, L, C] and importance [B, L] of normalized images [B, 3, H, W]."""
        features = network.forward_intermediates(
            images, indices=[self.stage], stop_early=True, output_fmt="NCHW", intermediates_only=True
        )[-1]
        tokens = features.flatten(2).transpose(1, 2)
        return tokens, tokens.float().norm(dim=-1)


def _is_softmax(weights: Tensor | None, tokens: int) -> bool:
    """Whether these are shares of attention between all tokens, [B, heads, N, N] (not between channels, or signed)."""
    if weights is None or weights.shape[2:] != (tokens, tokens):
        return False
    if weights.is_meta:  # a plan is made of shapes
        return True
    sums = weights.sum(-1)
    return bool((weights >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-4)


class NotThisKind(Exception):
    """The network is not what a reader reads."""


TimmReader = BlockReader | MapReader


def timm_reader(network: nn.Module, options: TeacherOptions) -> TimmReader:
    """The reader of a timm network, which is put in eval mode, tried on one image, and pruned.

    Raises:
        UserError: naming the recipe key: an input size or a grid that does not fit, or nothing to read.
    """
    network.eval()
    if not hasattr(network, "forward_intermediates"):
        raise UserError(f"{options.key}.source: timm gives no features of {options.source}; choose another model")
    if _has_blocks_of_tokens(network):
        if options.stage is not None:
            raise UserError(
                f"{options.key}.stage: {options.source} has no stages but blocks of one grid, and the last is taken; "
                "remove the key"
            )
        try:
            return _tried(BlockReader, network, options)
        except NotThisKind:
            pass
    return _tried(MapReader, network, options)


def _tried(kind: Callable[[nn.Module, TeacherOptions], Any], network: nn.Module, options: TeacherOptions) -> Any:
    try:
        return kind(network, options)
    except (AssertionError, RuntimeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{options.key}.image_size: {options.source} does not take {options.image_size} pixels "
            f"({' '.join(str(error).split())})"
        ) from None


def _has_blocks_of_tokens(network: nn.Module) -> bool:
    blocks = getattr(network, "blocks", None)
    if not hasattr(network, "num_prefix_tokens") or not isinstance(blocks, nn.Sequential | nn.ModuleList):
        return False
    attn = getattr(blocks[-1], "attn", None)
    return isinstance(getattr(attn, "attn_drop", None), nn.Module) and hasattr(attn, "fused_attn")


def _choose_stage(grids: list[tuple[int, int]], options: TeacherOptions) -> int:
    size, wanted = options.image_size, options.student_grid
    listed = ", ".join(
        f"{stage} {rows}x{columns} (stride {size / rows:.3g})" for stage, (rows, columns) in enumerate(grids)
    )
    shown = f"the stages of {options.source} at {size} pixels are {listed}"
    if options.stage is not None and options.stage >= len(grids):
        raise UserError(f"{options.key}.stage: no stage {options.stage}; {shown}")
    fitting = [stage for stage, grid in enumerate(grids) if grid == wanted]
    if options.stage is not None:
        fitting = [stage for stage in fitting if stage == options.stage]
    if not fitting:
        what = "no stage has" if options.stage is None else f"stage {options.stage} does not have"
        raise UserError(
            f"{options.key}: {what} the student's {wanted[0]}x{wanted[1]} grid; {shown}. Set {options.key}.image_size "
            f"to {wanted[0]} times the stride of the stage you want"
        )
    return fitting[-1]
