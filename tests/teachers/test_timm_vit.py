"""A timm ViT as a teacher: against timm itself and the authors' DINO."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer, _create_vision_transformer
from torch import nn

from mrmae_ds.errors import UserError
from mrmae_ds.teachers.timm_vit import TimmTeacher, tensors_sha256

from ..fixtures import load_reference, part
from ..models.reference import perturb
from .samples import normalize, pixels_of, timm_attention

default_cfgs: dict[str, Any] = {}


def _build(pretrained: bool, depth: int, **kwargs: Any) -> VisionTransformer:
    size = {"patch_size": 16, "embed_dim": 48, "depth": depth, "num_heads": 4}
    cfg = {
        "num_classes": 1000,
        "input_size": (3, 64, 64),
        "mean": (0.4, 0.5, 0.6),
        "std": (0.2, 0.25, 0.3),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    cfg |= kwargs.pop("pretrained_cfg", None) or {}
    overlay = kwargs.pop("pretrained_cfg_overlay", None) or {}
    return _create_vision_transformer(
        "vit_base_patch16_224", pretrained, pretrained_cfg=cfg | overlay, **{"img_size": 64} | size | kwargs
    )


@register_model
def mrmae_test_vit(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Three blocks of width 48."""
    return _build(pretrained, 3, **kwargs)


