"""Removed pixels have exactly no influence on what the encoder computes, for the patches of every size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mrmae_ds.models.decoder import DecoderSpec
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.masking import VisibleSet, choose_visible
from mrmae_ds.models.objectives import Objective
from mrmae_ds.models.pretrain import FusionSpec, PretrainModel
from mrmae_ds.models.sizes import ARCHITECTURES, CViTSpec, encoder_spec
from tests.support.reference import perturb, pixel_objective, random_images, random_noise

MIMIC = Objective(target="clip", tap="encoder", tokens="visible", normalize="layer_norm", weight=0.5)
# Widths and depths do not matter for reach; patches, grid and the number of convolutions do.
NARROW = {
    "cvit": {"dims": [8, 8, 12], "depths": [2, 2, 2], "num_heads": 2},
    "vit": {"dim": 12, "depth": 2, "num_heads": 2},
}


def build(arch: str, size: int) -> PretrainModel:
    torch.manual_seed(0)
    spec = encoder_spec(arch, NARROW[arch.split("_")[0]])
    fusion = FusionSpec(stages=(1, 2) if isinstance(spec, CViTSpec) else (), blocks=(0,))
    objectives = {"pixels": pixel_objective(), "mimic": MIMIC}
    decoder = DecoderSpec(dim=8, depth=1, num_heads=2)
    model = PretrainModel(build_encoder(spec, size), fusion, decoder, objectives, {"clip": 6})
    perturb(model, seed=1)
    return model


def removed_pixels(visible: VisibleSet, stride: int) -> Tensor:
    """True on the pixels of removed tokens, [B, 1, H, W]."""
    rows, columns = visible.grid
    removed = torch.ones(len(visible.ids_keep), 1, rows * stride, columns * stride, dtype=torch.bool)
    for image, tokens in enumerate(visible.ids_keep.tolist()):
        for token in tokens:
            top, left = token // columns * stride, token % columns * stride
            removed[image, :, top : top + stride, left : left + stride] = False
    return removed


# A BEiT computes all tokens: tests/models/test_beit.py.
VISIBLE = [arch for arch in ARCHITECTURES if not arch.startswith("beit")]
SIZES = [(arch, 32 if arch.endswith("tiny") else 224) for arch in VISIBLE]


@pytest.mark.parametrize(("arch", "size"), [*SIZES, ("cvit_huge", 392)])
@pytest.mark.parametrize("keep_ratio", [0.25, 0.6])
def test_removed_pixels_have_no_influence(arch: str, size: int, keep_ratio: float) -> None:
    model = build(arch, size)
    rows, columns = model.encoder.grid
    visible = choose_visible(random_noise(2, rows * columns, seed=3), (rows, columns), keep_ratio)
    removed = removed_pixels(visible, model.encoder.stride).expand(2, 3, size, size)
    images = random_images(2, size, seed=2).requires_grad_()
    other = torch.where(removed, 100 * random_images(2, size, seed=4), images.detach())
    targets = {"clip": torch.randn(2, rows * columns, 6)}

    latent = model.latent(images, visible)
    assert torch.equal(latent, model.latent(other, visible))
    (latent * torch.randn_like(latent)).sum().backward()
    assert (images.grad[removed] == 0).all()
    assert (images.grad[~removed] != 0).float().mean() > 0.99
    with torch.no_grad():
        losses, changed = model(images, visible, targets), model(other, visible, targets)
    assert torch.equal(losses["mimic"], changed["mimic"])
    assert not torch.equal(losses["pixels"], changed["pixels"])  # which they are the target of


@pytest.mark.parametrize("arch", ["cvit_base", "cvit_huge", "cvit_tiny"])
def test_visible_neighbors_do_mix(arch: str) -> None:
    """The mask cuts removed cells only: in each convolutional stage a visible neighbor is seen."""
    model = build(arch, 32 if arch == "cvit_tiny" else 224)
    encoder, (rows, columns) = model.encoder, model.encoder.grid
    # Tokens 0 to K-1 are visible: whole rows from the top, so token 0 has a right and a lower neighbor.
    visible = choose_visible(torch.arange(float(rows * columns))[None], encoder.grid, 0.5)
    for stage in (0, 1):
        images = random_images(1, rows * encoder.stride, seed=2).requires_grad_()
        encoder(images, visible)["stages"][stage][0, 0].sum().backward()
        reach = images.grad[0].abs().sum(0).unflatten(0, (rows, -1)).unflatten(2, (columns, -1)).sum((1, 3)) > 0
        assert reach[0, 1] and reach[1, 0] and reach[1, 1]
