"""A run of this project as a teacher."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from mrmae_ds.errors import UserError
from mrmae_ds.imagenet import IMAGENET_MEAN, IMAGENET_STD
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.sizes import BeitSpec, EncoderSpec
from mrmae_ds.teachers.sources.checkpoint import CheckpointTeacher
from mrmae_ds.weights.load import load_encoder
from mrmae_ds.weights.paths import MODEL_FILE
from tests.support.reference import reference_mcmae
from tests.support.released import mcmae_state, tiny_vit, write_released
from tests.support.sample_teachers import CVIT, MEAN, STD, VIT, normalize, options, pixels_of, save_run, timm_attention

BOTH = pytest.mark.parametrize("spec", [CVIT, VIT], ids=["cvit", "vit"])


def build(source: Path, features: str = "raw", image_size: int = 16, **changes: Any) -> CheckpointTeacher:
    return CheckpointTeacher(options("t", str(source), features=features, image_size=image_size, **changes))


@BOTH
@pytest.mark.parametrize("kind", ["pretrain", "classifier"])
def test_tokens_and_importance_equal_those_of_the_run(spec: EncoderSpec, kind: str, tmp_path: Path) -> None:
    save_run(tmp_path, spec, kind)
    teacher = build(tmp_path)
    pixels = pixels_of(3, 16)
    tokens, importance, _ = teacher(pixels)
    encoder = build_encoder(spec, 16).eval()
    load_encoder(encoder, tmp_path / MODEL_FILE)
    images = normalize(pixels, MEAN, STD)
    prefix = 1 if spec is VIT else 0
    with torch.no_grad():
        torch.testing.assert_close(tokens, encoder.forward_features(images)[:, prefix:])
    attention = timm_attention(encoder.transformer_blocks[-1], encoder.forward_features, images).mean(1)
    expected = attention[:, 0, 1:] if prefix else attention.mean(1)
    torch.testing.assert_close(importance, expected, atol=1e-6, rtol=1e-5)
    assert importance.std() > 1e-4
    assert (teacher.grid, teacher.width, teacher.image_size) == ((4, 4), 16, 16)


@BOTH
def test_features_after_the_norm_of_pretraining(spec: EncoderSpec, tmp_path: Path) -> None:
    saved = save_run(tmp_path, spec)
    raw, normed = build(tmp_path)(pixels_of(2, 16)), build(tmp_path, "ln_post")(pixels_of(2, 16))
    weight, bias = saved["fusion.norm.weight"], saved["fusion.norm.bias"]
    torch.testing.assert_close(normed.tokens, F.layer_norm(raw.tokens, (16,), weight, bias, eps=1e-6))
    assert torch.equal(normed.importance, raw.importance)


@pytest.mark.parametrize(("kind", "features"), [("pretrain", "proj"), ("classifier", "ln_post")])
def test_unavailable_features_are_refused(kind: str, features: str, tmp_path: Path) -> None:
    save_run(tmp_path, CVIT, kind)
    with pytest.raises(UserError, match=rf"teachers.t.features: .* has no {features} features; use raw"):
        build(tmp_path, features)


def test_statistics_are_those_of_training_or_of_the_recipe(tmp_path: Path) -> None:
    save_run(tmp_path, CVIT)
    own, given = build(tmp_path), build(tmp_path, statistics=((0.1, 0.2, 0.3), (1.0, 2.0, 3.0)))
    assert own.mean.flatten().tolist() == pytest.approx(MEAN)
    assert own.std.flatten().tolist() == pytest.approx(STD)
    assert given.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert given.std.flatten().tolist() == pytest.approx([1.0, 2.0, 3.0])


@BOTH
@pytest.mark.parametrize("features", ["raw", "ln_post"])
def test_bf16_is_near_fp32(spec: EncoderSpec, features: str, tmp_path: Path) -> None:
    save_run(tmp_path, spec)
    exact, rounded = (
        build(tmp_path, features, dtype=dtype)(pixels_of(2, 16)) for dtype in (torch.float32, torch.bfloat16)
    )
    assert rounded.tokens.dtype == torch.float32
    assert F.cosine_similarity(exact.tokens, rounded.tokens, dim=-1).min() > 0.99
    assert not torch.equal(exact.tokens, rounded.tokens)


@BOTH
def test_another_input_size_gives_another_grid(spec: EncoderSpec, tmp_path: Path) -> None:
    save_run(tmp_path, spec)
    teacher = build(tmp_path, image_size=24)
    assert teacher.grid == (6, 6)
    tokens, importance, _ = teacher(pixels_of(2, 16))
    assert tokens.shape == (2, 36, 16)
    assert importance.shape == (2, 36)


def test_sha256_is_of_the_file(tmp_path: Path) -> None:
    save_run(tmp_path, CVIT)
    assert build(tmp_path).sha256 == hashlib.sha256((tmp_path / MODEL_FILE).read_bytes()).hexdigest()


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"teachers.t.source: .*nowhere does not exist; run that stage first"):
        build(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"teachers.t.source: .* has not finished"):
        build(tmp_path)
    torch.save({}, tmp_path / "foreign.pt")
    with pytest.raises(UserError, match=r"teachers.t.source: .*foreign.pt: no weights found"):
        build(tmp_path / "foreign.pt")
    torch.save(tiny_vit(init_values=1e-5).state_dict(), tmp_path / "foreign.pt")
    with pytest.raises(UserError, match=r"foreign.pt: contains a ViT with tensors that a plain ViT lacks .*kind: timm"):
        build(tmp_path / "foreign.pt")


@pytest.mark.parametrize("features", ["raw", "ln_post"])
def test_a_released_pretraining(features: str, mcmae: dict[str, Tensor], tmp_path: Path) -> None:
    path = write_released(tmp_path / "x.pth", mcmae_state(mcmae))
    with pytest.raises(UserError, match=r"teachers.t.source: .*x.pth: does not record its number of attention heads"):
        build(path, image_size=224, student_grid=(14, 14))
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    teacher = build(path, features, image_size=224, student_grid=(14, 14))
    assert teacher.mean.flatten().tolist() == pytest.approx(IMAGENET_MEAN)
    pixels = pixels_of(1, 224)
    model = reference_mcmae(mcmae).eval()
    with torch.no_grad():
        expected = model.encoder.forward_features(normalize(pixels, IMAGENET_MEAN, IMAGENET_STD))
        expected = model.fusion.norm(expected) if features == "ln_post" else expected
    torch.testing.assert_close(teacher(pixels).tokens, expected, atol=1e-5, rtol=1e-4)


def test_a_vit_of_unknown_origin_needs_its_statistics(tmp_path: Path) -> None:
    source = timm.create_model("vit_small_patch16_224", img_size=32, num_classes=0).eval()
    torch.save({"model": source.state_dict()}, tmp_path / "x.pth")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 6}))
    settings = {"image_size": 32, "student_grid": (2, 2)}
    with pytest.raises(
        UserError, match=r"x.pth: does not record the mean .* give teachers.t.mean and std, or put a pre"
    ):
        build(tmp_path / "x.pth", **settings)
    teacher = build(tmp_path / "x.pth", "ln_post", statistics=((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), **settings)
    pixels = pixels_of(2, 32)
    with torch.no_grad():
        expected = source.forward_features(normalize(pixels, (0.5,) * 3, (0.5,) * 3))[:, 1:]
    torch.testing.assert_close(teacher(pixels).tokens, expected, atol=1e-5, rtol=1e-4)
    assert teacher.details["weights"] == "weights under model"


@BOTH
def test_layers_and_class_token(spec: EncoderSpec, tmp_path: Path) -> None:
    save_run(tmp_path, spec)
    pixels, outputs = pixels_of(2, 16), []
    encoder = build_encoder(spec, 16).eval()
    load_encoder(encoder, tmp_path / MODEL_FILE)
    for block in encoder.transformer_blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        encoder.forward_features(normalize(pixels, MEAN, STD))
    prefix, last = encoder.num_prefix_tokens, build(tmp_path)(pixels)
    depth = len(outputs)
    for layers in ((0,), tuple(range(depth))):
        expected = torch.cat([outputs[layer] for layer in layers], dim=-1)
        for sees_visible in (False, True):
            teacher = build(tmp_path, layers=layers, sees_visible=sees_visible)
            assert teacher.has_class_token == bool(prefix) and teacher.layers == layers
            found = teacher(pixels)  # without a visible set, all tokens
            torch.testing.assert_close(found.tokens, expected[:, prefix:])
            if prefix:
                torch.testing.assert_close(found.class_token, expected[:, :prefix])
            else:
                assert found.class_token is None
            if not sees_visible:
                torch.testing.assert_close(found.importance, last.importance)
    assert len(build(tmp_path, layers=(0,), sees_visible=True).network.transformer_blocks) == 1
    with pytest.raises(UserError, match=f"teachers.t.layers: .* has no block {depth}; it has 0 to {depth - 1}"):
        build(tmp_path, layers=(depth,))


def test_a_beit_that_sees_visible_tokens_is_refused(tmp_path: Path) -> None:
    save_run(tmp_path, BeitSpec(16, 2, 2, patch=4))
    assert build(tmp_path).has_class_token
    with pytest.raises(UserError, match=r"teachers.t.sees: .* is a BEiT, whose relative positions are of all tokens"):
        build(tmp_path, sees_visible=True)
