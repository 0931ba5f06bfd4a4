"""MAE's plain ViT: timm's VisionTransformer, which can also encode the visible tokens alone.

Parameter names are those of MAE's released files. Source of the masked path: He et al. 2021, section 3.
"""

from __future__ import annotations

from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mrmae_ds.masking import VisibleSet
from mrmae_ds.models.checkpointing import CheckpointPlan, run_blocks
from mrmae_ds.models.positions import sincos_positions
from mrmae_ds.models.sizes import ViTSpec, token_grid


class MaskableViT(VisionTransformer):
    """A ViT with a class token; the same interface as :class:`mrmae_ds.models.cvit.CViT`.

    Args:
        spec: width, depth, heads, ratio, patch.
        image_size: side of the square input in pixels.
        num_classes: outputs of the head; 0 builds the bare encoder for pre-training (fixed positions, no norm).
        drop_path_rate: stochastic depth of the last block.

    Raises:
        UserError: if the patch does not tile ``image_size``.
    """

    fusable_stages: tuple[tuple[int, int], ...] = ()

    def __init__(self, spec: ViTSpec, image_size: int, num_classes: int = 0, drop_path_rate: float = 0.0) -> None:
        grid = token_grid(spec, image_size)
        super().__init__(
            img_size=image_size,
            patch_size=spec.patch,
            num_classes=num_classes,
            global_pool="avg" if num_classes else "",
            embed_dim=spec.dim,
            depth=spec.depth,
            num_heads=spec.num_heads,
            mlp_ratio=spec.mlp_ratio,
            fc_norm=bool(num_classes),
            final_norm=bool(num_classes),  # timm makes fc_norm only of a final norm; without classes there is none
            drop_path_rate=drop_path_rate,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
        self.spec = spec
        self.grid = grid
        self.stride = spec.stride
        self.checkpointing = CheckpointPlan()
        self.pos_embed = nn.Parameter(sincos_positions(spec.dim, grid, 1), requires_grad=num_classes > 0)

    @property
    def transformer_blocks(self) -> nn.Sequential:
        """The blocks, first to last."""
        return self.blocks

    def forward(
        self, images: Tensor, visible: VisibleSet | None = None, taps: tuple[int, ...] = ()
    ) -> Tensor | dict[str, Tensor | list[Tensor]]:
        """Classify [B, 3, H, W], or encode the visible tokens; see :meth:`CViT.forward`.

        In the latter case every tensor is [B, 1 + K, C]: the class token comes first.
        """
        if visible is None:
            return self.forward_head(self.forward_features(images))
        patches = visible.take(self.patch_embed(images) + self.pos_embed[:, 1:])
        x = torch.cat([self._class_token(patches), patches], dim=1)
        outputs: list[Tensor] = []
        x = run_blocks(self.blocks, x, self.checkpointing.transformer, collect=outputs)
        return {"tokens": x, "stages": [], "blocks": [outputs[i] for i in taps]}

    def forward_features(self, images: Tensor) -> Tensor:
        """Class and patch tokens after the last block, [B, 3, H, W] to [B, 1 + L, C]."""
        patches = self.patch_embed(images) + self.pos_embed[:, 1:]
        x = torch.cat([self._class_token(patches), patches], dim=1)
        return run_blocks(self.blocks, x, self.checkpointing.transformer)

    def _class_token(self, patches: Tensor) -> Tensor:
        return (self.cls_token + self.pos_embed[:, :1]).expand(patches.shape[0], -1, -1)
