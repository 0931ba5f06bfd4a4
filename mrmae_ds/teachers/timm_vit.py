"""A timm vision transformer as a teacher: DINO (``vit_base_patch16_224.dino``), DINOv2, or any other with patches."""

from __future__ import annotations

import hashlib
from pathlib import Path

import timm
import torch
from timm.models import load_checkpoint
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from mrmae_ds.errors import UserError
from mrmae_ds.files import file_sha256
from mrmae_ds.teachers.base import LastBlockInput, Teacher, class_attention


class TimmTeacher(Teacher):
    """Patch tokens of a timm ViT's last block, and its class token's attention.

    Args:
        source: timm's model name, with the tag of its weights if they come from the hub.
        weights: a local file (.safetensors, .pt, .pth, .bin); None downloads timm's.
        key: the recipe key to name in errors.
        image_size: side of its input in pixels; timm resizes the position embedding if needed.
        features: ``raw`` after the last block, ``ln_post`` after the final norm.
        statistics: mean and std, or None for the model's own.
        dtype: of weights and arithmetic.

    Raises:
        UserError: for an unknown name, unreadable weights, or a model that is not a plain ViT.
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
        if features == "proj":
            raise UserError(f"{key}.features: timm models have no projection; use raw or ln_post")
        network = load_timm(source, weights, key, image_size)
        if not isinstance(network, VisionTransformer) or not network.has_class_token:
            raise UserError(f"{key}.source: {source} is no ViT with a class token; choose a timm ViT (DINO, DINOv2)")
        if not isinstance(network.blocks[-1].attn.q_norm, nn.Identity):
            raise UserError(f"{key}.source: {source} normalises queries and keys, which its attention map would miss")
        config = network.default_cfg
        mean, std = statistics or (tuple(config["mean"]), tuple(config["std"]))
        super().__init__(
            network,
            grid=network.patch_embed.grid_size,
            width=network.embed_dim,
            image_size=image_size,
            mean=mean,
            std=std,
            dtype=dtype,
            sha256=file_sha256(Path(weights)) if weights else tensors_sha256(network),
        )
        self.normalized = features == "ln_post"

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Teacher.encode`."""
        block, prefix = self.network.blocks[-1], self.network.num_prefix_tokens
        with LastBlockInput(block) as seen:
            tokens = self.network.forward_intermediates(
                images, indices=1, norm=self.normalized, output_fmt="NLC", intermediates_only=True
            )[-1]
        attn = block.attn
        normed = block.norm1(seen.x)
        return tokens, class_attention(normed, attn.qkv.weight, attn.qkv.bias, attn.num_heads, prefix)


def load_timm(source: str, weights: str | None, key: str, image_size: int) -> nn.Module:
    """Build a timm model without head, with the hub's weights or a local file's.

    Raises:
        UserError: naming the recipe key; also if the file lacks any of the model's weights, because timm would leave
            those random without a word.
    """
    if weights and not Path(weights).is_file():
        raise UserError(f"{key}.weights: {weights} does not exist; name a .safetensors or .pt file")
    try:
        network = timm.create_model(source, pretrained=weights is None, num_classes=0, img_size=image_size)
        if weights is None:
            return network
        loaded = load_checkpoint(network, weights, strict=False, filter_fn=checkpoint_filter_fn)
    except Exception as error:  # timm, the hub client and torch each raise their own kinds
        raise UserError(
            f"{key}: timm model {source!r} could not be loaded ({type(error).__name__}: {error}); check the name, or "
            f"give a local file as {key}.weights where no hub is in reach"
        ) from None
    if loaded.missing_keys:
        raise UserError(
            f"{key}.weights: {weights} is not a file of {source}: it lacks {len(loaded.missing_keys)} of its tensors, "
            f"first {loaded.missing_keys[0]}"
        )
    return network


def tensors_sha256(network: nn.Module) -> str:
    """Hex sha256 over names and bytes of all tensors, for weights that did not come from a named file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
