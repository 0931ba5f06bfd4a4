"""Wrapped, renamed and ambiguous files: each accepted form gives its source's values, each near twin is refused."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mrmae_ds.cli.inspect import describe
from mrmae_ds.errors import UserError
from mrmae_ds.imagenet import IMAGENET_MEAN
from mrmae_ds.models.cvit import CViT
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.sizes import ViTSpec
from mrmae_ds.models.vit import MaskedViT
from mrmae_ds.teachers.sources.clip_loading import source_of
from mrmae_ds.teachers.sources.gelu import gelu_of_file
from mrmae_ds.weights.export import export_run
from mrmae_ds.weights.load import LoadReport, load_encoder
from mrmae_ds.weights.resolve import resolve
from tests.fixtures import part
from tests.support.reference import MCMAE, random_images
from tests.support.released import TINY_VIT, hugging_face_clip, hugging_face_vit, tiny_clip, tiny_vit, write_released
from tests.support.sample_teachers import CVIT

SPEC = ViTSpec(24, 2, 3, patch=8)
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
IMAGES = random_images(2, 32, seed=1)


def load_into_vit(path: Path, pool: str = "token", classes: int = 5) -> tuple[MaskedViT, LoadReport]:
    model = MaskedViT(SPEC, 32, classes, pool=pool).eval()
    return model, load_encoder(model, path)


def assert_refused(path: Path, message: str) -> None:
    """Assert that loading refuses a file, and that check does not call it usable, for the same reason."""
    with pytest.raises(UserError, match=message):
        load_into_vit(path)
    try:
        text = describe(path)
    except UserError as error:
        text = f"NOT USABLE {error}"
    assert "NOT USABLE" in text and "use it" not in text
    reason = text.split("NOT USABLE")[1].strip()
    with pytest.raises(UserError) as refused:
        load_into_vit(path)
    assert reason in str(refused.value)


PREFIXES = ["model.", "backbone.", "encoder.", "net.", "module.backbone.", "_orig_mod.module.model.", "backbone.net."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_are_removed(prefix: str, mcmae: dict[str, Tensor], tmp_path: Path) -> None:
    state = part(mcmae, "finetune/")
    path = write_released(tmp_path / "x.pth", {prefix + name: tensor for name, tensor in state.items()})
    model = CViT(MCMAE, 224, 10).eval()
    report = load_encoder(model, path)
    assert (report.missing, report.unexpected) == ([], [])
    with torch.no_grad():
        torch.testing.assert_close(model(mcmae["image"]), mcmae["logits"], **CLOSE)
    assert f"names without {prefix}" in report.notes


def test_an_unknown_prefix_is_refused_until_it_is_chosen(tmp_path: Path) -> None:
    source = tiny_vit()
    torch.save({f"generator.{name}": tensor for name, tensor in source.state_dict().items()}, tmp_path / "x.pth")
    assert_refused(tmp_path / "x.pth", r"names begin with 'generator.', which is unknown .* name .*x.pth#generator$")
    model, report = load_into_vit(Path(f"{tmp_path}/x.pth#generator"))
    assert report.missing == []
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), source(IMAGES))
    assert_refused(Path(f"{tmp_path}/x.pth#gen"), r"x.pth: has no weights under 'gen'; remove #gen")


def test_absent_key_that_begins_like_a_present_one_is_named_whole(tmp_path: Path) -> None:
    torch.save({"model": tiny_vit().state_dict()}, tmp_path / "x.pth")
    message = r"x.pth: has no weights under 'model_ema'; remove #model_ema$"
    assert_refused(Path(f"{tmp_path}/x.pth#model_ema"), message)


@pytest.mark.parametrize("held", [False, True], ids=["top level", "under a key"])
def test_of_student_and_teacher_one_is_chosen(held: bool, tmp_path: Path) -> None:
    networks = {"student": tiny_vit(num_classes=0), "teacher": tiny_vit(num_classes=0, depth=2)}
    nn.init.normal_(networks["student"].cls_token)
    state = {
        f"{name}.backbone.{key}": tensor for name, net in networks.items() for key, tensor in net.state_dict().items()
    }
    state["student.head.last_layer.weight_g"] = torch.ones(3, 1)
    torch.save({"model": state, "epoch": 3} if held else state, tmp_path / "x.pth")
    assert_refused(tmp_path / "x.pth", r"contains 2 networks: student.backbone, teacher.backbone; choose: .*x.pth#")
    for name, source in networks.items():
        path = Path(f"{tmp_path}/x.pth#{name}")
        model, report = load_into_vit(path)
        with torch.no_grad():
            torch.testing.assert_close(model.forward_features(IMAGES), source.forward_features(IMAGES))
        assert f"names without {name}.backbone." in "; ".join(report.notes)
        assert f"names without {name}.backbone." in describe(path)


def test_the_choice_between_weights_and_their_average_is_reported(tmp_path: Path) -> None:
    source, average = tiny_vit(), tiny_vit()
    nn.init.ones_(average.head.bias)
    content = {"model": source.state_dict(), "model_ema": average.state_dict(), "epoch": 3}
    torch.save(content, tmp_path / "x.pth")
    assert_refused(tmp_path / "x.pth", r"contains 2 sets of weights: model, model_ema; choose one: .*x.pth#model")
    for key, expected in (("model", source), ("model_ema", average)):
        model, report = load_into_vit(Path(f"{tmp_path}/x.pth#{key}"))
        assert report.notes[0] == f"weights under {key}"
        with torch.no_grad():
            torch.testing.assert_close(model(IMAGES), expected(IMAGES))


@pytest.mark.parametrize("beside", [False, True], ids=["inside", "beside"])
def test_a_classifier_under_an_encoder_prefix_keeps_its_head(beside: bool, tmp_path: Path) -> None:
    source = tiny_vit(global_pool="avg")
    state = {f"encoder.{name}": tensor for name, tensor in source.state_dict().items()}
    if beside:
        state = {name.replace("encoder.head.", "head."): tensor for name, tensor in state.items()}
    torch.save(state, tmp_path / "x.pth")
    model, report = load_into_vit(tmp_path / "x.pth", "avg")
    assert (report.missing, report.unexpected) == ([], [])
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), source(IMAGES))


def test_a_head_whose_input_is_unknown_is_left_out(tmp_path: Path) -> None:
    state = {f"encoder.{name}": tensor for name, tensor in tiny_vit().state_dict().items()}
    state = {name.replace("encoder.head.", "head."): tensor for name, tensor in state.items()}
    torch.save(state, tmp_path / "x.pth")
    _, report = load_into_vit(tmp_path / "x.pth")
    assert sorted(report.missing) == ["head.bias", "head.weight"]
    assert "2 tensors outside the encoder left out (head)" in "; ".join(report.notes)


def test_a_linear_probes_batch_norm_is_folded_into_its_head(tmp_path: Path) -> None:
    """As MAE's script saves it: a BatchNorm without parameters, then the linear layer, on the class token."""
    source = tiny_vit()
    source.head = nn.Sequential(nn.BatchNorm1d(24, affine=False, eps=1e-6), source.head).eval()
    nn.init.normal_(source.head[0].running_mean)
    nn.init.uniform_(source.head[0].running_var, 0.5, 2)
    state = source.state_dict()
    torch.save({"model": state}, tmp_path / "x.pth")
    model, report = load_into_vit(tmp_path / "x.pth")
    assert (report.missing, report.unexpected) == ([], [])
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), source(IMAGES), **CLOSE)
    torch.save({"model": state | {"head.0.weight": torch.ones(24)}}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"a plain ViT lacks \(head.*.running_mean, .*head.*.weight"):
        load_into_vit(tmp_path / "x.pth")