@register_model
def mrmae_test_vit_one_block(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """The last block of the authors' tiny DINO."""
    return _build(pretrained, 1, **kwargs)


def save_model(path: Path, name: str = "mrmae_test_vit", **kwargs: Any) -> VisionTransformer:
    model = timm.create_model(name, num_classes=1000, **kwargs).eval()
    perturb(model, seed=3, scale=0.2)
    torch.save(model.state_dict(), path)
    return model


def build(
    weights: Path | None,
    source: str = "mrmae_test_vit",
    features: str = "raw",
    image_size: int = 64,
    dtype: torch.dtype = torch.float32,
    statistics: Any = None,
) -> TimmTeacher:
    return TimmTeacher(
        source,
        str(weights) if weights else None,
        "teachers.dino",
        image_size=image_size,
        features=features,
        statistics=statistics,
        dtype=dtype,
    )


@pytest.mark.parametrize("features", ["raw", "ln_post"])
def test_tokens_and_importance_are_timms(features: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "weights.pt")
    teacher = build(tmp_path / "weights.pt", features=features)
    pixels = pixels_of(2, 64)
    tokens, importance = teacher(pixels)
    images = normalize(pixels, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    with torch.no_grad():
        if features == "raw":
            model_norm, model.norm = model.norm, nn.Identity()
        expected = model.forward_features(images)[:, 1:]
        if features == "raw":
            model.norm = model_norm
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-4)
    attention = timm_attention(model.blocks[-1], model.forward_features, images)
    torch.testing.assert_close(importance, attention.mean(1)[:, 0, 1:], atol=1e-6, rtol=1e-5)
    assert (teacher.grid, teacher.width) == ((4, 4), 48)


def test_registers_are_no_patches(tmp_path: Path) -> None:
    model = save_model(tmp_path / "weights.pt", reg_tokens=2)
    timm_kwargs = {"reg_tokens": 2}

    @register_model
    def mrmae_test_vit_registers(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
        return _build(pretrained, 3, **kwargs | timm_kwargs)

    tokens, importance = build(tmp_path / "weights.pt", "mrmae_test_vit_registers", "ln_post")(
        pixels_of(2, 64)
    )
    images = normalize(pixels_of(2, 64), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    with torch.no_grad():
        torch.testing.assert_close(tokens, model.forward_features(images)[:, 3:], atol=1e-5, rtol=1e-4)
    attention = timm_attention(model.blocks[-1], model.forward_features, images)
    torch.testing.assert_close(importance, attention.mean(1)[:, 0, 3:], atol=1e-6, rtol=1e-5)


def test_last_block_of_the_authors_dino(tmp_path: Path) -> None:
    reference = load_reference("dino")
    model = timm.create_model("mrmae_test_vit_one_block", num_classes=0)
    torch.save(model.state_dict() | part(reference, "state/"), tmp_path / "dino.pt")
    teacher = build(tmp_path / "dino.pt", "mrmae_test_vit_one_block", "ln_post")
    # What enters the last block is the authors' value, whatever the picture.
    teacher.network.norm_pre.register_forward_hook(lambda *_: reference["last_block_input"])
    tokens, importance = teacher(pixels_of(2, 64))
    torch.testing.assert_close(tokens, reference["normed"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(importance, reference["importance"], atol=1e-6, rtol=0)


def test_positions_are_resized_for_another_input(tmp_path: Path) -> None:
    save_model(tmp_path / "weights.pt")
    teacher = build(tmp_path / "weights.pt", image_size=96)
    assert teacher.grid == (6, 6)
    assert teacher(pixels_of(1, 64)).tokens.shape == (1, 36, 48)


def test_statistics_are_the_models_or_the_given(tmp_path: Path) -> None:
    save_model(tmp_path / "weights.pt")
    assert build(tmp_path / "weights.pt").mean.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    given = build(tmp_path / "weights.pt", statistics=((0.1, 0.1, 0.1), (2.0, 2.0, 2.0)))
    assert given.std.flatten().tolist() == [2.0, 2.0, 2.0]


def test_sha256_is_of_the_file(tmp_path: Path) -> None:
    save_model(tmp_path / "weights.pt")
    expected = hashlib.sha256((tmp_path / "weights.pt").read_bytes()).hexdigest()
    assert build(tmp_path / "weights.pt").sha256 == expected


def test_sha256_of_tensors_changes_with_any_of_them() -> None:
    network = nn.LayerNorm(3)
    first = tensors_sha256(network)
    assert first == tensors_sha256(nn.LayerNorm(3))
    with torch.no_grad():
        network.weight[1] += 1e-6
    assert tensors_sha256(network) != first


def test_what_it_cannot_be_is_named(tmp_path: Path) -> None:
    save_model(tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"teachers.dino.weights: .*absent.pt does not exist"):
        build(tmp_path / "absent.pt")
    with pytest.raises(UserError, match=r"teachers.dino.features: timm models have no projection"):
        build(tmp_path / "weights.pt", features="proj")
    with pytest.raises(UserError, match=r"teachers.dino: timm model 'no_such_model' could not be loaded"):
        build(tmp_path / "weights.pt", "no_such_model")
    (tmp_path / "broken.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"teachers.dino: timm model 'mrmae_test_vit' could not be loaded"):
        build(tmp_path / "broken.pt")


def test_a_model_without_class_token_is_refused(tmp_path: Path) -> None:
    options = {"class_token": False, "global_pool": "avg"}
    save_model(tmp_path / "weights.pt", **options)

    @register_model
    def mrmae_test_vit_no_class(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
        return _build(pretrained, 3, **kwargs | options)

    with pytest.raises(UserError, match="is no ViT with a class token"):
        build(tmp_path / "weights.pt", "mrmae_test_vit_no_class")


def test_attention_it_cannot_read_is_refused(tmp_path: Path) -> None:
    """With normed queries and keys, class_attention would give other numbers than the model's."""
    save_model(tmp_path / "weights.pt", qk_norm=True)

    @register_model
    def mrmae_test_vit_qk_norm(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
        return _build(pretrained, 3, **kwargs | {"qk_norm": True})

    with pytest.raises(UserError, match=r"teachers\.dino\.source"):
        build(tmp_path / "weights.pt", "mrmae_test_vit_qk_norm")


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """Else the teacher is a random network and nobody notices."""
    state = save_model(tmp_path / "weights.pt").state_dict()
    torch.save({f"backbone.{name}": value for name, value in state.items()}, tmp_path / "prefixed.pt")
    with pytest.raises(UserError, match=r"teachers\.dino"):
        build(tmp_path / "prefixed.pt")
    del state["blocks.1.attn.qkv.weight"]
    torch.save(state, tmp_path / "partial.pt")
    with pytest.raises(UserError, match=r"teachers\.dino"):
        build(tmp_path / "partial.pt")
