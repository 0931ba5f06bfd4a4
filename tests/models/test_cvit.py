"""CViT: both forwards, stages, head, settings. Values are tested in test_dense.py and test_reference.py."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from mrmae_ds.errors import UserError
from mrmae_ds.models.activation_checkpointing import CheckpointPlan
from mrmae_ds.models.cvit import CViT
from mrmae_ds.models.decoder import DecoderSpec
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.masking import choose_visible
from mrmae_ds.models.pos_embed import resize_pos_embed
from mrmae_ds.models.pretrain import FusionSpec, PretrainModel
from mrmae_ds.models.sizes import CViTSpec, EncoderSpec
from tests.fixtures import load_json
from tests.support import dense
from tests.support.reference import perturb, pixel_model, random_images, random_noise

GRID = 4


def cvit_spec(patches: tuple[int, int, int]) -> CViTSpec:
    return CViTSpec((8, 12, 16), (1, 2, 2), 4, (4, 2, 4), patches)


def build(spec: EncoderSpec, fusion: FusionSpec) -> PretrainModel:
    torch.manual_seed(0)
    decoder = DecoderSpec(dim=16, depth=2, num_heads=4)
    model = pixel_model(build_encoder(spec, GRID * spec.stride), fusion, decoder, "standardize")
    perturb(model, seed=1)
    return model


def classifier(img_size: int | tuple[int, int] = 64, **settings: Any) -> CViT:
    """Three classes, every parameter perturbed."""
    torch.manual_seed(0)
    model = CViT(cvit_spec((4, 2, 2)), img_size, **{"num_classes": 3, **settings})
    perturb(model, seed=1)
    return model


def dense_stages(model: CViT, images: Tensor) -> list[Tensor]:
    """The outputs of the three stages, [B, C, h, w], by the formulas of dense.py."""
    state = dict(model.state_dict())
    x1 = dense.patch_embed(images, state, "patch_embed1")
    x1 = dense.conv_stage(x1, state, 1, torch.ones(()))
    x2 = dense.patch_embed(x1, state, "patch_embed2")
    x2 = dense.conv_stage(x2, state, 2, torch.ones(()))
    x3 = dense.patch_embed(x2, state, "patch_embed3")
    tokens = dense.linear(x3.flatten(2).transpose(1, 2), state, "patch_embed4") + state["pos_embed"]
    tokens = dense.attention_blocks(tokens, state, "blocks3", model.spec.num_heads)[-1]
    return [x1, x2, tokens.transpose(1, 2).reshape(x3.shape)]


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (80, 48)])
def test_stages_and_logits_of_any_shape(size: tuple[int, int]) -> None:
    model = classifier(size).eval()
    images = torch.randn(2, 3, *size)
    expected = dense_stages(model, images)
    final, maps = model.forward_intermediates(images)
    for found, exact in zip(maps, expected, strict=True):
        torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-4)
    tokens = expected[2].flatten(2).transpose(1, 2)
    torch.testing.assert_close(final, tokens, atol=1e-5, rtol=1e-4)
    assert torch.equal(model.forward_features(images), final)
    state = model.state_dict()
    logits = dense.linear(dense.token_norm(tokens.mean(1), state, "fc_norm"), state, "head")
    torch.testing.assert_close(model(images), logits, atol=1e-5, rtol=1e-4)


def test_formats_and_choices_of_stages() -> None:
    model, images = classifier((48, 80)).eval(), torch.randn(2, 3, 48, 80)
    maps = model.forward_intermediates(images, intermediates_only=True)
    assert [tuple(m.shape) for m in maps] == [(2, 8, 12, 20), (2, 12, 6, 10), (2, 16, 3, 5)]

    def chosen(**how: Any) -> list[Tensor]:
        return model.forward_intermediates(images, intermediates_only=True, **how)

    assert all(torch.equal(a.permute(0, 2, 3, 1), b) for a, b in zip(maps, chosen(output_fmt="NHWC"), strict=True))
    tokens = chosen(output_fmt="NLC")
    assert all(torch.equal(a.flatten(2).transpose(1, 2), b) for a, b in zip(maps, tokens, strict=True))
    for indices, stages in ((1, [2]), (2, [1, 2]), ([0], [0]), ((-3, -1), [0, 2])):
        found = chosen(indices=indices)
        assert len(found) == len(stages) and all(torch.equal(a, maps[i]) for a, i in zip(found, stages, strict=True))
    for wrong in ({"norm": True}, {"output_fmt": "NCL"}):
        with pytest.raises(UserError, match="norm=False and NCHW, NHWC or NLC"):
            model.forward_intermediates(images, **wrong)


def test_stopping_early_computes_no_later_stage() -> None:
    model, images = classifier().eval(), random_images(1, 64, seed=2)
    calls = count_calls(model)
    final, maps = model.forward_intermediates(images, indices=[0, 1], stop_early=True)
    assert (calls["blocks1.0"], calls["blocks2.1"], calls["patch_embed3"], calls["blocks3.0"]) == (1, 1, 0, 0)
    assert torch.equal(final, maps[1].flatten(2).transpose(1, 2))
    final, _ = model.forward_intermediates(images, indices=[0, 1], stop_early=False)
    assert torch.equal(final, model.forward_features(images))


@pytest.mark.parametrize(("indices", "last"), [([0], 0), ([0, 1], 1), (1, 2), ([-2], 1)])
def test_pruning_leaves_what_the_stages_need(indices: int | list[int], last: int) -> None:
    model, images = classifier().eval(), random_images(2, 64, seed=2)
    expected = model.forward_intermediates(images, intermediates_only=True)[last]
    kept = model.prune_intermediate_layers(indices)
    assert kept[-1] == last and model.num_features == (8, 12, 16)[last]
    assert torch.equal(model(images), expected.flatten(2).transpose(1, 2))
    model(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    prefixes = ["patch_embed1", "blocks1", "patch_embed2", "blocks2", "patch_embed3", "patch_embed4", "blocks3"]
    parts = {name.split(".")[0] for name in model.state_dict()}
    assert parts == {*prefixes[: 2 * (last + 1) + (last == 2)], *(["pos_embed"] if last == 2 else [])}


def test_pruning_no_stage_can_keep_the_head() -> None:
    model, images = classifier().eval(), random_images(2, 64, seed=2)
    logits = model(images)
    assert model.prune_intermediate_layers([2], prune_head=False) == [2]
    assert torch.equal(model(images), logits)


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax"])
def test_pooled_head_equals_its_formula(pool: str) -> None:
    model, images = classifier(global_pool=pool).eval(), random_images(2, 64, seed=2)
    tokens = model.forward_features(images)
    pooled = {"avg": tokens.mean(1), "max": tokens.amax(1), "avgmax": (tokens.mean(1) + tokens.amax(1)) / 2}[pool]
    state = model.state_dict()
    features = dense.token_norm(pooled, state, "fc_norm")
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), features, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(images), dense.linear(features, state, "head"), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("classes", "pool", "shape", "after_blocks", "frozen"),
    [
        (3, "avg", (2, 3), {"fc_norm", "head"}, False),
        (0, "avg", (2, 16), {"fc_norm"}, False),
        (3, "", (2, 16, 3), {"head"}, False),
        (0, "", (2, 16, 16), set(), True),
    ],
)
def test_no_parameter_is_unused(
    classes: int, pool: str, shape: tuple[int, ...], after_blocks: set[str], frozen: bool
) -> None:
    model = classifier(num_classes=classes, global_pool=pool)
    out = model(random_images(2, 64, seed=2))
    assert out.shape == shape
    out.square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == ({"pos_embed"} if frozen else set())
    assert model.pos_embed.requires_grad is not frozen
    assert {name.split(".")[0] for name in model.state_dict()} & {"fc_norm", "head", "norm"} == after_blocks


def test_the_head_is_replaced() -> None:
    model, images = classifier().eval().bfloat16(), random_images(2, 64, seed=2).bfloat16()
    norm, features = model.fc_norm, model.forward_head(model.forward_features(images), pre_logits=True)
    model.reset_classifier(5)
    assert model.fc_norm is norm and model(images).shape == (2, 5) and model.get_classifier() is model.head
    assert (model.num_classes, model.global_pool, model.head.training) == (5, "avg", False)
    model.reset_classifier(0)
    assert torch.equal(model(images), features)
    model.reset_classifier(2, "")
    assert isinstance(model.fc_norm, nn.Identity) and model(images).shape == (2, 16, 2)
    model.reset_classifier(2, "max")
    assert isinstance(model.fc_norm, nn.LayerNorm) and model(images).dtype == torch.bfloat16
    with pytest.raises(UserError, match="global_pool: 'token' needs a class token"):
        model.reset_classifier(2, "token")


def test_dropout_before_the_head_in_training_only() -> None:
    model, tokens = classifier(drop_rate=0.5), torch.randn(64, 16, 16)
    dropped = model.train().forward_head(tokens, pre_logits=True)
    kept = model.eval().forward_head(tokens, pre_logits=True)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert torch.allclose(dropped[dropped != 0], 2 * kept[dropped != 0])


def test_set_input_size_equals_a_model_of_that_size() -> None:
    model = classifier(64).eval()
    other = classifier((48, 96)).eval()
    other.load_state_dict({**model.state_dict(), "pos_embed": resize_pos_embed(model.pos_embed, (4, 4), (3, 6))})
    model.set_input_size((48, 96))
    assert (model.grid, model.img_size, model.pos_embed.requires_grad) == ((3, 6), (48, 96), True)
    images = torch.randn(2, 3, 48, 96)
    assert torch.equal(model(images), other(images))
    bare = build_encoder(cvit_spec((4, 2, 2)), 64)
    bare.set_input_size(128)
    assert not bare.pos_embed.requires_grad and bare.grid == (8, 8)
    with pytest.raises(UserError, match="image_size: 100"):
        model.set_input_size((48, 100))
    assert model.grid == (3, 6)


def test_images_of_another_size_are_named() -> None:
    model = classifier(64)
    visible = choose_visible(random_noise(1, 16, seed=3), (4, 4), 0.5)
    for arguments in ((), (visible,)):
        with pytest.raises(UserError, match=r"images: \(64, 80\) pixels, but the model was built for \(64, 64\)"):
            model(torch.randn(1, 3, 64, 80), *arguments)


def count_calls(model: nn.Module) -> Counter[str]:
    """Counts the forward calls of every module by name, recomputations included, from now on."""
    calls: Counter[str] = Counter()
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    return calls


PLANS = {
    "none": (CheckpointPlan(), 1, 1),
    "conv stages": (CheckpointPlan(conv_stages=1), 2, 1),
    "transformer": (CheckpointPlan(transformer=1), 1, 2),
}


@pytest.mark.parametrize(("plan", "conv", "transformer"), PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize("masked", [False, True])
def test_checkpointing_recomputes_the_planned_parts_only(
    plan: CheckpointPlan, conv: int, transformer: int, masked: bool
) -> None:
    model = classifier().train()
    model.checkpointing = plan
    calls = count_calls(model)
    visible = choose_visible(random_noise(2, 16, seed=3), (4, 4), 0.5)
    out = model(random_images(2, 64, seed=2), *([visible] if masked else []))
    (out["tokens"] if masked else out).sum().backward()
    found = {name: calls[name] for name in ("blocks1.0", "blocks2.0", "blocks2.1", "blocks3.0", "blocks3.1")}
    assert found == {name: transformer if name.startswith("blocks3") else conv for name in found}


@pytest.mark.parametrize(("enable", "times"), [(True, 2), (False, 1)])
def test_checkpointing_by_timms_switch(enable: bool, times: int) -> None:
    model = classifier().train()
    model.checkpointing = CheckpointPlan(conv_stages=2)
    model.set_grad_checkpointing(enable)
    calls = count_calls(model)
    model.forward_intermediates(random_images(2, 64, seed=2))[0].sum().backward()
    assert {calls[f"blocks{name}"] for name in ("1.0", "2.0", "2.1", "3.0", "3.1")} == {times}


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_all_tokens_visible_equals_dense_forward(size: tuple[int, int]) -> None:
    encoder = CViT(cvit_spec((4, 2, 2)), size, global_pool="")
    perturb(encoder, seed=1)
    images = torch.randn(2, 3, *size)
    visible = choose_visible(random_noise(2, encoder.grid[0] * encoder.grid[1], seed=3), encoder.grid, 1.0)
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


def test_a_class_token_joins_the_transformer_stage() -> None:
    spec = CViTSpec((8, 12, 16), (1, 1, 2), 4, patches=(2, 2, 1))
    model = CViT(spec, 16, 3, global_pool="token").eval()
    perturb(model, seed=1)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cells = model.forward_intermediates(images, indices=[1], output_fmt="NHWC", intermediates_only=True)[0]
        patches = model.patch_embed4(model.patch_embed3(cells).flatten(1, 2))
        x = torch.cat([model.cls_token.expand(2, -1, -1), patches], dim=1) + model.pos_embed
        for block in model.blocks3:
            x = block(x)
        normed = torch.nn.functional.layer_norm(x[:, 0], (16,), model.norm.weight, model.norm.bias, eps=1e-6)
        torch.testing.assert_close(model.forward_features(images), x)
        torch.testing.assert_close(model(images), model.head(normed))
        tokens, maps = model.forward_intermediates(images)
        torch.testing.assert_close(tokens, x)
        torch.testing.assert_close(maps[-1].flatten(2).transpose(1, 2), x[:, 1:])
    assert {"cls_token", "norm.weight", "norm.bias"} <= model.state_dict().keys()
    assert not any(name.startswith("fc_norm") for name in model.state_dict())
    model.set_input_size(24)
    assert model.pos_embed.shape == (1, 1 + 36, 16) and model(torch.randn(1, 3, 24, 24)).shape == (1, 3)
    model.reset_classifier(5, "avg")
    with torch.no_grad():
        expected = model.head(model.fc_norm(model.forward_features(torch.ones(1, 3, 24, 24))[:, 1:].mean(1)))
        torch.testing.assert_close(model(torch.ones(1, 3, 24, 24)), expected)
    assert "cls_token" not in CViT(spec, 16, 3).state_dict()
