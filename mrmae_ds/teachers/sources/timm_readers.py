"""Read tokens and importance from a timm network: from a ViT's last block, or from a stage's feature map.

Shape legend: B images, L patch tokens in raster order, P prefix tokens (class, registers), N = P + L, C width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from timm.models import vision_transformer
from torch import Tensor, nn

from mrmae_ds.errors import UserError
from mrmae_ds.teachers.base import (
    LastBlockInput,
    TeacherOutput,
    class_attention,
    describe_importance,
    join_layers,
)
from mrmae_ds.teachers.options import TeacherOptions


# Types of timm's modules, which are not annotated themselves: the attributes that are used here, and nothing else. They
# are never instantiated.
class TimmAttention(nn.Module):
    """Attention layer of a block of tokens."""

    qkv: nn.Linear
    num_heads: int
    q_norm: nn.Module
    k_norm: nn.Module
    attn_drop: nn.Module
    fused_attn: bool


class TimmBlock(nn.Module):
    """Block of a network of tokens."""

    norm1: nn.Module
    attn: TimmAttention


class TimmNetwork(nn.Module):
    """A timm model without head; ``blocks`` and ``num_prefix_tokens`` only where it consists of blocks of one grid."""

    pretrained_cfg: Mapping[str, Any]
    feature_info: Sequence[Mapping[str, Any]]
    forward_intermediates: Callable[..., list[Tensor]]
    prune_intermediate_layers: Callable[..., list[int]]
    patch_embed: Any
    blocks: Sequence[TimmBlock]
    num_prefix_tokens: int


class AttentionMatrix:
    """Context manager that captures a layer's attention matrix; the layer's fused path must be off.

    Attributes:
        weights: attention [B, heads, N, N] of the last forward inside the context, or None before one.
    """

    def __init__(self, attn: TimmAttention) -> None:
        self.attn = attn
        self.weights: Tensor | None = None

    def __enter__(self) -> AttentionMatrix:
        self.handle = self.attn.attn_drop.register_forward_pre_hook(self._keep)
        return self

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Keep the dropout's input, which is the matrix [B, heads, N, N]."""
        self.weights = inputs[0]

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


class BlockReader:
    """Reader of the tokens of a ViT's last block and of that block's attention.

    For timm's plain attention layer, one row of the attention is computed beside the layer. Any other layer (rotary or
    relative positions, grouped heads, ...) is run unfused, and its attention matrix is captured by a forward hook.

    Args:
        network: model with ``blocks`` of one grid, each with an ``attn``; it is pruned to the needed parts.
        options: ``ln_post`` features apply the final norm.

    Raises:
        UnsupportedNetworkError: if the last block's attention is not between N tokens.
    """

    def __init__(self, network: TimmNetwork, options: TeacherOptions) -> None:
        self.normalized = options.features == "ln_post"
        self.prefix = network.num_prefix_tokens
        self.has_class = self.prefix > 0 and getattr(network, "cls_token", None) is not None
        self.importance = describe_importance(self.has_class)
        block = network.blocks[-1]
        self.plain = type(block) is vision_transformer.Block and type(block.attn) is vision_transformer.Attention
        block.attn.fused_attn = block.attn.fused_attn and self.plain
        size = options.image_size
        with torch.no_grad(), AttentionMatrix(block.attn) as captured:
            tokens = self._tokens(network, torch.zeros(1, 3, size, size), "NCHW")
        self.grid, self.width = (tokens.shape[2], tokens.shape[3]), tokens.shape[1]
        if not self.plain and not _is_softmax(captured.weights, self.prefix + self.grid[0] * self.grid[1]):
            raise UnsupportedNetworkError
        options.check_tiles(network.feature_info[-1]["reduction"])
        options.check_layers(len(network.blocks))
        if options.layers and not self.plain:
            raise UserError(
                f"{options.key}.layers: {options.source} is not a plain ViT; only its last block can be used"
            )
        self.layers = options.layers
        self.has_class_token = self.has_class and self.plain
        network.prune_intermediate_layers(1, prune_norm=not self.normalized, prune_head=True)

    def ignore_class_token(self) -> None:
        """Use the attention that patches receive, for weights whose head takes their mean and not the class token."""
        self.has_class = self.has_class_token = False
        self.importance = "last block's attention, received by each patch on average (the class token was not trained)"

    def _tokens(self, network: TimmNetwork, images: Tensor, output_fmt: str) -> Tensor:
        """Return the last block's patch tokens of images: [B, L, C] for ``NLC``, [B, C, rows, columns] for ``NCHW``."""
        return network.forward_intermediates(
            images, indices=1, norm=self.normalized, output_fmt=output_fmt, intermediates_only=True
        )[-1]

    def __call__(self, network: TimmNetwork, images: Tensor) -> TeacherOutput:
        """Return the output of normalized images [B, 3, H, W]."""
        block = network.blocks[-1]
        attn = block.attn
        if not self.plain:
            with AttentionMatrix(attn) as matrix:
                tokens = self._tokens(network, images, "NLC")
            assert matrix.weights is not None
            rows = matrix.weights[:, :, :1] if self.has_class else matrix.weights[:, :, self.prefix :]
            return TeacherOutput(tokens, rows.float().mean(dim=(1, 2))[:, self.prefix :])
        with LastBlockInput(block) as captured:
            features = network.forward_intermediates(
                images,
                indices=list(self.layers) or 1,
                norm=self.normalized,
                output_fmt="NLC",
                intermediates_only=True,
                return_prefix_tokens=self.has_class_token,
            )
        if self.has_class_token:
            tokens, class_token = join_layers(*zip(*features, strict=True))
        else:
            tokens, class_token = torch.cat(features, dim=-1) if self.layers else features[-1], None
        importance = class_attention(
            block.norm1(captured.x),
            attn.qkv.weight,
            attn.qkv.bias,
            attn.num_heads,
            self.prefix,
            from_class=self.has_class,
            q_norm=attn.q_norm,
            k_norm=attn.k_norm,
        )
        return TeacherOutput(tokens, importance, class_token)


