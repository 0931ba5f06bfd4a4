"""Half precision: every objective is a float32 scalar near its float32 value, and gradients arrive."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from mrmae_ds.models.decoder import DecoderSpec
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.masking import choose_visible
from mrmae_ds.models.objectives import Objective
from mrmae_ds.models.pretrain import FusionSpec, PretrainModel
from mrmae_ds.models.sizes import CViTSpec, EncoderSpec, ViTSpec
from tests.support.reference import perturb, random_images, random_noise

CVIT = CViTSpec((16, 24, 32), (1, 1, 2), 4)
VIT = ViTSpec(32, 3, 4)
BOTH = pytest.mark.parametrize("spec", [CVIT, VIT], ids=["cvit", "vit"])
TAPS = [("encoder", "visible"), ("decoder", "visible"), ("decoder", "masked"), ("decoder", "all")]
# Every loss and normalization at every place: one model holds them all.
OBJECTIVES = {
    f"{target}_{tap}_{tokens}_{loss}_{normalize}": Objective(
        target=target, tap=tap, tokens=tokens, loss=loss, normalize=normalize, weight=0.01
    )
    for target, (tap, tokens), loss, normalize in product(
        ("pixels", "clip"),
        TAPS,
        ("l2", "l2_sum", "smooth_l1", "cosine"),
        ("standardize", "layer_norm", "l2", "none"),
    )
}


def build(spec: EncoderSpec) -> PretrainModel:
    torch.manual_seed(0)
    fusion = FusionSpec(stages=(1, 2) if spec is CVIT else (), blocks=(0,))
    decoder = DecoderSpec(dim=32, depth=1, num_heads=4)
    model = PretrainModel(build_encoder(spec, 64), fusion, decoder, OBJECTIVES, {"clip": 24})
    perturb(model, seed=1, scale=0.02)
    return model


def losses(model: PretrainModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Losses of one batch; ``dtype`` is that of images and teacher features."""
    images = random_images(4, 64, seed=2).bfloat16().to(dtype)
    target = torch.randn(4, 16, 24, generator=torch.Generator().manual_seed(3)).bfloat16().to(dtype)
    visible = choose_visible(random_noise(4, 16, seed=4), (4, 4), 0.25)
    return model(images, visible, {"clip": target})


def assert_near(found: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    assert found.keys() == exact.keys() == {"loss", *OBJECTIVES}
    for name, loss in found.items():
        assert loss.dtype == torch.float32 and loss.shape == (), name
        assert loss.item() == pytest.approx(exact[name].item(), rel=0.006), name
    different = sum(found[name].item() != exact[name].item() for name in found)
    assert different > 0.9 * len(found)  # it was half precision


@BOTH
def test_losses_under_autocast_are_near_those_in_float32(spec: EncoderSpec) -> None:
    model = build(spec)
    exact = losses(model, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = losses(model, torch.float32)
    assert_near(found, exact)
    found["loss"].backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


@BOTH
def test_losses_with_bfloat16_weights_are_near_those_in_float32(spec: EncoderSpec) -> None:
    """As under DeepSpeed's bf16: weights and images in bfloat16, losses in float32."""
    exact = losses(build(spec).bfloat16().float(), torch.float32)
    model = build(spec).bfloat16()
    found = losses(model, torch.bfloat16)
    assert_near(found, exact)
    found["loss"].backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_pixel_targets_are_made_in_full_precision() -> None:
    """With zero heads a loss depends on its target only, whose images must not be rounded by bf16 weights."""
    # Not standardized: the mean square of such a target is the same whatever the image.
    objective = Objective(target="pixels", tap="decoder", tokens="masked", normalize="none", weight=1.0)
    objectives = {"pixels": objective}
    decoder = DecoderSpec(dim=32, depth=1, num_heads=4)
    model = PretrainModel(build_encoder(CVIT, 64), FusionSpec(), decoder, objectives, {})
    for parameter in model.heads.parameters():
        torch.nn.init.zeros_(parameter)
    images, visible = random_images(4, 64, seed=2), choose_visible(random_noise(4, 16, seed=4), (4, 4), 0.25)
    exact = model(images, visible, {})["pixels"]
    assert torch.equal(model.bfloat16()(images, visible, {})["pixels"], exact)
    rounded = model(images.bfloat16(), visible, {})["pixels"]
    assert abs(rounded / exact - 1) > 1e-6
