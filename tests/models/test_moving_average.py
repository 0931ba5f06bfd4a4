"""Moving averages against values of data2vec's authors (tests/fixtures) and independent formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mrmae_ds.config.recipe import load_recipe
from mrmae_ds.config.sections import TeacherConfig
from mrmae_ds.factory import build_pretraining
from mrmae_ds.models.beit import MaskedBeit
from mrmae_ds.models.decoder import DecoderSpec
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.masking import TokenMask, choose_visible
from mrmae_ds.models.moving_average import MovingAverage
from mrmae_ds.models.objectives import Objective
from mrmae_ds.models.pretrain import FusionSpec, PretrainModel
from mrmae_ds.models.sizes import BeitSpec, CViTSpec, EncoderSpec, ViTSpec
from tests.fixtures import load_reference, part
from tests.support.reference import perturb, random_images, random_noise

VIT = ViTSpec(16, 3, 4, patch=4)
CVIT = CViTSpec((8, 12, 16), (1, 1, 3), 4, patches=(2, 2, 1))
GRID = (4, 4)
LATENT = Objective(
    target="ema", tap="decoder", tokens="masked", loss="smooth_l1", beta=2.0, normalize="layer_norm", weight=1.0
)

DATA2VEC = LATENT.model_copy(update={"tap": "encoder"})


@pytest.fixture(scope="module")
def data2vec() -> dict[str, Tensor]:
    return load_reference("data2vec")


def always(decay: float) -> Any:
    return TeacherConfig(kind="ema", decay=decay).decay_at


def test_an_update_equals_the_authors(data2vec: dict[str, Tensor]) -> None:
    """Six tensors of theirs before and after; the tolerance is one bit of the largest."""
    before, student, after = (part(data2vec, f"step/{name}/") for name in ("ema_before", "student_after", "ema_after"))
    average = MovingAverage(nn.ParameterList(before.values()), always(0.9998), (0,))
    average.update(nn.ParameterList(student.values()), epoch=0.5)
    for found, name in zip(average.parameters(), before, strict=True):
        torch.testing.assert_close(found.detach(), after[name], atol=1.2e-7, rtol=0)
        assert not torch.equal(found, before[name])


def data2vec_model(data2vec: dict[str, Tensor], objective: Objective = DATA2VEC, **average: Any) -> PretrainModel:
    """Student and average with the authors' weights."""
    encoder = MaskedBeit(BeitSpec(16, 4, 2, mlp_ratio=2, patch=8, layer_scale=0.1), 32, mask_token=True)
    model = PretrainModel(encoder, FusionSpec(), DecoderSpec(), {"latent": objective}, {"ema": 16})
    options: dict[str, Any] = {"decay": always(0.9998), "layers": (1, 2, 3), "layer_norm": True}
    model.averages["ema"] = MovingAverage(encoder, **options | average)
    ours = {"norm.": "fusion.norm.", "lm_head.": "heads.latent."}
    state = {}
    for name, value in part(data2vec, "student/").items():
        prefix = next((prefix for prefix in ours if name.startswith(prefix)), "")
        state[ours.get(prefix, "encoder.") + name.removeprefix(prefix)] = value
    for name, value in part(data2vec, "ema/").items():
        if not name.startswith(tuple(ours)):
            state[f"averages.ema.network.{name}"] = value
    model.load_state_dict(state)
    return model.train()


