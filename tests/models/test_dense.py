"""Whole models in float64 against the dense formulas of dense.py: latents, losses, logits, every gradient."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mrmae_ds.models.cvit import CViT
from mrmae_ds.models.decoder import DecoderSpec
from mrmae_ds.models.masking import choose_visible
from mrmae_ds.models.objectives import Objective
from mrmae_ds.models.pretrain import FusionSpec, PretrainModel
from mrmae_ds.models.sizes import CViTSpec, ViTSpec
from mrmae_ds.models.vit import MaskedViT
from tests.support import dense
from tests.support.reference import authors_name, perturb, pixel_objective, random_noise

TEACHER_WIDTH = 10
MIMIC = Objective(target="clip", tap="encoder", tokens="visible", normalize="layer_norm", weight=0.3)


@dataclass(frozen=True)
class Case:
    """A model, an input (a side or height and width, pixels) and a visible share."""

    spec: CViTSpec | ViTSpec
    size: int | tuple[int, int]
    keep_ratio: float
    fusion: FusionSpec
    decoder: DecoderSpec
    norm_pix: bool

    @property
    def grid(self) -> tuple[int, int]:
        height, width = self.size if isinstance(self.size, tuple) else (self.size, self.size)
        return height // self.spec.stride, width // self.spec.stride


def fused(*stages: int, blocks: tuple[int, ...] = ()) -> FusionSpec:
    return FusionSpec(stages=stages, blocks=blocks)


def decoder(dim: int, depth: int, heads: int, ratio: float = 4) -> DecoderSpec:
    return DecoderSpec(dim=dim, depth=depth, num_heads=heads, mlp_ratio=ratio)


SMALL = CViTSpec((8, 12, 24), (2, 2, 3), 4)
WIDE = CViTSpec((8, 12, 24), (1, 2, 2), 3, (8, 8, 4))
HUGE = CViTSpec((12, 16, 24), (2, 1, 3), 2, patches=(7, 1, 2))
WIDE_HUGE = CViTSpec((8, 8, 24), (1, 1, 2), 3, (8, 8, 4), (7, 1, 2))
TINY = CViTSpec((8, 12, 16), (1, 1, 2), 4, (2, 3, 1), (2, 2, 1))
CASES = {
    "cvit 4-2-2 at 64": Case(SMALL, 64, 0.25, fused(1, 2), decoder(16, 2, 4), True),
    "cvit 4-2-2 at 64, every block": Case(SMALL, 64, 0.4, fused(2, blocks=(1, 0)), decoder(12, 1, 3), False),
    "cvit 4-2-2 at 128, ratios 8-8-4": Case(WIDE, 128, 0.25, fused(1, 2), decoder(16, 1, 2, 2), True),
    "cvit 4-2-2 at 128, half": Case(SMALL, 128, 0.5, fused(), decoder(16, 1, 4), False),
    "cvit 4-2-2 at 224": Case(CViTSpec((8, 8, 12), (1, 1, 1), 2), 224, 0.25, fused(1, 2), decoder(8, 1, 2), True),
    "cvit 4-2-2 at 64x96": Case(SMALL, (64, 96), 0.3, fused(1, blocks=(1,)), decoder(16, 1, 4), True),
    "cvit 7-1-2 at 56": Case(HUGE, 56, 0.25, fused(1, 2), decoder(16, 2, 4), True),
    "cvit 7-1-2 at 84": Case(HUGE, 84, 0.75, fused(1, 2, blocks=(0,)), decoder(16, 1, 2), False),
    "cvit 7-1-2 at 112, ratios 8-8-4": Case(WIDE_HUGE, 112, 0.25, fused(1, 2), decoder(12, 1, 3), True),
    "cvit 7-1-2 at 112x56": Case(HUGE, (112, 56), 0.5, fused(2), decoder(16, 1, 4), True),
    "cvit 2-2-1 at 16": Case(TINY, 16, 0.25, fused(1, 2), decoder(16, 1, 4), True),
    "cvit 2-2-1 at 32": Case(TINY, 32, 0.5, fused(1), decoder(16, 1, 4), False),
    "vit/16 at 64": Case(ViTSpec(24, 4, 3), 64, 0.25, fused(), decoder(16, 2, 4), True),
    "vit/16 at 96, two blocks": Case(ViTSpec(16, 4, 2), 96, 0.5, fused(blocks=(2, 0)), decoder(12, 1, 3), False),
    "vit/14 at 56": Case(ViTSpec(16, 2, 4, 8, 14), 56, 0.3, fused(blocks=(0,)), decoder(16, 1, 2, 2), True),
    "vit/4 at 32": Case(ViTSpec(16, 2, 4, patch=4), 32, 0.25, fused(), decoder(16, 1, 2), True),
}


def build(case: Case) -> PretrainModel:
    torch.manual_seed(0)
    bare = {"num_classes": 0, "global_pool": ""}
    encoder = CViT(case.spec, case.size, **bare) if isinstance(case.spec, CViTSpec) else MaskedViT(case.spec, case.size)
    pixels = pixel_objective("standardize" if case.norm_pix else "none", weight=0.7)
    objectives = {"pixels": pixels, "mimic": MIMIC}
    model = PretrainModel(encoder, case.fusion, case.decoder, objectives, {"clip": TEACHER_WIDTH})
    perturb(model, seed=1)
    return model.double()


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_equal(found: Tensor | None, expected: Tensor | None, name: str) -> None:
    assert found is not None and expected is not None, name
    assert found.dtype == expected.dtype == torch.float64, name
    assert expected.norm() > 0, name
    assert (found - expected).norm() <= 1e-9 * expected.norm(), name


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_model_is_the_dense_formulas(case: Case) -> None:
    model, grid = build(case), case.grid
    height, width = (side * case.spec.stride for side in grid)
    images = normal(2, 3, height, width, seed=2)
    target = normal(2, grid[0] * grid[1], TEACHER_WIDTH, seed=3)
    noise = random_noise(2, grid[0] * grid[1], seed=4)

    ours = images.clone().requires_grad_()
    visible = choose_visible(noise, grid, case.keep_ratio)
    latent = model.latent(ours, visible)
    losses = model(ours, visible, {"clip": target})
    losses["loss"].backward()

    theirs = images.clone().requires_grad_()
    kept = dense.keep_smallest(noise, case.keep_ratio)
    state = {
        authors_name(name): p.detach().clone().requires_grad_(p.requires_grad) for name, p in model.named_parameters()
    }
    convolutional = isinstance(case.spec, CViTSpec)
    prefix = 0 if convolutional else 1
    for name, dim in (("pos_embed", case.spec.embed_dim), ("decoder_pos_embed", case.decoder.dim)):
        torch.testing.assert_close(state[name], dense.sincos(dim, grid, prefix), atol=1e-6, rtol=0)
    encode = dense.cvit_latent if convolutional else dense.vit_latent
    exact = encode(theirs, kept, grid, state, case.spec.num_heads, case.fusion.blocks)
    decoded = dense.decode(exact, kept, state, case.decoder.num_heads, prefix)
    pixels = dense.pixel_loss(theirs, decoded, kept, grid, state, case.norm_pix)
    mimic = dense.mimic_loss(exact[:, prefix:], target, kept, state, "heads.mimic")
    total = 0.7 * pixels + 0.3 * mimic
    total.backward()

    assert visible.ids_keep.tolist() == kept
    for name, (found, expected) in {
        "latent": (latent, exact),
        "pixels": (losses["pixels"], pixels),
        "mimic": (losses["mimic"], mimic),
        "loss": (losses["loss"], total),
        "gradient of the input": (ours.grad, theirs.grad),
    }.items():
        assert_equal(found, expected, name)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert_equal(parameter.grad, state[authors_name(name)].grad, name)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.keep_ratio == 0.25])
def test_the_classifier_is_the_dense_formulas(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    build = CViT if isinstance(case.spec, CViTSpec) else MaskedViT
    model = build(case.spec, case.size, num_classes=5)
    perturb(model, seed=1)
    model.double()
    height, width = (side * case.spec.stride for side in case.grid)
    ours = normal(3, 3, height, width, seed=2).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    state = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}

    logits = model(ours)
    expected = dense.classify(theirs, case.grid, state, case.spec.num_heads)
    assert_equal(logits, expected, "logits")
    cotangent = normal(3, 5, seed=3)
    (logits * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    assert_equal(ours.grad, theirs.grad, "gradient of the input")
    for name, parameter in model.named_parameters():
        assert_equal(parameter.grad, state[name].grad, name)
