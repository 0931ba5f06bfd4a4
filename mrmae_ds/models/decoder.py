"""MAE's light decoder: predict one feature vector per token from visible tokens and mask tokens.

Shape legend: B images, P prefix tokens (a class token or none), K visible tokens, L tokens of the grid.
"""

from __future__ import annotations

from functools import partial

import torch
from pydantic import Field, model_validator
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mrmae_ds.errors import ConfigError
from mrmae_ds.models.activation_checkpointing import run_blocks
from mrmae_ds.models.masking import VisibleSet
from mrmae_ds.models.pos_embed import sincos_pos_embed
from mrmae_ds.schema import Section


class DecoderSpec(Section):
    """Size of the decoder; the defaults are MAE's.

    Attributes:
        dim: width.
        depth: number of blocks.
        num_heads: attention heads per block.
        mlp_ratio: hidden width of the MLPs, as a multiple of ``dim``.
    """

    dim: int = Field(512, gt=0, multiple_of=4)
    depth: int = Field(8, ge=1)
    num_heads: int = Field(16, ge=1)
    mlp_ratio: float = Field(4, gt=0)

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> DecoderSpec:
        if self.dim % self.num_heads:
            raise ConfigError("num_heads", f"{self.num_heads} heads cannot share the decoder's dim {self.dim} evenly")
        return self


class Decoder(nn.Module):
    """MAE's decoder: linear layer, mask tokens, fixed position embedding, blocks, norm (He et al. 2021, section 3).

    Args:
        spec: size of the decoder.
        encoder_dim: width of the input latent.
        grid: rows and columns of the token grid.
        num_prefix_tokens: number of class tokens at the start of the latent.
    """

    def __init__(self, spec: DecoderSpec, encoder_dim: int, grid: tuple[int, int], num_prefix_tokens: int) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.checkpoint_every = 0
        self.embed = nn.Linear(encoder_dim, spec.dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, spec.dim))
        self.pos_embed = nn.Parameter(sincos_pos_embed(spec.dim, grid, num_prefix_tokens), requires_grad=False)
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(
            Block(spec.dim, spec.num_heads, spec.mlp_ratio, qkv_bias=True, norm_layer=norm) for _ in range(spec.depth)
        )
        self.norm = norm(spec.dim)

    def forward(self, latent: Tensor, visible: VisibleSet) -> Tensor:
        """Compute features of all tokens.

        Args:
            latent: encoder output [B, P + K, C].
            visible: visible set of the batch.

        Returns:
            Features in raster order, [B, L, D].
        """
        x = self.embed(latent)
        prefix, kept = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        batch, num_kept, dim = kept.shape
        removed = visible.ids_restore.shape[1] - num_kept
        # mask_token is fp32, while x may be bf16 under autocast.
        filler = self.mask_token.to(x.dtype).expand(batch, removed, dim)
        order = visible.ids_restore[..., None].expand(-1, -1, dim)
        tokens = torch.cat([kept, filler], dim=1).gather(1, order)
        x = torch.cat([prefix, tokens], dim=1) + self.pos_embed
        x = run_blocks(self.blocks, x, self.checkpoint_every)
        return self.norm(x)[:, self.num_prefix_tokens :]
