"""Exports: the printed line of Python is executed, and the loaded model computes the run's outputs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mrmae_ds.data.loaders.pillow import center_crop
from mrmae_ds.errors import UserError
from mrmae_ds.imagenet import IMAGENET_MEAN
from mrmae_ds.models.decoder import DecoderSpec
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.masking import choose_visible
from mrmae_ds.models.objectives import Objective
from mrmae_ds.models.pretrain import FusionSpec, PretrainModel
from mrmae_ds.models.sizes import ARCHITECTURES, CViTSpec, EncoderSpec, ImageSize, ViTSpec
from mrmae_ds.records.sections import GitState, Schedule
from mrmae_ds.weights.export import (
    Exported,
    WeightLayout,
    export_run,
    timm_call,
)
from mrmae_ds.weights.load import load_encoder, load_model
from mrmae_ds.weights.model_file import encoder_metadata, read_metadata, read_tensors, save_weights
from mrmae_ds.weights.paths import MODEL_FILE
from tests.fixtures import part
from tests.support import dense
from tests.support.records import make_record
from tests.support.reference import perturb, random_images, random_noise
from tests.support.released import mae_state, write_released

CVIT = CViTSpec((8, 12, 16), (1, 1, 2), 4, (4, 4, 2), (2, 2, 1))
VIT = ViTSpec(16, 2, 4, patch=4)
BOTH = pytest.mark.parametrize("spec", [CVIT, VIT], ids=["cvit", "vit"])
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def classifier_run(folder: Path, spec: EncoderSpec, image_size: ImageSize = 24, pool: str = "avg") -> nn.Module:
    """A finished fine-tuning of 3 classes in ``folder``; return its model in eval mode."""
    model = build_encoder(spec, image_size, 3, pool=pool)
    perturb(model, seed=1, scale=0.3)
    metadata = {"kind": "classifier", **encoder_metadata(model), "num_classes": 3, "stage": "finetune"}
    metadata |= {"recipe": {"name": "small"}, "mean": [0.5, 0.25, 0.125], "std": [0.1, 0.2, 0.3]}
    save_weights(folder / MODEL_FILE, model.state_dict(), metadata)
    make_record(name="small", git=GitState(commit=COMMIT, dirty=False)).write(folder)
    return model.eval()


def pretraining_run(folder: Path, spec: EncoderSpec, blocks: tuple[int, ...] = ()) -> PretrainModel:
    """A finished pre-training with pixels and a teacher in ``folder``; return its model in eval mode."""
    mimic = {"target": "clip", "tap": "encoder", "tokens": "visible", "normalize": "layer_norm", "weight": 0.5}
    pixels = {"target": "pixels", "tap": "decoder", "tokens": "masked", "normalize": "standardize", "weight": 0.5}
    decoder = {"dim": 16, "depth": 1, "num_heads": 4}
    fusion = {"stages": [1, 2] if isinstance(spec, CViTSpec) else [], "blocks": list(blocks)}
    recipe = {
        "name": "small",
        "model": {"fusion": fusion, "decoder": decoder},
        "stages": {"pretrain": {"objectives": {"rebuild": pixels, "mimic": mimic}}},
    }
    objectives = {"rebuild": Objective(**pixels), "mimic": Objective(**mimic)}
    encoder = build_encoder(spec, 24)
    model = PretrainModel(encoder, FusionSpec(**fusion), DecoderSpec(**decoder), objectives, {"clip": 6})
    perturb(model, seed=2, scale=0.3)
    metadata = {"kind": "pretrain", **encoder_metadata(encoder), "num_classes": 0, "stage": "pretrain"}
    save_weights(folder / MODEL_FILE, model.state_dict(), metadata | {"recipe": recipe})
    return model.eval()


def load_by(exported: Exported) -> Any:
    """Execute the printed line of Python and return its ``model``."""
    names: dict[str, Any] = {}
    exec(exported.line, names)
    return names["model"].eval()


@BOTH
@pytest.mark.parametrize("changes", [{}, {"odd ratios": True}], ids=["4", "2.7"])
def test_a_classifier_for_timm(spec: EncoderSpec, changes: dict[str, bool], tmp_path: Path) -> None:
    if changes:
        ratio = {"mlp_ratios": (2.7, 2.7, 2.7)} if spec is CVIT else {"mlp_ratio": 2.7}
        spec = replace(spec, **ratio)
    model = classifier_run(tmp_path, spec)
    exported = export_run(tmp_path, "timm", tmp_path / "out.safetensors")
    loaded = load_by(exported)
    assert (type(loaded).__module__.split(".")[0] == "timm") == isinstance(spec, ViTSpec)
    images = random_images(2, 24, seed=3)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
        assert torch.equal(loaded.forward_features(images), model.forward_features(images))
    assert loaded.num_classes == 3
    assert exported.notes == (
        "its input is RGB in [0, 1], minus the mean 0.5 0.25 0.125, divided by 0.1 0.2 0.3",
        "evaluation takes the center crop of 24 x 24 pixels, the short side resized to 27 (bicubic)",
    )


@BOTH
@pytest.mark.parametrize("size", [24, 224, 240])
def test_timms_own_transform_gives_evaluations_pixels(spec: EncoderSpec, size: int, tmp_path: Path) -> None:
    """So that timm measures the run's accuracy: mean, std, size and crop are the run's, on images of any shape."""
    classifier_run(tmp_path, spec, size)
    loaded = load_by(export_run(tmp_path, "timm", tmp_path / "out.safetensors"))
    data_config = timm.data.resolve_model_data_config(loaded)
    transform = timm.data.create_transform(**data_config, is_training=False)
    generator = np.random.default_rng(0)
    mean, std = (torch.tensor(values)[:, None, None] for values in ([0.5, 0.25, 0.125], [0.1, 0.2, 0.3]))
    for shape in ((300, 280), (260, 333), (40, 31)):
        image = Image.fromarray(generator.integers(0, 256, (*shape, 3), dtype=np.uint8))
        pixels = torch.from_numpy(np.array(center_crop(image, size))).permute(2, 0, 1).float() / 255
        torch.testing.assert_close(transform(image), (pixels - mean) / std, atol=1e-5, rtol=1e-5)
    assert data_config["crop_pct"] == (0.875 if size <= 224 else 1.0)


@BOTH
@pytest.mark.parametrize("kind", ["classifier", "encoder"])
def test_the_line_may_be_changed_as_for_timms_own_models(spec: EncoderSpec, kind: str, tmp_path: Path) -> None:
    encoder = classifier_run(tmp_path, spec) if kind == "classifier" else pretraining_run(tmp_path, spec).encoder
    exported = export_run(tmp_path, "timm", tmp_path / "out.safetensors")

    def changed(new: str, old: str = "pretrained=True") -> Any:
        assert exported.line.count(old) == 1
        return load_by(replace(exported, line=exported.line.replace(old, new)))

    images = random_images(2, 24, seed=3)
    # By default timm takes the last three blocks of a ViT, and this one has two.
    last = "" if isinstance(spec, CViTSpec) else ", out_indices=(0, 1)"
    features = changed(f"pretrained=True, features_only=True{last}")(images)
    expected = encoder.forward_intermediates(images, intermediates_only=True)
    if isinstance(spec, CViTSpec):
        assert [tuple(map.shape[1:]) for map in features] == [(8, 12, 12), (12, 6, 6), (16, 6, 6)]
        assert all(torch.equal(found, map) for found, map in zip(features, expected, strict=True))
    else:
        assert torch.equal(features[-1], expected[-1])
    classes = "num_classes=3" if kind == "classifier" else "num_classes=0"
    new_head = changed(f"{classes[:-1]}7", old=f", {classes},"[2:-1])
    assert new_head.num_classes == 7
    blocks = "blocks3" if isinstance(spec, CViTSpec) else "blocks"
    state, original = new_head.state_dict(), encoder.state_dict()
    assert all(torch.equal(state[name], original[name]) for name in state if name.startswith((blocks, "patch_embed")))
    larger = changed("img_size=32", old="img_size=24")
    assert larger(random_images(2, 32, seed=3)).shape[0] == 2
    assert torch.equal(larger.state_dict()[f"{blocks}.0.attn.qkv.weight"], original[f"{blocks}.0.attn.qkv.weight"])


@BOTH
def test_the_hubs_configuration_reproduces_the_model(spec: EncoderSpec, tmp_path: Path) -> None:
    model = classifier_run(tmp_path, spec)
    loaded = load_by(export_run(tmp_path, "timm", tmp_path / "out.safetensors"))
    timm.models.save_for_hf(loaded, tmp_path / "hub", safe_serialization=True)
    from_hub = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    data_config = timm.data.resolve_model_data_config(from_hub)
    expected = timm.data.resolve_model_data_config(loaded)
    assert {key: list(value) if isinstance(value, tuple) else value for key, value in expected.items()} == {
        key: list(value) if isinstance(value, tuple) else value for key, value in data_config.items()
    }
    assert (expected["mean"], expected["input_size"]) == ((0.5, 0.25, 0.125), (3, 24, 24))
    images = random_images(2, 24, seed=3)
    with torch.no_grad():
        assert torch.equal(from_hub(images), model(images))


@pytest.mark.parametrize("family", ["mcmae", "mae"])
def test_exports_released_files(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    reference = request.getfixturevalue(family)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    state = part(reference, "finetune/") if family == "mcmae" else mae_state(reference)
    exported = export_run(write_released(tmp_path / "x.pth", state), out=tmp_path / "out.safetensors")
    loaded = load_by(exported)
    with torch.no_grad():
        if family == "mcmae":
            expected, found = reference["logits"], loaded(reference["image"])
        else:
            images = reference["images"]
            expected = dense.vit_latent(images, [list(range(16))] * len(images), (4, 4), state, 4)
            found = loaded.forward_features(images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert timm.data.resolve_model_data_config(loaded)["mean"] == IMAGENET_MEAN
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"x.pth: does not record its number of attention heads"):
        export_run(tmp_path / "x.pth", out=tmp_path / "out.safetensors")


@pytest.mark.parametrize(("spec", "pool"), [(VIT, "token"), (VIT, "avg"), (CVIT, "max")])
@pytest.mark.parametrize("layout", ["timm", "safetensors"])
def test_other_poolings_and_rectangles(spec: EncoderSpec, pool: str, layout: WeightLayout, tmp_path: Path) -> None:
    model = classifier_run(tmp_path, spec, (24, 32), pool)
    loaded = load_by(export_run(tmp_path, layout, tmp_path / "out.safetensors"))
    images = torch.randn(2, 3, 24, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert loaded.global_pool == pool


def test_a_vits_encoder_for_timm_has_the_norm_of_pretraining(tmp_path: Path) -> None:
    model = pretraining_run(tmp_path, VIT)
    loaded = load_by(export_run(tmp_path, "timm", tmp_path / "out.safetensors"))
    images = random_images(2, 24, seed=3)
    with torch.no_grad():
        expected = model.fusion.norm(model.encoder.forward_features(images))
        assert expected.shape == (2, 1 + 36, 16)
        assert torch.equal(loaded.forward_features(images), expected)
        assert torch.equal(loaded(images), expected)


def test_a_cvits_encoder_for_timm_gives_its_tokens(tmp_path: Path) -> None:
    model = pretraining_run(tmp_path, CVIT)
    exported = export_run(tmp_path, "timm", tmp_path / "out.safetensors")
    loaded = load_by(exported)
    images = random_images(2, 24, seed=3)
    with torch.no_grad():
        expected = model.encoder.forward_features(images)
        assert torch.equal(loaded.forward_features(images), expected)
        assert torch.equal(loaded(images), expected)
    assert "decoder, fusion and heads are left out" in exported.notes[0]
    assert read_tensors(exported.path).keys() == model.encoder.state_dict().keys()


def test_notes_report_blocks_fused_before_the_norm(tmp_path: Path) -> None:
    pretraining_run(tmp_path, VIT, blocks=(0,))
    exported = export_run(tmp_path, "timm", tmp_path / "out.safetensors")
    assert "pre-training added blocks [0] before it" in exported.notes[0]


@BOTH
def test_exports_a_complete_pretraining_model(spec: EncoderSpec, tmp_path: Path) -> None:
    model = pretraining_run(tmp_path, spec)
    exported = export_run(tmp_path, "safetensors", tmp_path / "out.safetensors")
    loaded = load_by(exported)
    images, visible = random_images(2, 24, seed=3), choose_visible(random_noise(2, 36, seed=4), (6, 6), 0.25)
    with torch.no_grad():
        expected, found = model.predict(images, visible), loaded.predict(images, visible)
    assert found.keys() == expected.keys() == {"rebuild", "mimic"}
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert found["mimic"].shape == (2, 9, 6)
    assert not load_model(exported.path).training


@BOTH
def test_exports_a_complete_classifier(spec: EncoderSpec, tmp_path: Path) -> None:
    model = classifier_run(tmp_path, spec)
    loaded = load_by(export_run(tmp_path, "safetensors", tmp_path / "out.safetensors"))
    images = random_images(2, 24, seed=3)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


@BOTH
@pytest.mark.parametrize("kind", ["classifier", "encoder"])
def test_an_export_initializes_a_finetuning(spec: EncoderSpec, kind: str, tmp_path: Path) -> None:
    source = classifier_run(tmp_path, spec) if kind == "classifier" else pretraining_run(tmp_path, spec).encoder
    exported = export_run(tmp_path, "timm", tmp_path / "out.safetensors")
    model = build_encoder(spec, 24, 3)
    report = load_encoder(model, exported.path)
    assert len(report.missing) == (0 if kind == "classifier" else 4)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in source.state_dict().items())


def test_metadata_states_the_origin(tmp_path: Path) -> None:
    classifier_run(tmp_path, CVIT)
    path = export_run(tmp_path, "timm", tmp_path / "out.safetensors").path
    metadata = read_metadata(path)
    assert (metadata["commit"], metadata["results"]["top1"], metadata["run"]) == (COMMIT, 80.0, "small")
    assert metadata["create_model"] == (
        'timm.create_model("cvit_tiny", img_size=24, dims=(8, 12, 16), depths=(1, 1, 2), mlp_ratios=(4.0, 4.0, 2.0), '
        "num_classes=3, global_pool='avg')"
    )
    assert (metadata["kind"], metadata["layout"], metadata["recipe"]["name"]) == ("classifier", "timm", "small")
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "pt"  # what transformers and others look for


def test_a_commit_with_changes_is_not_called_clean(tmp_path: Path) -> None:
    classifier_run(tmp_path, CVIT)
    make_record(git=GitState(commit=COMMIT, dirty=True)).write(tmp_path)
    path = export_run(tmp_path, "timm", tmp_path / "out.safetensors").path
    assert read_metadata(path)["commit"] == f"{COMMIT}+changes"


def call_of(spec: EncoderSpec, **values: Any) -> str:
    model = build_encoder(replace(spec, **{"depths": (0, 0, 0)} if isinstance(spec, CViTSpec) else {"depth": 0}), 224)
    metadata = {"kind": "classifier", "num_classes": 5, **encoder_metadata(model), **values}
    metadata["spec"] |= {"depths": spec.depths} if isinstance(spec, CViTSpec) else {"depth": spec.depth}
    return timm_call(metadata)


def test_standard_sizes_need_no_overrides() -> None:
    rest = "img_size=224, num_classes=5, global_pool='avg'"
    for arch in ("cvit_small", "cvit_base", "cvit_large", "cvit_huge"):
        assert call_of(ARCHITECTURES[arch]) == f'"{arch}", {rest}'
    assert call_of(ARCHITECTURES["vit_small"]) == f'"vit_small_patch16_224", {rest}'
    assert call_of(ARCHITECTURES["vit_base"]) == f'"vit_base_patch16_224", {rest}'
    assert call_of(ARCHITECTURES["vit_large"]) == f'"vit_large_patch16_224", {rest}'
    assert call_of(ARCHITECTURES["vit_huge"]) == f'"vit_huge_patch14_224", {rest}'
    assert call_of(ARCHITECTURES["vit_base"], image_size=384).startswith('"vit_base_patch16_224", img_size=384, ')


def test_the_default_name_is_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "small_seed1"
    classifier_run(run / "finetune", CVIT)
    pretraining_run(run / "pretrain", CVIT)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for stage in ("finetune", "pretrain"):
        export_run(run / stage)
        export_run(run / stage / MODEL_FILE, "safetensors")
    names = {f"small_seed1-{stage}{end}.safetensors" for stage in ("finetune", "pretrain") for end in ("", "-timm")}
    assert set(os.listdir()) == names
    (run / "finetune" / MODEL_FILE).rename(tmp_path / "elsewhere.safetensors")
    export_run(tmp_path / "elsewhere.safetensors", out=tmp_path)
    assert (tmp_path / "small-finetune-timm.safetensors").is_file()


def test_overwrites_only_files_of_this_project_unless_forced(tmp_path: Path) -> None:
    classifier_run(tmp_path, CVIT)
    out = tmp_path / "out.safetensors"
    out.write_text("someone's notes")
    with pytest.raises(UserError, match=rf"--out: {out} exists and was not written by this project.*--force"):
        export_run(tmp_path, out=out)
    save_file({"weight": torch.zeros(2)}, out)
    with pytest.raises(UserError, match=r"exists and was not written by this project"):
        export_run(tmp_path, out=out)
    export_run(tmp_path, out=out, force=True)
    export_run(tmp_path, "safetensors", out=out)  # now one of ours
    assert read_metadata(out)["layout"] == "safetensors"
    before = (tmp_path / MODEL_FILE).read_bytes()
    with pytest.raises(UserError, match=r"--out: .*model.safetensors is the run's own file; choose another"):
        export_run(tmp_path, out=tmp_path / MODEL_FILE, force=True)
    assert (tmp_path / MODEL_FILE).read_bytes() == before
    with pytest.raises(UserError, match=r"--out: .*x.pth must end in .safetensors"):
        export_run(tmp_path, out=tmp_path / "x.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == [MODEL_FILE, "out.safetensors", "record.json"]


def test_refuses_runs_that_are_not_finished(tmp_path: Path) -> None:
    unfinished = tmp_path / "small" / "pretrain"
    unfinished.mkdir(parents=True)
    schedule = Schedule(epochs=10, global_batch=64, steps=100, steps_done=30)
    make_record(status="failed", schedule=schedule, top1=None).write(unfinished)
    with pytest.raises(UserError, match=r"not finished \(30 of 100 steps, status failed\).*training command again"):
        export_run(unfinished)
    with pytest.raises(UserError, match=r"^/.*small has not finished .*name a stage folder"):
        export_run(tmp_path / "small")
    classifier_run(tmp_path / "small" / "finetune", CVIT)
    with pytest.raises(UserError, match=r"small is the folder of 1 finished stage; choose one: .*small/finetune$"):
        export_run(tmp_path / "small")
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        export_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"^/proc/x.safetensors: cannot be written .*name a file in another folder$"):
        export_run(tmp_path / "small" / "finetune", out=Path("/proc/x.safetensors"))
    exported = export_run(tmp_path / "small" / "finetune", out=tmp_path / "out.safetensors").path
    with pytest.raises(UserError, match=r"out.safetensors: is itself an export; give the run's folder"):
        export_run(exported, out=tmp_path / "again.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match=r"foreign.safetensors: contains no encoder supported by this project"):
        export_run(tmp_path / "foreign.safetensors")


def without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if key != name}


def test_rejects_incomplete_models(tmp_path: Path) -> None:
    pretraining_run(tmp_path, CVIT)
    encoder = export_run(tmp_path, out=tmp_path / "encoder.safetensors").path
    with pytest.raises(UserError, match=r"encoder.safetensors: contains an encoder for timm: timm.create_model\("):
        load_model(encoder)
    tensors, metadata = read_tensors(tmp_path / MODEL_FILE), read_metadata(tmp_path / MODEL_FILE)
    for lost in ("heads.mimic.bias", "decoder.norm.weight"):
        save_weights(tmp_path / "torn.safetensors", without(tensors, lost), metadata)
        with pytest.raises(UserError, match=r"torn.safetensors: its tensors do not match its metadata"):
            load_model(tmp_path / "torn.safetensors")
    del metadata["recipe"]
    save_weights(tmp_path / "torn.safetensors", tensors, metadata)
    with pytest.raises(UserError, match=r"torn.safetensors: .*\('recipe'\)"):
        load_model(str(tmp_path / "torn.safetensors"))


@pytest.mark.parametrize("write", [classifier_run, pretraining_run])
def test_a_model_with_nan_is_neither_exported_nor_loaded(write: Callable[..., nn.Module], tmp_path: Path) -> None:
    write(tmp_path, VIT)
    path = tmp_path / MODEL_FILE
    tensors, metadata = read_tensors(path), read_metadata(path)
    lost = next(name for name in tensors if name.endswith("blocks.0.mlp.fc1.weight"))
    tensors[lost][0, 0] = torch.nan
    save_weights(path, tensors, metadata | {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]})
    layouts: tuple[WeightLayout, ...] = ("timm", "safetensors")
    for layout in layouts:
        with pytest.raises(UserError, match=rf"{path}: 1 tensor with NaN or infinity: {lost}"):
            export_run(tmp_path, layout, tmp_path / "out.safetensors")
    with pytest.raises(UserError, match=rf"{path}: 1 tensor with NaN or infinity: {lost}"):
        load_model(path)
