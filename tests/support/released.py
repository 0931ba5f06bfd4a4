"""Files in the layout of MCMAE's and MAE's releases: full-size shapes without data, small ones with the reference's."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import open_clip
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


def tiny_clip(**vision: Any) -> open_clip.CLIP:
    """Build a small CLIP of open_clip with every parameter random."""
    sizes = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 16} | vision
    text = {"context_length": 8, "vocab_size": 16, "width": 32, "heads": 2, "layers": 1}
    model = open_clip.CLIP(embed_dim=16, vision_cfg=sizes, text_cfg=text).eval()
    perturb(model, seed=5)
    return model


# Hugging Face's names of the modules of a ViT's block, by timm's.
HUGGING_FACE_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
HUGGING_FACE_DINOV2_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "ls1": "layer_scale1",
    "ls2": "layer_scale2",
}


def hugging_face_vit(state: Mapping[str, Tensor], dinov2: bool = False) -> dict[str, Tensor]:
    """Rename the tensors of a timm ViT as transformers' ViTModel or Dinov2Model has them, without a head."""
    outside = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }
    renamed = {theirs: state[ours] for ours, theirs in outside.items()}
    for name, tensor in state.items():
        if not name.startswith("blocks."):
            continue
        _, number, module = name.split(".", 2)
        module, part = module.rsplit(".", 1)
        block = f"encoder.layer.{number}."
        if module == "attn.qkv":
            for kind, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[f"{block}attention.attention.{kind}.{part}"] = third
        else:
            theirs = (HUGGING_FACE_DINOV2_BLOCK if dinov2 else HUGGING_FACE_BLOCK)[module]
            renamed[f"{block}{theirs}.{'lambda1' if part == 'gamma' else part}"] = tensor
    return renamed


def hugging_face_clip(model: open_clip.CLIP) -> dict[str, Tensor]:
    """Rename a CLIP's image tower as transformers' CLIPModel has it, beside some of its text tower."""
    visual = model.visual.state_dict()
    start = "vision_model."
    renamed = {
        f"{start}embeddings.class_embedding": visual["class_embedding"],
        f"{start}embeddings.patch_embedding.weight": visual["conv1.weight"],
        f"{start}embeddings.position_embedding.weight": visual["positional_embedding"],
        f"{start}embeddings.position_ids": torch.arange(17)[None],
        "visual_projection.weight": visual["proj"].T,
        "text_model.encoder.layers.0.layer_norm1.weight": torch.ones(32),
        "logit_scale": torch.tensor(1.0),
    }
    for end in ("weight", "bias"):
        renamed[f"{start}pre_layrnorm.{end}"] = visual[f"ln_pre.{end}"]
        renamed[f"{start}post_layernorm.{end}"] = visual[f"ln_post.{end}"]
        for i in range(len(model.visual.transformer.resblocks)):
            ours, theirs = f"transformer.resblocks.{i}.", f"{start}encoder.layers.{i}."
            thirds = visual[f"{ours}attn.in_proj_{end}"].chunk(3)
            renamed |= {f"{theirs}self_attn.{kind}_proj.{end}": t for kind, t in zip("qkv", thirds, strict=True)}
            renamed[f"{theirs}self_attn.out_proj.{end}"] = visual[f"{ours}attn.out_proj.{end}"]
            renamed[f"{theirs}layer_norm1.{end}"] = visual[f"{ours}ln_1.{end}"]
            renamed[f"{theirs}layer_norm2.{end}"] = visual[f"{ours}ln_2.{end}"]
            renamed[f"{theirs}mlp.fc1.{end}"] = visual[f"{ours}mlp.c_fc.{end}"]
            renamed[f"{theirs}mlp.fc2.{end}"] = visual[f"{ours}mlp.c_proj.{end}"]
    return renamed
