"""MILAN and DMAE against values of the authors' public classes, and MaskAlign against its formula (tests/fixtures)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from mrmae_ds.config.recipe import load_recipe
from mrmae_ds.errors import ConfigError, UserError
from mrmae_ds.factory import build_pretraining
from mrmae_ds.models.decoder import DecoderSpec
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.masking import VisibleSet, choose_visible
from mrmae_ds.models.objectives import Objective
from mrmae_ds.models.pretrain import FusionSpec, PretrainModel
from mrmae_ds.models.sizes import CViTSpec, EncoderSpec, ViTSpec
from mrmae_ds.models.vit import MaskedViT
from mrmae_ds.teachers.base import TeacherOutput, draw_visible, targets_of
from mrmae_ds.teachers.sources.checkpoint import CheckpointTeacher
from mrmae_ds.weights.load import load_pretrained
from mrmae_ds.weights.model_file import encoder_metadata, save_weights
from tests.fixtures import load_reference, part
from tests.support.reference import (
    DMAE_HEAD,
    authors_name,
    load_all_but_positions,
    our_name,
    perturb,
    pixel_model,
    pixel_objective,
    random_images,
    random_noise,
)
from tests.support.released import write_released
from tests.support.sample_teachers import options

GRID = (4, 4)
MILAN = Objective(
    target="clip", tap="decoder", tokens="all", class_token=True, loss="cosine", normalize="none", weight=2.0
)
DMAE = Objective(
    target="mae", tap="encoder", block=2, tokens="visible", class_token=True, loss="l1", normalize="l2",
    normalize_prediction="l2", weight=1.0,
)  # fmt: skip
VIT = ViTSpec(16, 3, 4, patch=4)
CVIT = CViTSpec((8, 12, 16), (1, 1, 3), 4, patches=(2, 2, 1))


def visible_of(reference: dict[str, Tensor]) -> VisibleSet:
    return VisibleSet(reference["ids_keep"].long(), reference["ids_restore"].long(), GRID)


def check_gradients(model: nn.Module, reference: dict[str, Tensor]) -> None:
    """Compare the norm of every trained parameter's gradient."""
    norms = part(reference, "grad_norms/")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == len(norms)
    for name, parameter in trained.items():
        theirs = norms[authors_name(name.replace("heads.mimic", DMAE_HEAD))]
        assert parameter.grad.norm().item() == pytest.approx(theirs.item(), rel=1e-4, abs=1e-7), name


@pytest.fixture(scope="module")
def milan() -> dict[str, Tensor]:
    return load_reference("milan")


def milan_model(milan: dict[str, Tensor], objective: Objective = MILAN) -> PretrainModel:
    spec = DecoderSpec(kind="prompting", dim=16, depth=2, num_heads=4, mlp_ratio=2)
    encoder = MaskedViT(ViTSpec(16, 2, 2, mlp_ratio=2, patch=8), 32)
    # Named as MAE's only head, which the map of names knows.
    model = PretrainModel(encoder, FusionSpec(), spec, {"pixels": objective}, {"clip": 512})
    return load_all_but_positions(model, part(milan, "state/"))


