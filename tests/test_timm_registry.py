"""CViTs as timm models: registration, settings, checkpoint files, feature extraction."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.fx
from safetensors.torch import save_file
from timm.models import get_model_input_config, get_pretrained_cfg
from torchvision.models.feature_extraction import create_feature_extractor

from mrmae_ds.errors import UserError
from mrmae_ds.models.cvit import CViT
from mrmae_ds.models.pos_embed import resize_pos_embed
from mrmae_ds.models.sizes import ARCHITECTURES, CViTSpec
from mrmae_ds.timm_registry import checkpoint_filter_fn
from tests.fixtures import load_reference, part
from tests.support.processes import REPOSITORY, environment
from tests.support.reference import MCMAE, perturb, random_images, reference_mcmae
from tests.support.released import mcmae_state, write_released

NARROW: dict[str, Any] = {"dims": (8, 12, 16), "depths": [1, 2, 2], "num_heads": 4}
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def narrow(**settings: Any) -> CViT:
    """Create a cvit_base with narrow layers, by default at 32x48 pixels, with every parameter perturbed."""
    torch.manual_seed(0)
    model = timm.create_model("cvit_base", **NARROW, **{"img_size": (32, 48), **settings}).eval()
    perturb(model, seed=1)
    return model


ORDERS = {
    "timm first": "import timm, mrmae_ds",
    # The model modules import timm; locating timm (find_spec) must not consume the registration.
    "timm last": "import mrmae_ds, importlib.util; importlib.util.find_spec('timm'); import mrmae_ds.models.cvit, timm",
}


@pytest.mark.parametrize("imports", ORDERS.values(), ids=ORDERS.keys())
def test_either_order_of_imports(imports: str) -> None:
    made = "timm.create_model('cvit_tiny', num_classes=7).num_classes"
    code = f"{imports}; print({made}, *timm.list_models('cvit*'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=200
    )
    assert done.stdout.split() == ["7", "cvit_base", "cvit_huge", "cvit_large", "cvit_small", "cvit_tiny"], done.stderr


def test_every_cvit_is_registered() -> None:
    cvits = {arch for arch, spec in ARCHITECTURES.items() if isinstance(spec, CViTSpec)}
    assert set(timm.list_models("cvit*")) == cvits


@pytest.mark.parametrize(
    ("arch", "image_size", "parameters"),
    [
        ("cvit_small", 224, 22_327_528),
        ("cvit_base", 224, 85_374_824),
        ("cvit_large", 224, 311_171_688),
        ("cvit_huge", 224, 652_303_592),
        ("cvit_huge", 392, 652_303_592 + (28**2 - 16**2) * 1280),
        ("cvit_huge", (448, 224), 652_303_592 + (32 * 16 - 16**2) * 1280),
    ],
)
def test_number_of_parameters_of_each_registered_model(
    arch: str, image_size: int | tuple[int, int], parameters: int
) -> None:
    with torch.device("meta"):
        model = timm.create_model(arch, img_size=image_size)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_default_configs_of_registered_models() -> None:
    for arch in timm.list_models("cvit*"):
        cfg = get_pretrained_cfg(arch)
        assert cfg is not None
        assert cfg.input_size == ((3, 32, 32) if arch == "cvit_tiny" else (3, 224, 224))
        assert (cfg.crop_pct, cfg.interpolation, cfg.fixed_input_size) == (0.875, "bicubic", True)
        assert cfg.mean == pytest.approx([0.485, 0.456, 0.406]) and cfg.std == pytest.approx([0.229, 0.224, 0.225])
    model = narrow()
    assert model.default_cfg is model.pretrained_cfg
    names = dict(model.named_modules())
    assert names[model.default_cfg["first_conv"]] is model.patch_embed1.proj
    assert names[model.default_cfg["classifier"]] is model.get_classifier()
    assert (model.num_classes, model.num_features, model.head_hidden_size) == (1000, 16, 16)


def test_the_input_size_is_the_models_own() -> None:
    model = narrow(in_chans=1)
    assert get_model_input_config(model)["input_size"] == (1, 32, 48)
    model.set_input_size(64)
    assert get_model_input_config(model)["input_size"] == (1, 64, 64)


def test_settings_reach_the_model() -> None:
    fields: dict[str, Any] = {"mlp_ratios": (2, 3, 1), "patches": (2, 2, 2), "dims": (8, 8, 16), "num_heads": 2}
    model = timm.create_model(
        "cvit_large", **fields, depths=(1, 1, 2), img_size=(24, 16), num_classes=5, in_chans=4, drop_rate=0.3
    )
    assert model.spec == CViTSpec(depths=(1, 1, 2), **fields)
    assert (model.grid, model.img_size, model.num_classes, model.head_drop.p) == ((3, 2), (24, 16), 5, 0.3)
    assert model.eval()(torch.randn(2, 4, 24, 16)).shape == (2, 5)
    model = timm.create_model("cvit_tiny", drop_path_rate=0.2)
    assert model.blocks3[-1].drop_path1.drop_prob == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"img_size": 392}, "image_size: 392 is not a multiple of the patch stride 16; .* 384 and 400"),
        ({"img_size": (224, 230)}, "image_size: 230 .* 224 and 240"),
        ({"img_size": 0}, "image_size: 0 .* are 16$"),
        ({"depths": "many"}, "cvit_base.depths: .*'many'"),
        ({"dims": (8, 8)}, "cvit_base.dims"),
        ({"depths": (1, 0, 1)}, "cvit_base.depths.1: .*got 0"),
        ({"num_heads": 5}, "cvit_base: the transformer's width 768 must be a multiple of num_heads 5"),
        ({"dims": (8, 8, 18), "num_heads": 3}, "width 18 .* and of 4"),
        ({"global_pool": "map"}, "global_pool: 'map' is unknown; CViT has 'avg'"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        timm.create_model("cvit_base", **settings)


def test_a_classifier_starts_as_the_authors_fine_tuning() -> None:
    model = timm.create_model("cvit_base", **NARROW, img_size=224, num_classes=100)
    assert model.blocks3[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.1)


def test_logits_of_the_authors_weights() -> None:
    reference = load_reference("mcmae")
    fields = {"dims": MCMAE.dims, "depths": MCMAE.depths, "num_heads": MCMAE.num_heads}
    model = timm.create_model("cvit_base", **fields, num_classes=10).eval()
    model.load_state_dict(part(reference, "finetune/"))
    features = model.forward_features(reference["image"])
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, reference["features"], **CLOSE)
    torch.testing.assert_close(model.forward_head(features), reference["logits"], **CLOSE)
    model.reset_classifier(0)
    torch.testing.assert_close(model(reference["image"]), reference["features"], **CLOSE)


def test_a_checkpoint_file_is_loaded_bit_by_bit(tmp_path: Path) -> None:
    saved, path = narrow(num_classes=10), tmp_path / "model.safetensors"
    state = saved.state_dict()
    save_file(state, path)
    settings = {**NARROW, "img_size": (32, 48), "checkpoint_path": path}
    loaded = timm.create_model("cvit_base", **settings, num_classes=10).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    with pytest.raises(RuntimeError, match=r"size mismatch for head\.weight"):
        timm.create_model("cvit_base", **settings, num_classes=11)
    del state["fc_norm.bias"]
    save_file(state, path)
    with pytest.raises(RuntimeError, match=r"Missing key.*fc_norm\.bias"):
        timm.create_model("cvit_base", **settings, num_classes=10)


def test_a_configuration_in_the_working_directory_is_not_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    (tmp_path / "weights").mkdir()
    saved, path = narrow(num_classes=10), tmp_path / "weights" / "model.safetensors"
    save_file(saved.state_dict(), path)
    images = torch.randn(1, 3, 32, 48)
    assert torch.equal(pretrained(path, **NARROW, img_size=(32, 48), num_classes=10)(images), saved.eval()(images))


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "wrapped"])
def test_checkpoint_path_of_released_files(wrapped: bool, tmp_path: Path) -> None:
    reference = load_reference("mcmae")
    fields = {"dims": MCMAE.dims, "depths": MCMAE.depths, "num_heads": MCMAE.num_heads}
    prefix = "module.model." if wrapped else ""
    states = {"finetune.pth": part(reference, "finetune/"), "pretrain.pth": mcmae_state(reference)}
    for name, state in states.items():
        write_released(tmp_path / name, {prefix + key: tensor for key, tensor in state.items()})
    model = timm.create_model("cvit_base", **fields, num_classes=10, checkpoint_path=tmp_path / "finetune.pth").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(reference["image"]), reference["logits"], **CLOSE)
    path = tmp_path / "pretrain.pth"
    bare = timm.create_model("cvit_base", **fields, num_classes=0, global_pool="", checkpoint_path=path).eval()
    student = reference_mcmae(reference).eval()
    images = random_images(1, 224, seed=3)
    with torch.no_grad():
        torch.testing.assert_close(bare(images), student.encoder.forward_features(images))
    with pytest.raises(UserError, match=r"contains a CViT without a head.*num_classes=0 .*pretrained_cfg_overlay"):
        timm.create_model("cvit_base", **fields, num_classes=10, checkpoint_path=path)
    with pytest.raises(RuntimeError, match=r"size mismatch for head.weight"):
        timm.create_model("cvit_base", **fields, num_classes=9, checkpoint_path=tmp_path / "finetune.pth")


def pretrained(path: Path, **settings: Any) -> CViT:
    """Create a model with the weights of its pretrained configuration."""
    overlay = {"file": str(path), "num_classes": 10}
    return timm.create_model("cvit_base", pretrained=True, pretrained_cfg_overlay=overlay, **settings).eval()


def test_a_file_of_another_input_size_and_more_channels(tmp_path: Path) -> None:
    saved, path = narrow(num_classes=10, img_size=64), tmp_path / "model.safetensors"
    save_file(saved.state_dict(), path)
    model = pretrained(path, **NARROW, img_size=(48, 96), num_classes=10, in_chans=6)
    assert torch.equal(model.pos_embed, resize_pos_embed(saved.pos_embed, (4, 4), (3, 6)))
    # timm repeats the colors' kernels and keeps their sum, so an image repeated in six channels keeps its features.
    model.set_input_size(64)
    with torch.no_grad():
        model.pos_embed.copy_(saved.pos_embed)
        images = random_images(2, 64, seed=3)
        torch.testing.assert_close(model(images.repeat(1, 2, 1, 1)), saved(images), **CLOSE)


def test_a_file_of_a_rectangle_fits_its_own_shape_only(tmp_path: Path) -> None:
    saved, path = narrow(num_classes=10, img_size=(32, 48)), tmp_path / "model.safetensors"
    save_file(saved.state_dict(), path)
    images = torch.randn(1, 3, 32, 48)
    assert torch.equal(pretrained(path, **NARROW, img_size=(32, 48), num_classes=10)(images), saved(images))
    with pytest.raises(UserError, match=r"the file: pos_embed is \(1, 6, 16\): .* not form a square grid, .* is 4 x 4"):
        pretrained(path, **NARROW, img_size=64, num_classes=10)


def test_the_encoder_of_a_pretraining_file(tmp_path: Path) -> None:
    student, path = reference_mcmae(load_reference("mcmae")), tmp_path / "model.safetensors"
    save_file({name: t.contiguous() for name, t in student.state_dict().items()}, path)
    fields = {"dims": MCMAE.dims, "depths": MCMAE.depths, "num_heads": MCMAE.num_heads}
    bare = pretrained(path, **fields, num_classes=0, global_pool="")
    images = random_images(1, 224, seed=3)
    assert torch.equal(bare(images), student.encoder.eval().forward_features(images))
    classifier = pretrained(path, **fields, num_classes=3)
    assert torch.equal(classifier.forward_features(images), bare(images))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_encoder_of_a_released_file_with_a_class_token(prefix: str) -> None:
    released = mcmae_state(load_reference("mcmae"))
    row = torch.full((1, 1, 32), 7.0)
    released |= {"cls_token": row, "pos_embed": torch.cat([row, released["pos_embed"]], dim=1)}
    fields = {"dims": MCMAE.dims, "depths": MCMAE.depths, "num_heads": MCMAE.num_heads}
    bare = timm.create_model("cvit_base", **fields, num_classes=0, global_pool="")
    taken = checkpoint_filter_fn({prefix + name: value for name, value in released.items()}, bare)
    bare.load_state_dict(taken)  # strictly
    assert all(torch.equal(taken[name], released[name]) for name in taken if name != "pos_embed")
    assert torch.equal(taken["pos_embed"], released["pos_embed"][:, 1:])


@pytest.mark.parametrize("pool", ["avg", "max", ""])
def test_a_model_whose_pooling_was_changed_is_saved_with_its_class_token(pool: str, tmp_path: Path) -> None:
    model = timm.create_model("cvit_tiny", num_classes=7, global_pool="token").eval()
    perturb(model, seed=1)
    model.reset_classifier(3, global_pool=pool)
    timm.models.save_for_hf(model, tmp_path)
    saved = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(saved(images), model(images))


def test_features_of_a_file(tmp_path: Path) -> None:
    saved, path = narrow(num_classes=10), tmp_path / "model.safetensors"
    save_file(saved.state_dict(), path)
    images = torch.randn(1, 3, 32, 48)
    found = pretrained(path, **NARROW, img_size=(32, 48), features_only=True, out_indices=(0, 1))(images)
    expected = saved.forward_intermediates(images, intermediates_only=True)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_models_are_built_on_the_given_device_in_the_given_dtype() -> None:
    model = timm.create_model("cvit_base", **NARROW, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    with torch.device("meta"):
        assert timm.create_model("cvit_base", **NARROW).pos_embed.is_meta


@pytest.mark.parametrize("wanted", [(0, 1, 2), (0, 1), (1,), (-1,), (-3, -2)])
def test_features_only_returns_the_wanted_stages(wanted: tuple[int, ...]) -> None:
    model = narrow()
    extractor = timm.create_model("cvit_base", **NARROW, img_size=(32, 48), features_only=True, out_indices=wanted)
    result = extractor.load_state_dict({f"model.{name}": t for name, t in model.state_dict().items()}, strict=False)
    assert result.missing_keys == []
    images = torch.randn(2, 3, 32, 48)
    found = extractor.eval()(images)
    stages = [i % 3 for i in wanted]
    assert extractor.feature_info.channels() == [(8, 12, 16)[i] for i in stages]
    assert extractor.feature_info.reduction() == [(4, 8, 16)[i] for i in stages]
    expected = model.forward_intermediates(images, intermediates_only=True)
    for features, stage in zip(found, stages, strict=True):
        assert torch.equal(features, expected[stage])
    sum(features.sum() for features in extractor(images)).backward()
    assert all(p.grad is not None for p in extractor.parameters())  # unused modules are absent


@pytest.mark.parametrize(
    ("arch", "channels", "strides"),
    [("cvit_base", [256, 384, 768], [4, 8, 16]), ("cvit_huge", [768, 1024, 1280], [7, 7, 14])],
)
def test_features_of_the_sizes(arch: str, channels: list[int], strides: list[int]) -> None:
    with torch.device("meta"):
        extractor = timm.create_model(arch, features_only=True)
        features = extractor(torch.empty(1, 3, 224, 224))
    assert extractor.feature_info.channels() == channels and extractor.feature_info.reduction() == strides
    sizes = zip(channels, strides, strict=True)
    assert [tuple(f.shape) for f in features] == [(1, c, 224 // s, 224 // s) for c, s in sizes]


def test_features_by_hooks_equal_intermediates() -> None:
    model = narrow()
    extractor = timm.create_model("cvit_base", **NARROW, img_size=(32, 48), features_only=True, feature_cls="hook")
    extractor.body.load_state_dict(model.state_dict(), strict=False)
    found = extractor.eval()(images := torch.randn(1, 3, 32, 48))
    expected = model.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
    assert all(torch.equal(f.flatten(1, -2), e) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_classifiers_are_traceable(pool: str) -> None:
    """Traced once, they compute the same logits and gradients for any batch, and check the size of the images."""
    model = narrow(global_pool=pool, num_classes=3)
    traced = torch.fx.symbolic_trace(model)
    images = torch.randn(2, 3, 32, 48)
    (own,) = torch.autograd.grad(model(images).square().sum(), model.patch_embed1.proj.weight)
    (again,) = torch.autograd.grad(traced(images).square().sum(), model.patch_embed1.proj.weight)
    torch.testing.assert_close(traced(images), model(images), rtol=0, atol=0)
    torch.testing.assert_close(again, own, rtol=0, atol=0)
    assert traced(images[:1]).shape == (1, 3)
    with pytest.raises(UserError, match="the model was built for"):
        traced(torch.randn(1, 3, 48, 48))


def test_torchvision_extracts_features_of_any_node() -> None:
    model = narrow(num_classes=3)
    images = torch.randn(1, 3, 32, 48)
    features = create_feature_extractor(model, ["blocks3.0.mlp.fc1", "head"])(images)
    assert features["blocks3.0.mlp.fc1"].shape == (1, 6, 64)
    torch.testing.assert_close(features["head"], model(images), rtol=0, atol=0)
