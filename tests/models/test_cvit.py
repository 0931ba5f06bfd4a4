"""CViT: leakage, the masked forward, drop path. Its numbers are compared in test_dense.py and test_reference.py."""

from __future__ import annotations

import pytest
import torch
from timm.layers import DropPath

from mrmae_ds.masking import choose_visible
from mrmae_ds.models.cvit import CViT
from mrmae_ds.models.decoder import DecoderSpec
from mrmae_ds.models.pretrain import FusionSpec, PretrainModel
from mrmae_ds.models.sizes import CViTSpec, EncoderSpec, ViTSpec
from mrmae_ds.models.weights import build_encoder

from ..fixtures import load_json
from .reference import perturb, pixel_model, random_images, random_noise

PATCHES = [(4, 2, 2), (7, 1, 2), (2, 2, 1)]
GRID = 4


def cvit_spec(patches: tuple[int, int, int]) -> CViTSpec:
    return CViTSpec((8, 12, 16), (1, 2, 2), 4, (4, 2, 4), patches)


def build(spec: EncoderSpec, fusion: FusionSpec) -> PretrainModel:
    torch.manual_seed(0)
    decoder = DecoderSpec(dim=16, depth=2, num_heads=4)
    model = pixel_model(build_encoder(spec, GRID * spec.stride), fusion, decoder, "standardize")
    perturb(model, seed=1)
    return model


@pytest.mark.parametrize("spec", [*map(cvit_spec, PATCHES), ViTSpec(16, 2, 4, patch=4)], ids=str)
def test_masked_pixels_never_reach_the_latent(spec: EncoderSpec) -> None:
    stages = (1, 2) if isinstance(spec, CViTSpec) else ()
    model = build(spec, FusionSpec(stages=stages, blocks=(0,)))
    images = random_images(2, GRID * spec.stride, seed=2).requires_grad_()
    visible = choose_visible(random_noise(2, GRID**2, seed=3), (GRID, GRID), 0.3)
    removed = visible.mask.reshape(2, 1, GRID, GRID).repeat_interleave(spec.stride, 2)
    removed = removed.repeat_interleave(spec.stride, 3).expand_as(images).bool()
    other = torch.where(removed, 100 * random_images(2, GRID * spec.stride, seed=4), images.detach())
    latent = model.latent(images, visible)
    assert torch.equal(latent, model.latent(other, visible))
    (latent * torch.randn_like(latent)).sum().backward()
    assert (images.grad[removed] == 0).all()
    assert (images.grad[~removed] != 0).float().mean() > 0.99


def test_visible_pixels_reach_other_visible_tokens() -> None:
    """The mask must not cut what is visible: neighbours mix in the depth-wise convolution."""
    spec = cvit_spec((2, 2, 1))
    encoder = build(spec, FusionSpec()).encoder
    noise = torch.arange(16.0)[None]  # tokens 0 to 3, the first row, are visible
    visible = choose_visible(noise, (GRID, GRID), 0.25)
    images = random_images(1, 16, seed=2).requires_grad_()
    encoder(images, visible)["stages"][0][0, 0].sum().backward()  # stage 1 of token 0
    assert images.grad[0, :, :4, 4:8].abs().sum() > 0  # token 1 is its neighbour
    assert (images.grad[0, :, 4:8, :4] == 0).all()  # so is token 4, removed


def test_all_tokens_visible_equals_dense_forward() -> None:
    encoder = build(cvit_spec((4, 2, 2)), FusionSpec()).encoder
    images = random_images(2, 64, seed=2)
    visible = choose_visible(random_noise(2, 16, seed=3), (GRID, GRID), 1.0)
    tokens = encoder(images, visible)["tokens"]
    torch.testing.assert_close(tokens, visible.take(encoder.forward_features(images)), atol=1e-5, rtol=1e-4)


def test_outputs_of_the_masked_forward() -> None:
    encoder = build(cvit_spec((4, 2, 2)), FusionSpec()).encoder
    visible = choose_visible(random_noise(2, 16, seed=3), (GRID, GRID), 0.25)
    outputs = encoder(random_images(2, 64, seed=2), visible, taps=(1, 0))
    assert outputs["tokens"].shape == (2, 4, 16)
    assert [tuple(x.shape) for x in outputs["stages"]] == [(2, 4, 4, 4, 8), (2, 4, 2, 2, 12)]
    assert torch.equal(outputs["blocks"][0], outputs["tokens"])
    assert encoder.fusable_stages == ((8, 4), (12, 2))


def test_drop_path_grows_over_all_blocks_of_all_stages() -> None:
    model = CViT(CViTSpec((8, 8, 8), (2, 2, 11), 2), 32, num_classes=2, drop_path_rate=0.1)
    rates = {
        name.replace("drop_path1", "drop_path"): module.drop_prob
        for name, module in model.named_modules()
        if isinstance(module, DropPath) and not name.endswith("drop_path2")
    }
    expected = load_json("positions")["drop_path"]
    assert rates.keys() == expected.keys()
    assert list(rates.values()) == pytest.approx([expected[name] for name in rates])
    for block in list(model.blocks3):
        assert block.drop_path1.drop_prob == block.drop_path2.drop_prob
    assert isinstance(model.blocks1[0].drop_path, torch.nn.Identity)


def test_positions_are_fixed_in_pretraining_and_trained_in_finetuning() -> None:
    spec = cvit_spec((4, 2, 2))
    bare = build_encoder(spec, 64)
    assert not bare.pos_embed.requires_grad
    assert CViT(spec, 64, num_classes=3).pos_embed.requires_grad
    assert not any(name.startswith(("head", "fc_norm")) for name in bare.state_dict())