def test_a_cvits_head_after_another_batch_norm_is_not_taken(tmp_path: Path) -> None:
    encoder = {n: t for n, t in build_encoder(CVIT, 64).state_dict().items() if not n.startswith(("head.", "fc_norm."))}
    probe = {"head.0.running_mean": torch.ones(16), "head.0.running_var": torch.ones(16)}
    probe |= {"head.1.weight": torch.ones(5, 16), "head.1.bias": torch.zeros(5)}
    torch.save(encoder | probe, tmp_path / "x.pth")
    assert resolve(tmp_path / "x.pth").identity.kind == "classifier"
    for other in ({"head.0.weight": torch.full((16,), 2.0)}, {"head.2.weight": torch.ones(5, 5)}):
        torch.save(encoder | probe | other, tmp_path / "x.pth")
        assert resolve(tmp_path / "x.pth").identity.kind == "encoder"
        report = load_encoder(build_encoder(CVIT, 64, 5), tmp_path / "x.pth")
        assert "head.weight" in report.missing and set(other) < set(report.unexpected)


def test_a_class_token_head_is_reported_and_not_taken_into_mean_pooling(tmp_path: Path) -> None:
    torch.save(tiny_vit().state_dict(), tmp_path / "x.pth")
    _, report = load_into_vit(tmp_path / "x.pth", "avg")
    assert "head.weight" in report.missing and "head.weight" in report.unexpected
    assert "head left out: its input is token, the model's avg" in str(report)


