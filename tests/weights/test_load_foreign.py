"""Loading files of other projects: the authors' values, resizing, errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from mrmae_ds.cli.inspect import describe
from mrmae_ds.errors import UserError
from mrmae_ds.models.cvit import CViT
from mrmae_ds.models.decoder import DecoderSpec
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.masking import choose_visible
from mrmae_ds.models.objectives import Objective
from mrmae_ds.models.pretrain import FusionSpec, PretrainModel
from mrmae_ds.models.sizes import CViTSpec, ViTSpec
from mrmae_ds.models.vit import MaskedViT
from mrmae_ds.weights.export import export_run, load_exported
from mrmae_ds.weights.load import load_encoder, load_pretrained
from tests.fixtures import part
from tests.support import dense
from tests.support.reference import MAE, MCMAE, perturb, pixel_model, pixel_objective, random_images
from tests.support.released import mae_state, mcmae_state, tiny_vit, without_decoder, write_released

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
HEAD = ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]
DECODERS = {"mcmae": DecoderSpec(dim=32, depth=1, num_heads=4), "mae": DecoderSpec(dim=16, depth=2, num_heads=4)}
TINY_VIT_SPEC = ViTSpec(24, 2, 3, patch=8)


def new_model(name: str, normalize: str = "standardize", **changes: Any) -> PretrainModel:
    """An untrained pre-training model of mcmae.npz's or mae.npz's size."""
    encoder = build_encoder(MCMAE, 224) if name == "mcmae" else build_encoder(MAE, 64)
    fusion = FusionSpec(stages=(1, 2)) if name == "mcmae" else FusionSpec()
    return pixel_model(encoder, fusion, DECODERS[name].model_copy(update=changes), normalize)


@pytest.mark.parametrize("name", ["mcmae", "mae"])
@pytest.mark.parametrize(("normalize", "key"), [("standardize", "loss_norm_pix"), ("none", "loss_raw_pix")])
def test_released_pretraining_reproduces_the_authors_outputs(
    name: str, normalize: str, key: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    reference = request.getfixturevalue(name)
    state = mcmae_state(reference) if name == "mcmae" else mae_state(reference)
    model = new_model(name, normalize)
    report = load_pretrained(model, write_released(tmp_path / "x.pth", state))
    assert (report.missing, report.resized, report.unexpected) == ([], [], ["decoder_pos_embed"])
    assert len(report.loaded) == len(state) - 1
    images = reference["image" if name == "mcmae" else "images"]
    visible = choose_visible(reference["noise"], model.encoder.grid, 0.25)
    torch.testing.assert_close(model.latent(images, visible), reference["latent"], **CLOSE)
    prediction = model.predict(images, visible)["pixels"]
    torch.testing.assert_close(prediction.flatten()[::41], reference["pred_every_41st"], **CLOSE)
    torch.testing.assert_close(model(images, visible, {})["loss"], reference[key], atol=1e-5, rtol=0)


def features_and_logits(model: CViT, image: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return model.fc_norm(model.forward_features(image).mean(1)), model(image)


def test_released_classifier_reproduces_the_authors_outputs(mcmae: dict[str, Tensor], tmp_path: Path) -> None:
    model = CViT(MCMAE, 224, 10).eval()
    report = load_encoder(model, write_released(tmp_path / "x.pth", part(mcmae, "finetune/")))
    assert (report.missing, report.unexpected, report.resized) == ([], [], [])
    features, logits = features_and_logits(model, mcmae["image"])
    torch.testing.assert_close(features, mcmae["features"], **CLOSE)
    torch.testing.assert_close(logits, mcmae["logits"], **CLOSE)


@pytest.mark.parametrize("layout", ["whole", "first-release", "class-token", "wrapped"])
def test_finetuning_starts_from_a_released_pretraining(layout: str, mcmae: dict[str, Tensor], tmp_path: Path) -> None:
    state = mcmae_state(mcmae)
    if layout == "first-release":
        state = {name: state[name] for name in without_decoder(state)}
    if layout == "class-token":
        class_row = torch.full((1, 1, 32), 7.0)
        state |= {"cls_token": class_row, "pos_embed": torch.cat([class_row, state["pos_embed"]], dim=1)}
    if layout == "wrapped":
        state = {f"module.{name}": value for name, value in state.items()}
    model = CViT(MCMAE, 224, 10).eval()
    model.load_state_dict(part(mcmae, "finetune/"))
    report = load_encoder(model, write_released(tmp_path / "x.pth", state))
    assert sorted(report.missing) == HEAD
    assert len(report.loaded) == 67
    assert len(report.unexpected) == {"whole": 26, "first-release": 2, "class-token": 27, "wrapped": 26}[layout]
    assert ("cls_token" in report.unexpected) == (layout == "class-token")
    assert report.resized == (["pos_embed"] if layout == "class-token" else [])
    features, logits = features_and_logits(model, mcmae["image"])
    torch.testing.assert_close(features, mcmae["features_after_pretrain"], **CLOSE)
    torch.testing.assert_close(logits, mcmae["logits_after_pretrain"], **CLOSE)


def test_positions_of_a_released_file_are_resized(mcmae: dict[str, Tensor], tmp_path: Path) -> None:
    state = mcmae_state(mcmae)
    path = write_released(tmp_path / "x.pth", state)
    model = CViT(MCMAE, 288, 10)
    assert load_encoder(model, path).resized == ["pos_embed"]
    expected = resample_abs_pos_embed(state["pos_embed"], [18, 18], num_prefix_tokens=0, antialias=False)
    torch.testing.assert_close(model.pos_embed.detach(), expected)
    larger = pixel_model(build_encoder(MCMAE, 288), FusionSpec(stages=(1, 2)), DECODERS["mcmae"], "none")
    fixed = larger.decoder.pos_embed.clone()
    assert load_pretrained(larger, path).resized == ["encoder.pos_embed"]
    torch.testing.assert_close(larger.encoder.pos_embed.detach(), expected)
    assert torch.equal(larger.decoder.pos_embed, fixed)


def test_positions_that_are_no_grid_are_refused(mcmae: dict[str, Tensor], tmp_path: Path) -> None:
    state = mcmae_state(mcmae) | {"pos_embed": torch.zeros(1, 198, 32)}
    path = write_released(tmp_path / "x.pth", state)
    with pytest.raises(UserError, match=r"x.pth: pos_embed is \(1, 198, 32\): its rows do not form a square grid"):
        load_encoder(build_encoder(MCMAE, 224), path)


def test_head_of_other_classes_is_not_loaded(mcmae: dict[str, Tensor], tmp_path: Path) -> None:
    path = write_released(tmp_path / "x.pth", part(mcmae, "finetune/"))
    model = CViT(MCMAE, 224, 7)
    before = model.head.weight.clone()
    report = load_encoder(model, path)
    assert sorted(report.missing) == sorted(report.unexpected) == ["head.bias", "head.weight"]
    assert torch.equal(model.head.weight, before)
    assert torch.equal(model.fc_norm.weight, mcmae["finetune/fc_norm.weight"])


def test_a_mean_pooled_vit_of_timm_gives_its_logits(tmp_path: Path) -> None:
    source = tiny_vit(global_pool="avg")
    torch.save(source.state_dict(), tmp_path / "x.pth")
    model = MaskedViT(TINY_VIT_SPEC, 32, 5).eval()
    report = load_encoder(model, tmp_path / "x.pth")
    assert (report.missing, report.unexpected) == ([], [])
    images = random_images(2, 32, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(model(images), source(images))


def test_a_vit_of_timm_with_its_head_on_the_class_token(tmp_path: Path) -> None:
    source, images = tiny_vit(), random_images(2, 32, seed=1)
    torch.save(source.state_dict(), tmp_path / "x.pth")
    model = MaskedViT(TINY_VIT_SPEC, 32, 5, pool="token").eval()
    report = load_encoder(model, tmp_path / "x.pth")
    assert (report.missing, report.unexpected) == ([], [])
    with torch.no_grad():
        torch.testing.assert_close(model(images), source(images))
    mean_pooled = MaskedViT(TINY_VIT_SPEC, 32, 5).eval()
    report = load_encoder(mean_pooled, tmp_path / "x.pth")
    assert sorted(report.missing) == HEAD
    assert sorted(report.unexpected) == ["head.bias", "head.weight", "norm.bias", "norm.weight"]
    with torch.no_grad():
        features = source.norm(mean_pooled.forward_features(images))
        torch.testing.assert_close(features, source.forward_features(images))


def test_mean_pooled_head_is_not_loaded_into_class_token_pooling(tmp_path: Path) -> None:
    torch.save(tiny_vit(global_pool="avg").state_dict(), tmp_path / "x.pth")
    model = MaskedViT(TINY_VIT_SPEC, 32, 5, pool="token")
    before = model.head.weight.clone()
    report = load_encoder(model, tmp_path / "x.pth")
    assert sorted(report.missing) == ["head.bias", "head.weight", "norm.bias", "norm.weight"]
    assert sorted(report.unexpected) == HEAD
    assert torch.equal(model.head.weight, before)


def test_the_class_token_is_finetuned_from_a_released_pretraining(mae: dict[str, Tensor], tmp_path: Path) -> None:
    """As MAE's script does without global pooling: the norm is loaded, only the head is new."""
    state = mae_state(mae)
    model = build_encoder(MAE, 64, 5, pool="token").eval()
    report = load_encoder(model, write_released(tmp_path / "x.pth", state))
    assert sorted(report.missing) == ["head.bias", "head.weight"]
    everything = [list(range(16))] * len(mae["images"])
    expected = dense.vit_latent(mae["images"], everything, (4, 4), state, MAE.num_heads)[:, 0]
    with torch.no_grad():
        features = model.forward_head(model.forward_features(mae["images"]), pre_logits=True)
    torch.testing.assert_close(features, expected, **CLOSE)