def test_data2vecs_target_loss_and_gradients(data2vec: dict[str, Tensor]) -> None:
    model, images = data2vec_model(data2vec), data2vec["images"]
    mask = TokenMask(data2vec["mask"].bool(), GRID)
    target = model.averages["ema"](images)[:, 1:]
    torch.testing.assert_close(F.layer_norm(target, (16,)), data2vec["target"], atol=1e-5, rtol=0)
    torch.testing.assert_close(model.predict(images, mask)["latent"], data2vec["prediction"], atol=1e-5, rtol=1e-4)
    loss = model(images, mask, {})["loss"]
    assert loss.item() == pytest.approx(0.2511747, abs=1e-6)
    loss.backward()
    norms = {name.removeprefix("lm_head."): norm for name, norm in part(data2vec, "grad_norms/").items()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == len(norms)
    for name, parameter in trained.items():
        theirs = norms[name.removeprefix("heads.latent.").removeprefix("fusion.").removeprefix("encoder.")]
        assert parameter.grad.norm().item() == pytest.approx(theirs.item(), rel=1e-4, abs=1e-7), name


def test_variants_of_data2vec_are_others(data2vec: dict[str, Tensor]) -> None:
    """fairseq's target is normalized once; and beta is 1 by default."""
    images, mask = data2vec["images"], TokenMask(data2vec["mask"].bool(), GRID)
    fairseq = data2vec_model(data2vec, layer_norm=False).averages["ema"](images)[:, 1:]
    expected = data2vec["target_without_layer_norms"]
    torch.testing.assert_close(F.layer_norm(fairseq, (16,)), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(expected, data2vec["target"], atol=2e-5, rtol=0)
    loss = data2vec_model(data2vec, DATA2VEC.model_copy(update={"beta": None}))(images, mask, {})["loss"]
    assert loss.item() == pytest.approx(data2vec["loss_beta_1"].item(), abs=1e-6)


def test_masked_pixels_change_the_target_and_no_prediction(data2vec: dict[str, Tensor]) -> None:
    model, images, mask = data2vec_model(data2vec), data2vec["images"], TokenMask(data2vec["mask"].bool(), GRID)
    removed = mask.mask.reshape(2, 1, *GRID).repeat_interleave(8, 2).repeat_interleave(8, 3)
    with torch.no_grad():
        prediction, changed = (model.predict(x, mask)["latent"] for x in (images, images + 100 * removed))
        target, other = (model.averages["ema"](x) for x in (images, images + removed))
    assert torch.equal(prediction, changed) and not torch.allclose(target, other)


def build(spec: EncoderSpec, **average: Any) -> PretrainModel:
    torch.manual_seed(0)
    encoder = build_encoder(spec, 16, drop_path_rate=0.9)
    decoder = DecoderSpec(dim=12, depth=1, num_heads=2)
    model = PretrainModel(encoder, FusionSpec(), decoder, {"latent": LATENT}, {"ema": 16})
    perturb(model, seed=1)
    model.averages["ema"] = MovingAverage(encoder, **{"decay": always(0.9), **average})
    return model


@pytest.mark.parametrize("spec", [VIT, CVIT], ids=["vit", "cvit"])
def test_the_target_is_the_mean_of_whole_images_without_drop_path(spec: EncoderSpec) -> None:
    """The dense path of the encoder, in eval mode, gives the last block; hooks give the others."""
    model, images = build(spec, layers=(0, 2), layer_norm=True).train(), random_images(2, 16, seed=2)
    perturb(model, seed=3)  # the average keeps the weights from before
    outputs: list[Tensor] = []
    average = model.averages["ema"]
    found = average(images)
    for block in average.network.transformer_blocks:
        block.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    average.network.forward_features(images)
    expected = sum(F.layer_norm(outputs[layer], (16,)) for layer in (0, 2)) / 2
    torch.testing.assert_close(found, expected)
    assert torch.equal(found, average(images)) and not found.requires_grad
    assert not any(module.training for module in average.modules()) and model.encoder.training
    last = MovingAverage(average.network, always(0.9))(images)
    torch.testing.assert_close(last, outputs[2])


def test_only_the_student_is_trained() -> None:
    model, images = build(VIT), random_images(2, 16, seed=2)
    visible = choose_visible(random_noise(2, 16, seed=3), GRID, 0.25)
    model(images, visible, {})["loss"].backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith("averages.") for name in trained)


def test_training_equals_a_loop_in_float64() -> None:
    """Targets, losses and averages of five steps, whose decay rises in the first three of ten steps per epoch."""
    config = TeacherConfig(kind="ema", decay=0.9, decay_start=0.5, decay_epochs=0.3)
    model = build(VIT, decay=config.decay_at, layers=(1, 2), layer_norm=True).double().eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    names = [name for name, _ in model.encoder.named_parameters()]
    own = {name: p.detach().clone() for name, p in model.encoder.named_parameters()}
    teacher = build_encoder(VIT, 16).double().eval()
    for step, decay in enumerate((0.5 + 0.4 / 3, 0.5 + 0.8 / 3, 0.9, 0.9, 0.9)):
        images = random_images(2, 16, seed=step).double()
        visible = choose_visible(random_noise(2, 16, seed=step), GRID, 0.25)
        teacher.load_state_dict(own)
        x = torch.cat([teacher._class_token(images), teacher.patch_embed(images) + teacher.pos_embed[:, 1:]], dim=1)
        blocks = []
        for block in teacher.blocks:
            x = block(x)
            blocks.append(x)
        target = torch.stack([F.layer_norm(x[:, 1:], (16,)) for x in blocks[1:]]).mean(0)
        difference = (model.predict(images, visible)["latent"] - F.layer_norm(target, (16,))).abs()
        terms = torch.where(difference < 2, difference.square() / 4, difference - 1).mean(-1)
        expected = (terms * visible.mask).sum() / visible.mask.sum()
        loss = model(images, visible, {})["loss"]
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_averages((step + 1) / 10)
        weights = dict(model.encoder.named_parameters())
        own = {name: decay * own[name] + (1 - decay) * weights[name].detach() for name in names}
        for name, parameter in model.averages["ema"].network.named_parameters():
            torch.testing.assert_close(parameter.detach(), own[name], rtol=1e-12, atol=1e-14)


def test_parameters_are_as_many_as_the_authors() -> None:
    recipe = load_recipe(Path("ds_configs/methods/data2vec_base.yaml"))
    assert recipe.stages.pretrain is not None
    with torch.device("meta"):
        model, teachers = build_pretraining(recipe, recipe.stages.pretrain)
    averaged = sum(p.numel() for p in model.averages.parameters())
    assert sum(p.numel() for p in model.parameters()) == 86_256_720 + averaged and not teachers
    assert averaged == sum(p.numel() for p in model.encoder.parameters())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 86_256_720
