"""A run of this project as a teacher (the demo's; DMAE distils from MAE the same way)."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from mrmae_ds.errors import UserError
from mrmae_ds.files import file_sha256
from mrmae_ds.models.pretrain import Encoder
from mrmae_ds.teachers.base import LastBlockInput, Teacher, class_attention, importance_words
from mrmae_ds.teachers.options import TeacherOptions
from mrmae_ds.weights.load import (
    build_encoder,
    find_weights,
    load_encoder,
    read_metadata,
    read_tensors,
    spec_from_metadata,
)


def encoder_attention(encoder: Encoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """Patch tokens after the last block [B, L, C], and its attention [B, L], of normalized images.

    The attention is the class token's where there is one, else what each patch receives on average.
    """
    block, prefix = encoder.transformer_blocks[-1], encoder.num_prefix_tokens
    with LastBlockInput(block) as seen:
        tokens = encoder.forward_features(images)
    attn = block.attn
    importance = class_attention(block.norm1(seen.x), attn.qkv.weight, attn.qkv.bias, attn.num_heads, prefix)
    return tokens[:, prefix:], importance


class CheckpointTeacher(Teacher):
    """An encoder that this project trained; its source is a run's stage folder or model file.

    ``raw`` features are the last block's; ``ln_post`` applies the norm that pre-training put after it. The position
    embedding is resized for another input than it was trained at, the statistics are those it was trained with.

    Raises:
        UserError: for a missing or foreign file, or ``proj`` features, which it does not have.
    """

    def __init__(self, options: TeacherOptions) -> None:
        path = find_weights(Path(options.source), f"{options.key}.source")
        metadata, features = read_metadata(path), options.features
        if features == "proj" or (features == "ln_post" and metadata["kind"] != "pretrain"):
            raise UserError(f"{options.key}.features: {path} has no {features} features; use raw")
        encoder = build_encoder(spec_from_metadata(metadata), options.image_size)
        load_encoder(encoder, path, f"{options.key}.source")
        mean, std = options.statistics or (tuple(metadata["mean"]), tuple(metadata["std"]))
        super().__init__(
            encoder,
            grid=encoder.grid,
            width=encoder.embed_dim,
            image_size=options.image_size,
            mean=mean,
            std=std,
            dtype=options.dtype,
            sha256=file_sha256(path),
            facts={"importance": importance_words(encoder.num_prefix_tokens > 0)},
        )
        if features == "ln_post":
            tensors = read_tensors(path)
            for name in ("weight", "bias"):
                # A copy: what the file gives is a view of all of it.
                tensor = tensors[f"fusion.norm.{name}"].to(options.dtype, copy=True)
                self.register_buffer(f"norm_{name}", tensor, persistent=False)
        self.features = features

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Teacher.encode`."""
        tokens, importance = encoder_attention(self.network, images)
        if self.features == "ln_post":
            tokens = F.layer_norm(tokens, tokens.shape[-1:], self.norm_weight, self.norm_bias, eps=1e-6)
        return tokens, importance
