"""The rows of the paper's Table 3 as lists of objectives: each switch changes what it names and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from zlib import crc32

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mrmae_ds.models.decoder import DecoderSpec
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.masking import VisibleSet, choose_visible
from mrmae_ds.models.objectives import Objective
from mrmae_ds.models.pretrain import FusionSpec, PretrainModel
from mrmae_ds.models.sizes import CViTSpec, EncoderSpec, ViTSpec
from tests.support.reference import random_noise

VIT = ViTSpec(16, 4, 4, patch=4)
CVIT = CViTSpec((8, 12, 16), (1, 1, 3), 4, patches=(2, 2, 1))
WIDTHS, TOKENS = {"clip": 6, "dino": 7}, 16


def objective(target: str, tap: str, tokens: str, weight: float = 0.5, **changes: str) -> Objective:
    normalize = "standardize" if target == "pixels" else "layer_norm"
    values = {"target": target, "tap": tap, "tokens": tokens, "normalize": normalize, "weight": weight}
    return Objective.model_validate(values | changes)


PIXELS = objective("pixels", "decoder", "masked")
MIMIC = objective("clip", "encoder", "visible")
JOINT = objective("clip", "decoder", "masked")
NO_FUSION = FusionSpec()
BLOCKS = FusionSpec(blocks=(1, 2))


@dataclass(frozen=True)
class Row:
    """A row of Table 3."""

    objectives: dict[str, Objective]
    focused: bool = False
    fusion: FusionSpec = NO_FUSION
    spec: EncoderSpec = VIT


BOTH = {"pixels": PIXELS, "mimic": MIMIC}
ROWS = {
    1: Row({"pixels": PIXELS}),
    2: Row(BOTH),
    3: Row(BOTH, focused=True),
    4: Row(BOTH, focused=True, fusion=BLOCKS),
    5: Row({"pixels": PIXELS, "mimic": JOINT}, focused=True, fusion=BLOCKS),
    6: Row({"mimic": MIMIC}, focused=True, fusion=BLOCKS),
    7: Row(BOTH, focused=True, fusion=FusionSpec(stages=(1, 2), blocks=(0, 1)), spec=CVIT),
}


def build(row: Row) -> PretrainModel:
    """Return the row's model in float64; parameters of equal name and shape are equal in all rows."""
    encoder = build_encoder(row.spec, 16)
    decoder = DecoderSpec(dim=12, depth=1, num_heads=2)
    model = PretrainModel(encoder, row.fusion, decoder, row.objectives, WIDTHS).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * normal(*parameter.shape, seed=crc32(name.encode())))
    return model


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


IMAGES = normal(3, 3, 16, 16, seed=1)
TARGETS = {name: normal(3, TOKENS, width, seed=2) for name, width in WIDTHS.items()}
IMPORTANCE = (2 * normal(3, TOKENS, seed=3)).softmax(1)


def visible_set(row: Row) -> VisibleSet:
    mode = "sample" if row.focused else "random"
    return choose_visible(random_noise(3, TOKENS, seed=4), (4, 4), 0.25, mode, IMPORTANCE)


def losses(row: Row, visible: VisibleSet | None = None, targets: dict[str, Tensor] | None = None) -> dict[str, float]:
    found = build(row)(IMAGES, visible or visible_set(row), targets or TARGETS)
    return {name: value.item() for name, value in found.items()}


def gradients(model: PretrainModel, row: Row, loss: str) -> dict[str, Tensor]:
    """Gradient of one loss for every parameter that it reaches."""
    model.zero_grad()
    model(IMAGES, visible_set(row), TARGETS)[loss].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def parts(names: set[str]) -> set[str]:
    return {".".join(name.split(".")[: 2 if name.startswith(("heads", "fusion.stage")) else 1]) for name in names}


def shapes(number: int) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in build(ROWS[number]).named_parameters()}


def test_parameters_of_each_row() -> None:
    one, two, three, four, five, six = (shapes(number) for number in range(1, 7))
    assert parts(one.keys()) == {"encoder", "fusion", "decoder", "heads.pixels"}
    assert two.keys() - one.keys() == {"heads.mimic.weight", "heads.mimic.bias"}
    assert {name: two[name] for name in one} == one
    assert two == three == four  # neither focused mimicking nor fused transformer blocks have parameters
    assert four["heads.mimic.weight"] == (WIDTHS["clip"], 16)  # on the encoder's latent
    assert five["heads.mimic.weight"] == (WIDTHS["clip"], 12)  # on the decoder's output, and nothing on the encoder's
    assert {**five, "heads.mimic.weight": four["heads.mimic.weight"]} == four
    assert parts(four.keys() - six.keys()) == {"decoder", "heads.pixels"}
    assert {name: four[name] for name in six} == six
    assert {"fusion.stage_convs", "heads.mimic", "heads.pixels", "decoder"} < parts(shapes(7).keys())


def test_row_2_adds_a_loss_and_leaves_the_other() -> None:
    one, two = losses(ROWS[1]), losses(ROWS[2])
    assert one.keys() == {"loss", "pixels"}
    assert two["pixels"] == one["pixels"]
    assert one["loss"] == 0.5 * one["pixels"]
    assert two["loss"] == pytest.approx(0.5 * two["pixels"] + 0.5 * two["mimic"], rel=1e-14)


def test_row_3_changes_the_visible_set_alone() -> None:
    random, focused = visible_set(ROWS[2]), visible_set(ROWS[3])
    assert not torch.equal(random.mask, focused.mask)
    shown = [((1 - visible.mask) * IMPORTANCE).sum(1) for visible in (random, focused)]
    assert (shown[1] > shown[0]).all()
    assert losses(ROWS[3]) == losses(ROWS[2], visible=focused) != losses(ROWS[2])


