"""BEiT's encoder against values of the authors' public classes, and mask tokens of it and of a plain ViT."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from mrmae_ds.config.recipe import load_recipe
from mrmae_ds.errors import UserError
from mrmae_ds.factory import build_pretraining
from mrmae_ds.models.beit import MaskedBeit
from mrmae_ds.models.decoder import DecoderSpec
from mrmae_ds.models.encoders import build_encoder, init_classifier
from mrmae_ds.models.masking import TokenMask, choose_visible
from mrmae_ds.models.objectives import Objective, patchify
from mrmae_ds.models.pretrain import FusionSpec, PretrainModel
from mrmae_ds.models.sizes import ARCHITECTURES, BeitSpec, EncoderSpec, ViTSpec
from mrmae_ds.training.param_groups import finetune_groups, pretrain_groups
from tests.fixtures import load_reference, part
from tests.support.reference import perturb, random_images, random_noise

SPEC, GRID = BeitSpec(16, 2, 2, mlp_ratio=2, patch=8), (4, 4)
VIT = ViTSpec(16, 2, 2, patch=8)
PIXELS = Objective(target="pixels", tap="encoder", tokens="masked", loss="l1", normalize="none", weight=1.0)
HOG = Objective(target="hog", tap="encoder", tokens="masked", normalize="none", weight=1.0)
ALL = Objective(
    target="t", tap="encoder", tokens="all", class_token=True, loss="smooth_l1", beta=2.0, normalize="layer_norm",
    weight=1.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def beit() -> dict[str, Tensor]:
    return load_reference("beit")


@pytest.fixture(scope="module")
def simmim() -> dict[str, Tensor]:
    return load_reference("simmim")


def model_of(spec: EncoderSpec, objective: Objective, size: int = 32, **options: bool) -> PretrainModel:
    encoder = build_encoder(spec, size, **({"mask_token": True} | options))
    return PretrainModel(encoder, FusionSpec(), DecoderSpec(), {"a": objective}, {"t": 6})


def random_mask(batch: int, share: float = 0.4) -> TokenMask:
    return TokenMask(random_noise(batch, 16, seed=5) < share, GRID)


def test_features_and_gradients_are_the_authors(beit: dict[str, Tensor]) -> None:
    state, norms = part(beit, "state/"), part(beit, "grad_norms/")
    encoder = MaskedBeit(SPEC, 32, mask_token=True)
    encoder.load_state_dict({name: v for name, v in state.items() if not name.startswith(("norm.", "lm_head."))})
    torch.testing.assert_close(encoder.rel_pos_bias(), beit["rel_pos_bias"])
    mask = beit["mask"].bool()
    x = encoder(beit["images"], TokenMask(mask, GRID))["tokens"]
    x = F.layer_norm(x, (16,), state["norm.weight"], state["norm.bias"], eps=1e-6)
    torch.testing.assert_close(x, beit["features"], atol=1e-6, rtol=1e-5)
    logits = F.linear(x[:, 1:], state["lm_head.weight"], state["lm_head.bias"])
    loss = F.cross_entropy(logits[mask], beit["labels"].long()[mask])
    assert loss.item() == pytest.approx(4.1345987, abs=1e-6)
    loss.backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad.norm().item() == pytest.approx(norms[name].item(), rel=1e-4, abs=1e-7), name


def test_simmims_loss_and_gradients_are_the_authors(simmim: dict[str, Tensor]) -> None:
    """Their head's channels are color, row, column; ours row, column, color."""
    ours = {"encoder.norm.": "fusion.norm.", "decoder.0.": "heads.a."}
    order = torch.arange(768).reshape(3, 16, 16).permute(1, 2, 0).flatten()

    def renamed(name: str) -> str:
        return next((own + name.removeprefix(old) for old, own in ours.items() if name.startswith(old)), name)

    state = {renamed(name): value for name, value in part(simmim, "state/").items()}
    state |= {"heads.a.weight": state["heads.a.weight"].flatten(1)[order], "heads.a.bias": state["heads.a.bias"][order]}
    model = model_of(BeitSpec(16, 2, 2), PIXELS, 64)
    model.load_state_dict(state)
    mask = TokenMask(simmim["mask"].flatten(1).bool(), GRID)
    features = model.latent(simmim["images"], mask)[:, 1:].transpose(1, 2).unflatten(2, GRID)
    torch.testing.assert_close(features, simmim["features"], atol=1e-5, rtol=1e-4)
    loss = model(simmim["images"], mask, {})["loss"]
    # They divide by the number of masked values + 1e-5.
    assert loss.item() == pytest.approx(0.86203, abs=1e-5)
    assert loss.item() == pytest.approx(simmim["loss"].item(), abs=1e-6)
    loss.backward()
    norms = {renamed(name): value for name, value in part(simmim, "grad_norms/").items()}
    for name, parameter in model.named_parameters():
        assert parameter.grad.norm().item() == pytest.approx(norms[name].item(), rel=1e-4, abs=1e-7), name


def test_a_classifier_gives_the_authors_logits_and_timms(beit: dict[str, Tensor]) -> None:
    state, images = part(beit, "finetune/"), beit["finetune_images"]
    ours = MaskedBeit(SPEC, 32, num_classes=5).eval()
    ours.load_state_dict(state)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
    theirs = timm.create_model("beit_base_patch16_224", num_classes=5, **sizes).eval()
    theirs.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), beit["finetune_logits"], atol=1e-6, rtol=1e-5)
        assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize("spec", [SPEC, VIT], ids=["beit", "vit"])
