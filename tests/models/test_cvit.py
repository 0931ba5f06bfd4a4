"""CViT: the masked forward, drop path, positions. Numbers: test_dense.py, test_reference.py; reach: test_leakage.py."""

from __future__ import annotations

import pytest
import torch
from timm.layers import DropPath

from mrmae_ds.masking import choose_visible
from mrmae_ds.models.cvit import CViT
from mrmae_ds.models.decoder import DecoderSpec
from mrmae_ds.models.pretrain import FusionSpec, PretrainModel
from mrmae_ds.models.sizes import CViTSpec, EncoderSpec
from mrmae_ds.models.weights import build_encoder

from ..fixtures import load_json
from .reference import perturb, pixel_model, random_images, random_noise

GRID = 4


def cvit_spec(patches: tuple[int, int, int]) -> CViTSpec:
    return CViTSpec((8, 12, 16), (1, 2, 2), 4, (4, 2, 4), patches)


def build(spec: EncoderSpec, fusion: FusionSpec) -> PretrainModel:
    torch.manual_seed(0)
    decoder = DecoderSpec(dim=16, depth=2, num_heads=4)
    model = pixel_model(build_encoder(spec, GRID * spec.stride), fusion, decoder, "standardize")
    perturb(model, seed=1)
    return model


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