def test_row_4_adds_blocks_before_the_norm() -> None:
    model, visible = build(ROWS[4]), visible_set(ROWS[4])
    outputs: list[Tensor] = []
    for block in model.encoder.transformer_blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    latent = model.latent(IMAGES, visible)
    expected = F.layer_norm(outputs[1] + outputs[2] + outputs[3], (16,), *model.fusion.norm.parameters(), eps=1e-6)
    assert latent.shape == (3, 1 + 4, 16)
    torch.testing.assert_close(latent, expected, atol=1e-12, rtol=1e-12)
    plain = build(ROWS[3]).latent(IMAGES, visible)
    torch.testing.assert_close(
        plain, F.layer_norm(outputs[3], (16,), *model.fusion.norm.parameters(), eps=1e-6), atol=1e-12, rtol=1e-12
    )


@pytest.mark.parametrize("how", ["detached", "zero"])
def test_row_5_reaches_the_encoder_through_the_decoder_alone(how: str) -> None:
    for number, direct in ((4, True), (5, False)):
        model = build(ROWS[number])
        assert "encoder" in parts(gradients(model, ROWS[number], "mimic").keys())
        if how == "detached":
            model.decoder.embed.register_forward_hook(lambda module, args, output: output.detach())
        else:
            torch.nn.init.zeros_(model.decoder.embed.weight)
        reached = parts(gradients(model, ROWS[number], "mimic").keys())
        assert reached == ({"encoder", "fusion", "heads.mimic"} if direct else {"decoder", "heads.mimic"})


def test_row_5_has_its_target_on_removed_tokens_and_row_4_on_visible_ones() -> None:
    for number, where in ((4, 0.0), (5, 1.0)):
        mask = visible_set(ROWS[number]).mask
        elsewhere = {"clip": TARGETS["clip"] + (mask != where)[..., None] * 7 * normal(3, TOKENS, 6, seed=9)}
        there = {"clip": TARGETS["clip"] + (mask == where)[..., None] * 7 * normal(3, TOKENS, 6, seed=9)}
        before = losses(ROWS[number])
        assert losses(ROWS[number], targets=elsewhere) == before
        after = losses(ROWS[number], targets=there)
        assert after["mimic"] != before["mimic"] and after["pixels"] == before["pixels"]


def test_row_5_leaves_the_pixels_alone() -> None:
    assert losses(ROWS[5])["pixels"] == losses(ROWS[4])["pixels"]
    assert losses(ROWS[5])["mimic"] != losses(ROWS[4])["mimic"]


def test_row_6_only_lacks_the_pixels() -> None:
    four, six = losses(ROWS[4]), losses(ROWS[6])
    assert build(ROWS[6]).decoder is None
    assert six == {"loss": 0.5 * four["mimic"], "mimic": four["mimic"]}
    reached = gradients(build(ROWS[4]), ROWS[4], "mimic")
    assert {name: g.tolist() for name, g in gradients(build(ROWS[6]), ROWS[6], "mimic").items()} == {
        name: g.tolist() for name, g in reached.items()
    }


@pytest.mark.parametrize("number", ROWS)
def test_weights_scale_losses_and_gradients_linearly(number: int) -> None:
    row = ROWS[number]
    weights = {"pixels": 0.125, "mimic": 3.0}
    other = replace(row, objectives={k: o.model_copy(update={"weight": weights[k]}) for k, o in row.objectives.items()})
    found, before = losses(other), losses(row)
    assert all(found[name] == before[name] for name in row.objectives)
    assert found["loss"] == pytest.approx(sum(weights[name] * before[name] for name in row.objectives), rel=1e-14)
    model = build(other)
    each = {name: gradients(model, row, name) for name in row.objectives}
    for parameter, gradient in gradients(model, row, "loss").items():
        expected = sum(weights[name] * g[parameter] for name, g in each.items() if parameter in g)
        assert (gradient - expected).norm() <= 1e-12 * gradient.norm(), parameter


@pytest.mark.parametrize("loss", ["l2", "l2_sum", "smooth_l1", "cosine"])
@pytest.mark.parametrize("target", ["pixels", "clip"])
def test_visible_and_removed_tokens_make_up_all(target: str, loss: str) -> None:
    # One head for the three: the same prediction, taken over different tokens.
    groups = {tokens: objective(target, "decoder", tokens, loss=loss) for tokens in ("visible", "masked", "all")}
    row = Row(groups)
    model = build(row)
    for name in groups:
        model.heads[name].load_state_dict(model.heads["all"].state_dict())
    found = {name: value.item() for name, value in model(IMAGES, visible_set(row), TARGETS).items()}
    assert 4 * found["visible"] + 12 * found["masked"] == pytest.approx(16 * found["all"], rel=1e-12)
    assert found["visible"] != found["masked"]


def test_joint_teachers_have_a_head_each() -> None:
    dino = objective("dino", "encoder", "visible", 0.25)
    joint = Row({"pixels": PIXELS, "mimic": objective("clip", "encoder", "visible", 0.25), "dino": dino})
    model, found = build(joint), losses(joint)
    assert model.heads["mimic"].weight.shape == (6, 16) and model.heads["dino"].weight.shape == (7, 16)
    mimics = (found["mimic"] + found["dino"]) / 2
    assert found["loss"] == pytest.approx(0.5 * found["pixels"] + 0.5 * mimics, rel=1e-14)
    assert parts(gradients(model, joint, "dino").keys()) == {"encoder", "fusion", "heads.dino"}
    assert found["mimic"] == losses(ROWS[2])["mimic"]
