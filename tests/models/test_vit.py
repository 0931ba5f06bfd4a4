"""The plain ViT: interface of CViT, MAE's fine-tuning head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import timm
import torch
from torch import Tensor

from mrmae_ds.errors import UserError
from mrmae_ds.models.masking import choose_visible
from mrmae_ds.models.pos_embed import resize_pos_embed
from mrmae_ds.models.sizes import ImageSize, ViTSpec
from mrmae_ds.models.vit import MaskedViT
from tests.support import dense
from tests.support.reference import perturb, random_images, random_noise

SPEC = ViTSpec(16, 3, 4, patch=4)


def build(
    num_classes: int = 0, drop_path: float = 0.0, size: ImageSize = 16, pool: Literal["avg", "token"] = "avg"
) -> MaskedViT:
    model = MaskedViT(SPEC, size, num_classes, drop_path, pool).eval()
    perturb(model, seed=1)
    return model


@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
def test_all_tokens_visible_equals_dense_forward(size: tuple[int, int]) -> None:
    encoder = build(size=size)
    images = torch.randn(2, 3, *size)
    grid = (size[0] // 4, size[1] // 4)
    assert encoder.grid == grid
    visible = choose_visible(random_noise(2, grid[0] * grid[1], seed=3), grid, 1.0)
    outputs = encoder(images, visible, taps=(2, 0))
    dense = encoder.forward_features(images)
    torch.testing.assert_close(outputs["tokens"][:, :1], dense[:, :1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(outputs["tokens"][:, 1:], visible.take(dense[:, 1:]), atol=1e-5, rtol=1e-4)
    assert outputs["stages"] == []
    assert torch.equal(outputs["blocks"][0], outputs["tokens"])


@pytest.mark.parametrize(("pool", "norms"), [("avg", {"fc_norm"}), ("token", {"norm"})])
@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
def test_a_classifier_is_timms(pool: Literal["avg", "token"], norms: set[str], size: tuple[int, int]) -> None:
    model = build(num_classes=5, size=size, pool=pool)  # its positions are trained, the class token's too
    assert model.pos_embed[0, 0].abs().max() > 0
    assert {name.split(".")[0] for name in model.state_dict()} & {"norm", "fc_norm"} == norms
    timms = timm.create_model(
        "vit_base_patch16_224",
        img_size=size,
        patch_size=4,
        embed_dim=16,
        depth=3,
        num_heads=4,
        num_classes=5,
        global_pool=pool,
    ).eval()
    timms.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, *size)
    torch.testing.assert_close(model(images), timms(images), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.forward_features(images), timms.forward_features(images), atol=1e-5, rtol=1e-4)


def test_logits_of_the_class_token() -> None:
    model = build(num_classes=5, pool="token")
    images = random_images(2, 16, seed=2)
    tokens = model.forward_intermediates(images, indices=1, norm=False, return_prefix_tokens=True)[1][-1][1]
    state = model.state_dict()
    expected = dense.linear(dense.token_norm(tokens[:, 0], state, "norm"), state, "head")
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_no_parameter_of_a_classifier_is_unused(pool: Literal["avg", "token"]) -> None:
    model = build(num_classes=5, pool=pool)
    model(random_images(2, 16, seed=2)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_checkpointing_recomputes_every_block() -> None:
    model, images = build(num_classes=5).train(), random_images(2, 16, seed=2)
    calls: list[int] = []
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    visible = choose_visible(random_noise(2, 16, seed=3), (4, 4), 0.5)
    forwards: list[Callable[[], Tensor]] = [
        lambda: model(images),
        lambda: model(images, visible)["tokens"],
        lambda: model.forward_intermediates(images)[0],
    ]
    for enable, expected in ((True, [0, 1, 2, 2, 1, 0]), (False, [0, 1, 2])):
        model.set_grad_checkpointing(enable)
        for forward in forwards:
            calls.clear()
            forward().sum().backward()
            assert calls == expected


def test_set_input_size_equals_a_model_of_that_size() -> None:
    model = build(num_classes=5)
    other = build(num_classes=5, size=(12, 24))
    positions = resize_pos_embed(model.pos_embed[:, 1:], (4, 4), (3, 6))
    other.load_state_dict({**model.state_dict(), "pos_embed": torch.cat([model.pos_embed[:, :1], positions], dim=1)})
    model.set_input_size((12, 24))
    images = torch.randn(2, 3, 12, 24)
    assert model.grid == (3, 6) and torch.equal(model(images), other(images))
    bare = build()
    bare.set_input_size(32)
    assert not bare.pos_embed.requires_grad
    with pytest.raises(UserError, match="image_size: 30"):
        model.set_input_size(30)


def test_logits_are_of_the_mean_of_patch_tokens() -> None:
    model = build(num_classes=5)
    images = random_images(2, 16, seed=2)
    mean = model.forward_features(images)[:, 1:].double().mean(1)
    centerd = mean - mean.mean(-1, keepdim=True)
    normed = centerd / (centerd.square().mean(-1, keepdim=True) + 1e-6).sqrt()
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
