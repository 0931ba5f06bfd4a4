"""Light decoders: predict one feature vector per token from visible tokens and mask tokens.

Shape legend: B images, P prefix tokens (a class token or none), K visible tokens, L tokens of the grid.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mrmae_ds.errors import ConfigError
from mrmae_ds.models.activation_checkpointing import run_blocks
from mrmae_ds.models.masking import VisibleSet
from mrmae_ds.models.pos_embed import sincos_pos_embed
from mrmae_ds.schema import Section


class DecoderSpec(Section):
    """Kind and size of the decoder; the defaults are MAE's.

    Attributes:
        kind: ``mae`` (self-attention of all tokens) or ``prompting`` (:class:`PromptingDecoder`, MILAN's).
        dim: width.
        depth: number of blocks.
        num_heads: attention heads per block.
        mlp_ratio: hidden width of the MLPs, as a multiple of ``dim``.
    """

    # Left out of records and hashes at its default, so that runs from before it existed keep their hash.
    kind: Literal["mae", "prompting"] = Field("mae", exclude_if=lambda value: value == "mae")
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

    block_class: type[Block] = Block

    def __init__(self, spec: DecoderSpec, encoder_dim: int, grid: tuple[int, int], num_prefix_tokens: int) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.checkpoint_every = 0
        self.embed = nn.Linear(encoder_dim, spec.dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, spec.dim))
        self.pos_embed = nn.Parameter(sincos_pos_embed(spec.dim, grid, num_prefix_tokens), requires_grad=False)
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(
            self.block_class(spec.dim, spec.num_heads, spec.mlp_ratio, qkv_bias=True, norm_layer=norm)
            for _ in range(spec.depth)
        )
        self.norm = norm(spec.dim)

    def forward(self, latent: Tensor, visible: VisibleSet) -> Tensor:
        """Compute features of all tokens.

        Args:
            latent: encoder output [B, P + K, C].
            visible: visible set of the batch.

        Returns:
            Features of the prefix tokens and then of all others in raster order, [B, P + L, D].
        """
        x = self.embed(latent)
        prefix, kept = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        x = torch.cat([prefix, visible.restore(kept, self._fillers(kept, visible))], dim=1) + self.pos_embed
        return self.norm(run_blocks(self.blocks, x, self.checkpoint_every))

    def _fillers(self, kept: Tensor, visible: VisibleSet) -> Tensor:
        """Return a mask token for each removed one, [B, L - K, D]."""
        removed = visible.ids_restore.shape[1] - kept.shape[1]
        # mask_token is fp32, while the tokens may be bf16 under autocast.
        return self.mask_token.to(kept.dtype).expand(len(kept), removed, -1)


class PromptedAttention(nn.Module):
    """Attention of the removed tokens to fixed prompts and to themselves.

    Args:
        dim: width D.
        num_heads: attention heads.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, prompts: Tensor) -> Tensor:
        """Attend from x [B, M, D] to prompts [B, N, D] and x; of the shape of x."""
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        kv = self.kv(torch.cat([prompts, x], dim=1)).unflatten(-1, (2, self.num_heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class PromptingBlock(Block):
    """Transformer block whose tokens also attend to prompts that it leaves unchanged.

    It takes the arguments of timm's Block.
    """

    def __init__(self, dim: int, num_heads: int, *args: Any, **options: Any) -> None:
        super().__init__(dim, num_heads, *args, **options)
        self.attn = PromptedAttention(dim, num_heads)

    def forward(self, x: Tensor, prompts: Tensor) -> Tensor:
        """Map x [B, M, D] to its shape, given prompts [B, N, D], which are not normalized."""
        x = x + self.attn(self.norm1(x), prompts)
        return x + self.mlp(self.norm2(x))


class PromptingDecoder(Decoder):
    """MILAN's decoder: only removed tokens change; the others are prompts, as they entered (Hou et al. 2022)."""

    block_class = PromptingBlock

    def forward(self, latent: Tensor, visible: VisibleSet) -> Tensor:
        """Compute features of all tokens, as :meth:`Decoder.forward` does."""
        positions, num_prefix = self.pos_embed, self.num_prefix_tokens
        x = self.embed(latent)
        prefix, kept = x[:, :num_prefix] + positions[:, :num_prefix], x[:, num_prefix:]
        patches = positions[:, num_prefix:].expand(len(x), -1, -1)
        kept = kept + visible.take(patches)
        ids = visible.ids_removed[..., None].expand(-1, -1, patches.shape[-1])
        removed = self._fillers(kept, visible) + patches.gather(1, ids)
        prompts = torch.cat([prefix, kept], dim=1)
        removed = run_blocks(self.blocks, removed, self.checkpoint_every, prompts)
        return self.norm(torch.cat([prefix, visible.restore(kept, removed)], dim=1))


DECODERS: dict[str, type[Decoder]] = {"mae": Decoder, "prompting": PromptingDecoder}