@pytest.mark.parametrize("prefix", ["", "vit."])
def test_hugging_faces_vit(prefix: str, tmp_path: Path) -> None:
    source = tiny_vit()
    state = {prefix + name: tensor for name, tensor in hugging_face_vit(source.state_dict()).items()}
    if prefix:
        state |= {"classifier.weight": source.head.weight, "classifier.bias": source.head.bias}
        state |= {"vit.pooler.dense.weight": torch.ones(24, 24)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    model, report = load_into_vit(tmp_path / "pytorch_model.bin")
    assert report.missing == ([] if prefix else ["head.weight", "head.bias"])
    assert "names converted from Hugging Face's ViT or DINOv2" in report.notes
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(IMAGES), source.forward_features(IMAGES))
        if prefix:
            torch.testing.assert_close(model(IMAGES), source(IMAGES))
            assert "pooler" in "; ".join(report.notes)
    lost = f"{prefix}encoder.layer.1.attention.attention.key.bias"
    torch.save({name: tensor for name, tensor in state.items() if name != lost}, tmp_path / "x.pth")
    assert_refused(tmp_path / "x.pth", r"encoder tensors are missing: 1 \(blocks.1.attn.qkv.bias\)")


def test_heads_are_compared_with_the_configuration_beside_the_file(tmp_path: Path) -> None:
    torch.save(tiny_vit(num_heads=4).state_dict(), tmp_path / "x.pth")
    _, report = load_into_vit(tmp_path / "x.pth")
    assert report.notes == ["the number of heads cannot be checked: the file does not record it"]
    assert "the number of heads cannot be checked" in describe(tmp_path / "x.pth")
    for config in ({"num_attention_heads": 4, "hidden_size": 24}, {"model_args": {"num_heads": 4}}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=r"num_heads 4 instead of 3 \(num_heads by config.json beside it"):
            load_into_vit(tmp_path / "x.pth")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 3, "hidden_size": 24}))
    assert load_into_vit(tmp_path / "x.pth")[1].notes == []
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4, "hidden_size": 768}))  # of another file
    assert len(load_into_vit(tmp_path / "x.pth")[1].notes) == 1


def test_heads_of_a_known_size_are_compared(tmp_path: Path) -> None:
    """MoCo v3's ViT-S has 12 heads, all others 6: without a further mark its size decides nothing."""
    small = timm.create_model("vit_small_patch16_224", num_classes=0, img_size=32).state_dict()
    two, path = {heads: MaskedViT(ViTSpec(384, 12, heads), 32) for heads in (6, 12)}, tmp_path / "x.pth"
    torch.save(small, path)
    for model in two.values():
        assert "the number of heads cannot be checked" in "; ".join(load_encoder(model, path).notes)
    assert "if it has 6 heads, else model.overrides.num_heads=N" in describe(path)
    networks = ("base_encoder", "momentum_encoder")
    torch.save({"state_dict": {f"module.{a}.{n}": t for a in networks for n, t in small.items()}}, path)
    load_encoder(two[12], Path(f"{path}#base_encoder"))
    with pytest.raises(UserError, match=r"num_heads 12 instead of 6 \(num_heads by MoCo v3's names;"):
        load_encoder(two[6], Path(f"{path}#momentum_encoder"))
    write_released(path, small)  # MAE's
    load_encoder(two[6], path)
    with pytest.raises(UserError, match=r"num_heads 6 instead of 12 .* by its width and depth, those of vit_small"):
        load_encoder(two[12], path)
    torch.save(small, path)
    (tmp_path / "config.json").write_text(json.dumps({"num_features": 384, "pretrained_cfg": {"tag": "augreg"}}))
    with pytest.raises(UserError, match=r"num_heads 6 instead of 12"):
        load_encoder(two[12], path)


@pytest.mark.parametrize("heads", ["3", 2.5, True])
def test_heads_that_are_no_whole_number_are_refused(heads: object, tmp_path: Path) -> None:
    torch.save(tiny_vit().state_dict(), tmp_path / "x.pth")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": heads}))
    message = f"x.pth: config.json beside it gives {heads!r} attention heads, which is not a whole number; correct"
    assert_refused(tmp_path / "x.pth", re.escape(message))


