"""Encoders for dense prediction: CViT and plain ViT with attention in windows, on images of any multiple of 32.

Names of the parameters are those of a pre-trained encoder, with ``rel_pos_h`` and ``rel_pos_w`` in every transformer
block. Sources: OpenGVLab/Official-ConvMAE-Det (CViT) and Detectron2's ViTDet (plain ViT).

Shape legend: B images, H x W their pixels, h x w the token grid, C the encoder's width.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import Tensor, nn

from mrmae_ds.errors import ConfigError, UserError
from mrmae_ds.models.activation_checkpointing import run_blocks
from mrmae_ds.models.cvit import CViT
from mrmae_ds.models.pos_embed import resize_pos_embed
from mrmae_ds.models.sizes import (
    PYRAMID_MULTIPLE,
    BeitSpec,
    CViTSpec,
    EncoderSpec,
    ImageSize,
    ViTSpec,
    check_global_blocks,
    nearest_for_pyramid,
    token_grid,
)
from mrmae_ds.models.vit import MaskedViT
from mrmae_ds.models.window_attention import WindowAttention

STRIDE = 16


class WindowedCViT(CViT):
    """CViT without a head whose transformer blocks attend in windows, except some.

    Args:
        spec: widths, depths, heads, MLP ratios and patches; their product must be 16.
        image_size: input size in pixels that the tables of global blocks are built for.
        window: side of a window in tokens; 0 makes all blocks global.
        global_blocks: 0-based indices of the transformer blocks that attend over the whole map.
        position_size: input size of the stored position embedding, the pre-training's. It is resized in every forward,
            and is trained.
        drop_path_rate: stochastic depth of the last block.
        conv_eps: eps of the norms in the convolution blocks. Pre-training has 1e-5, the authors' detector 1e-6.

    Raises:
        ConfigError: for another stride, an image size that patches do not tile, or a block that does not exist.
    """

    def __init__(
        self,
        spec: CViTSpec,
        image_size: ImageSize,
        window: int,
        global_blocks: Iterable[int],
        position_size: ImageSize = 224,
        drop_path_rate: float = 0.0,
        conv_eps: float = 1e-6,
    ) -> None:
        super().__init__(spec, position_size, drop_path_rate=drop_path_rate, global_pool="")
        self.pos_embed.requires_grad_(True)
        for block in (*self.blocks1, *self.blocks2):
            block.norm1.eps = block.norm2.eps = conv_eps
        _attend_in_windows(self.blocks3, spec, image_size, window, global_blocks)

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """Encode normalized images [B, 3, H, W] to the last stage's map [B, C, h, w], without a norm.

        Raises:
            UserError: if H or W is not a multiple of 32.
        """
        x = self.patch_embed4(self.patch_embed3(self._maps(images, 2)[-1]))
        x = x + _positions(self.pos_embed, self.grid, x)
        return run_blocks(self.blocks3, x, self.checkpointing.transformer).permute(0, 3, 1, 2)

    def _check_size(self, images: Tensor) -> None:
        check_multiple(images)


class WindowedViT(MaskedViT):
    """Plain ViT without class token, final norm and head whose blocks attend in windows, except some.

    The stored position embedding has MAE's row of the class token, which is not used. Arguments are those of
    :class:`WindowedCViT`.
    """

    def __init__(
        self,
        spec: ViTSpec,
        image_size: ImageSize,
        window: int,
        global_blocks: Iterable[int],
        position_size: ImageSize = 224,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(spec, position_size, drop_path_rate=drop_path_rate)
        self.pos_embed.requires_grad_(True)
        self.cls_token = None
        _attend_in_windows(self.blocks, spec, image_size, window, global_blocks)

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """Encode normalized images [B, 3, H, W] to the last block's map [B, C, h, w], without a norm.

        Raises:
            UserError: if H or W is not a multiple of 32.
        """
        check_multiple(images)
        x = self.patch_embed.proj(images).permute(0, 2, 3, 1)
        x = x + _positions(self.pos_embed[:, self.num_prefix_tokens :], self.grid, x)
        return run_blocks(self.blocks, x, self.checkpointing.transformer).permute(0, 3, 1, 2)


def build_windowed(
    spec: EncoderSpec,
    image_size: ImageSize,
    window: int,
    global_blocks: Iterable[int],
    position_size: ImageSize = 224,
    drop_path_rate: float = 0.0,
) -> WindowedCViT | WindowedViT:
    """Build the windowed encoder of a spec; arguments are those of :class:`WindowedCViT`."""
    if isinstance(spec, CViTSpec):
        return WindowedCViT(spec, image_size, window, global_blocks, position_size, drop_path_rate)
    if isinstance(spec, BeitSpec):
        raise UserError("a BEiT has relative positions of one size and no windows; use a CViT or a plain ViT")
    return WindowedViT(spec, image_size, window, global_blocks, position_size, drop_path_rate)


def check_multiple(images: Tensor) -> None:
    """Raise UserError unless the sides of images [B, C, H, W] are multiples of 32."""
    height, width = images.shape[2:]
    if height % PYRAMID_MULTIPLE or width % PYRAMID_MULTIPLE:
        nearest = nearest_for_pyramid(height), nearest_for_pyramid(width)
        raise UserError(
            f"images: {(height, width)} pixels, but both must be multiples of {PYRAMID_MULTIPLE}; the nearest is "
            f"{nearest}"
        )


def _positions(pos_embed: Tensor, grid: tuple[int, int], x: Tensor) -> Tensor:
    """Resize positions [1, L, C] of a grid to the map ``x`` [B, h, w, C]: [1, h, w, C]."""
    size = x.shape[1], x.shape[2]
    return resize_pos_embed(pos_embed, grid, size).unflatten(1, size)


def _attend_in_windows(
    blocks: nn.ModuleList | nn.Sequential,
    spec: EncoderSpec,
    image_size: ImageSize,
    window: int,
    global_blocks: Iterable[int],
) -> None:
    """Replace the attention of transformer blocks, after the checks of :class:`WindowedCViT`."""
    if spec.stride != STRIDE:
        raise ConfigError(
            "model.overrides",
            f"the encoder's stride is {spec.stride} pixels, but detection needs {STRIDE}; change its patches",
        )
    grid, chosen = token_grid(spec, image_size), frozenset(global_blocks)
    check_global_blocks(chosen, len(blocks), "detector.global_blocks")
    if window >= max(grid):
        warnings.warn(f"detector.window: {window} covers the grid {grid}: all blocks are global", stacklevel=3)
        window = 0
    for i, block in enumerate(blocks):
        block.attn = WindowAttention(spec.embed_dim, spec.num_heads, 0 if i in chosen else window, grid)