def test_a_class_token_without_a_position(tmp_path: Path) -> None:
    source = tiny_vit(num_classes=0, no_embed_class=True)
    torch.save(source.state_dict(), tmp_path / "x.pth")
    assert source.pos_embed.shape == (1, 16, 24)
    model = MaskedViT(TINY_VIT_SPEC, 32).eval()
    load_encoder(model, tmp_path / "x.pth")
    assert (model.pos_embed[:, 0] == 0).all()
    images = random_images(2, 32, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(source.norm(model.forward_features(images)), source.forward_features(images))


def test_pretraining_starts_from_the_first_release(mcmae: dict[str, Tensor], tmp_path: Path) -> None:
    state = mcmae_state(mcmae)
    path = write_released(tmp_path / "x.pth", {name: state[name] for name in without_decoder(state)})
    model = new_model("mcmae")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = load_pretrained(model, path)
    after = model.state_dict()
    assert {name.split(".")[0] for name in report.missing} == {"decoder", "heads", "fusion"}
    assert all(torch.equal(after[name], before[name]) for name in report.missing)
    assert torch.equal(after["fusion.norm.weight"], state["norm.weight"])
    assert report.unexpected == []


def test_pixel_head_is_loaded_under_any_name_and_mimic_heads_are_not(mcmae: dict[str, Tensor], tmp_path: Path) -> None:
    state = mcmae_state(mcmae)
    mimic = Objective(target="clip", tap="encoder", tokens="visible", normalize="layer_norm", weight=0.5)
    objectives = {"mimic": mimic, "rebuild": pixel_objective()}
    encoder = build_encoder(MCMAE, 224)
    model = PretrainModel(encoder, FusionSpec(stages=(1, 2)), DECODERS["mcmae"], objectives, {"clip": 8})
    before = model.heads["mimic"].weight.clone()
    report = load_pretrained(model, write_released(tmp_path / "x.pth", state))
    assert report.missing == ["heads.mimic.weight", "heads.mimic.bias"]
    assert torch.equal(model.heads["mimic"].weight, before)
    assert torch.equal(model.heads["rebuild"].weight, state["decoder_pred.weight"])


def test_model_without_decoder_loads_the_other_tensors(mcmae: dict[str, Tensor], tmp_path: Path) -> None:
    mimic = Objective(target="clip", tap="encoder", tokens="visible", normalize="layer_norm", weight=1.0)
    encoder = build_encoder(MCMAE, 224)
    model = PretrainModel(encoder, FusionSpec(stages=(1, 2)), DecoderSpec(), {"mimic": mimic}, {"clip": 8})
    report = load_pretrained(model, write_released(tmp_path / "x.pth", mcmae_state(mcmae)))
    assert report.missing == ["heads.mimic.weight", "heads.mimic.bias"]
    assert all(name.startswith(("decoder_", "mask_token")) for name in report.unexpected)
    assert len(report.loaded) == 67 + 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": (1, 1, 3)}, r"depths \(1, 1, 2\) instead of \(1, 1, 3\); use"),
        ({"mlp_ratios": (8, 8, 4)}, r"mlp_ratios \(4, 4, 4\) instead of \(8, 8, 4\); use"),
        ({"patches": (7, 1, 2)}, r"patches \(4, 2, 2\) instead of \(7, 1, 2\); use"),
        ({"dims": (16, 24, 64), "depths": (2, 1, 2)}, r"dims .*64\); depths \(1, 1, 2\) instead of \(2, 1, 2\); use"),
    ],
    ids=str,
)
def test_another_size_is_refused_naming_what_differs(
    changes: dict[str, Any], message: str, mcmae: dict[str, Tensor], tmp_path: Path
) -> None:
    path = write_released(tmp_path / "x.pth", mcmae_state(mcmae))
    encoder = build_encoder(replace(MCMAE, **changes), 224)
    with pytest.raises(UserError, match=rf"x.pth: its encoder differs from the recipe's: {message}"):
        load_encoder(encoder, path)
    model = pixel_model(encoder, FusionSpec(), DECODERS["mcmae"], "none")
    with pytest.raises(UserError, match=rf"x.pth: its encoder differs from the recipe's: {message}"):
        load_pretrained(model, path)