@pytest.mark.parametrize("heads", [5, 0])
def test_heads_that_do_not_divide_the_width_are_refused(heads: object, tmp_path: Path) -> None:
    torch.save(tiny_vit().state_dict(), tmp_path / "x.pth")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": heads}))
    assert_refused(tmp_path / "x.pth", rf"x.pth: config.json beside it gives {heads} attention heads, .* width, 24; ")


@pytest.mark.parametrize("key", ["cat", "5", "00"])
def test_class_names_are_numbered(key: str, tmp_path: Path) -> None:
    torch.save(tiny_vit().state_dict(), tmp_path / "x.pth")
    labels = {"0": "a", "1": "b", "2": "c", "3": "d"}
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {**labels, key: "e"}}))
    assert_refused(tmp_path / "x.pth", r"x.pth: the keys of id2label in config.json beside it are not 0 to 4; correct")
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"4": "e", **labels}}))
    assert resolve(tmp_path / "x.pth").identity.origin.class_names == ("a", "b", "c", "d", "e")


def test_a_recorded_pooling_decides_about_the_head(tmp_path: Path) -> None:
    """The mean of the patches without an fc_norm has the names of a class token's classifier."""
    torch.save(tiny_vit(global_pool="avg", fc_norm=False).state_dict(), tmp_path / "x.pth")
    for config in ({"global_pool": "avg"}, {"model_args": {"global_pool": "avg", "fc_norm": False}}):
        (tmp_path / "config.json").write_text(json.dumps({"num_features": 24, "model_args": {"num_heads": 3}} | config))
        _, report = load_into_vit(tmp_path / "x.pth")
        assert report.missing == ["head.weight", "head.bias"]
        assert "head left out: its input is unknown, the model's token" in str(report)
        assert resolve(tmp_path / "x.pth").identity.title == "plain ViT classifier"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    (tmp_path / "config.json").write_text(json.dumps({"global_pool": "avg", "model_args": {"num_heads": 3}}))
    assert "evaluation and export: the input of its head is unknown" in describe(tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x.pth: the input of its head is unknown"):
        export_run(tmp_path / "x.pth", out=tmp_path / "out.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_features": 24, "global_pool": "token"}))
    assert load_into_vit(tmp_path / "x.pth")[1].missing == []
    torch.save(tiny_vit(global_pool="avg").state_dict(), tmp_path / "x.pth")
    (tmp_path / "config.json").write_text(json.dumps({"num_features": 24, "global_pool": "avg"}))
    assert load_into_vit(tmp_path / "x.pth", "avg")[1].missing == []


