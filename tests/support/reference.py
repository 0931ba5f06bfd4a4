"""Models with the authors' weights, and the map of parameter names."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from mrmae_ds.models.cvit import CViT
from mrmae_ds.models.decoder import DecoderSpec
from mrmae_ds.models.encoders import Encoder
from mrmae_ds.models.objectives import Objective
from mrmae_ds.models.pretrain import FusionSpec, PretrainModel
from mrmae_ds.models.sizes import CViTSpec, ViTSpec
from mrmae_ds.models.vit import MaskedViT
from tests.fixtures import part

MCMAE = CViTSpec((16, 24, 32), (1, 1, 2), 4)
MAE = ViTSpec(32, 2, 4)
DMAE_HEAD = "aligned_feature_projection_heads.0"
FIXED_POSITIONS = ["encoder.pos_embed", "decoder.pos_embed"]


def our_name(name: str) -> str:
    """Return this project's name of a pre-training parameter, given the authors' name."""
    if name.startswith("decoder_pred."):
        return name.replace("decoder_pred", "heads.pixels")
    if name.startswith(DMAE_HEAD):
        return name.replace(DMAE_HEAD, "heads.mimic")
    if found := re.fullmatch(r"stage(\d)_output_decode\.(\w+)", name):
        return f"fusion.stage_convs.{found[1]}.{found[2]}"
    if name.startswith("norm."):
        return "fusion." + name
    if name == "mask_token":
        return "decoder.mask_token"
    return "decoder." + name.removeprefix("decoder_") if name.startswith("decoder_") else "encoder." + name


def authors_name(name: str) -> str:
    """Return the authors' name of a pre-training parameter, given this project's name."""
    name = re.sub(r"^fusion\.stage_convs\.(\d)", r"stage\1_output_decode", name)
    name = re.sub(r"^fusion\.norm", "norm", name)
    name = re.sub(r"^heads\.pixels", "decoder_pred", name)
    name = re.sub(r"^decoder\.mask_token", "mask_token", name)
    name = re.sub(r"^decoder\.", "decoder_", name)
    return name.removeprefix("encoder.")


def pixel_objective(normalize: str = "standardize", weight: float = 1.0) -> Objective:
    """MAE's objective, with or without norm_pix."""
    return Objective(target="pixels", tap="decoder", tokens="masked", normalize=normalize, weight=weight)


def pixel_model(encoder: Encoder, fusion: FusionSpec, decoder: DecoderSpec, normalize: str) -> PretrainModel:
    """Build a model whose only objective is ``pixels``."""
    return PretrainModel(encoder, fusion, decoder, {"pixels": pixel_objective(normalize)}, {})


def reference_mcmae(reference: dict[str, Tensor], normalize: str = "standardize") -> PretrainModel:
    """Build MCMAE's pre-training model with the authors' weights, from the arrays of fixtures/mcmae.npz."""
    decoder = DecoderSpec(dim=32, depth=1, num_heads=4)
    model = pixel_model(CViT(MCMAE, 224, global_pool=""), FusionSpec(stages=(1, 2)), decoder, normalize)
    return load_all_but_positions(model, part(reference, "state/"))


def reference_mae(reference: dict[str, Tensor], normalize: str = "standardize") -> PretrainModel:
    """Build MAE's pre-training model with the authors' weights, from the arrays of fixtures/mae.npz."""
    decoder = DecoderSpec(dim=16, depth=2, num_heads=4)
    model = pixel_model(MaskedViT(MAE, 64), FusionSpec(), decoder, normalize)
    return load_all_but_positions(model, part(reference, "state/"))


def load_all_but_positions(model: PretrainModel, state: dict[str, Tensor]) -> PretrainModel:
    """Load the authors' weights, which must have every parameter except the fixed position embeddings."""
    result = model.load_state_dict({our_name(name): value for name, value in state.items()}, strict=False)
    assert sorted(result.missing_keys) == sorted(FIXED_POSITIONS)
    assert result.unexpected_keys == []
    return model


def perturb(model: nn.Module, seed: int, scale: float = 0.1) -> None:
    """Add noise to every trainable parameter, so that biases, affine terms and tokens matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)


def random_images(batch: int, side: int, seed: int) -> Tensor:
    """Return normal noise as images, float32 [batch, 3, side, side]."""
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def random_noise(batch: int, tokens: int, seed: int) -> Tensor:
    """Return the noise that determines a mask, uniform in [0, 1), float32 [batch, tokens]."""
    return torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed))
