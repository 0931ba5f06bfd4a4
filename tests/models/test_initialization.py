"""Initialization of every parameter by the rules of the methods' public code; no library default remains."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mrmae_ds.models.decoder import DecoderSpec
from mrmae_ds.models.encoders import build_encoder, init_classifier
from mrmae_ds.models.objectives import Objective
from mrmae_ds.models.pretrain import FusionSpec, PretrainModel
from mrmae_ds.models.sizes import BeitSpec, CViTSpec, EncoderSpec, ViTSpec
from tests.support.reference import pixel_objective

CVIT = CViTSpec((16, 24, 32), (2, 1, 3), 4)
VIT = ViTSpec(160, 2, 4)
BEIT = BeitSpec(160, 2, 4)
MIMIC = Objective(target="clip", tap="encoder", tokens="visible", normalize="layer_norm", weight=0.5)
BOTH = pytest.mark.parametrize("spec", [CVIT, VIT], ids=["cvit", "vit"])
Check = Callable[[Tensor], None]


def uniform(bound: float) -> Check:
    """Uniform in [-bound, bound]: the ends, and the spread within five standard errors."""

    def check(x: Tensor) -> None:
        assert x.abs().max() <= bound * (1 + 1e-6)
        assert x.abs().max() >= bound * (1 - 12 / x.numel())
        spread = x.double().square().mean().sqrt().item() * math.sqrt(3) / bound
        assert abs(spread - 1) < 5 * math.sqrt(0.2 / x.numel())

    return check


def normal(std: float) -> Check:
    """Normal with zero mean: the mean and the spread within five standard errors, and a tail that no uniform has."""

    def check(x: Tensor) -> None:
        x = x.double() / std
        assert abs(x.mean()) < 5 / math.sqrt(x.numel())
        assert abs(x.square().mean().sqrt() - 1) < 5 / math.sqrt(2 * x.numel())
        assert x.abs().max() > 2

    return check


def cut_normal(std: float, scale: float = 1.0) -> Check:
    """Normal with zero mean, cut at one deviation, times scale: the ends, the spread within five standard errors."""

    def check(x: Tensor) -> None:
        x = x.double() / (std * scale)
        assert x.abs().max() <= 1 + 1e-6
        assert x.abs().max() >= 1 - 12 / x.numel()
        density = math.exp(-0.5) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(0.5))
        assert abs(x.square().mean() - (1 - 2 * density)) < 5 * math.sqrt(0.08 / x.numel())

    return check


def constant(value: float) -> Check:
    def check(x: Tensor) -> None:
        assert (x == value).all()

    return check


def xavier(weight: Tensor) -> Check:
    """Of the matrix [out, everything else]."""
    return uniform(math.sqrt(6 / (weight.shape[0] + weight[0].numel())))


def frameworks_default(weight: Tensor) -> Check:
    """torch's for a convolution's weight and bias."""
    return uniform(1 / math.sqrt(weight[0].numel()))


def rules(model: nn.Module, linear: Callable[[Tensor], Check], special: dict[str, Check]) -> dict[str, Check]:
    """The check of each parameter by name: ``special`` first, then its module's kind."""
    found: dict[str, Check] = {}
    for prefix, module in model.named_modules():
        path = f"{prefix}." if prefix else ""
        if isinstance(module, nn.LayerNorm):
            found |= {f"{path}weight": constant(1), f"{path}bias": constant(0)}
        elif isinstance(module, nn.Linear):
            found[f"{path}weight"] = linear(module.weight)
            if module.bias is not None:
                found[f"{path}bias"] = constant(0)
        elif isinstance(module, nn.Conv2d):
            default = frameworks_default(module.weight)
            found |= {f"{path}weight": default, f"{path}bias": default}
    return found | special


def assert_follows(model: nn.Module, checks: dict[str, Check]) -> None:
    parameters = dict(model.named_parameters())
    assert checks.keys() == parameters.keys()
    for name, parameter in parameters.items():
        try:
            checks[name](parameter.detach())
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def no_check(x: Tensor) -> None:
    """Fixed sin-cos positions; their values are compared elsewhere."""