def test_a_hugging_face_vit_has_the_layers_of_this_projects(tmp_path: Path) -> None:
    torch.save(hugging_face_vit(tiny_vit().state_dict()), tmp_path / "x.pth")
    usual = {"hidden_size": 24, "num_attention_heads": 3, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
    (tmp_path / "config.json").write_text(json.dumps(usual))
    load_into_vit(tmp_path / "x.pth")
    for change, message in (
        ({"hidden_act": "quick_gelu"}, r"x.pth: has the activation quick_gelu \(hidden_act in config.json\)"),
        ({"layer_norm_eps": 0.01}, r"x.pth: has layer norms of epsilon 0.01 \(layer_norm_eps in config.json\)"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(usual | change))
        assert_refused(tmp_path / "x.pth", message)


@pytest.mark.parametrize(
    ("options", "settings", "mean"),
    [
        ({"layer_decay": 0.75, "blr": 1e-3}, {}, IMAGENET_MEAN),
        ({"layer_decay": 0.75, "blr": 1e-3}, {"init_values": 0.1}, None),  # of another script: MAE's cannot build it
        ({"layer_decay": 0.75}, {}, None),
        ({"norm_pix_loss": False, "mask_ratio": 0.75}, {}, IMAGENET_MEAN),
        ({"norm_pix_loss": False}, {}, None),
        ({"local_crops_number": 8, "momentum_teacher": 0.996}, {}, IMAGENET_MEAN),
        ({"local_crops_number": 8}, {}, None),
        ({"layer_decay": 0.75, "imagenet_default_mean_and_std": False}, {}, (0.5, 0.5, 0.5)),
        ({"layer_decay": 0.75, "imagenet_default_mean_and_std": True}, {"init_values": 0.1}, IMAGENET_MEAN),
    ],
    ids=str,
)
def test_statistics_by_the_command_line(
    options: dict[str, Any], settings: dict[str, Any], mean: tuple[float, ...] | None, tmp_path: Path
) -> None:
    content = {"model": tiny_vit(**settings).state_dict(), "args": argparse.Namespace(**options)}
    torch.save(content, tmp_path / "x.pth")
    statistics = resolve(tmp_path / "x.pth").identity.origin.statistics
    assert (statistics and statistics[0]) == mean


@pytest.mark.parametrize("width", [64, 1024])
def test_open_clips_configuration_of_another_file_is_not_read(width: int, tmp_path: Path) -> None:
    config = {
        "model_cfg": {"vision_cfg": {"width": width, "head_width": 16}, "quick_gelu": True},
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(tiny_clip().state_dict(), tmp_path / "clip.pth")
    torch.save(tiny_vit(embed_dim=64, num_heads=4).state_dict(), tmp_path / "vit.pth")
    clip, vit = (resolve(tmp_path / name) for name in ("clip.pth", "vit.pth"))
    origin, mine = clip.identity.origin, width == 64
    assert (origin.statistics is not None, origin.num_heads == 4, gelu_of_file(clip.file) is not None) == (mine,) * 3
    assert vit.identity.origin.statistics is None and gelu_of_file(vit.file) is None


@pytest.mark.parametrize("name", ["encoder.layer.{}.lambda_1", "embeddings.norm.weight"])
def test_a_hugging_face_encoder_with_tensors_of_its_own_is_no_plain_vit(name: str, tmp_path: Path) -> None:
    state = hugging_face_vit(tiny_vit(num_classes=0).state_dict())
    left = {"pooler.dense.weight": torch.ones(24, 24), "embeddings.position_ids": torch.arange(17)}
    torch.save(state | left | {"embeddings.mask_token": torch.ones(1, 1, 24)}, tmp_path / "x.pth")
    assert load_into_vit(tmp_path / "x.pth")[1].missing == ["head.weight", "head.bias"]
    torch.save(state | {name.format(i): torch.ones(24) for i in range(2)}, tmp_path / "x.pth")
    message = f"tensors that a plain ViT lacks ({name.format('*')}), so that"
    with pytest.raises(UserError, match=re.escape(message)):
        load_into_vit(tmp_path / "x.pth")
    assert "as a teacher: teachers.NAME={kind: timm" in describe(tmp_path / "x.pth")


def test_a_hugging_face_clip_with_tensors_of_its_own_is_no_plain_tower(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    state = hugging_face_clip(tiny_clip())
    torch.save(state, tmp_path / "x.pth")
    assert source_of(resolve(tmp_path / "x.pth")) == "file"
    message = {f"vision_model.encoder.layers.{i}.message_fc.weight": torch.ones(64, 64) for i in range(2)}
    torch.save(state | message, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"the model has no visual.encoder.layers.0.message_fc.weight \(2 such"):
        source_of(resolve(tmp_path / "x.pth"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    state = tiny_vit().state_dict()
    state["blocks.1.mlp.fc1.bias"][3] = value
    torch.save(state, tmp_path / "x.pth")
    assert_refused(tmp_path / "x.pth", r"x.pth: 1 tensor with NaN or infinity: blocks.1.mlp.fc1.bias$")


@pytest.mark.parametrize("lost", ["blocks.1.mlp.fc1.weight", "pos_embed"])
@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_are_refused(kind: torch.dtype, lost: str, tmp_path: Path) -> None:
    """Their scales are elsewhere, and copying them into a float32 model would raise no error."""
    state = tiny_vit().state_dict()
    state[lost] = state[lost].to(kind)
    save_file(state, tmp_path / "x.safetensors")
    name = str(kind).removeprefix("torch.")
    assert_refused(tmp_path / "x.safetensors", rf"1 tensor quantized \({name}\): {lost}; use the original")
    for plain in (torch.bfloat16, torch.float64):
        save_file(
            {name: value.to(plain) for name, value in tiny_vit().state_dict().items()}, tmp_path / "x.safetensors"
        )
        load_into_vit(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pos_embed": lambda t: t[0]}, r"pos_embed is \(17, 24\), expected \(1, 2, 24\)"),
        ({"pos_embed": lambda t: torch.cat([t, t], -1)}, r"pos_embed is \(1, 17, 48\), expected \(1, 17, 24\)"),
        ({"blocks.0.mlp.fc1.weight": lambda t: t.to_sparse()}, "1 tensor sparse or without values: blocks.0.mlp"),
        ({"blocks.0.mlp.fc1.weight": lambda t: t.to("meta")}, "1 tensor sparse or without values: blocks.0.mlp"),
        ({"blocks.0.mlp.fc1.weight": lambda t: t.T}, r"blocks.0.mlp.fc1.weight is \(24, 96\), expected \(24, 24\)"),
    ],
)
def test_tensors_of_another_kind_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    state = tiny_vit().state_dict()
    torch.save(state | {name: make(state[name]) for name, make in change.items()}, tmp_path / "x.pth")
    assert_refused(tmp_path / "x.pth", message)


def test_a_head_that_is_a_number_is_no_encoders(tmp_path: Path) -> None:
    torch.save(tiny_vit().state_dict() | {"head.weight": torch.tensor(1.0)}, tmp_path / "x.pth")
    assert "head.weight is a single number" in describe(tmp_path / "x.pth")
    with pytest.raises(UserError, match="no encoder supported"):
        load_into_vit(tmp_path / "x.pth")


def test_a_clip_tower_without_blocks_is_refused(tmp_path: Path) -> None:
    shapes = {
        "conv1.weight": (8, 3, 4, 4),
        "class_embedding": (8,),
        "positional_embedding": (5, 8),
        "ln_post.weight": (8,),
    }
    torch.save({f"visual.{name}": torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "x.pth")
    assert "all of visual.transformer.resblocks.*" in describe(tmp_path / "x.pth")


@pytest.mark.parametrize(
    "config, message",
    [
        ({"image_mean": [123.675, 116.28, 103.53], "image_std": [58.4, 57.1, 57.4]}, "not those of pixels in 0 to 1"),
        ({"image_mean": 0.5, "image_std": 0.5}, "not three numbers each"),
        ({"image_mean": [0.5], "image_std": [0.5]}, "not three numbers each"),
        ({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0]}, "not those of pixels in 0 to 1"),
    ],
)
def test_statistics_beside_a_file_are_of_pixels_in_0_to_1(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    torch.save(tiny_vit().state_dict(), tmp_path / "x.pth")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    assert_refused(tmp_path / "x.pth", rf"x.pth: the image_mean and image_std of preprocessor_config.json .* {message}")
    config = {"image_mean": [0.5, 0.5, 0.5], "image_std": [1, 1, 1]}  # not normalized by their deviation
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"pretrained_cfg": null, "model_args": null, "id2label": null}')
    assert resolve(tmp_path / "x.pth").identity.origin.statistics == ((0.5,) * 3, (1.0,) * 3)


def test_a_detectors_file_gives_its_backbone(tmp_path: Path) -> None:
    source = tiny_vit(num_classes=0)
    state = {f"backbone.{name}": tensor for name, tensor in source.state_dict().items()}
    state |= {"roi_heads.box.weight": torch.ones(2), "rpn.conv.weight": torch.ones(2)}
    torch.save({"model": state}, tmp_path / "x.pth")
    model, report = load_into_vit(tmp_path / "x.pth")
    assert "2 tensors outside the encoder left out (roi_heads, rpn)" in report.notes
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(IMAGES), source.forward_features(IMAGES))
    relative = {f"backbone.blocks.{i}.attn.rel_pos_h": torch.ones(7, 8) for i in (0, 1)}
    torch.save({"model": state | relative}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="windows and relative positions"):
        load_into_vit(tmp_path / "x.pth")
    assert f"stages.detect.init={tmp_path / 'x.pth'} with " in describe(tmp_path / "x.pth")


def test_lost_tensors_are_reported_by_check_as_by_loading(tmp_path: Path) -> None:
    state = tiny_vit().state_dict()
    for lost in ("cls_token", "pos_embed", "patch_embed.proj.bias", "blocks.0.attn.proj.weight", "blocks.1.norm2.bias"):
        torch.save({name: tensor for name, tensor in state.items() if name != lost}, tmp_path / "x.pth")
        assert_refused(tmp_path / "x.pth", rf"encoder tensors are missing: 1 \({lost}\)")
    assert resolve(tmp_path / "x.pth").problem
    assert TINY_VIT["depth"] == 2