def test_ratios_that_round_are_the_same_size(tmp_path: Path) -> None:
    spec = CViTSpec((8, 12, 16), (1, 1, 1), 4, (2.7, 2.7, 2.7), (2, 2, 1))
    torch.save(build_encoder(spec, 16).state_dict(), tmp_path / "x.pth")
    assert load_encoder(build_encoder(spec, 16), tmp_path / "x.pth").missing == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"dim": 64}, "dim 32 instead of 64"), ({"depth": 2}, "depth 1 instead of 2"), ({"mlp_ratio": 2}, "mlp_ratio 4 ")],
    ids=str,
)
def test_another_decoder_is_refused(
    changes: dict[str, Any], message: str, mcmae: dict[str, Tensor], tmp_path: Path
) -> None:
    path = write_released(tmp_path / "x.pth", mcmae_state(mcmae))
    with pytest.raises(UserError, match=rf"x.pth: its decoder differs from the recipe's: {message}.*model.decoder"):
        load_pretrained(new_model("mcmae", **changes), path)


def test_other_families_and_variants_are_refused(mcmae: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    states: Mapping[str, Mapping[str, Tensor]] = {
        "contains CViT with its decoder, MCMAE.*but the recipe's model is a plain ViT": mcmae_state(mcmae),
        r"a plain ViT lacks \(blocks.\*.ls1.gamma, blocks.\*.ls2.gamma\).*kind: timm": tiny_vit(
            init_values=1e-5
        ).state_dict(),
        "contains CLIP model, image tower 8 wide": {"visual.conv1.weight": torch.zeros(8, 3, 4, 4)},
        "contains no encoder supported by this project": {"weight": torch.zeros(2)},
    }
    for message, state in states.items():
        torch.save(dict(state), path)
        with pytest.raises(UserError, match=rf"x.pth: .*{message}"):
            load_encoder(build_encoder(TINY_VIT_SPEC, 32), path)


@pytest.mark.parametrize("lost", ["blocks1.0.attn.bias", "patch_embed4.weight", "blocks3.1.norm1.weight"])
def test_a_file_without_a_tensor_of_the_encoder_is_refused(lost: str, mcmae: dict[str, Tensor], tmp_path: Path) -> None:
    state = mcmae_state(mcmae)
    del state[lost]
    path = write_released(tmp_path / "x.pth", state)
    with pytest.raises(UserError, match=rf"x.pth: encoder tensors are missing: \d+ \({lost}"):
        load_encoder(build_encoder(MCMAE, 224), path)
    with pytest.raises(UserError, match=rf"x.pth: encoder tensors are missing: \d+ \({lost}"):
        load_pretrained(new_model("mcmae"), path)


def test_a_cvit_with_a_class_token_is_pooled_by_it(tmp_path: Path) -> None:
    source = CViT(MCMAE, 224, 10, global_pool="token").eval()
    perturb(source, seed=2)
    path = write_released(tmp_path / "x.pth", source.state_dict())
    model = CViT(MCMAE, 224, 10, global_pool="token").eval()
    report = load_encoder(model, path)
    assert (report.missing, report.unexpected) == ([], [])
    images = random_images(1, 224, seed=1)
    with torch.no_grad():
        assert torch.equal(model(images), source(images))
    mean_pooled = CViT(MCMAE, 224, 10)
    assert load_encoder(mean_pooled, path).missing == ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]
    without = {name: tensor for name, tensor in source.state_dict().items() if name != "cls_token"}
    with pytest.raises(UserError, match=r"x.pth: has no class token \(cls_token\), which pool: token takes"):
        load_encoder(model, write_released(tmp_path / "x.pth", without))


