"""CLIP's image tower as a teacher, by open_clip."""

from __future__ import annotations

from pathlib import Path

import open_clip
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from mrmae_ds.errors import UserError
from mrmae_ds.files import file_sha256
from mrmae_ds.teachers.base import LastBlockInput, Teacher, class_attention
from mrmae_ds.teachers.timm_vit import tensors_sha256


class ClipTeacher(Teacher):
    """Patch tokens of CLIP's last block, and its class token's attention.

    Args:
        source: open_clip's model name; OpenAI's weights need the ``-quickgelu`` names.
        weights: a pretrained tag (``openai``) or a local file.
        key: the recipe key to name in errors.
        image_size: side of its input; open_clip resizes the position embedding if needed.
        features: ``raw``, ``ln_post``, or ``proj`` (ln_post, then the projection to the joint space).
        statistics: mean and std, or None for CLIP's own.
        dtype: of weights and arithmetic.

    Raises:
        UserError: for an unknown name, unreadable weights, a tower that is no ViT, or a GELU that is not the weights'.
    """

    def __init__(
        self,
        source: str,
        weights: str | None,
        key: str,
        *,
        image_size: int,
        features: str,
        statistics: tuple[tuple[float, float, float], tuple[float, float, float]] | None,
        dtype: torch.dtype,
    ) -> None:
        visual = load_clip_tower(source, weights, key, image_size)
        mean, std = statistics or (visual.preprocess_cfg["mean"], visual.preprocess_cfg["std"])
        if features == "proj" and visual.proj is None:
            raise UserError(f"{key}.features: the tower of {source} has no projection; use raw or ln_post")
        local = Path(weights) if weights and Path(weights).is_file() else None
        super().__init__(
            visual,
            grid=visual.grid_size,
            width=visual.output_dim if features == "proj" else visual.conv1.out_channels,
            image_size=image_size,
            mean=mean,
            std=std,
            dtype=dtype,
            sha256=file_sha256(local) if local else tensors_sha256(visual),
        )
        self.features = features

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Teacher.encode`."""
        visual = self.network
        last = len(visual.transformer.resblocks) - 1
        block = visual.transformer.resblocks[last]
        with LastBlockInput(block) as seen:
            tokens = visual.forward_intermediates(
                images,
                indices=[last],
                intermediates_only=True,
                normalize_intermediates=self.features != "raw",
                output_fmt="NLC",
            )["image_intermediates"][-1]
        if self.features == "proj":
            tokens = tokens @ visual.proj
        attn = block.attn
        importance = class_attention(
            block.ln_1(seen.x), attn.in_proj_weight, attn.in_proj_bias, attn.num_heads, prefix=1
        )
        return tokens, importance


def load_clip_tower(source: str, weights: str | None, key: str, image_size: int) -> nn.Module:
    """The image tower of an open_clip model.

    Raises:
        UserError: naming the recipe key.
    """
    if weights is None:
        raise UserError(f"{key}.weights: a CLIP teacher needs a tag (openai) or a local file")
    if ":" in source:
        raise UserError(
            f"{key}.source: {source} names files itself and would ignore {key}.weights; give a model's name"
        )
    _check_gelu(source, weights, key)
    try:
        model = open_clip.create_model(source, pretrained=weights, force_image_size=image_size, require_pretrained=True)
    except Exception as error:  # open_clip, the hub client and torch each raise their own kinds
        raise UserError(
            f"{key}: open_clip model {source!r} with weights {weights!r} could not be loaded "
            f"({type(error).__name__}: {error}); check both names, or give a local file as {key}.weights"
        ) from None
    if not isinstance(model.visual, VisionTransformer):
        raise UserError(f"{key}.source: the image tower of {source} is no open_clip ViT; choose a ViT-* model")
    return model.visual


def _check_gelu(source: str, weights: str, key: str) -> None:
    """open_clip only warns when a tag's weights were trained with another GELU than the model's."""
    tagged, built = open_clip.get_pretrained_cfg(source, weights), open_clip.get_model_config(source)
    if not tagged or not built:
        return
    if bool(tagged.get("quick_gelu")) != bool(built.get("quick_gelu")):
        right = f"{source}-quickgelu" if tagged.get("quick_gelu") else source.removesuffix("-quickgelu")
        raise UserError(f"{key}.source: the weights {weights} were trained with the other GELU; use {right}")
