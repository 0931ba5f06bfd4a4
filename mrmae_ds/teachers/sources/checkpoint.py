"""An encoder of this project's models as a teacher (as in the demo; DMAE distills from MAE the same way)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor

from mrmae_ds.errors import UserError
from mrmae_ds.models.beit import MaskedBeit
from mrmae_ds.models.encoders import Encoder, build_encoder
from mrmae_ds.models.masking import VisibleSet
from mrmae_ds.models.window_attention import WindowAttention
from mrmae_ds.teachers.base import (
    LastBlockInput,
    MetaTeacher,
    Teacher,
    TeacherOutput,
    TeacherSpec,
    class_attention,
    describe_importance,
)
from mrmae_ds.teachers.options import TeacherOptions
from mrmae_ds.weights.load import load_encoder_weights
from mrmae_ds.weights.model_file import is_ours, read_metadata, spec_from_metadata
from mrmae_ds.weights.paths import find_weights, weights_sha256
from mrmae_ds.weights.resolve import Weights, model_metadata, resolve


def encoder_attention(encoder: Encoder, images: Tensor, layers: tuple[int, ...] = ()) -> TeacherOutput:
    """Compute an encoder's tokens and the attention of its last block.

    Args:
        encoder: the encoder.
        images: normalized images [B, 3, H, W].
        layers: blocks whose tokens are returned; empty is the last one.

    Returns:
        Tokens [B, L, C] (of several layers [B, L, layers * C]), class tokens likewise if there are any, and attention
        [B, L]: the class token's to the patches if there is one, otherwise the mean attention that each patch receives.

    Raises:
        UserError: for a detector's encoder whose last block attends in windows.
    """
    block: Block = encoder.transformer_blocks[-1]
    attn, prefix = block.attn, encoder.num_prefix_tokens
    if isinstance(attn, WindowAttention):
        if attn.window:
            raise UserError("the last block of the detector's encoder attends in windows; no map of it can be drawn")
        with LastBlockInput(block) as captured:
            maps = encoder(images)
        return TeacherOutput(maps.flatten(2).transpose(1, 2), attn.received(block.norm1(captured.x)))
    with LastBlockInput(block) as captured:
        if layers:
            tokens = encode_layers(encoder, images, VisibleSet.whole(len(images), encoder.grid, images.device), layers)
        else:
            tokens = encoder.forward_features(images)
    bias, positions = attn.qkv.bias, None
    if isinstance(encoder, MaskedBeit):
        bias, positions = encoder.last_attention()
    x = block.norm1(captured.x)
    importance = class_attention(x, attn.qkv.weight, bias, attn.num_heads, prefix, position_bias=positions)
    return TeacherOutput(tokens[:, prefix:], importance, tokens[:, :prefix] if prefix else None)


def encode_visible(encoder: Encoder, images: Tensor, visible: VisibleSet, layers: tuple[int, ...]) -> TeacherOutput:
    """Compute an encoder's visible tokens alone; the others and the importance are 0.

    Args:
        encoder: the encoder.
        images: normalized images [B, 3, H, W].
        visible: the visible set.
        layers: blocks whose tokens are returned; empty is the last one.
    """
    prefix = encoder.num_prefix_tokens
    x = encode_layers(encoder, images, visible, layers)
    kept = x[:, prefix:]
    zeros = kept.new_zeros(len(kept), visible.ids_restore.shape[1] - kept.shape[1], kept.shape[2])
    tokens = visible.restore(kept, zeros)
    return TeacherOutput(tokens, tokens.new_zeros(tokens.shape[:2]), x[:, :prefix] if prefix else None)


def encode_layers(encoder: Encoder, images: Tensor, visible: VisibleSet, layers: tuple[int, ...]) -> Tensor:
    """Return the tokens of layers, concatenated, [B, P + K, layers * C]; of the last block without any."""
    features = encoder(images, visible, layers)
    return torch.cat(features["blocks"], dim=-1) if layers else features["tokens"]


def cut_encoder(encoder: Encoder, options: TeacherOptions) -> None:
    """Remove the blocks of a teacher of visible tokens that are behind its deepest layer.

    Raises:
        UserError: naming the recipe key, for a layer that does not exist, or an encoder that computes all tokens.
    """
    options.check_layers(len(encoder.transformer_blocks))
    if options.sees_visible and isinstance(encoder, MaskedBeit):
        raise UserError(
            f"{options.key}.sees: {options.source} is a BEiT, whose relative positions are of all tokens; remove the "
            "key, or choose a plain ViT or CViT"
        )
    if options.sees_visible and options.layers:
        del encoder.transformer_blocks[max(options.layers) + 1 :]


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
        encoder = _build(metadata, options)
        notes = load_encoder_weights(encoder, weights).notes
        cut_encoder(encoder, options)
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
                    "importance": _describe_importance(encoder, options),
                    **({"weights": "; ".join(notes)} if notes else {}),
                },
                layers=options.layers,
                sees_visible=options.sees_visible,
                has_class_token=encoder.num_prefix_tokens > 0,
            ),
        )
        if features == "ln_post":
            for name in ("weight", "bias"):
                # Copied, because safetensors returns views of the whole file.
                tensor = norm[f"fusion.norm.{name}"].to(options.dtype, copy=True)
                self.register_buffer(f"norm_{name}", tensor, persistent=False)
        self.features = features

    def encode(self, images: Tensor) -> TeacherOutput:
        """Return the output of normalized images [B, 3, H, W]."""
        if self.sees_visible:
            return self.encode_visible(images, VisibleSet.whole(len(images), self.grid, images.device))
        return self._after_norm(encoder_attention(self.network, images, self.layers))

    def encode_visible(self, images: Tensor, visible: VisibleSet) -> TeacherOutput:
        """Return the output of the visible tokens of normalized images [B, 3, H, W]."""
        return self._after_norm(encode_visible(self.network, images, visible, self.layers))

    def _after_norm(self, output: TeacherOutput) -> TeacherOutput:
        if self.features != "ln_post":
            return output
        class_token = None if output.class_token is None else self._normalize(output.class_token)
        return TeacherOutput(self._normalize(output.tokens), output.importance, class_token)

    def _normalize(self, tokens: Tensor) -> Tensor:
        return F.layer_norm(tokens, tokens.shape[-1:], self.norm_weight, self.norm_bias, eps=1e-6)


def _describe_importance(encoder: Encoder, options: TeacherOptions) -> str:
    return "none (visible tokens only)" if options.sees_visible else describe_importance(encoder.num_prefix_tokens > 0)


def _resolve(options: TeacherOptions) -> tuple[Path, Weights, dict[str, Any]]:
    """Return the teacher's file, its weights and its metadata."""
    key = options.key
    path = find_weights(Path(options.source), f"{key}.source")
    weights = resolve(path, f"{key}.source")
    fix = f"give {key}.mean and std, or "
    return path, weights, model_metadata(weights, statistics=options.statistics is None, fix=fix)