@pytest.mark.parametrize("lost", [["weight"], ["bias"], ["weight", "bias"]], ids=str)
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_classifier_without_the_norm_before_its_head_is_refused(pool: str, lost: list[str], tmp_path: Path) -> None:
    """A default norm in its place gives other logits; every use refuses it as check does."""
    state, norm = tiny_vit(global_pool=pool).state_dict(), "norm" if pool == "token" else "fc_norm"
    path, model = tmp_path / "x.pth", MaskedViT(TINY_VIT_SPEC, 32, 5, pool=pool)
    torch.save(state, path)
    assert load_encoder(model, path).missing == []
    torch.save({name: t for name, t in state.items() if name not in [f"{norm}.{end}" for end in lost]}, path)
    if (pool, len(lost)) == ("avg", 2):  # the head then is one on the class token, by its names
        norm = "norm"
    missing = " and ".join(f"{norm}.{end}" for end in sorted(lost))
    problem = f"lacks {missing} of the norm after its last block, before its head"
    for use in (load_encoder, load_pretrained):
        taker = model if use is load_encoder else new_vit()
        with pytest.raises(UserError, match=rf"x.pth: {problem}$"):
            use(taker, path)
    assert " ".join(describe(path).splitlines()[-1].split()) == f"NOT USABLE {problem}"
    with pytest.raises(UserError, match=problem):
        export_run(path, out=tmp_path / "out.safetensors")


