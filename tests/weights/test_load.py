"""Model files: round trip, loading, errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from mrmae_ds.errors import UserError
from mrmae_ds.models.decoder import DecoderSpec
from mrmae_ds.models.encoders import build_encoder, init_classifier
from mrmae_ds.models.pos_embed import resize_pos_embed
from mrmae_ds.models.pretrain import FusionSpec
from mrmae_ds.models.sizes import CViTSpec, EncoderSpec, ImageSize, ViTSpec
from mrmae_ds.weights.load import LoadReport, load_encoder, load_pretrained
from mrmae_ds.weights.model_file import (
    build_classifier,
    encoder_metadata,
    read_metadata,
    read_tensors,
    save_weights,
    spec_from_metadata,
)
from mrmae_ds.weights.paths import MODEL_FILE, find_weights
from tests.support.reference import perturb, pixel_model

CVIT = CViTSpec((8, 12, 16), (1, 1, 2), 4, patches=(2, 2, 1))
VIT = ViTSpec(16, 2, 4, patch=4)
BOTH = pytest.mark.parametrize("spec", [CVIT, VIT], ids=["cvit", "vit"])


def save_pretrained(path: Path, spec: EncoderSpec, image_size: int = 16) -> dict[str, Tensor]:
    """Write a pre-training file; return its tensors."""
    encoder = build_encoder(spec, image_size)
    model = pixel_model(encoder, FusionSpec(), DecoderSpec(dim=16, depth=1, num_heads=4), "standardize")
    perturb(model, seed=5)
    with torch.no_grad():  # positions that are not what a new model of another size would have anyway
        encoder.pos_embed += 0.1 * torch.randn_like(encoder.pos_embed)
    save_weights(path, model.state_dict(), {"kind": "pretrain", **encoder_metadata(encoder)})
    return model.state_dict()


def save_classifier(
    path: Path, spec: EncoderSpec, classes: int, size: ImageSize = 16, pool: str = "avg"
) -> dict[str, Tensor]:
    """Write a fine-tuned file; return its tensors."""
    model = build_encoder(spec, size, classes, pool=pool)
    perturb(model, seed=6)
    metadata = {"kind": "classifier", **encoder_metadata(model), "num_classes": classes}
    save_weights(path, model.state_dict(), metadata)
    return model.state_dict()


@BOTH
def test_saved_tensors_and_metadata_are_read_back(spec: EncoderSpec, tmp_path: Path) -> None:
    path = tmp_path / MODEL_FILE
    saved = save_pretrained(path, spec)
    read = read_tensors(path)
    assert read.keys() == saved.keys()
    assert all(torch.equal(read[name], saved[name]) for name in saved)
    metadata = read_metadata(path)
    assert spec_from_metadata(metadata) == spec
    assert metadata["image_size"] == 16
    assert [file.name for file in tmp_path.iterdir()] == [MODEL_FILE]


def test_views_are_saved_with_their_visible_values(tmp_path: Path) -> None:
    save_weights(tmp_path / "x", {"t": torch.arange(6.0).reshape(2, 3).T}, {})
    assert read_tensors(tmp_path / "x")["t"].tolist() == [[0, 3], [1, 4], [2, 5]]


@BOTH
def test_pretrained_into_classifier_misses_exactly_head_and_fc_norm(spec: EncoderSpec, tmp_path: Path) -> None:
    path = tmp_path / MODEL_FILE
    saved = save_pretrained(path, spec)
    model = build_encoder(spec, 16, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = load_encoder(model, path)
    assert sorted(report.missing) == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]
    assert sorted(report.unexpected) == sorted(name for name in saved if not name.startswith("encoder."))
    assert report.resized == []
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if name in report.missing else saved[f"encoder.{name}"]), name
    assert sorted([*report.loaded, *report.missing]) == sorted(before)


@BOTH
def test_pretrained_into_bare_encoder_misses_nothing(spec: EncoderSpec, tmp_path: Path) -> None:
    save_pretrained(tmp_path / MODEL_FILE, spec)
    assert load_encoder(build_encoder(spec, 16), tmp_path / MODEL_FILE).missing == []


@BOTH
def test_classifier_keeps_its_head_only_if_the_classes_agree(spec: EncoderSpec, tmp_path: Path) -> None:
    saved = save_classifier(tmp_path / MODEL_FILE, spec, classes=3)
    same = build_encoder(spec, 16, 3)
    report = load_encoder(same, tmp_path / MODEL_FILE)
    assert (report.missing, report.unexpected) == ([], [])
    assert all(torch.equal(value, saved[name]) for name, value in same.state_dict().items())
    report = load_encoder(build_encoder(spec, 16, 5), tmp_path / MODEL_FILE)
    assert sorted(report.missing) == sorted(report.unexpected) == ["head.bias", "head.weight"]
    report = load_encoder(build_encoder(spec, 16), tmp_path / MODEL_FILE)
    assert report.missing == []
    assert sorted(report.unexpected) == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]


@pytest.mark.parametrize(
    ("spec", "pool"),
    [(VIT, "avg"), (VIT, "token"), (CVIT, "avg"), (CVIT, "max"), (CVIT, "avgmax"), (CVIT, "token")],
    ids=["vit-avg", "vit-token", "cvit-avg", "cvit-max", "cvit-avgmax", "cvit-token"],
)
@pytest.mark.parametrize("size", [16, (8, 12), (32, 8)], ids=str)
def test_rebuilds_a_classifier(spec: EncoderSpec, pool: str, size: ImageSize, tmp_path: Path) -> None:
    """Its pooling and its shape too: (32, 8) has as many tokens as 16 x 16."""
    path = tmp_path / MODEL_FILE
    saved = save_classifier(path, spec, classes=3, size=size, pool=pool)
    model = build_classifier(read_metadata(path))
    assert model.global_pool == pool
    assert model.grid == (4, 4) if size == 16 else (size[0] // 4, size[1] // 4)
    report = load_encoder(model, path)
    assert (report.missing, report.unexpected, report.resized) == ([], [], [])
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    other = build_classifier(read_metadata(path), 24)
    assert load_encoder(other, path).resized == ["pos_embed"]
    prefix = other.num_prefix_tokens
    positions = resize_pos_embed(saved["pos_embed"][:, prefix:], model.grid, (6, 6))
    assert torch.equal(other.pos_embed[:, prefix:], positions)


@pytest.mark.parametrize(("spec", "pool"), [(VIT, "max"), (CVIT, "map")], ids=["vit", "cvit"])
def test_a_pooling_that_the_encoder_lacks(spec: EncoderSpec, pool: str) -> None:
    with pytest.raises(UserError, match=f"'{pool}' is unknown"):
        build_encoder(spec, 16, 3, pool=pool)


def test_head_of_another_pooling_is_not_loaded(tmp_path: Path) -> None:
    save_classifier(tmp_path / MODEL_FILE, CVIT, classes=3, pool="max")
    model = build_encoder(CVIT, 16, 3)
    report = load_encoder(model, tmp_path / MODEL_FILE)
    assert sorted(report.missing) == sorted(report.unexpected) == ["head.bias", "head.weight"]


@BOTH
def test_positions_are_resized_for_another_grid(spec: EncoderSpec, tmp_path: Path) -> None:
    saved = save_pretrained(tmp_path / MODEL_FILE, spec)["encoder.pos_embed"]
    model = build_encoder(spec, 24, 3)
    report = load_encoder(model, tmp_path / MODEL_FILE)
    assert report.resized == ["pos_embed"]
    prefix = 1 if spec is VIT else 0
    expected = resample_abs_pos_embed(saved, [6, 6], num_prefix_tokens=prefix, antialias=False)
    assert expected.shape == (1, prefix + 36, 16)
    torch.testing.assert_close(model.pos_embed.detach(), expected)
    assert torch.equal(model.pos_embed[:, :prefix], saved[:, :prefix])


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / MODEL_FILE
    save_pretrained(path, CVIT)
    other = CViTSpec((8, 12, 16), (1, 1, 3), 4, patches=(2, 2, 1))
    with pytest.raises(UserError, match=rf"{path}: its encoder differs .*: depths \(1, 1, 2\) instead of \(1, 1, 3\);"):
        load_encoder(build_encoder(other, 16), path)
    with pytest.raises(UserError, match=rf"{path}: contains CViT, .*but the recipe's model is a plain ViT"):
        load_encoder(build_encoder(VIT, 16), path)
    with pytest.raises(UserError, match=rf"{path}: its encoder differs from the recipe's: num_heads 4 instead of 2;"):
        load_encoder(build_encoder(replace(CVIT, num_heads=2), 16), path)


def test_errors_name_the_recipe_key(tmp_path: Path) -> None:
    path, key = tmp_path / MODEL_FILE, "stages.finetune.init"
    tensors = save_pretrained(path, CVIT)
    with pytest.raises(UserError, match=rf"^{key}: {path}: its encoder differs"):
        load_encoder(build_encoder(replace(CVIT, num_heads=2), 16), path, key)
    with pytest.raises(UserError, match=rf"^{key}: {tmp_path}/none: no such file"):
        load_encoder(build_encoder(CVIT, 16), tmp_path / "none", key)
    decoder = DecoderSpec(dim=32, depth=1, num_heads=4)
    student = pixel_model(build_encoder(CVIT, 16), FusionSpec(), decoder, "none")
    with pytest.raises(UserError, match=rf"^{key}: {path}: its decoder differs"):
        load_pretrained(student, path, key)
    del tensors["encoder.patch_embed4.bias"]
    save_weights(path, tensors, read_metadata(path))
    with pytest.raises(UserError, match=rf"^{key}: {path}: encoder tensors are missing"):
        load_encoder(build_encoder(CVIT, 16), path, key)


def test_a_file_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    path = tmp_path / MODEL_FILE
    tensors = save_pretrained(path, CVIT)
    metadata = read_metadata(path)
    del tensors["encoder.blocks1.0.conv1.bias"]
    save_weights(path, tensors, metadata)
    with pytest.raises(UserError, match=rf"{path}: encoder tensors are missing.*blocks1.0.conv1.bias"):
        load_encoder(build_encoder(CVIT, 16), path)


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = tmp_path / MODEL_FILE
    tensors = save_pretrained(path, CVIT)
    metadata = read_metadata(path)
    tensors["encoder.patch_embed4.bias"] = torch.zeros(3)
    save_weights(path, tensors, metadata)
    with pytest.raises(UserError, match=rf"{path}: encoder.patch_embed4.bias is \(3,\), expected \(16,\)"):
        load_encoder(build_encoder(CVIT, 16), path)


def test_foreign_absent_and_truncated_files_are_named(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.pt"
    torch.save({"weight": torch.zeros(2)}, foreign)
    without = tmp_path / "without.safetensors"
    save_file({"weight": torch.zeros(2)}, without)
    whole, truncated = tmp_path / MODEL_FILE, tmp_path / "truncated.safetensors"
    save_pretrained(whole, CVIT)
    truncated.write_bytes(whole.read_bytes()[:-1000])
    empty = tmp_path / "empty.safetensors"
    empty.touch()
    for path in (foreign, truncated, empty, tmp_path / "absent.safetensors"):
        what = "not a model file of this project" if path == foreign else "not a readable safetensors file"
        with pytest.raises(UserError, match=f"{path}: {what}"):
            read_metadata(path)
        with pytest.raises(UserError, match=str(path)):
            load_encoder(build_encoder(CVIT, 16), path)
    with pytest.raises(UserError, match=rf"{without}: a safetensors file, but not one written by this project"):
        read_metadata(without)


def test_weights_are_found_in_a_stage_folder_or_reported_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"teachers.t.source: {tmp_path} has not finished"):
        find_weights(tmp_path, "teachers.t.source")
    with pytest.raises(UserError, match=r"stages.finetune.init: .*nowhere does not exist; run that stage first"):
        find_weights(tmp_path / "nowhere", "stages.finetune.init")
    (tmp_path / MODEL_FILE).touch()
    assert find_weights(tmp_path, "key") == find_weights(tmp_path / MODEL_FILE, "key") == tmp_path / MODEL_FILE


def test_of_several_indices_in_a_folder_none_is_chosen(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").touch()
    assert find_weights(tmp_path) == tmp_path / "model.safetensors.index.json"
    (tmp_path / "ema.safetensors.index.json").touch()
    with pytest.raises(
        UserError, match=rf"key: {tmp_path} has 2 indices \(ema.safe.*, model.safe.*\); name one of them"
    ):
        find_weights(tmp_path, "key")


def test_report_counts_and_names() -> None:
    report = LoadReport(loaded=["a", "b"], missing=[f"m{i}" for i in range(8)])
    assert str(report) == "loaded 2 tensors; resized 0; missing 8 (m0, m1, m2, m3, m4, m5, ...); not used 0"


@BOTH
def test_new_classifier_has_weights_of_the_prescribed_deviations(spec: EncoderSpec) -> None:
    torch.manual_seed(0)
    model = build_encoder(spec, 16, 400)
    init_classifier(model)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.15)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            std = 2e-5 if name == "head" else 0.02
            assert module.weight.std().item() == pytest.approx(std, rel=0.15), name
            assert (module.bias == 0).all(), name
