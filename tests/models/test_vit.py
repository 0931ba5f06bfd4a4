"""The plain ViT: interface of CViT, MAE's fine-tuning head."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from mrmae_ds.masking import choose_visible
from mrmae_ds.models.sizes import ViTSpec
from mrmae_ds.models.vit import MaskableViT

from .reference import perturb, random_images, random_noise

SPEC = ViTSpec(16, 3, 4, patch=4)


def build(num_classes: int = 0, drop_path: float = 0.0) -> MaskableViT:
    model = MaskableViT(SPEC, 16, num_classes, drop_path).eval()
    perturb(model, seed=1)
    return model


def test_all_tokens_visible_equals_dense_forward() -> None:
    encoder = build()
    images = random_images(2, 16, seed=2)
    visible = choose_visible(random_noise(2, 16, seed=3), (4, 4), 1.0)
    outputs = encoder(images, visible, taps=(2, 0))
    dense = encoder.forward_features(images)
    torch.testing.assert_close(outputs["tokens"][:, :1], dense[:, :1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(outputs["tokens"][:, 1:], visible.take(dense[:, 1:]), atol=1e-5, rtol=1e-4)
    assert outputs["stages"] == []
    assert torch.equal(outputs["blocks"][0], outputs["tokens"])


def test_dense_forward_is_timms() -> None:
    model = build(num_classes=5)  # its positions are trained, the class token's too
    assert model.pos_embed[0, 0].abs().max() > 0
    images = random_images(2, 16, seed=2)
    expected = VisionTransformer.forward_features(model, images)
    torch.testing.assert_close(model.forward_features(images), expected, atol=1e-5, rtol=1e-4)


def test_logits_are_of_the_mean_of_patch_tokens() -> None:
    model = build(num_classes=5)
    images = random_images(2, 16, seed=2)
    mean = model.forward_features(images)[:, 1:].double().mean(1)
    centred = mean - mean.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    normed = normed * model.fc_norm.weight.double() + model.fc_norm.bias.double()
    expected = normed @ model.head.weight.double().T + model.head.bias.double()
    torch.testing.assert_close(model(images).double(), expected, atol=1e-5, rtol=1e-4)


def test_bare_encoder_has_no_norm_and_fixed_positions() -> None:
    bare, classifier = build(), build(num_classes=5)
    extra = classifier.state_dict().keys() - bare.state_dict().keys()
    assert extra == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    assert not bare.pos_embed.requires_grad
    assert classifier.pos_embed.requires_grad
    assert (bare.pos_embed[0, 0] == 0).all()
    assert bare.fusable_stages == ()


def test_drop_path_grows_linearly() -> None:
    model = build(num_classes=2, drop_path=0.2)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])
