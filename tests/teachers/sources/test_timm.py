"""Loading timm models as teachers: precision and origin of weights, position embedding, statistics, errors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer, _create_vision_transformer
from torch import nn

from mrmae_ds.errors import UserError
from mrmae_ds.teachers.base import tensors_sha256
from mrmae_ds.teachers.sources.timm import TimmTeacher
from tests.fixtures import load_reference, part
from tests.support.reference import perturb
from tests.support.sample_teachers import normalize, options, pixels_of, timm_attention

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def _vit(blocks: int, pretrained: bool, **kwargs: Any) -> VisionTransformer:
    size = {"patch_size": 16, "embed_dim": 48, "depth": blocks, "num_heads": 4}
    cfg = {"num_classes": 1000, "input_size": (3, 64, 64), "mean": MEAN, "std": STD}
    cfg |= {"first_conv": "patch_embed.proj", "classifier": "head"}
    cfg |= kwargs.pop("pretrained_cfg", None) or {}
    overlay = kwargs.pop("pretrained_cfg_overlay", None) or {}
    values = {"img_size": 64} | size | kwargs
    return _create_vision_transformer("vit_base_patch16_224", pretrained, pretrained_cfg=cfg | overlay, **values)


@register_model
def mrmae_test_vit(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Three blocks of width 48."""
    return _vit(3, pretrained, **kwargs)


