"""CViT: two convolutional stages and a transformer stage; dense for fine-tuning, masked for pre-training.

Shape legend: B pictures, H = W = image size, L tokens of the final grid, K visible tokens, C3 the last stage's width.
Source of the architecture: SPEC of MCMAE's public code; parameter names are those of its released files.
"""

from __future__ import annotations

from functools import partial

from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mrmae_ds.masking import VisibleSet
from mrmae_ds.models.checkpointing import CheckpointPlan, run_blocks
from mrmae_ds.models.layers import ConvBlock, PatchEmbed
from mrmae_ds.models.positions import sincos_positions
from mrmae_ds.models.sizes import CViTSpec, token_grid


class CViT(nn.Module):
    """The encoder of MCMAE and MR-MAE.

    Args:
        spec: widths, depths, heads, ratios and patches.
        image_size: side of the square input in pixels; the patches must tile it.
        num_classes: outputs of the head; 0 builds the bare encoder for pre-training (no ``fc_norm``, no ``head``).
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 over all blocks of all stages.

    Raises:
        UserError: if the patches do not tile ``image_size``.
    """

    num_prefix_tokens = 0

    def __init__(self, spec: CViTSpec, image_size: int, num_classes: int = 0, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.spec = spec
        self.embed_dim = spec.embed_dim
        self.stride = spec.stride
        self.grid = token_grid(spec, image_size)
        self.checkpointing = CheckpointPlan()
        total = sum(spec.depths)
        rates = iter([drop_path_rate * i / max(total - 1, 1) for i in range(total)])
        c1, c2, c3 = spec.dims
        p1, p2, p3 = spec.patches
        self.patch_embed1 = PatchEmbed(3, c1, p1)
        self.patch_embed2 = PatchEmbed(c1, c2, p2)
        self.patch_embed3 = PatchEmbed(c2, c3, p3)
        self.patch_embed4 = nn.Linear(c3, c3)
        self.pos_embed = nn.Parameter(sincos_positions(c3, self.grid), requires_grad=num_classes > 0)
        conv = [
            nn.ModuleList(ConvBlock(dim, ratio, next(rates)) for _ in range(depth))
            for dim, depth, ratio in zip(spec.dims[:2], spec.depths[:2], spec.mlp_ratios[:2], strict=True)
        ]
        self.blocks1, self.blocks2 = conv
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks3 = nn.ModuleList(
            Block(c3, spec.num_heads, spec.mlp_ratios[2], qkv_bias=True, drop_path=next(rates), norm_layer=norm)
            for _ in range(spec.depths[2])
        )
        self.fc_norm = norm(c3) if num_classes > 0 else nn.Identity()
        self.head = nn.Linear(c3, num_classes) if num_classes > 0 else nn.Identity()

    @property
    def transformer_blocks(self) -> nn.ModuleList:
        """The transformer stage's blocks, first to last."""
        return self.blocks3

    @property
    def fusable_stages(self) -> tuple[tuple[int, int], ...]:
        """(channels, cells per token side) of each convolutional stage that multi-layer fusion can take."""
        _, p2, p3 = self.spec.patches
        return (self.spec.dims[0], p2 * p3), (self.spec.dims[1], p3)

    def forward(
        self, images: Tensor, visible: VisibleSet | None = None, taps: tuple[int, ...] = ()
    ) -> Tensor | dict[str, Tensor | list[Tensor]]:
        """Classify [B, 3, H, W] (logits [B, classes]), or encode visible tokens for pre-training.

        Both go through one ``forward`` because ZeRO-3 gathers a module's parameters when it is called.

        Args:
            images: normalised pictures.
            visible: if given, only these tokens are computed and a dictionary is returned: ``tokens`` [B, K, C3]
                before any norm, ``stages`` a list of [B, K, s, s, C], ``blocks`` the outputs of ``taps``.
            taps: 0-based numbers of transformer blocks whose output [B, K, C3] is wanted too.
        """
        if visible is None:
            return self.forward_head(self.forward_features(images))
        return self._forward_visible(images, visible, taps)

    def forward_features(self, images: Tensor) -> Tensor:
        """All tokens after the last block, [B, 3, H, W] to [B, L, C3]."""
        x = images.permute(0, 2, 3, 1)
        x = run_blocks(self.blocks1, self.patch_embed1(x), self.checkpointing.conv_stages)
        x = run_blocks(self.blocks2, self.patch_embed2(x), self.checkpointing.conv_stages)
        x = self.patch_embed4(self.patch_embed3(x).flatten(1, 2)) + self.pos_embed
        return run_blocks(self.blocks3, x, self.checkpointing.transformer)

    def forward_head(self, tokens: Tensor) -> Tensor:
        """Mean over tokens, norm, linear: [B, L, C3] to [B, classes]."""
        return self.head(self.fc_norm(tokens.mean(dim=1)))

    def _forward_visible(
        self, images: Tensor, visible: VisibleSet, taps: tuple[int, ...]
    ) -> dict[str, Tensor | list[Tensor]]:
        x = visible.take_blocks(images.permute(0, 2, 3, 1))
        x1 = run_blocks(self.blocks1, self.patch_embed1(x), self.checkpointing.conv_stages, visible)
        x2 = run_blocks(self.blocks2, self.patch_embed2(x1), self.checkpointing.conv_stages, visible)
        x = self.patch_embed4(self.patch_embed3(x2).flatten(2).reshape(*x2.shape[:2], -1))
        x = x + visible.take(self.pos_embed)
        outputs: list[Tensor] = []
        x = run_blocks(self.blocks3, x, self.checkpointing.transformer, collect=outputs)
        return {"tokens": x, "stages": [x1, x2], "blocks": [outputs[i] for i in taps]}