def test_pixels_of_masked_tokens_change_nothing_that_is_predicted(spec: EncoderSpec) -> None:
    model = model_of(spec, HOG)
    perturb(model, seed=1)
    mask, images = random_mask(2), random_images(2, 32, seed=3)
    removed = mask.mask.reshape(2, 1, *GRID).repeat_interleave(8, 2).repeat_interleave(8, 3)
    with torch.no_grad():
        prediction = model.predict(images, mask)["a"]
        assert torch.equal(prediction, model.predict(images + 100 * removed, mask)["a"])
        assert not torch.equal(prediction, model.predict(images + 1 - removed, mask)["a"])
    assert prediction.shape == (2, 16, 108 // 4)


@pytest.mark.parametrize("spec", [SPEC, VIT], ids=["beit", "vit"])
def test_the_loss_is_the_mean_over_masked_tokens_of_the_batch(spec: EncoderSpec) -> None:
    """Images with more masked tokens have more weight; each trained parameter gets a gradient."""
    model, images = model_of(spec, PIXELS), random_images(2, 32, seed=3)
    perturb(model, seed=1)
    mask = random_mask(2)
    assert mask.removed.sum(1).tolist() == [5, 8]
    loss = model(images, mask, {})["loss"]
    distances = (model.predict(images, mask)["a"] - patchify(images, 8)).abs().mean(-1)
    torch.testing.assert_close(loss, distances[mask.removed].mean())
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("spec", [SPEC, VIT], ids=["beit", "vit"])
def test_attention_is_dropped_in_training_alone(spec: EncoderSpec) -> None:
    encoder, images = build_encoder(spec, 32, attn_drop_rate=0.5), random_images(2, 32, seed=3)
    perturb(encoder, seed=1)
    rates = {block.attn.attn_drop.p for block in encoder.transformer_blocks}
    with torch.no_grad():
        torch.manual_seed(0)
        first, second = encoder(images), encoder(images)
        assert rates == {0.5} and not torch.equal(first, second)
        encoder.eval()
        assert torch.equal(encoder(images), encoder(images))


def test_all_tokens_without_a_mask_have_no_mask_token() -> None:
    model, images = model_of(SPEC, ALL, mask_token=False), random_images(2, 32, seed=3)
    assert "encoder.mask_token" not in model.state_dict()
    target = torch.randn(2, 17, 6)
    loss = model(images, TokenMask.whole(2, GRID, images.device), {"t": target})["loss"]
    tokens = F.linear(model.fusion.norm(model.encoder(images)), model.heads["a"].weight, model.heads["a"].bias)
    torch.testing.assert_close(loss, F.smooth_l1_loss(tokens, F.layer_norm(target, (6,)), beta=2.0))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_mask_of_squares_removes_whole_squares() -> None:
    visible = choose_visible(random_noise(3, 4, seed=1), (2, 2), 0.5)
    removed = TokenMask.of_units(visible, GRID).removed.unflatten(1, GRID)
    for row in range(4):
        for column in range(4):
            assert torch.equal(removed[:, row, column], visible.mask.bool()[:, row // 2 * 2 + column // 2])


@pytest.mark.parametrize("checkpoint", [1, 2])
def test_activation_checkpointing_changes_no_gradient(checkpoint: int) -> None:
    gradients = []
    for every in (0, checkpoint):
        torch.manual_seed(0)
        model, images = model_of(SPEC, PIXELS), random_images(2, 32, seed=3)
        perturb(model, seed=1)
        model.encoder.checkpointing.transformer = every
        model(images, random_mask(2), {})["loss"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_parameters_are_decayed_as_by_the_authors() -> None:
    """Tables and the mask token are; the class token, norms, scales and biases are not."""
    model = model_of(SPEC, PIXELS)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, others = pretrain_groups(model, 0.05)
    if not decayed["weight_decay"]:
        decayed, others = others, decayed
    found = {names[id(p)] for p in decayed["params"]}
    assert {"encoder.mask_token", "encoder.rel_pos_bias.relative_position_bias_table"} <= found
    assert {"encoder.cls_token", "encoder.blocks.0.gamma_1", "encoder.blocks.0.attn.q_bias"} <= set(
        names.values()
    ) - found


def test_layers_of_fine_tuning_are_the_blocks_and_decay_their_tables() -> None:
    model = MaskedBeit(BeitSpec(16, 3, 2, patch=8), 32, num_classes=5)
    init_classifier(model)
    groups = finetune_groups(model, 0.05, 0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found["cls_token"] == (0.5**4, 0.0) and found["patch_embed.proj.weight"] == (0.5**4, 0.05)
    for block in range(3):
        scale = 0.5 ** (3 - block)
        assert found[f"blocks.{block}.attn.relative_position_bias_table"] == (scale, 0.05)
        assert found[f"blocks.{block}.gamma_1"] == (scale, 0.0)
    assert found["head.weight"] == (1.0, 0.05) and found["fc_norm.weight"] == (1.0, 0.0)


def test_another_input_size_resizes_the_tables() -> None:
    model = MaskedBeit(SPEC, 32, num_classes=5)
    perturb(model, seed=1)
    model.set_input_size(48)
    assert model.grid == (6, 6) and model(random_images(1, 48, seed=1)).shape == (1, 5)
    assert model.blocks[0].attn.relative_position_bias_table.shape == (11 * 11 + 3, 2)
    with pytest.raises(UserError, match="is not a multiple of the patch stride 8"):
        model.set_input_size(36)


def test_parameters_are_as_many_as_the_authors() -> None:
    recipe = load_recipe(Path("ds_configs/methods/simmim_vit_base.yaml"))
    assert recipe.stages.pretrain is not None
    with torch.device("meta"):
        model, _ = build_pretraining(recipe, recipe.stages.pretrain)
        classifier = build_encoder(ARCHITECTURES["beit_base"], 224, 1000)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 86_256_720
    assert sum(p.numel() for p in classifier.parameters()) == 86_530_984
