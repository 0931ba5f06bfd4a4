"""BEiT's ViT: timm's Beit, with mask tokens and the interface of this project's encoders.

Positions are relative: a bias of the attention, from one table that all blocks share in pre-training, and from a table
in each block of a classifier. Parameter names are those of BEiT's released files. Source: Bao et al. 2021.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from timm.models.beit import Beit
from torch import Tensor, nn

from mrmae_ds.errors import UserError
from mrmae_ds.models.activation_checkpointing import CheckpointPlan, run_blocks
from mrmae_ds.models.sizes import BeitSpec, ImageSize, height_width, token_grid
from mrmae_ds.models.vit import POOLS, PlainEncoder


class MaskedBeit(PlainEncoder, Beit):
    """A BEiT with the interface of :class:`mrmae_ds.models.vit.MaskedViT`; it always computes all tokens.

    Args:
        spec: width, depth, heads, MLP ratio, patch and layer scale.
        img_size: input size in pixels, one side of a square or (height, width).
        num_classes: outputs of the head; 0 builds the bare encoder, without a final norm.
        drop_path_rate: stochastic depth of the last block.
        pool: input of the head: ``avg``, the mean of the patch tokens followed by ``fc_norm``, or ``token``, the class
            token after ``norm``.
        attn_drop_rate: dropout of the attention.
        mask_token: have a mask token, for pre-training.

    Raises:
        UserError: if the patch does not tile ``img_size``, or for an unknown pooling.
    """

    undecayed = ("cls_token",)  # in pre-training

    def __init__(
        self,
        spec: BeitSpec,
        img_size: ImageSize,
        num_classes: int = 0,
        drop_path_rate: float = 0.0,
        pool: str = "avg",
        *,
        attn_drop_rate: float = 0.0,
        mask_token: bool = False,
    ) -> None:
        if pool not in POOLS:
            raise UserError(f"pool: {pool!r} is unknown; a BEiT has {' and '.join(POOLS)}")
        grid, tables = token_grid(spec, img_size), "blocks" if num_classes else spec.relative_positions
        super().__init__(
            img_size=height_width(img_size),
            patch_size=spec.patch,
            num_classes=num_classes,
            global_pool=pool if num_classes else "",
            embed_dim=spec.dim,
            depth=spec.depth,
            num_heads=spec.num_heads,
            mlp_ratio=spec.mlp_ratio,
            drop_path_rate=drop_path_rate,
            attn_drop_rate=attn_drop_rate,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            init_values=spec.layer_scale,
            use_abs_pos_emb=False,
            use_rel_pos_bias=tables == "blocks",
            use_shared_rel_pos_bias=tables == "shared",
        )
        if not num_classes:
            self.norm = nn.Identity()
        self.spec, self.grid, self.stride = replace(spec, relative_positions=tables), grid, spec.stride
        self.checkpointing = CheckpointPlan()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, spec.dim)) if mask_token else None

    def _run(self, patches: Tensor, collect: list[Tensor] | None = None) -> Tensor:
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        # Once for all blocks, in its own module, at whose call ZeRO-3 gathers the table.
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias()
        return run_blocks(self.blocks, x, self.checkpointing.transformer, bias, collect)

    def last_attention(self) -> tuple[Tensor, Tensor]:
        """Return the bias of the last block's queries, keys and values [3 C], and that of positions [heads, N, N]."""
        attn = self.blocks[-1].attn
        positions = attn._get_rel_pos_bias()[0] if self.rel_pos_bias is None else self.rel_pos_bias()
        return torch.cat([attn.q_bias, attn.k_bias, attn.v_bias]), positions

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of all blocks in backward, or of none."""
        super().set_grad_checkpointing(enable)  # for timm's own forward_intermediates
        self.checkpointing = CheckpointPlan(transformer=int(enable))

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return the name patterns of layers for timm's layer decay; a table belongs to its block's layer."""
        return {"stem": "^(?:cls_token|patch_embed|rel_pos_bias)", "blocks": r"^blocks\.(\d+)\."}

    def no_weight_decay(self) -> set[str]:
        """Return the names of matrices without weight decay: BEiT's code decays its tables, unlike timm's."""
        return {"cls_token"}

    def set_input_size(self, img_size: ImageSize, patch_size: None = None) -> None:
        """Change the input size; tables are resized into new parameters.

        Args:
            img_size: pixels, one side of a square or (height, width).
            patch_size: must be None; part of timm's interface.

        Raises:
            UserError: if the patch does not tile ``img_size``.
        """
        self.grid = token_grid(self.spec, img_size)
        super().set_input_size(img_size=height_width(img_size))
