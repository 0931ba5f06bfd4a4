"""Tiny teachers' weights files, and attention computed by the libraries themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mrmae_ds.models.decoder import DecoderSpec
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.pretrain import FusionSpec
from mrmae_ds.models.sizes import CViTSpec, EncoderSpec, ViTSpec
from mrmae_ds.teachers import TeacherOptions
from mrmae_ds.weights.model_file import encoder_metadata, save_weights
from mrmae_ds.weights.paths import MODEL_FILE
from tests.support.reference import perturb, pixel_model

CVIT = CViTSpec((8, 12, 16), (1, 1, 2), 4, patches=(2, 2, 1))
VIT = ViTSpec(16, 2, 4, patch=4)
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
NORM = {"mean": MEAN, "std": STD}


def options(name: str, source: str, **changes: Any) -> TeacherOptions:
    """Return options of a float32 teacher for 64 pixels and a student's grid of 4x4; ``weights`` may be a path."""
    weights = changes.pop("weights", None)
    values = {"image_size": 64, "student_grid": (4, 4), "dtype": torch.float32, **changes}
    return TeacherOptions(f"teachers.{name}", source, weights=None if weights is None else str(weights), **values)


def pixels_of(batch: int, side: int, seed: int = 0) -> Tensor:
    """Return random pixels, float32 [batch, 3, side, side] in 0 to 1."""
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def save_run(folder: Path, spec: EncoderSpec, kind: str = "pretrain", image_size: int = 16) -> dict[str, Tensor]:
    """Write a stage folder's model file; return its tensors."""
    encoder = build_encoder(spec, image_size, 0 if kind == "pretrain" else 3)
    model: nn.Module = encoder
    if kind == "pretrain":
        model = pixel_model(encoder, FusionSpec(), DecoderSpec(dim=16, depth=1, num_heads=4), "standardize")
    perturb(model, seed=5, scale=0.3)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / MODEL_FILE, model.state_dict(), {"kind": kind, **encoder_metadata(encoder), **NORM})
    return model.state_dict()


def timm_attention(block: nn.Module, run: nn.Module, images: Tensor) -> Tensor:
    """Return a timm block's attention [B, heads, N, N], as its unfused code computes it in ``run(images)``."""
    seen: list[Tensor] = []
    fused, block.attn.fused_attn = block.attn.fused_attn, False
    handle = block.attn.attn_drop.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        run(images)
    handle.remove()
    block.attn.fused_attn = fused
    return seen[0]


def normalize(pixels: Tensor, mean: list[float] | tuple[float, ...], std: list[float] | tuple[float, ...]) -> Tensor:
    """Normalize each channel by its mean and standard deviation."""
    return torch.stack([(pixels[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
