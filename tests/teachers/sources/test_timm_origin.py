"""Weights under timm names: GELU, statistics, heads and pooling by the file's origin, the name, or an explicit key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from mrmae_ds.errors import UserError
from mrmae_ds.imagenet import IMAGENET_MEAN
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.teachers.sources.clip import ClipTeacher
from mrmae_ds.teachers.sources.timm import TimmTeacher
from tests.fixtures import load_reference, part
from tests.support.reference import MCMAE, perturb
from tests.support.released import hugging_face_clip, hugging_face_vit, tiny_clip, tiny_vit, write_released
from tests.support.sample_teachers import normalize, options, pixels_of, timm_attention

HALF, CLIP_MEAN = (0.5, 0.5, 0.5), (0.48145466, 0.4578275, 0.40821073)
QUICK = {"notes": ("natively QuickGELU, use quickgelu model variant for original results",), "mean": CLIP_MEAN}
SIZES = {"img_size": 32, "patch_size": 8, "num_heads": 4, "depth": 2}

# register_model looks up this name.
default_cfgs = generate_default_cfgs(
    {
        "mrmae_origin_vit.augreg": {"mean": HALF, "std": HALF, "hf_hub_id": "x/"},
        "mrmae_origin_vit.dino": {"mean": IMAGENET_MEAN, "std": (0.229, 0.224, 0.225), "hf_hub_id": "x/"},
        "mrmae_origin_clip_32.laion": {"mean": CLIP_MEAN, "std": HALF, "hf_hub_id": "x/"},
        "mrmae_origin_clip_32.openai": QUICK | {"std": HALF, "hf_hub_id": "x/"},
        "mrmae_origin_clip_quickgelu_32.openai": QUICK | {"std": HALF, "hf_hub_id": "x/"},
    }
)


def _vit(pretrained: bool, settings: dict[str, Any], **sizes: Any) -> VisionTransformer:
    cfg = {"pretrained_cfg", "pretrained_cfg_overlay"}
    arch = settings.pop("arch")
    kept = {name: settings.pop(name) for name in cfg if name in settings}
    return timm.models.build_model_with_cfg(
        VisionTransformer,
        arch,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        **kept,
        **{**SIZES, **sizes, **settings},
    )


@register_model
def mrmae_origin_vit(pretrained: bool = False, **settings: Any) -> VisionTransformer:
    """Two blocks of width 48, with weights of two kinds of statistics."""
    return _vit(pretrained, settings | {"arch": "mrmae_origin_vit"}, embed_dim=48)


@register_model
def mrmae_origin_clip_32(pretrained: bool = False, **settings: Any) -> VisionTransformer:
    """The image tower of tiny_clip, with the plain GELU."""
    sizes = {"embed_dim": 64, "pre_norm": True, "norm_layer": nn.LayerNorm}
    return _vit(pretrained, settings | {"arch": "mrmae_origin_clip_32"}, **sizes)


@register_model
def mrmae_origin_clip_quickgelu_32(pretrained: bool = False, **settings: Any) -> VisionTransformer:
    """The same with QuickGELU."""
    sizes = {"embed_dim": 64, "pre_norm": True, "norm_layer": nn.LayerNorm, "act_layer": "quick_gelu"}
    return _vit(pretrained, settings | {"arch": "mrmae_origin_clip_quickgelu_32"}, **sizes)


def build(weights: Path | str, source: str, **changes: Any) -> TimmTeacher:
    return TimmTeacher(options("t", source, weights=weights, image_size=32, student_grid=(4, 4), **changes))


def clip_tokens(model: open_clip.CLIP, images: Tensor) -> Tensor:
    """The last block's patch tokens as open_clip computes them."""
    with torch.no_grad():
        return model.visual.forward_intermediates(images, indices=[1], intermediates_only=True, output_fmt="NLC")[
            "image_intermediates"
        ][-1]


@pytest.mark.parametrize("layout", ["open_clip", "bare tower", "hugging face"])
@pytest.mark.parametrize("quick", [True, False])
def test_clips_gelu_under_a_timm_name(layout: str, quick: bool, tmp_path: Path) -> None:
    """Of a file without OpenAI's scalars: by the tag, the name, or the key, and never the wrong one."""
    model = tiny_clip()
    for module in model.visual.modules():
        if quick and isinstance(module, nn.GELU):
            module.forward = open_clip.transformer.QuickGELU().forward
    states = {"open_clip": model.state_dict(), "bare tower": model.visual.state_dict()}
    states["hugging face"] = hugging_face_clip(model)
    path = tmp_path / "x.pt"
    torch.save(states[layout], path)
    wrong, right = "mrmae_origin_clip_32", "mrmae_origin_clip_quickgelu_32"
    if not quick:
        wrong, right = right, wrong
    pixels = pixels_of(2, 32)
    teacher = build(path, f"{right}.openai" if quick else f"{right}.laion")
    expected = clip_tokens(model, normalize(pixels, CLIP_MEAN, HALF))
    torch.testing.assert_close(teacher(pixels).tokens, expected, atol=1e-5, rtol=1e-4)
    if quick:
        assert "QuickGELU" in teacher.details["GELU"]
        with pytest.raises(UserError, match=r"t.source: these weights were trained with QuickGELU .*note on openai"):
            build(path, f"{wrong}.openai")
    with pytest.raises(
        UserError, match=r"teachers.t.quickgelu: .*x.pt does not record the GELU .*mrmae_origin_clip_32"
    ):
        build(path, "mrmae_origin_clip_32")
    given = build(path, right, quickgelu=quick)
    assert torch.equal(given(pixels).tokens, teacher(pixels).tokens)
    with pytest.raises(UserError, match=r"t.source: these weights were trained with|t.quickgelu: false in the recipe"):
        build(path, wrong, quickgelu=quick)