@register_model
def mrmae_test_vit_one_block(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """The last block of the authors' tiny DINO."""
    return _vit(1, pretrained, **kwargs)


@register_model
def mrmae_test_vit_dinov2(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """A model with a DINOv2 name."""
    return _vit(2, pretrained, **kwargs)


@register_model
def mrmae_test_vit_registers(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """A model with register tokens."""
    return _vit(3, pretrained, **{"reg_tokens": 4, "no_embed_class": True} | kwargs)


@register_model
def mrmae_test_vit_registers_tanh(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """The same with the approximate GELU."""
    return mrmae_test_vit_registers(pretrained, **{"act_layer": "gelu_tanh"} | kwargs)


def save_model(path: Path, name: str = "mrmae_test_vit", **kwargs: Any) -> VisionTransformer:
    model = timm.create_model(name, num_classes=1000, **kwargs).eval()
    perturb(model, seed=3, scale=0.2)
    torch.save(model.state_dict(), path)
    return model


def build(weights: Path | None, source: str = "mrmae_test_vit", **changes: Any) -> TimmTeacher:
    return TimmTeacher(options("dino", source, weights=weights, **changes))


@pytest.mark.parametrize("features", ["raw", "ln_post"])
def test_tokens_and_importance_are_timms(features: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "weights.pt")
    teacher = build(tmp_path / "weights.pt", features=features)
    pixels = pixels_of(2, 64)
    tokens, importance, class_token = teacher(pixels)
    images = normalize(pixels, MEAN, STD)
    attention = timm_attention(model.blocks[-1], model.forward_features, images)
    if features == "raw":
        model.norm = nn.Identity()
    with torch.no_grad():
        expected = model.forward_features(images)
    torch.testing.assert_close(tokens, expected[:, 1:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(class_token, expected[:, :1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(importance, attention.mean(1)[:, 0, 1:], atol=1e-6, rtol=1e-5)
    assert (teacher.grid, teacher.width) == ((4, 4), 48)
    assert teacher.details["importance"] == "last block's attention, class token to patches"


def test_layers_of_a_plain_vit(tmp_path: Path) -> None:
    model, pixels, outputs = save_model(tmp_path / "weights.pt"), pixels_of(2, 64), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        model.forward_features(normalize(pixels, MEAN, STD))
    depth = len(outputs)
    found = build(tmp_path / "weights.pt", layers=tuple(range(depth)))(pixels)
    expected = torch.cat(outputs, dim=-1)
    torch.testing.assert_close(found.tokens, expected[:, 1:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.class_token, expected[:, :1], atol=1e-5, rtol=1e-4)
    assert torch.equal(found.importance, build(tmp_path / "weights.pt")(pixels).importance)
    with pytest.raises(UserError, match=f"teachers.dino.layers: mrmae_test_vit has no block {depth}"):
        build(tmp_path / "weights.pt", layers=(depth,))


def test_last_block_of_the_authors_dino(tmp_path: Path) -> None:
    reference = load_reference("dino")
    model = timm.create_model("mrmae_test_vit_one_block", num_classes=0)
    torch.save(model.state_dict() | part(reference, "state/"), tmp_path / "dino.pt")
    teacher = build(tmp_path / "dino.pt", "mrmae_test_vit_one_block", features="ln_post")
    # What enters the last block is the authors' value, whatever the image.
    teacher.network.norm_pre.register_forward_hook(lambda *_: reference["last_block_input"])
    tokens, importance, _ = teacher(pixels_of(2, 64))
    torch.testing.assert_close(tokens, reference["normed"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(importance, reference["importance"], atol=1e-6, rtol=0)


def test_half_precision_files_are_computed_in_the_teachers_precision(tmp_path: Path) -> None:
    model = save_model(tmp_path / "weights.pt")
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    save_file(half, tmp_path / "half.safetensors")
    torch.save({name: tensor.float() for name, tensor in half.items()}, tmp_path / "same.pt")
    for size in (64, 96):  # as it is, and with positions to resize
        pixels = pixels_of(2, size)
        found = build(tmp_path / "half.safetensors", image_size=size, student_grid=(size // 16,) * 2)
        expected = build(tmp_path / "same.pt", image_size=size, student_grid=(size // 16,) * 2)
        assert {p.dtype for p in found.network.parameters()} == {torch.float32}
        assert torch.equal(found(pixels).tokens, expected(pixels).tokens)


def test_bf16_is_near_fp32(tmp_path: Path) -> None:
    save_model(tmp_path / "weights.pt")
    exact = build(tmp_path / "weights.pt")(pixels_of(2, 64))
    rounded = build(tmp_path / "weights.pt", dtype=torch.bfloat16)(pixels_of(2, 64))
    assert nn.functional.cosine_similarity(exact.tokens, rounded.tokens, dim=-1).min() > 0.99
    assert not torch.equal(exact.tokens, rounded.tokens)


def test_positions_are_resized_as_timm_does(tmp_path: Path) -> None:
    model = save_model(tmp_path / "weights.pt")
    teacher = build(tmp_path / "weights.pt", image_size=96)
    assert teacher.grid == (6, 6)
    model.set_input_size(img_size=96)
    torch.testing.assert_close(teacher.network.pos_embed, model.pos_embed)
    assert "as timm does" in teacher.details["position embedding"]
    assert "position embedding" not in build(tmp_path / "weights.pt").details


@pytest.mark.parametrize(
    ("source", "keys"),
    [("mrmae_test_vit_dinov2", {}), ("mrmae_test_vit_dinov2", {"position_resize": "dino"})],
)
def test_dino_resize_is_used_for_dino_models_and_on_request(source: str, keys: dict[str, str], tmp_path: Path) -> None:
    model = save_model(tmp_path / "weights.pt", source)
    with torch.no_grad():
        positions = model.pos_embed[:, 1:].reshape(4, 4, 48).permute(2, 0, 1)[None]
        # The call in DINO's vision_transformer.py, for 96 pixels in patches of 16.
        resized = nn.functional.interpolate(positions, scale_factor=((6 + 0.1) / 4, (6 + 0.1) / 4), mode="bicubic")
    teacher = build(tmp_path / "weights.pt", source, image_size=96, **keys)
    torch.testing.assert_close(teacher.network.pos_embed[:, 1:], resized[0].permute(1, 2, 0).reshape(1, 36, 48))
    assert torch.equal(teacher.network.pos_embed[:, :1], model.pos_embed[:, :1])
    assert "as in DINO's own code" in teacher.details["position embedding"]
    library = build(tmp_path / "weights.pt", source, image_size=96, position_resize="library")
    assert not torch.allclose(library.network.pos_embed, teacher.network.pos_embed, atol=1e-3)


def test_dinos_resize_needs_positions(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "resnet.pt")
    with pytest.raises(UserError, match=r"dino.position_resize: test_resnet has no position embedding"):
        build(tmp_path / "resnet.pt", "test_resnet", position_resize="dino")


def test_statistics_are_those_of_the_model_or_of_the_recipe(tmp_path: Path) -> None:
    save_model(tmp_path / "weights.pt")
    assert build(tmp_path / "weights.pt").mean.flatten().tolist() == pytest.approx(MEAN)
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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model as timm saves it to a folder or a hub's repository."""
    model = timm.create_model("test_vit", num_classes=0).eval()
    perturb(model, seed=4, scale=0.1)
    path = tmp_path / "saved"
    path.mkdir()
    save_file(model.state_dict(), path / "model.safetensors")
    config = {"architecture": "test_vit", "num_classes": 0, "pretrained_cfg": {"mean": MEAN, "std": STD}}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_local_folder_is_a_source(folder: Path) -> None:
    source = f"local-dir:{folder}"
    teacher = build(None, source, image_size=160, student_grid=(10, 10))
    assert teacher.mean.flatten().tolist() == pytest.approx(MEAN)
    file = build(folder / "model.safetensors", "test_vit", image_size=160, student_grid=(10, 10))
    pixels = pixels_of(1, 160)
    file.mean, file.std = teacher.mean, teacher.std
    assert torch.equal(teacher(pixels).tokens, file(pixels).tokens)
    assert len(teacher.sha256) == 64
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"teachers.dino: timm model 'local-dir:.*could not be loaded"):
        build(None, source, image_size=160, student_grid=(10, 10))
    with pytest.raises(UserError, match=r"teachers.dino: timm model 'local-dir:.*nowhere' could not be loaded"):
        build(None, f"local-dir:{folder / 'nowhere'}")


def test_unreachable_hub_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route to the hub")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", unreachable)
    with pytest.raises(UserError, match=r"'hf-hub:someone/model' could not be loaded .*no route.*local file as teach"):
        build(None, "hf-hub:someone/model")


def test_errors_name_the_key(tmp_path: Path) -> None:
    save_model(tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"teachers.dino.weights: .*absent.pt: no such file"):
        build(tmp_path / "absent.pt")
    with pytest.raises(UserError, match=r"teachers.dino.features: timm models have no projection"):
        build(tmp_path / "weights.pt", features="proj")
    with pytest.raises(UserError, match=r"teachers.dino: timm model 'no_such_model' could not be loaded"):
        build(tmp_path / "weights.pt", "no_such_model")
    (tmp_path / "broken.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"teachers.dino.weights: .*broken.pt: not a readable weights file"):
        build(tmp_path / "broken.pt")
    with pytest.raises(UserError, match=r"teachers.dino.image_size: patches of 16 do not tile 60 pixels; use 64,"):
        build(tmp_path / "weights.pt", image_size=60)
    with pytest.raises(UserError, match=r"teachers.dino.stage: mrmae_test_vit has no stages"):
        build(tmp_path / "weights.pt", stage=1)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """Without the check the teacher would silently be a random network."""
    state = save_model(tmp_path / "weights.pt").state_dict()
    torch.save({f"generator.{name}": value for name, value in state.items()}, tmp_path / "prefixed.pt")
    with pytest.raises(UserError, match=r"teachers\.dino\.weights: .*prefixed.pt: its encoder's names begin with 'gen"):
        build(tmp_path / "prefixed.pt")
    part_of = {name: value for name, value in state.items() if name != "blocks.1.attn.qkv.weight"}
    torch.save(part_of, tmp_path / "partial.pt")
    with pytest.raises(UserError, match=r"encoder tensors are missing: 1 \(blocks.1.attn.qkv.weight"):
        build(tmp_path / "partial.pt")
    save_model(tmp_path / "deeper.pt", depth=4)
    with pytest.raises(UserError, match=r"the model lacks 12 of its tensors, first blocks.3.norm1.weight"):
        build(tmp_path / "deeper.pt")


def test_unused_tensors_may_be_missing_or_superfluous(tmp_path: Path) -> None:
    state = save_model(tmp_path / "weights.pt").state_dict()
    expected = build(tmp_path / "weights.pt")(pixels_of(1, 64))
    bare = {name: value for name, value in state.items() if not name.startswith(("norm.", "head."))}
    torch.save(bare | {"head.mlp.0.weight": torch.ones(2), "mask_token": torch.ones(1, 1, 48)}, tmp_path / "bare.pt")
    assert torch.equal(build(tmp_path / "bare.pt")(pixels_of(1, 64)).tokens, expected.tokens)
    with pytest.raises(UserError, match=r"lacks 2 of its tensors, first norm.(weight|bias)"):
        build(tmp_path / "bare.pt", features="ln_post")


@pytest.mark.parametrize(
    "extra",
    ["reg_token", "dist_token", "norm_pre.weight", "rel_pos_bias.table", "rope.freqs", "projection.weight", "scale"],
)
def test_tensors_that_the_model_lacks_are_refused_wherever_they_are(extra: str, tmp_path: Path) -> None:
    """Without them the features differ, and no shape does."""
    state = save_model(tmp_path / "weights.pt").state_dict()
    torch.save(state | {extra: torch.ones(1, 1, 48)}, tmp_path / "more.pt")
    with pytest.raises(UserError, match=rf"dino.weights: .*more.pt is not a file of .*: the model lacks 1 .* {extra};"):
        build(tmp_path / "more.pt")


@pytest.mark.parametrize(
    "extra", ["head_dist.weight", "fc_norm.", "attn_pool.q.weight", "pre_logits.fc.bias", "decoder_embed.weight"]
)
def test_heads_and_decoders_are_not_needed(extra: str, tmp_path: Path) -> None:
    state = save_model(tmp_path / "weights.pt").state_dict()
    more = [f"{extra}weight", f"{extra}bias"] if extra.endswith(".") else [extra]
    torch.save(state | dict.fromkeys(more, torch.ones(48)), tmp_path / "more.pt")
    expected = build(tmp_path / "weights.pt")(pixels_of(1, 64))
    assert torch.equal(build(tmp_path / "more.pt")(pixels_of(1, 64)).tokens, expected.tokens)


@pytest.mark.parametrize("distilled", ["deit_tiny_distilled_patch16_224", "vit_tiny_patch16_224"])
def test_a_distilled_model_and_a_plain_one_are_not_exchanged(distilled: str, tmp_path: Path) -> None:
    """The position embedding has a row per token, so its resizing fails first, with an error of torch's."""
    names = {"deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224", "vit_tiny_patch16_224"} - {distilled}
    torch.save(timm.create_model(distilled, num_classes=0).state_dict(), tmp_path / "x.pt")
    other = "deit_tiny_patch16_224" if "distilled" in distilled else sorted(names)[0]
    found = "the model lacks 1 of its tensors, first dist_token" if "distilled" in distilled else "it lacks dist_token"
    with pytest.raises(UserError, match=rf"x.pt is not a file of {other}.*: {found}; set source to") as refused:
        build(tmp_path / "x.pt", other, image_size=224, student_grid=(14, 14))
    assert "hub" not in str(refused.value)


def test_a_local_file_of_other_shapes_is_refused_without_the_hub(tmp_path: Path) -> None:
    torch.save(timm.create_model("mrmae_test_vit", num_classes=0, embed_dim=24).state_dict(), tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"could not be loaded .*; set source to the model that .*x.pt was") as refused:
        build(tmp_path / "x.pt")
    assert "hub" not in str(refused.value)


@pytest.mark.parametrize("computed", ["gelu", "gelu_tanh"])
def test_a_recorded_activation_is_compared_with_the_models(computed: str, tmp_path: Path) -> None:
    """Of networks that only timm has; a plain ViT with another one is refused before."""
    source = "mrmae_test_vit_registers" + "_tanh" * (computed == "gelu_tanh")
    save_model(tmp_path / "weights.pt", source)
    for recorded in ("gelu", "gelu_tanh", "no_such_activation"):
        (tmp_path / "config.json").write_text(json.dumps({"model_args": {"act_layer": recorded}}))
        if recorded == computed:
            details = build(tmp_path / "weights.pt", source).details
            assert details["activation"] == f"{recorded}, by config.json beside it"
            continue
        with pytest.raises(UserError, match=rf"dino.source: .* has the activation {recorded} \(act_layer in config"):
            build(tmp_path / "weights.pt", source)


def test_registers_by_their_authors_names(tmp_path: Path) -> None:
    model = save_model(tmp_path / "weights.pt", "mrmae_test_vit_registers")
    state = model.state_dict()
    state["register_tokens"] = state.pop("reg_token")
    row, state["mask_token"] = torch.ones(1, 1, 48), torch.zeros(1, 48)
    state["pos_embed"] = torch.cat([row, state["pos_embed"]], dim=1)
    state["cls_token"] = state["cls_token"] - row  # timm's conversion adds the row
    torch.save(state, tmp_path / "registers.pt")

    found = build(tmp_path / "registers.pt", "mrmae_test_vit_registers", position_resize="library")
    expected = build(tmp_path / "weights.pt", "mrmae_test_vit_registers", position_resize="library")
    pixels = pixels_of(1, 64)
    torch.testing.assert_close(found(pixels).tokens, expected(pixels).tokens, atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match="the model lacks 1 of its tensors, first reg_token"):
        build(tmp_path / "registers.pt")


def test_clip_weights_under_a_timm_name_of_the_other_gelu_are_refused(tmp_path: Path) -> None:
    """timm has a name per GELU, and records the GELU of weights only in a note."""
    state = save_model(tmp_path / "weights.pt").state_dict()
    scalars = {name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save(state | scalars, tmp_path / "openai.pt")
    with pytest.raises(UserError, match=r"source: these weights were trained with QuickGELU .*use a name with clip_q"):
        build(tmp_path / "openai.pt")
    note = {"notes": ("natively QuickGELU, use quickgelu model variant for original results",)}
    overlay = note | {"state_dict": state, "num_classes": 1000}

    @register_model
    def mrmae_test_vit_noted(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
        return _vit(3, pretrained, **kwargs | {"pretrained_cfg_overlay": overlay})

    with pytest.raises(UserError, match=r"trained with QuickGELU \(by timm's note"):
        build(None, "mrmae_test_vit_noted")