@BOTH
def test_pretraining_model_follows_the_initialization_rules(spec: EncoderSpec) -> None:
    torch.manual_seed(0)
    objectives = {"pixels": pixel_objective(), "mimic": MIMIC}
    fusion = FusionSpec(stages=(1, 2) if spec is CVIT else ())
    encoder = build_encoder(spec, 32)
    model = PretrainModel(encoder, fusion, DecoderSpec(dim=256, depth=2), objectives, {"clip": 40})
    special = {
        "decoder.mask_token": normal(0.02),
        "encoder.pos_embed": no_check,
        "decoder.pos_embed": no_check,
    }
    patches = "encoder.patch_embed3.proj" if spec is CVIT else "encoder.patch_embed.proj"
    special[f"{patches}.weight"] = xavier(model.get_submodule(patches).weight)
    if spec is VIT:
        special["encoder.cls_token"] = normal(0.02)
    assert_follows(model, rules(model, xavier, special))


def test_masked_feature_prediction_follows_its_authors_initialization() -> None:
    """A ViT with learned positions is MaskFeat's (SlowFast's ``MViT._init_weights``, ``MaskMViT``)."""
    torch.manual_seed(0)
    encoder = build_encoder(replace(VIT, positions="learned"), 32, mask_token=True)
    hog = Objective(target="hog", tap="encoder", tokens="masked", normalize="none", weight=1.0)
    model = PretrainModel(encoder, FusionSpec(), DecoderSpec(), {"hog": hog}, {})
    special = {f"encoder.{name}": normal(0.02) for name in ("pos_embed", "cls_token", "mask_token")}
    assert_follows(model, rules(model, lambda weight: normal(0.02), special))


def test_beit_follows_its_authors_initialization() -> None:
    """As ``VisionTransformerForMaskedImageModeling`` and ``VisionTransformerForCyclicalTraining``."""
    torch.manual_seed(0)
    encoder = build_encoder(BEIT, 32, mask_token=True)
    objective = Objective(target="clip", tap="encoder", tokens="masked", normalize="none", weight=1.0)
    model = PretrainModel(encoder, FusionSpec(), DecoderSpec(), {"mimic": objective}, {"clip": 40})
    special = {f"encoder.{name}": cut_normal(0.02) for name in ("cls_token", "mask_token")}
    special |= {"encoder.patch_embed.proj.weight": cut_normal(0.02), "encoder.patch_embed.proj.bias": constant(0)}
    special["encoder.rel_pos_bias.relative_position_bias_table"] = constant(0)
    for i in range(BEIT.depth):
        block = f"encoder.blocks.{i}"
        for name in ("attn.proj", "mlp.fc2"):
            special[f"{block}.{name}.weight"] = cut_normal(0.02, scale=(2 * (i + 1)) ** -0.5)
        special |= {f"{block}.attn.{name}_bias": constant(0) for name in "qv"}
        special |= {f"{block}.gamma_{j}": constant(BEIT.layer_scale) for j in (1, 2)}
    assert_follows(model, rules(model, lambda weight: cut_normal(0.02), special))


@BOTH
def test_classifier_follows_the_initialization_rules(spec: EncoderSpec) -> None:
    torch.manual_seed(0)
    model = build_encoder(spec, 32, num_classes=50)
    init_classifier(model)
    special = {"pos_embed": normal(0.02), "head.weight": normal(2e-5)}
    if spec is VIT:
        special["cls_token"] = normal(0.02)
    assert_follows(model, rules(model, lambda weight: normal(0.02), special))


@BOTH
def test_drawn_from_torchs_generator_alone(spec: EncoderSpec) -> None:
    """Equal seeds, equal weights: all ranks of a job start from the same model."""
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        encoder = build_encoder(spec, 32)
        models.append(PretrainModel(encoder, FusionSpec(), DecoderSpec(), {"mimic": MIMIC}, {"clip": 4}))
    first, again, other = (torch.cat([p.flatten() for p in model.parameters()]) for model in models)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
