"""The pre-training model: taps, fusion, gradients' reach."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mrmae_ds.errors import UserError
from mrmae_ds.models.decoder import DecoderSpec
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.masking import VisibleSet, choose_visible
from mrmae_ds.models.objectives import Objective
from mrmae_ds.models.pretrain import FusionSpec, PretrainModel, masked_pixels
from mrmae_ds.models.sizes import CViTSpec, EncoderSpec, ViTSpec
from tests.support.reference import perturb, pixel_objective, random_images, random_noise

CVIT = CViTSpec((8, 12, 16), (1, 1, 3), 4, patches=(2, 2, 1))
VIT = ViTSpec(16, 3, 4, patch=4)
DECODER = DecoderSpec(dim=12, depth=1, num_heads=2)
MIMIC = Objective(target="clip", tap="encoder", tokens="visible", normalize="layer_norm", weight=0.5)
# Table 3, row 5: the mimic loss at the decoder's masked tokens, beside the pixels.
CONFLICT = Objective(target="clip", tap="decoder", tokens="masked", normalize="layer_norm", weight=0.5)
NO_FUSION = FusionSpec()


def build(objectives: dict[str, Objective], fusion: FusionSpec = NO_FUSION, spec: EncoderSpec = CVIT) -> PretrainModel:
    torch.manual_seed(0)
    model = PretrainModel(build_encoder(spec, 16), fusion, DECODER, objectives, {"clip": 6, "dino": 7})
    perturb(model, seed=1)
    return model


@pytest.fixture
def visible() -> VisibleSet:
    return choose_visible(random_noise(2, 16, seed=2), (4, 4), 0.25)


@pytest.fixture
def images() -> Tensor:
    return random_images(2, 16, seed=3)


@pytest.fixture
def targets() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {name: torch.randn(2, 16, width, generator=generator) for name, width in {"clip": 6, "dino": 7}.items()}


def with_gradient(model: PretrainModel) -> set[str]:
    """First part of the names of parameters that a loss reached."""
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    return {".".join(name.split(".")[: 2 if name.startswith("heads") else 1]) for name in reached}


@pytest.mark.parametrize("spec", [CVIT, VIT], ids=["cvit", "vit"])
def test_losses_are_of_their_targets(
    spec: EncoderSpec, images: Tensor, visible: VisibleSet, targets: dict[str, Tensor]
) -> None:
    dino = Objective(target="dino", tap="encoder", tokens="visible", normalize="none", weight=0.25)
    objectives = {"pixels": pixel_objective("none", 0.75), "clip": MIMIC, "dino": dino, "late": CONFLICT}
    model = build(objectives, spec=spec)
    predictions = {name: p.double() for name, p in model.predict(images, visible).items()}
    assert {name: p.shape[1:] for name, p in predictions.items()} == {
        "pixels": (16, 48),
        "clip": (4, 6),
        "dino": (4, 7),
        "late": (16, 6),
    }
    truth = targets["clip"].double()
    clip = (truth - truth.mean(-1, keepdim=True)) / (truth.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    squares: dict[str, list[Tensor]] = {name: [] for name in objectives}
    for row in range(2):
        kept = visible.ids_keep[row].tolist()
        for place, token in enumerate(kept):
            squares["clip"].append((predictions["clip"][row, place] - clip[row, token]).square().mean())
            gap = predictions["dino"][row, place] - targets["dino"][row, token]
            squares["dino"].append(gap.square().mean())
        for token in set(range(16)) - set(kept):
            squares["late"].append((predictions["late"][row, token] - clip[row, token]).square().mean())
            top, left = token // 4 * 4, token % 4 * 4
            pixels = images[row, :, top : top + 4, left : left + 4].permute(1, 2, 0).flatten()
            squares["pixels"].append((predictions["pixels"][row, token] - pixels).square().mean())
    losses = model(images, visible, targets)
    assert losses.keys() == {"loss", *objectives}
    expected = {name: torch.stack(values).mean().item() for name, values in squares.items()}
    assert {name: losses[name].item() for name in objectives} == pytest.approx(expected, rel=1e-5)
    total = 0.75 * expected["pixels"] + 0.5 * expected["clip"] + 0.25 * expected["dino"] + 0.5 * expected["late"]
    assert losses["loss"].item() == pytest.approx(total, rel=1e-5)


def test_the_class_token_predicts_nothing(images: Tensor, visible: VisibleSet) -> None:
    model = build({"mimic": MIMIC}, spec=VIT)
    latent = model.latent(images, visible)
    assert latent.shape == (2, 1 + 4, 16)
    expected = latent[:, 1:] @ model.heads["mimic"].weight.T + model.heads["mimic"].bias
    torch.testing.assert_close(model.predict(images, visible)["mimic"], expected)


def test_mimic_at_the_encoder_gives_the_decoder_no_gradient(
    images: Tensor, visible: VisibleSet, targets: dict[str, Tensor]
) -> None:
    model = build({"pixels": pixel_objective(), "mimic": MIMIC}, FusionSpec(stages=(1, 2)))
    model(images, visible, targets)["mimic"].backward()
    assert with_gradient(model) == {"encoder", "fusion", "heads.mimic"}


def test_pixels_at_the_decoder_reach_the_encoder(
    images: Tensor, visible: VisibleSet, targets: dict[str, Tensor]
) -> None:
    model = build({"pixels": pixel_objective(), "mimic": MIMIC}, FusionSpec(stages=(1, 2)))
    model(images, visible, targets)["pixels"].backward()
    assert with_gradient(model) == {"encoder", "fusion", "decoder", "heads.pixels"}


def test_mimic_at_the_decoder_reaches_decoder_and_encoder(
    images: Tensor, visible: VisibleSet, targets: dict[str, Tensor]
) -> None:
    model = build({"pixels": pixel_objective(), "mimic": CONFLICT})
    model(images, visible, targets)["mimic"].backward()
    assert with_gradient(model) == {"encoder", "fusion", "decoder", "heads.mimic"}


def test_every_trainable_parameter_gets_a_gradient(
    images: Tensor, visible: VisibleSet, targets: dict[str, Tensor]
) -> None:
    model = build({"pixels": pixel_objective(), "mimic": MIMIC}, FusionSpec(stages=(1, 2)))
    model(images, visible, targets)["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_no_decoder_where_nothing_taps_it(images: Tensor, visible: VisibleSet, targets: dict[str, Tensor]) -> None:
    model = build({"mimic": MIMIC})
    assert model.decoder is None
    assert not any(name.startswith("decoder") for name in model.state_dict())
    assert model(images, visible, targets).keys() == {"loss", "mimic"}


def norm(x: Tensor, model: PretrainModel) -> Tensor:
    """The fusion's norm in float64."""
    x = x.double()
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    return x * model.fusion.norm.weight.double() + model.fusion.norm.bias.double()