class MapReader:
    """Reader of one stage's feature map as tokens, with its L2 norm over channels as importance; no class token.

    Args:
        network: model with ``forward_intermediates``; it is pruned to the needed parts.
        options: name the stage, or the grid that it must have.

    Raises:
        UserError: if no stage has the student's grid, the named stage does not exist, or its stride does not tile the
            image.
    """

    has_class_token = False

    def __init__(self, network: TimmNetwork, options: TeacherOptions) -> None:
        if options.features != "raw":
            raise UserError(f"{options.key}.features: a feature map of {options.source} is raw; use raw")
        if options.layers:
            raise UserError(f"{options.key}.layers: {options.source} has stages; name one as {options.key}.stage")
        size = options.image_size
        with torch.no_grad():
            maps = network.forward_intermediates(
                torch.zeros(1, 3, size, size), output_fmt="NCHW", intermediates_only=True
            )
        strides = [info["reduction"] for info in network.feature_info]
        self.stage = _choose_stage([(m.shape[2], m.shape[3]) for m in maps], strides, options)
        self.importance = f"feature norm of stage {self.stage} (of 0 to {len(maps) - 1})"
        chosen = maps[self.stage]
        options.check_tiles(strides[self.stage])
        self.grid, self.width = (chosen.shape[2], chosen.shape[3]), chosen.shape[1]
        network.prune_intermediate_layers([self.stage], prune_norm=True, prune_head=True)

    def __call__(self, network: TimmNetwork, images: Tensor) -> TeacherOutput:
        """Return the output of normalized images [B, 3, H, W]."""
        features = network.forward_intermediates(
            images, indices=[self.stage], stop_early=True, output_fmt="NCHW", intermediates_only=True
        )[-1]
        tokens = features.flatten(2).transpose(1, 2)
        return TeacherOutput(tokens, tokens.float().norm(dim=-1))


def _is_softmax(weights: Tensor | None, tokens: int) -> bool:
    """Return True if these are attention weights between all tokens, [B, heads, N, N].

    Attention between channels, or with signed weights, is not.
    """
    if weights is None or weights.shape[2:] != (tokens, tokens):
        return False
    if weights.is_meta:  # planning runs on shapes without values
        return True
    sums = weights.sum(-1)
    return bool((weights >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-4)


class UnsupportedNetworkError(Exception):
    """Raised when a network's architecture is not supported by a reader."""


TimmReader = BlockReader | MapReader


def timm_reader(network: nn.Module, options: TeacherOptions) -> TimmReader:
    """Return the reader of a timm network; the network is put in eval mode, run on one image, and pruned.

    Raises:
        UserError: naming the recipe key, if the input size or the grid does not fit, or the network has no features.
    """
    network = cast(TimmNetwork, network)  # its attributes are checked below
    network.eval()
    if not hasattr(network, "forward_intermediates"):
        raise UserError(f"{options.key}.source: timm returns no features of {options.source}; choose another model")
    if _has_blocks_of_tokens(network):
        if options.stage is not None:
            raise UserError(
                f"{options.key}.stage: {options.source} has no stages but blocks of one grid, and the last is used; "
                "remove the key"
            )
        try:
            return _make_reader(BlockReader, network, options)
        except UnsupportedNetworkError:
            pass
    return _make_reader(MapReader, network, options)


Reader = TypeVar("Reader", BlockReader, MapReader)


def _make_reader(reader: type[Reader], network: TimmNetwork, options: TeacherOptions) -> Reader:
    try:
        return reader(network, options)
    except (AssertionError, RuntimeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{options.key}.image_size: {options.source} does not accept {options.image_size} pixels "
            f"({' '.join(str(error).split())})"
        ) from None


def _has_blocks_of_tokens(network: nn.Module) -> bool:
    blocks = getattr(network, "blocks", None)
    if not hasattr(network, "num_prefix_tokens") or not isinstance(blocks, nn.Sequential | nn.ModuleList):
        return False
    attn = getattr(blocks[-1], "attn", None)
    return isinstance(getattr(attn, "attn_drop", None), nn.Module) and hasattr(attn, "fused_attn")


def _choose_stage(grids: list[tuple[int, int]], strides: list[int], options: TeacherOptions) -> int:
    size, (rows, columns) = options.image_size, options.student_grid
    # Not size / h, which a side that the stride does not tile would make a stride that no size has.
    of_stages = enumerate(zip(grids, strides, strict=False))
    listed = ", ".join(f"{stage} {h}x{w} (stride {stride})" for stage, ((h, w), stride) in of_stages)
    stages = f"the stages of {options.source} at {size} pixels are {listed}"
    if options.stage is not None and options.stage >= len(grids):
        raise UserError(f"{options.key}.stage: no stage {options.stage}; {stages}")
    fitting = [stage for stage, grid in enumerate(grids) if grid == options.student_grid]
    if options.stage is not None:
        fitting = [stage for stage in fitting if stage == options.stage]
    if not fitting:
        what = "no stage has" if options.stage is None else f"stage {options.stage} does not have"
        raise UserError(
            f"{options.key}: {what} the student's {rows}x{columns} grid; {stages}. Set {options.key}.image_size "
            f"to {rows} times the stride of the required stage"
        )
    return fitting[-1]
