"""The models against values of the authors' public classes (tests/fixtures/README.md)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mrmae_ds.models.cvit import CViT
from mrmae_ds.models.masking import VisibleSet, choose_visible
from mrmae_ds.models.pretrain import PretrainModel
from mrmae_ds.weights.load import load_encoder
from mrmae_ds.weights.model_file import encoder_metadata, save_weights
from tests.fixtures import part
from tests.support.reference import MCMAE, authors_name, our_name, reference_mae, reference_mcmae

CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def visible_of(model: PretrainModel, reference: dict[str, Tensor]) -> VisibleSet:
    return choose_visible(reference["noise"], model.encoder.grid, 0.25)


def test_names_are_renamed_both_ways(mcmae: dict[str, Tensor]) -> None:
    names = list(part(mcmae, "state/"))
    assert len(names) == 91
    assert [authors_name(our_name(name)) for name in names] == names


@pytest.mark.parametrize("name", ["mcmae", "mae"])
def test_random_mask_is_maes(name: str, request: pytest.FixtureRequest) -> None:
    reference = request.getfixturevalue(name)
    side = int(reference["noise"].shape[1] ** 0.5)
    visible = choose_visible(reference["noise"], (side, side), 0.25)
    assert torch.equal(visible.ids_restore, reference["ids_restore"].long())
    assert torch.equal(visible.mask, reference["mask"])


def test_mcmae_latent_and_prediction(mcmae: dict[str, Tensor]) -> None:
    model = reference_mcmae(mcmae)
    visible = visible_of(model, mcmae)
    torch.testing.assert_close(model.latent(mcmae["image"], visible), mcmae["latent"], **CLOSE)
    prediction = model.predict(mcmae["image"], visible)["pixels"]
    torch.testing.assert_close(prediction.flatten()[::41], mcmae["pred_every_41st"], **CLOSE)


def test_mae_latent_and_prediction(mae: dict[str, Tensor]) -> None:
    model = reference_mae(mae)
    visible = visible_of(model, mae)
    torch.testing.assert_close(model.latent(mae["images"], visible), mae["latent"], **CLOSE)
    prediction = model.predict(mae["images"], visible)["pixels"]
    torch.testing.assert_close(prediction.flatten()[::41], mae["pred_every_41st"], **CLOSE)


@pytest.mark.parametrize(("normalize", "key"), [("standardize", "loss_norm_pix"), ("none", "loss_raw_pix")])
def test_pixel_losses_equal_the_authors(
    mcmae: dict[str, Tensor], mae: dict[str, Tensor], normalize: str, key: str
) -> None:
    model = reference_mcmae(mcmae, normalize)
    losses = model(mcmae["image"], visible_of(model, mcmae), {})
    torch.testing.assert_close(losses["loss"], mcmae[key], atol=1e-5, rtol=0)
    model = reference_mae(mae, normalize)
    losses = model(mae["images"], visible_of(model, mae), {})
    torch.testing.assert_close(losses["loss"], mae[key], atol=1e-5, rtol=0)


def test_mae_gradients_equal_the_authors(mae: dict[str, Tensor]) -> None:
    model = reference_mae(mae)
    model(mae["images"], visible_of(model, mae), {})["loss"].backward()
    gradients = {authors_name(name): p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == part(mae, "grad/").keys()
    for name, expected in part(mae, "grad/").items():
        gradient = gradients[name]
        norm = mae[f"grad_norm/{name}"]
        torch.testing.assert_close(gradient.norm(), norm, atol=0, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
        sampled = gradient.flatten()[::13] if gradient.numel() > 4096 else gradient.flatten()
        assert (sampled - expected.flatten()).norm() <= 1e-3 * expected.norm(), name


def features_and_logits(model: CViT, image: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        features = model.fc_norm(model.forward_features(image).mean(1))
        return features, model(image)


def test_finetuning_features_and_logits(mcmae: dict[str, Tensor]) -> None:
    model = CViT(MCMAE, 224, num_classes=10).eval()
    model.load_state_dict(part(mcmae, "finetune/"))
    features, logits = features_and_logits(model, mcmae["image"])
    torch.testing.assert_close(features, mcmae["features"], **CLOSE)
    torch.testing.assert_close(logits, mcmae["logits"], **CLOSE)


def test_finetuning_after_loading_pretrained_weights(mcmae: dict[str, Tensor], tmp_path: Path) -> None:
    pretrained = reference_mcmae(mcmae)
    path = tmp_path / "model.safetensors"
    save_weights(path, pretrained.state_dict(), {"kind": "pretrain", **encoder_metadata(pretrained.encoder)})
    model: nn.Module = CViT(MCMAE, 224, num_classes=10).eval()
    model.load_state_dict(part(mcmae, "finetune/"))
    report = load_encoder(model, path)
    assert sorted(report.missing) == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]
    features, logits = features_and_logits(model, mcmae["image"])
    torch.testing.assert_close(features, mcmae["features_after_pretrain"], **CLOSE)
    torch.testing.assert_close(logits, mcmae["logits_after_pretrain"], **CLOSE)