def test_milans_prompting_decoder(milan: dict[str, Tensor]) -> None:
    model, visible, images = milan_model(milan), visible_of(milan), milan["images"]
    seen: list[Tensor] = []
    block = model.decoder.blocks[0]
    block.register_forward_hook(lambda module, inputs, output: seen.extend((*inputs, output)))
    prediction = model.predict(images, visible)["pixels"]
    masked, prompts, output = seen
    torch.testing.assert_close(model.latent(images, visible), milan["latent"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(masked, milan["masked_tokens"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(prompts, milan["fixed_tokens"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(output, milan["block0"], atol=1e-6, rtol=1e-5)
    assert prediction.shape == (2, 17, 512)


def test_milans_loss_and_gradients(milan: dict[str, Tensor]) -> None:
    model, images, targets = milan_model(milan), milan["images"], {"clip": milan["teacher"]}
    loss = model(images, visible_of(milan), targets)["loss"]
    assert loss.item() == pytest.approx(2.0021154, abs=1e-6)
    loss.backward()
    check_gradients(model, milan)


def test_milans_loss_without_the_class_token(milan: dict[str, Tensor]) -> None:
    """The target may have a class token that the objective does not use."""
    model = milan_model(milan, MILAN.model_copy(update={"class_token": False}))
    for targets in (milan["teacher"], milan["teacher"][:, 1:]):
        loss = model(milan["images"], visible_of(milan), {"clip": targets})["loss"]
        assert loss.item() == pytest.approx(milan["loss_patches_only"].item(), abs=1e-6)


def test_files_of_the_authors_load_whole(milan: dict[str, Tensor], dmae: dict[str, Tensor], tmp_path: Path) -> None:
    """Identified by their names, and the head goes to the objective's name in ds_configs/methods."""
    mimic = {"pixels": pixel_objective("none"), "mimic": DMAE}
    prompting = DecoderSpec(kind="prompting", dim=16, depth=2, num_heads=4, mlp_ratio=2)
    for reference, objectives, depth, decoder in (
        (milan, {"clip": MILAN}, 2, prompting),
        (dmae, mimic, 4, DecoderSpec(dim=16, depth=1, num_heads=4, mlp_ratio=2)),
    ):
        encoder = MaskedViT(ViTSpec(16, depth, 2, mlp_ratio=2, patch=8), 32)
        model = PretrainModel(encoder, FusionSpec(), decoder, objectives, {"clip": 512, "mae": 24})
        positions = {"pos_embed": encoder.pos_embed, "decoder_pos_embed": model.decoder.pos_embed}
        state = part(reference, "state/")
        report = load_pretrained(model, write_released(tmp_path / "released.pth", state | positions))
        assert report.missing == [] and report.unexpected == ["decoder_pos_embed"]


@pytest.fixture(scope="module")
def dmae() -> dict[str, Tensor]:
    return load_reference("dmae")


@pytest.fixture
def dmae_teacher(dmae: dict[str, Tensor], tmp_path: Path) -> CheckpointTeacher:
    """Block 4 of the authors' teacher, which sees the visible tokens."""
    spec = DecoderSpec(dim=16, depth=1, num_heads=4)
    encoder = build_encoder(ViTSpec(24, 6, 4, mlp_ratio=2, patch=8), 32)
    model = pixel_model(encoder, FusionSpec(), spec, "none")
    state = {our_name(name): value for name, value in part(dmae, "teacher/").items()}
    assert model.load_state_dict(state, strict=False).unexpected_keys == []
    metadata = {"kind": "pretrain", **encoder_metadata(encoder), "mean": [0.0] * 3, "std": [1.0] * 3}
    save_weights(tmp_path / "model.safetensors", model.state_dict(), metadata)
    return CheckpointTeacher(
        options("mae", str(tmp_path), image_size=32, student_grid=GRID, layers=(4,), sees_visible=True)
    )


def test_dmaes_teacher_sees_the_visible_tokens(dmae: dict[str, Tensor], dmae_teacher: CheckpointTeacher) -> None:
    visible, images = visible_of(dmae), dmae["images"]
    output = dmae_teacher(images, visible)
    expected = dmae["teacher_features"]
    torch.testing.assert_close(output.class_token, expected[:, :1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(visible.take(output.tokens), expected[:, 1:], atol=1e-5, rtol=1e-4)
    assert len(dmae_teacher.network.transformer_blocks) == 5  # the last one is not computed
    assert (output.tokens[visible.mask.bool()] == 0).all() and (output.importance == 0).all()
    # Removed pixels change nothing.
    removed = visible.mask.reshape(2, 1, *GRID).repeat_interleave(8, 2).repeat_interleave(8, 3)
    changed = dmae_teacher(images + 100 * removed, visible)
    assert torch.equal(changed.tokens, output.tokens) and torch.equal(changed.class_token, output.class_token)


def test_dmaes_losses_and_gradients(dmae: dict[str, Tensor], dmae_teacher: CheckpointTeacher) -> None:
    visible, images = visible_of(dmae), dmae["images"]
    objectives = {"pixels": pixel_objective("none"), "mimic": DMAE}
    encoder = MaskedViT(ViTSpec(16, 4, 2, mlp_ratio=2, patch=8), 32)
    spec = DecoderSpec(dim=16, depth=1, num_heads=4, mlp_ratio=2)
    model = PretrainModel(encoder, FusionSpec(), spec, objectives, {"mae": 24})
    load_all_but_positions(model, part(dmae, "state/"))
    tapped = model.encode(images, visible)[1][0]
    torch.testing.assert_close(tapped, dmae["student_features"], atol=1e-5, rtol=1e-4)
    targets = targets_of(objectives, {"mae": dmae_teacher}, {"mae": dmae_teacher(images, visible)}, images, 8)
    losses = model(images, visible, targets)
    assert losses["pixels"].item() == pytest.approx(0.8001757, abs=1e-6)
    assert losses["mimic"].item() == pytest.approx(0.2503816, abs=1e-6)
    losses["loss"].backward()
    check_gradients(model, dmae)


def mixing(block: int, **changes: Any) -> Objective:
    """One layer's objective of MaskAlign."""
    values = {"target": f"clip.{block}", "tap": "encoder", "block": block, "mix": True, "tokens": "visible"}
    values |= {"class_token": True, "loss": "smooth_l1", "normalize": "layer_norm", "weight": 1.0}
    return Objective.model_validate(values | changes)


def build(objectives: dict[str, Objective], spec: EncoderSpec = VIT) -> PretrainModel:
    torch.manual_seed(0)
    decoder = DecoderSpec(kind="prompting", dim=12, depth=2, num_heads=2)
    widths = {objective.target: 6 for objective in objectives.values() if objective.target != "pixels"}
    model = PretrainModel(build_encoder(spec, 16), FusionSpec(), decoder, objectives, widths)
    perturb(model, seed=1)
    return model


def test_maskaligns_mix_and_losses() -> None:
    """A matrix of weights over layers and blocks, one row of which belongs to each objective."""
    model = build({"a": mixing(1), "b": mixing(2, weight=0.5)})
    visible, images = choose_visible(random_noise(2, 16, seed=2), GRID, 0.3), random_images(2, 16, seed=3)
    targets = {name: torch.randn(2, 17, 6) for name in ("clip.1", "clip.2")}
    losses = model(images, visible, targets)
    x = model.encoder(images, visible, (0, 1, 2))["blocks"]
    matrix = torch.stack([model.mixes[name].weight for name in "ab"])
    mixed = torch.einsum("ab,bnlc->anlc", matrix, torch.stack(x))
    for tokens, name, target in zip(mixed, "ab", targets.values(), strict=True):
        target = F.layer_norm(torch.cat([target[:, :1], visible.take(target[:, 1:])], dim=1), (6,))
        expected = F.smooth_l1_loss(model.heads[name](tokens), target)
        torch.testing.assert_close(losses[name], expected)
    torch.testing.assert_close(losses["loss"], losses["a"] + 0.5 * losses["b"])
    losses["loss"].backward()
    # The norm behind the last block belongs to no loss, and is not trained.
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"encoder.pos_embed", "fusion.norm.weight", "fusion.norm.bias"}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_a_mix_begins_with_its_block() -> None:
    objectives, widths = {"a": mixing(1), "b": mixing(2)}, {"clip.1": 6, "clip.2": 6}
    weights = PretrainModel(build_encoder(VIT, 16), FusionSpec(), DecoderSpec(), objectives, widths).mixes
    torch.testing.assert_close(weights["a"].weight.detach(), torch.tensor([0.01, 1.01, 0.01]))
    torch.testing.assert_close(weights["b"].weight.detach(), torch.tensor([0.01, 0.01, 1.01]))


INNER = Objective(target="t", tap="encoder", block=1, tokens="visible", loss="l1", normalize="none", weight=1.0)
CASES = {
    "prompting": ({"clip": MILAN}, VIT),
    "block": ({"mimic": INNER, "pixels": pixel_objective()}, VIT),
    "block of a CViT": ({"mimic": INNER, "pixels": pixel_objective()}, CVIT),
    "mix": ({"a": mixing(1), "b": mixing(2)}, VIT),
}


@pytest.mark.parametrize("case", CASES)
def test_removed_pixels_change_no_prediction(case: str) -> None:
    model = build(*CASES[case])
    visible, images = choose_visible(random_noise(2, 16, seed=2), GRID, 0.3), random_images(2, 16, seed=3)
    removed = visible.mask.reshape(2, 1, *GRID).repeat_interleave(4, 2).repeat_interleave(4, 3)
    with torch.no_grad():
        first, second = model.predict(images, visible), model.predict(images + 100 * removed, visible)
        third = model.predict(images + 1 - removed, visible)
    for name in first:
        assert torch.equal(first[name], second[name])
        assert not torch.equal(first[name], third[name])


RECIPES = sorted(Path("ds_configs/methods").glob("*_tiny.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_removed_pixels_change_no_prediction_of_a_recipe(file: Path) -> None:
    """By the recipe's own masks, encoder and objectives; FD's removes nothing, and all of its pixels are seen."""
    recipe = load_recipe(file)
    stage, grid = recipe.stages.pretrain, (8, 8)
    assert stage is not None
    stand_in = SimpleNamespace(width=6, has_class_token=True)
    model = build_pretraining(recipe, stage, lambda *_: stand_in)[0].eval()
    perturb(model, seed=1)
    cells = grid if stage.masking is None else stage.masking.grid(grid, 4)
    importance = {name: TeacherOutput(torch.ones(2, 64), torch.ones(2, 64)) for name in stage.teachers}
    mask = draw_visible(stage, importance, random_noise(2, cells[0] * cells[1], seed=2), grid, 4)
    removed = mask.mask.reshape(2, 1, *grid).repeat_interleave(4, 2).repeat_interleave(4, 3)
    images = random_images(2, 32, seed=3)
    with torch.no_grad():
        first, second = model.predict(images, mask), model.predict(images + 100 * removed, mask)
        third = model.predict(images + 1 - removed, mask)
    assert bool(removed.any()) == (stage.encoder_input != "full") and first.keys() == stage.objectives.keys()
    for name in first:
        assert torch.equal(first[name], second[name])
        assert not torch.equal(first[name], third[name])


@pytest.mark.parametrize(
    ("objectives", "spec", "message"),
    [
        ({"m": mixing(3)}, VIT, "block 3 does not exist; this encoder has 0 to 2"),
        ({"m": INNER}, VIT, "no objective is tapped behind block 1, so blocks 2 to 2 would not be trained"),
        ({"m": mixing(2)}, CVIT, "this encoder has no class token"),
    ],
)
def test_taps_that_do_not_exist_or_train_too_little_are_refused(
    objectives: dict[str, Objective], spec: EncoderSpec, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(objectives, spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tap": "decoder", "mix": False}, "block: has no effect on tap: decoder"),
        ({"block": None}, "mix: name the block"),
        ({"block": -1}, "greater than or equal to 0"),
        ({"target": "pixels"}, "class_token: the target pixels has no class token"),
        ({"loss": "cosine", "normalize_prediction": "l2"}, "normalize_prediction: has no effect on loss: cosine"),
    ],
)
def test_keys_without_an_effect_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Objective.model_validate(mixing(1).model_dump() | change)


def test_new_keys_are_recorded_only_if_given() -> None:
    """Runs from before the keys existed keep their hash."""
    plain = Objective(target="t", tap="encoder", tokens="visible", normalize="none", weight=1.0)
    assert set(plain.model_dump()) == {"target", "tap", "tokens", "loss", "normalize", "weight"}
    assert {"block", "class_token", "normalize_prediction"} <= set(DMAE.model_dump())
    assert "kind" not in DecoderSpec().model_dump()
    assert DecoderSpec(kind="prompting").model_dump()["kind"] == "prompting"


def of_recipe(name: str, **teacher: Any) -> PretrainModel:
    """Build the student of a recipe on the meta device, with a stand-in for its teacher."""
    recipe = load_recipe(Path(f"ds_configs/methods/{name}.yaml"))
    assert recipe.stages.pretrain is not None
    with torch.device("meta"):
        return build_pretraining(recipe, recipe.stages.pretrain, lambda *_: SimpleNamespace(**teacher))[0]


@pytest.mark.parametrize(("name", "width", "total"), [("milan", 512, 111_776_512), ("dmae", 1024, 112_695_296)])
def test_parameters_are_as_many_as_the_authors(name: str, width: int, total: int) -> None:
    model = of_recipe(f"{name}_base", width=width, has_class_token=True)
    assert sum(p.numel() for p in model.parameters()) == total
    # Positions are fixed, of the encoder and of the decoder.
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == total - 197 * (768 + 512)


def test_a_teacher_without_a_class_token_is_refused() -> None:
    with pytest.raises(UserError, match=r"objectives.mimic.class_token: teachers.mae has no class token; remove"):
        of_recipe("milan_tiny", width=96, has_class_token=False)


def test_drop_path_of_pretraining_rises_over_the_encoders_blocks() -> None:
    for name, last in {"maskalign_base": 0.1, "milan_base": 0.0}.items():
        model = of_recipe(name, width=768, has_class_token=True)
        rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.encoder.transformer_blocks]
        assert rates == pytest.approx([last * i / 11 for i in range(12)])
        stage = load_recipe(Path(f"ds_configs/methods/{name}.yaml")).stages.pretrain
        assert ("drop_path" in stage.model_dump()) == (last > 0)  # absent, as in runs from before the key existed
