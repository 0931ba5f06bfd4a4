"""An encoder of this project's models as a teacher (as in the demo; DMAE distills from MAE the same way)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor

from mrmae_ds.errors import UserError
from mrmae_ds.models.encoders import Encoder, build_encoder
from mrmae_ds.teachers.base import (
    LastBlockInput,
    MetaTeacher,
    Teacher,
    TeacherSpec,
    class_attention,
    describe_importance,
)
from mrmae_ds.teachers.options import TeacherOptions
from mrmae_ds.weights.load import load_encoder_weights
from mrmae_ds.weights.model_file import is_ours, read_metadata, spec_from_metadata
from mrmae_ds.weights.paths import find_weights, weights_sha256
from mrmae_ds.weights.resolve import Weights, model_metadata, resolve


def encoder_attention(encoder: Encoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """Compute an encoder's patch tokens and the attention of its last block.

    Args:
        encoder: the encoder.
        images: normalized images [B, 3, H, W].

    Returns:
        Patch tokens after the last block [B, L, C], and attention [B, L]: the class token's to the patches if there is
        one, otherwise the mean attention that each patch receives.
    """
    block: Block = encoder.transformer_blocks[-1]
    prefix = encoder.num_prefix_tokens
    with LastBlockInput(block) as captured:
        tokens = encoder.forward_features(images)
    attn = block.attn
    importance = class_attention(block.norm1(captured.x), attn.qkv.weight, attn.qkv.bias, attn.num_heads, prefix)
    return tokens[:, prefix:], importance


class CheckpointTeacher(Teacher):
    """A CViT or a plain ViT; its source is a run's stage folder, or any weights file that ``mrmae check`` calls usable.

    ``raw`` features are those of the last block; ``ln_post`` applies the norm that pre-training put after it. The
    position embedding is resized if the input differs from that of training; the default statistics are those of
    training.

    Raises:
        UserError: for a file that is missing or not usable, whose heads or statistics are not known, or for features
            that it does not have (``proj``).
    """

    network: Encoder
    norm_weight: Tensor
    norm_bias: Tensor

    def __init__(self, options: TeacherOptions) -> None:
        path, weights, metadata = _resolve(options)
        features = options.features
        norm = {
            ours: weights.file.tensors[name] for name, ours in weights.identity.names.items() if "fusion.norm" in ours
        }
        if features == "proj" or (features == "ln_post" and not norm):
            raise UserError(f"{options.key}.features: {path} has no {features} features; use raw")
        encoder = build_encoder(spec_from_metadata(metadata), options.image_size)
        notes = load_encoder_weights(encoder, weights).notes
        mean, std = options.statistics or (tuple(metadata["mean"]), tuple(metadata["std"]))
        super().__init__(
            encoder,
            TeacherSpec(
                grid=encoder.grid,
                width=encoder.embed_dim,
                image_size=options.image_size,
                mean=mean,
                std=std,
                dtype=options.dtype,
                sha256=weights_sha256(path),
                details={
                    "importance": describe_importance(encoder.num_prefix_tokens > 0),
                    **({"weights": "; ".join(notes)} if notes else {}),
                },
            ),
        )
        if features == "ln_post":
            for name in ("weight", "bias"):
                # Copied, because safetensors returns views of the whole file.
                tensor = norm[f"fusion.norm.{name}"].to(options.dtype, copy=True)
                self.register_buffer(f"norm_{name}", tensor, persistent=False)
        self.features = features

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens [B, L, C] and importance [B, L] of normalized images [B, 3, H, W]."""
        tokens, importance = encoder_attention(self.network, images)
        if self.features == "ln_post":
            tokens = F.layer_norm(tokens, tokens.shape[-1:], self.norm_weight, self.norm_bias, eps=1e-6)
        return tokens, importance


def _resolve(options: TeacherOptions) -> tuple[Path, Weights, dict[str, Any]]:
    """Return the teacher's file, its weights and its metadata."""
    key = options.key
    path = find_weights(Path(options.source), f"{key}.source")
    weights = resolve(path, f"{key}.source")
    fix = f"give {key}.mean and std, or "
    return path, weights, model_metadata(weights, statistics=options.statistics is None, fix=fix)


class _Reader:
    def __init__(self, encoder: Encoder) -> None:
        self.grid, self.width = encoder.grid, encoder.embed_dim
        self.importance = describe_importance(encoder.num_prefix_tokens > 0)

    def __call__(self, network: Encoder, images: Tensor) -> tuple[Tensor, Tensor]:
        return encoder_attention(network, images)


def build_meta(options: TeacherOptions) -> MetaTeacher:
    """Build the encoder without weights; see :class:`~mrmae_ds.teachers.build.TeacherSource`."""
    path = find_weights(Path(options.source), f"{options.key}.source")
    # The header of a file of this project has all that is needed; plans are made of many such models.
    metadata = read_metadata(path) if is_ours(path) else _resolve(options)[2]
    encoder = build_encoder(spec_from_metadata(metadata), options.image_size)
    return MetaTeacher(encoder, _Reader(encoder), options)


build = CheckpointTeacher
