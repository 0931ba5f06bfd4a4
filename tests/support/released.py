"""Files in the layout of MCMAE's and MAE's releases: full-size shapes without data, small ones with the reference's."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from mrmae_ds.models.pos_embed import sincos_pos_embed
from mrmae_ds.weights.formats import TensorFile
from tests.fixtures import load_json, part
from tests.support.reference import perturb

TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
NOT_IN_FIRST_RELEASE = ("mask_token", "decoder_", "stage1_output_decode.", "stage2_output_decode.")


def released_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a released file of Base size, by the authors' names."""
    shapes = {}
    for key, shape in load_json("released")[name].items():
        found = re.search(r"\[(\d+)\]", key)
        for i in range(int(found[1]) if found else 1):
            shapes[re.sub(r"\[\d+\]", str(i), key)] = tuple(shape)
    return shapes


def without_decoder(names: Iterable[str]) -> list[str]:
    """Return the tensors that MCMAE's first release kept of its pre-training model."""
    return [name for name in names if not name.startswith(NOT_IN_FIRST_RELEASE)]


def file_of(shapes: Mapping[str, Iterable[int] | Tensor], metadata: dict[str, str] | None = None) -> TensorFile:
    """Return a weights file as if it had been read, with tensors of these shapes that hold no data."""
    tensors = {
        name: shape.to("meta") if isinstance(shape, Tensor) else torch.empty(tuple(shape), device="meta")
        for name, shape in shapes.items()
    }
    return TensorFile(Path("some.file"), "pickle", tensors, metadata=metadata or {})


def mcmae_state(reference: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return mcmae.npz's pre-training weights in the released layout; the fixed decoder positions hold noise."""
    return {
        "pos_embed": sincos_pos_embed(32, (14, 14)),
        "decoder_pos_embed": torch.randn(1, 196, 32, generator=torch.Generator().manual_seed(0)),
        **part(reference, "state/"),
    }


def mae_state(reference: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return mae.npz's pre-training weights in the released layout; the fixed decoder positions hold noise."""
    return {
        "pos_embed": sincos_pos_embed(32, (4, 4), 1),
        "decoder_pos_embed": torch.randn(1, 17, 16, generator=torch.Generator().manual_seed(0)),
        **part(reference, "state/"),
    }


def write_released(path: Path, state: Mapping[str, Tensor]) -> Path:
    """Write a file as the authors' scripts do, with their command line beside the weights."""
    args = argparse.Namespace(model="convmae_convvit_base_patch16_dec512d8b", mask_ratio=0.75, norm_pix_loss=True)
    torch.save({"model": dict(state), "epoch": 1599, "args": args}, path)
    return path


def tiny_vit(**settings: Any) -> torch.nn.Module:
    """Build a small timm ViT with every parameter random."""
    model = timm.create_model("vit_base_patch16_224", **(TINY_VIT | settings)).eval()
    perturb(model, seed=3)
    return model