def test_quickgelu_has_no_effect_on_other_models(tmp_path: Path) -> None:
    torch.save(timm.create_model("mrmae_origin_vit").state_dict(), tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"teachers.t.quickgelu: has no effect on mrmae_origin_vit.dino"):
        build(tmp_path / "x.pt", "mrmae_origin_vit.dino", quickgelu=True)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_hugging_faces_configuration_determines_a_clips_gelu(
    act: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_clip()
    torch.save(hugging_face_clip(model), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {"hidden_act": act}}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": HALF, "image_std": HALF}))
    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 16, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "mrmae-origin", config)  # others search this table
    weights = str(tmp_path / "pytorch_model.bin")
    changes = {"image_size": 32, "student_grid": (4, 4), "weights": weights}
    teacher = ClipTeacher(options("t", "mrmae-origin", **changes))
    assert teacher.details["GELU"] == f"{'Quick' * (act == 'quick_gelu')}GELU, by config.json beside it"
    assert teacher.details["statistics"] == "preprocessor_config.json beside it"
    pixels = pixels_of(2, 32)
    if act == "gelu":
        expected = clip_tokens(model, normalize(pixels, HALF, HALF))
        torch.testing.assert_close(teacher(pixels).tokens, expected, atol=1e-5, rtol=1e-4)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"teachers.t.quickgelu: .* does not record the GELU"):
        ClipTeacher(options("t", "mrmae-origin", **changes))


def dino_file(path: Path) -> VisionTransformer:
    """A file of DINO's script: student and teacher with projection heads."""
    model = timm.create_model("mrmae_origin_vit", num_classes=0).eval()
    perturb(model, seed=4, scale=0.2)
    teacher = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    teacher["head.last_layer.weight_g"] = torch.ones(8, 1)
    student = {f"module.{name}": torch.zeros_like(tensor) for name, tensor in teacher.items()}
    torch.save({"student": student, "teacher": teacher, "dino_loss": {"center": torch.zeros(1, 8)}}, path)
    return model


def test_statistics_of_a_dino_file_under_timms_plain_name(tmp_path: Path) -> None:
    """timm's default weights of that name have mean 0.5; DINO's were trained with ImageNet's."""
    model = dino_file(tmp_path / "dino.pth")
    teacher = build(f"{tmp_path}/dino.pth#teacher", "mrmae_origin_vit")
    assert teacher.mean.flatten().tolist() == pytest.approx(IMAGENET_MEAN)
    assert teacher.details["statistics"] == "DINO's projection head"
    assert "weights under teacher; names without backbone." in teacher.details["weights"]
    pixels = pixels_of(2, 32)
    images = normalize(pixels, IMAGENET_MEAN, (0.229, 0.224, 0.225))
    attention = timm_attention(model.blocks[-1], model.forward_features, images)
    torch.testing.assert_close(teacher(pixels).importance, attention.mean(1)[:, 0, 1:], atol=1e-6, rtol=1e-5)
    with pytest.raises(UserError, match=r"t.mean: .* was trained with mean \(0.485, .*DINO's projection head\), but"):
        build(f"{tmp_path}/dino.pth#teacher", "mrmae_origin_vit.augreg")
    with pytest.raises(UserError, match=r"t.weights: .*contains 2 sets of weights: student, teacher; choose"):
        build(tmp_path / "dino.pth", "mrmae_origin_vit")


def test_undecided_statistics_are_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("mrmae_origin_vit").state_dict(), tmp_path / "x.pt")
    with pytest.raises(
        UserError, match=r"t.mean: .*x.pt does not record .* of mrmae_origin_vit differ .*0.485.*give m"
    ):
        build(tmp_path / "x.pt", "mrmae_origin_vit")
    assert build(tmp_path / "x.pt", "mrmae_origin_vit.dino").mean.flatten().tolist() == pytest.approx(IMAGENET_MEAN)
    given = build(tmp_path / "x.pt", "mrmae_origin_vit", statistics=((0.1, 0.2, 0.3), HALF))
    assert given.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"mean": HALF, "std": HALF}}))
    assert build(tmp_path / "x.pt", "mrmae_origin_vit").details["statistics"] == "config.json beside it"


