"""Encoders by their spec: CViT, plain ViT or BEiT, bare or with a head; initialization for fine-tuning."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mrmae_ds.models.beit import MaskedBeit
from mrmae_ds.models.cvit import CViT
from mrmae_ds.models.sizes import BeitSpec, CViTSpec, EncoderSpec, ImageSize
from mrmae_ds.models.vit import MaskedViT

Encoder = CViT | MaskedViT | MaskedBeit


def build_encoder(
    spec: EncoderSpec,
    image_size: ImageSize,
    num_classes: int = 0,
    drop_path_rate: float = 0.0,
    pool: str = "avg",
    *,
    attn_drop_rate: float = 0.0,
    mask_token: bool = False,
) -> Encoder:
    """Build the encoder of a spec, with the libraries' default initialization.

    Args:
        spec: size of a CViT, a plain ViT or a BEiT.
        image_size: input size in pixels, one side of a square or (height, width).
        num_classes: outputs of the head; 0 builds the bare encoder for pre-training.
        drop_path_rate: stochastic depth of the last block.
        pool: pooling of a classifier: ``avg``, or another that :class:`~mrmae_ds.models.cvit.CViT` or
            :class:`~mrmae_ds.models.vit.MaskedViT` supports.
        attn_drop_rate: dropout of the attention; a CViT has none.
        mask_token: have a mask token, for pre-training; a CViT has none.

    Raises:
        ConfigError: if the patches do not tile ``image_size``.
        UserError: for a pooling that the encoder does not support.
    """
    if isinstance(spec, CViTSpec):
        return CViT(spec, image_size, num_classes, drop_path_rate, global_pool=pool if num_classes else "")
    extras: dict[str, Any] = {"attn_drop_rate": attn_drop_rate, "mask_token": mask_token}
    if isinstance(spec, BeitSpec):
        return MaskedBeit(spec, image_size, num_classes, drop_path_rate, pool, **extras)
    return MaskedViT(spec, image_size, num_classes, drop_path_rate, pool, **extras)


def init_classifier(model: Encoder) -> None:
    """Initialize a classifier for fine-tuning, as MAE and MCMAE do, and BEiT as its authors do.

    Truncated normal with std 0.02 for linear layers, position embedding and class token, and 2e-5 for the head. Loading
    a pre-trained encoder replaces all of these but the head.

    Args:
        model: encoder with a head.
    """
    if isinstance(model, MaskedBeit):
        model.init_weights()
        return
    nn.init.trunc_normal_(model.pos_embed, std=0.02)
    if model.cls_token is not None:
        nn.init.trunc_normal_(model.cls_token, std=0.02)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    head = model.head
    assert isinstance(head, nn.Linear)
    nn.init.trunc_normal_(head.weight, std=2e-5)


def dense_features(encoder: Encoder, images: Tensor) -> Tensor:
    """Return :func:`mean_features` of all patches, float32 [B, C].

    Args:
        encoder: bare encoder of a pre-training. Called as a module, because ZeRO-3 gathers its weights at a call.
        images: normalized images [B, 3, H, W].
    """
    return mean_features(encoder(images)[:, encoder.num_prefix_tokens :])


def mean_features(tokens: Tensor) -> Tensor:
    """Return the mean of the patch tokens, normalized as a new ``fc_norm`` would: float32 [B, C].

    Args:
        tokens: patch tokens [B, L, C].
    """
    tokens = tokens.float()
    return F.layer_norm(tokens.mean(dim=1), tokens.shape[-1:], eps=1e-6)