@pytest.mark.parametrize("spec", [CVIT, VIT], ids=["cvit", "vit"])
def test_listed_blocks_are_added_before_the_norm(spec: EncoderSpec, images: Tensor, visible: VisibleSet) -> None:
    model = build({"mimic": MIMIC}, FusionSpec(blocks=(0, 1)), spec)
    outputs: list[Tensor] = []
    for block in model.encoder.transformer_blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    latent = model.latent(images, visible)
    torch.testing.assert_close(latent.double(), norm(sum(outputs), model), atol=1e-5, rtol=1e-4)


def test_listed_stages_are_added_through_their_convolution(images: Tensor, visible: VisibleSet) -> None:
    model = build({"mimic": MIMIC}, FusionSpec(stages=(2,)))
    features = model.encoder(images, visible)
    weight, bias = model.fusion.stage_convs["2"].weight, model.fusion.stage_convs["2"].bias
    assert list(model.fusion.stage_convs) == ["2"]
    assert weight.shape == (16, 12, 1, 1)  # stage 2 of these patches has stage 3's grid
    added = features["stages"][1][:, :, 0, 0] @ weight[:, :, 0, 0].T + bias
    expected = norm(features["tokens"] + added, model)
    torch.testing.assert_close(model.latent(images, visible).double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("fusion", "spec", "message"),
    [
        (FusionSpec(stages=(1, 3)), CVIT, r"fusion.stages: \[3\].*stages are 1 to 2"),
        (FusionSpec(stages=(0,)), CVIT, r"fusion.stages: \[0\]"),
        (FusionSpec(stages=(1,)), VIT, r"fusion.stages: \[1\].*none"),
        (FusionSpec(blocks=(0, 2)), CVIT, r"fusion.blocks: \[2\].*are 0 to 1"),
        (FusionSpec(blocks=(-1,)), VIT, r"fusion.blocks: \[-1\]"),
    ],
)
def test_layers_that_do_not_exist_are_named(fusion: FusionSpec, spec: EncoderSpec, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build({"mimic": MIMIC}, fusion, spec)


def test_masked_pixels_are_filled(images: Tensor, visible: VisibleSet) -> None:
    shown = masked_pixels(images, visible, 4, fill=0.5)
    for row in range(2):
        for token in range(16):
            cells = (
                row,
                slice(None),
                slice(token // 4 * 4, token // 4 * 4 + 4),
                slice(token % 4 * 4, token % 4 * 4 + 4),
            )
            if token in visible.ids_keep[row].tolist():
                assert torch.equal(shown[cells], images[cells])
            else:
                assert (shown[cells] == 0.5).all()