def test_the_number_of_heads_is_compared(tmp_path: Path) -> None:
    torch.save(timm.create_model("mrmae_origin_vit", num_heads=2).state_dict(), tmp_path / "x.pt")
    teacher = build(tmp_path / "x.pt", "mrmae_origin_vit.dino")
    assert teacher.details["heads"] == "4, as in mrmae_origin_vit.dino; not checked, the file does not record it"
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 48, "num_attention_heads": 2}))
    with pytest.raises(
        UserError, match=r"t.weights: .*x.pt has 2 attention heads \(by config.json beside it\), mrmae_o"
    ):
        build(tmp_path / "x.pt", "mrmae_origin_vit.dino")


def test_the_class_token_of_a_mean_pooled_classifier_is_not_used(tmp_path: Path) -> None:
    """As MAE's fine-tuning saves it; only the mean of the patches was trained."""
    model = timm.create_model("mrmae_origin_vit", global_pool="avg", fc_norm=True, num_classes=5).eval()
    perturb(model, seed=4, scale=0.2)
    torch.save(model.state_dict(), tmp_path / "x.pt")
    teacher = build(tmp_path / "x.pt", "mrmae_origin_vit.dino")
    pixels = pixels_of(2, 32)
    images = normalize(pixels, IMAGENET_MEAN, (0.229, 0.224, 0.225))
    attention = timm_attention(model.blocks[-1], model.forward_features, images).mean(1)
    torch.testing.assert_close(teacher(pixels).importance, attention[:, 1:, 1:].mean(1), atol=1e-6, rtol=1e-5)
    assert "the class token was not trained" in teacher.details["importance"]


def test_hugging_faces_dinov2_gives_timms_tokens(tmp_path: Path) -> None:
    model = tiny_vit(num_classes=0, init_values=1e-5)
    state = hugging_face_vit(model.state_dict(), dinov2=True) | {"embeddings.mask_token": torch.zeros(1, 24)}
    torch.save(state, tmp_path / "x.bin")

    @register_model
    def mrmae_origin_layer_scale(pretrained: bool = False, **settings: Any) -> VisionTransformer:
        sizes = {"embed_dim": 24, "num_heads": 3, "init_values": 1e-5}
        return _vit(
            pretrained,
            settings | {"arch": "mrmae_origin_layer_scale", "pretrained_cfg": {"mean": HALF, "std": HALF}},
            **sizes,
        )

    teacher = build(tmp_path / "x.bin", "mrmae_origin_layer_scale", features="ln_post")
    assert teacher.details["statistics"] == "DINOv2's mask token and layer scale"
    pixels = pixels_of(2, 32)
    with torch.no_grad():
        expected = model.forward_features(normalize(pixels, IMAGENET_MEAN, (0.229, 0.224, 0.225)))[:, 1:]
    torch.testing.assert_close(teacher(pixels).tokens, expected, atol=1e-5, rtol=1e-4)
    lost = "encoder.layer.1.layer_scale2.lambda1"
    torch.save({name: tensor for name, tensor in state.items() if name != lost}, tmp_path / "x.bin")
    with pytest.raises(UserError, match=r"t.weights: .*encoder tensors are missing: 1 \(blocks.1.ls2.gamma\)"):
        build(tmp_path / "x.bin", "mrmae_origin_layer_scale")


def test_a_cvits_file_is_no_timm_vit(tmp_path: Path) -> None:
    path = write_released(tmp_path / "x.pth", part(load_reference("mcmae"), "finetune/"))
    with pytest.raises(
        UserError, match=r"t.weights: .*x.pth contains CViT classifier.*not mrmae_origin_vit; use kind: c"
    ):
        build(path, "mrmae_origin_vit")
    torch.save(build_encoder(MCMAE, 32).state_dict(), tmp_path / "y.pth")
    with pytest.raises(UserError, match=r"use kind: checkpoint with source: .*y.pth"):
        build(tmp_path / "y.pth", "mrmae_origin_vit.dino")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    state = timm.create_model("mrmae_origin_vit").state_dict()
    state["blocks.0.attn.qkv.bias"][0] = torch.nan
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"t.weights: .*x.pt: 1 tensor with NaN or infinity: blocks.0.attn.qkv.bias"):
        build(tmp_path / "x.pt", "mrmae_origin_vit.dino")


def test_prefixes_of_a_convolutional_networks_names_are_removed(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=0).eval()
    torch.save({f"model.{name}": tensor for name, tensor in model.state_dict().items()}, tmp_path / "x.pt")
    changes = {"image_size": 128, "student_grid": (4, 4), "weights": tmp_path / "x.pt"}
    teacher = TimmTeacher(options("t", "test_resnet.r160_in1k", **changes))
    images = pixels_of(1, 128)
    cfg = teacher.network.pretrained_cfg
    with torch.no_grad():
        expected = model.forward_intermediates(normalize(images, cfg["mean"], cfg["std"]), intermediates_only=True)[-1]
    torch.testing.assert_close(teacher(images).tokens, expected.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-4)
    torch.save({f"generator.{name}": tensor for name, tensor in model.state_dict().items()}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"is not a file of test_resnet.r160_in1k: the model lacks 75 .* first gen"):
        TimmTeacher(options("t", "test_resnet.r160_in1k", **changes))
