"""MAE's plain ViT: timm's VisionTransformer, extended to encode only the visible tokens.

Parameter names are those of MAE's released files. Source of the masked path: He et al. 2021, section 3.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mrmae_ds.errors import UserError
from mrmae_ds.models.activation_checkpointing import CheckpointPlan, run_blocks
from mrmae_ds.models.masking import TokenMask, VisibleFeatures, VisibleSet
from mrmae_ds.models.pos_embed import resize_pos_embed, sincos_pos_embed
from mrmae_ds.models.sizes import ImageSize, ViTSpec, height_width, token_grid

POOLS = ("avg", "token")


class PlainEncoder:
    """Part that encoders on timm's transformers share: they classify, or encode for pre-training.

    Subclasses also derive from timm's class, say where positions are added and run the blocks.
    """

    fusable_stages: tuple[tuple[int, int], ...] = ()
    blocks: Any
    patch_embed: Any
    norm: Any
    forward_head: Any
    mask_token: nn.Parameter | None

    @property
    def transformer_blocks(self) -> nn.Sequential | nn.ModuleList:
        """Return the blocks, first to last."""
        return self.blocks

    @property
    def token_projection(self) -> nn.Conv2d:
        """Return the convolution that makes the tokens."""
        return self.patch_embed.proj

    def forward(
        self, images: Tensor, visible: VisibleSet | TokenMask | None = None, taps: tuple[int, ...] = ()
    ) -> Tensor | VisibleFeatures:
        """Classify images, or encode them for pre-training.

        Args:
            images: normalized images [B, 3, H, W].
            visible: visible set, which must be whole for a BEiT, or mask whose removed tokens become mask tokens; None
                classifies.
            taps: 0-based indices of transformer blocks whose outputs are also returned.

        Returns:
            Logits [B, classes], or features whose tensors are [B, 1 + K, C]: the class token comes first.
        """
        # By type: torch.fx passes a stand-in that is not None for an argument that is left out.
        if not isinstance(visible, VisibleSet | TokenMask):
            return self.forward_head(self.forward_features(images))
        patches = self.patch_embed(images)
        if self.mask_token is not None and isinstance(visible, TokenMask):
            patches = visible.fill(patches, self.mask_token)
        outputs: list[Tensor] = []
        x = self._run(visible.take(self._positioned(patches)), outputs)
        return {"tokens": x, "stages": [], "blocks": [outputs[i] for i in taps]}

    def forward_features(self, images: Tensor) -> Tensor:
        """Compute class and patch tokens [B, 1 + L, C] of images [B, 3, H, W], after ``norm`` if ``pool`` is token."""
        return self.norm(self._run(self._positioned(self.patch_embed(images))))

    def _positioned(self, patches: Tensor) -> Tensor:
        """Add the positions that are part of the tokens to patch tokens [B, L, C]."""
        return patches

    def _run(self, patches: Tensor, collect: list[Tensor] | None = None) -> Tensor:
        """Run the blocks on the class token and patch tokens [B, L, C]; ``collect`` receives the blocks' outputs."""
        raise NotImplementedError


class MaskedViT(PlainEncoder, VisionTransformer):
    """A ViT with a class token and the interface of :class:`mrmae_ds.models.cvit.CViT`.

    Args:
        spec: width, depth, heads, MLP ratio and patch.
        img_size: input size in pixels, one side of a square or (height, width).
        num_classes: outputs of the head; 0 builds the bare encoder for pre-training (frozen position embedding, no
            final norm).
        drop_path_rate: stochastic depth of the last block.
        attn_drop_rate: dropout of the attention.
        mask_token: have a mask token, for pre-training on a :class:`~mrmae_ds.models.masking.TokenMask`.
        pool: input of the head: ``avg``, the mean of the patch tokens followed by ``fc_norm`` (MAE's fine-tuning), or
            ``token``, the class token after ``norm`` (MAE's other variant).

    Raises:
        UserError: if the patch does not tile ``img_size``, or for an unknown pooling.
    """

    def __init__(
        self,
        spec: ViTSpec,
        img_size: ImageSize,
        num_classes: int = 0,
        drop_path_rate: float = 0.0,
        pool: str = "avg",
        *,
        attn_drop_rate: float = 0.0,
        mask_token: bool = False,
    ) -> None:
        if pool not in POOLS:
            raise UserError(f"pool: {pool!r} is unknown; a plain ViT has {' and '.join(POOLS)}")
        grid = token_grid(spec, img_size)
        super().__init__(
            img_size=height_width(img_size),
            patch_size=spec.patch,
            num_classes=num_classes,
            global_pool=pool if num_classes else "",
            embed_dim=spec.dim,
            depth=spec.depth,
            num_heads=spec.num_heads,
            mlp_ratio=spec.mlp_ratio,
            fc_norm=bool(num_classes) and pool == "avg",
            final_norm=bool(num_classes),  # timm builds fc_norm only with a final norm
            drop_path_rate=drop_path_rate,
            attn_drop_rate=attn_drop_rate,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
        self.spec = spec
        self.grid = grid
        self.stride = spec.stride
        self.checkpointing = CheckpointPlan()
        learned = spec.positions == "learned"
        self.pos_embed = nn.Parameter(sincos_pos_embed(spec.dim, grid, 1), requires_grad=num_classes > 0 or learned)
        if learned:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, spec.dim)) if mask_token else None

    def _positioned(self, patches: Tensor) -> Tensor:
        return patches + self.pos_embed[:, 1:]

    def _run(self, patches: Tensor, collect: list[Tensor] | None = None) -> Tensor:
        x = torch.cat([self._class_token(patches), patches], dim=1)
        return run_blocks(self.blocks, x, self.checkpointing.transformer, collect=collect)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of all blocks in backward, or of none."""
        super().set_grad_checkpointing(enable)  # for timm's own forward_intermediates
        self.checkpointing = CheckpointPlan(transformer=int(enable))

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return the name patterns of layers for timm's layer decay.

        ``norm`` is in the last layer, as in MAE's fine-tuning and unlike in timm's ViT.
        """
        return {"stem": "^(?:cls_token|pos_embed|patch_embed)", "blocks": r"^blocks\.(\d+)\."}

    def no_weight_decay(self) -> set[str]:
        """Return the names of matrices without weight decay in fine-tuning: none with MaskFeat's learned positions."""
        return set() if self.spec.positions == "learned" else super().no_weight_decay()

    def set_input_size(self, img_size: ImageSize, patch_size: None = None) -> None:
        """Change the input size; the position embedding is resized into a new parameter.

        Args:
            img_size: pixels, one side of a square or (height, width).
            patch_size: must be None; part of timm's interface.

        Raises:
            UserError: if the patch does not tile ``img_size``.
        """
        old, self.grid = self.grid, token_grid(self.spec, img_size)
        self.patch_embed.set_input_size(img_size=height_width(img_size))
        if self.grid != old:
            resized = resize_pos_embed(self.pos_embed.detach(), old, self.grid, self.num_prefix_tokens)
            self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)

    def _class_token(self, patches: Tensor) -> Tensor:
        """Return the class token with its position embedding for each image of ``patches`` [B, ..., C]: [B, 1, C]."""
        return (self.cls_token + self.pos_embed[:, :1]).expand(patches.shape[0], -1, -1)