def _build(metadata: dict[str, Any], options: TeacherOptions) -> Encoder:
    """Return the encoder of a file's metadata at the teacher's input size, without its weights."""
    spec = spec_from_metadata(metadata)
    options.check_tiles(spec.stride)
    return build_encoder(spec, options.image_size)


class _Reader:
    def __init__(self, encoder: Encoder, options: TeacherOptions) -> None:
        self.grid, self.width = encoder.grid, encoder.embed_dim
        self.importance = _describe_importance(encoder, options)
        self.has_class_token = encoder.num_prefix_tokens > 0
        self.layers = options.layers

    def __call__(self, network: Encoder, images: Tensor) -> TeacherOutput:
        return encoder_attention(network, images, self.layers)


class _MetaCheckpoint(MetaTeacher):
    network: Encoder

    def encode_visible(self, images: Tensor, visible: VisibleSet) -> TeacherOutput:
        return encode_visible(self.network, images, visible, self.layers)


def build_meta(options: TeacherOptions) -> MetaTeacher:
    """Build the encoder without weights; see :class:`~mrmae_ds.teachers.build.TeacherSource`."""
    path = find_weights(Path(options.source), f"{options.key}.source")
    # The header of a file of this project has all that is needed; plans are made of many such models.
    metadata = read_metadata(path) if is_ours(path) else _resolve(options)[2]
    return meta_teacher(_build(metadata, options), options)


def meta_teacher(encoder: Encoder, options: TeacherOptions) -> MetaTeacher:
    """Return a teacher without weights of an encoder on the meta device."""
    cut_encoder(encoder, options)
    return _MetaCheckpoint(encoder, _Reader(encoder, options), options)


build = CheckpointTeacher
