"""A run of this project as a teacher (the demo's; DMAE distils from MAE the same way)."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mrmae_ds.errors import UserError
from mrmae_ds.files import file_sha256
from mrmae_ds.models.pretrain import Encoder
from mrmae_ds.models.weights import (
    build_encoder,
    find_weights,
    load_encoder,
    read_metadata,
    read_tensors,
    spec_from_metadata,
)
from mrmae_ds.teachers.base import LastBlockInput, Teacher, class_attention


def encoder_attention(encoder: Encoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """Patch tokens after the last block [B, L, C], and its attention [B, L], of normalised pictures.

    The attention is the class token's where there is one, else what each patch receives on average.
    """
    block, prefix = encoder.transformer_blocks[-1], encoder.num_prefix_tokens
    with LastBlockInput(block) as seen:
        tokens = encoder.forward_features(images)
    attn = block.attn
    importance = class_attention(block.norm1(seen.x), attn.qkv.weight, attn.qkv.bias, attn.num_heads, prefix)
    return tokens[:, prefix:], importance


class CheckpointTeacher(Teacher):
    """An encoder that this project trained.

    ``raw`` features are the last block's; ``ln_post`` applies the norm that pre-training put after it.

    Args:
        source: a run's stage folder or model file.
        key: the recipe key to name in errors.
        image_size: side of its input; the position embedding is resized for another than it was trained at.
        features: ``raw`` or ``ln_post``.
        statistics: mean and std, or None for those it was trained with.
        dtype: of weights and arithmetic.

    Raises:
        UserError: for a missing or foreign file, or ``proj`` features, which it does not have.
    """

    def __init__(
        self,
        source: Path,
        key: str,
        *,
        image_size: int,
        features: str,
        statistics: tuple[tuple[float, float, float], tuple[float, float, float]] | None,
        dtype: torch.dtype,
    ) -> None:
        path = find_weights(source, f"{key}.source")
        metadata = read_metadata(path)
        if features == "proj" or (features == "ln_post" and metadata["kind"] != "pretrain"):
            raise UserError(f"{key}.features: {path} has no {features} features; use raw")
        encoder = build_encoder(spec_from_metadata(metadata), image_size)
        load_encoder(encoder, path)
        mean, std = statistics or (tuple(metadata["mean"]), tuple(metadata["std"]))
        super().__init__(
            encoder,
            grid=encoder.grid,
            width=encoder.embed_dim,
            image_size=image_size,
            mean=mean,
            std=std,
            dtype=dtype,
            sha256=file_sha256(path),
        )
        if features == "ln_post":
            tensors = read_tensors(path)
            self.register_buffer("norm_weight", tensors["fusion.norm.weight"].to(dtype), persistent=False)
            self.register_buffer("norm_bias", tensors["fusion.norm.bias"].to(dtype), persistent=False)
        self.features = features

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Teacher.encode`."""
        tokens, importance = encoder_attention(self.network, images)
        if self.features == "ln_post":
            tokens = F.layer_norm(tokens, tokens.shape[-1:], self.norm_weight, self.norm_bias, eps=1e-6)
        return tokens, importance