def new_vit() -> PretrainModel:
    return pixel_model(build_encoder(TINY_VIT_SPEC, 32), FusionSpec(), DECODERS["mae"], "none")


def test_half_a_norm_after_a_pretraining_is_refused(mae: dict[str, Tensor], tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in mae_state(mae).items() if name != "norm.weight"}
    path = write_released(tmp_path / "x.pth", state)
    with pytest.raises(UserError, match=r"x.pth: lacks norm.weight of the norm after its last block$"):
        load_encoder(build_encoder(MAE, 64, 5, pool="token"), path)
    load_encoder(build_encoder(MAE, 64), write_released(path, {n: t for n, t in state.items() if n != "norm.bias"}))


def test_a_head_without_a_bias_has_a_zero_one(tmp_path: Path) -> None:
    source = tiny_vit()
    torch.nn.init.zeros_(source.head.bias)
    torch.save(
        {name: tensor for name, tensor in source.state_dict().items() if name != "head.bias"}, tmp_path / "x.pth"
    )
    model, images = MaskedViT(TINY_VIT_SPEC, 32, 5, pool="token").eval(), random_images(2, 32, seed=1)
    torch.nn.init.ones_(model.head.bias)
    report = load_encoder(model, tmp_path / "x.pth")
    assert report.missing == [] and "head without a bias, which is zero" in report.notes
    with torch.no_grad():
        torch.testing.assert_close(model(images), source(images))
    (tmp_path / "config.json").write_text('{"num_attention_heads": 3}')
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    exported = export_run(tmp_path / "x.pth", out=tmp_path / "out.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(load_exported(Path(exported.path))(images), source(images))
    other = MaskedViT(TINY_VIT_SPEC, 32, 7, pool="token")  # of other classes: nothing is taken
    assert load_encoder(other, tmp_path / "x.pth").missing == ["head.weight", "head.bias"]
