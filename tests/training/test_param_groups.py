from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn

from mrmae_ds.models.decoder import DecoderSpec
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.objectives import Objective
from mrmae_ds.models.pretrain import FusionSpec, PretrainModel
from mrmae_ds.models.sizes import ARCHITECTURES, CViTSpec, ViTSpec
from mrmae_ds.models.vit import MaskedViT
from mrmae_ds.training.param_groups import finetune_groups, pretrain_groups

EXPECTED = json.loads((Path(__file__).parent / "parameter_groups.json").read_text())
BASE = ARCHITECTURES["cvit_base"]
# Base with narrow layers: the same names, dimensions and depths.
assert isinstance(BASE, CViTSpec)
NARROW = replace(BASE, dims=(4, 8, 24))
# (lr scale, weight decay) of each parameter, in fine-tuning.
EXPECTED_SETTINGS = {
    name: (pytest.approx(EXPECTED["scales"][layer], rel=1e-12), decay)
    for name, (layer, decay) in EXPECTED["finetune"].items()
}
PIXELS = Objective(target="pixels", tap="decoder", tokens="masked", normalize="standardize", weight=1)


def _settings(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """(lr scale, weight decay) of each parameter by name; each is in one group only."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    listed = [(names[id(p)], (group["lr_scale"], group["weight_decay"])) for group in groups for p in group["params"]]
    assert len({name for name, _ in listed}) == len(listed)
    return dict(listed)


def _pretrain_model(spec: CViTSpec | ViTSpec, size: int, fusion: FusionSpec) -> PretrainModel:
    return PretrainModel(build_encoder(spec, size), fusion, DecoderSpec(dim=16, num_heads=4), {"pixels": PIXELS}, {})


def _our_name(theirs: str) -> str:
    """Name in this project's pre-training model of a parameter of the authors' model."""
    renamed = {
        "mask_token": "decoder.mask_token",
        "stage1_output_decode": "fusion.stage_convs.1",
        "stage2_output_decode": "fusion.stage_convs.2",
        "norm": "fusion.norm",
        "decoder_embed": "decoder.embed",
        "decoder_blocks": "decoder.blocks",
        "decoder_norm": "decoder.norm",
        "decoder_pred": "heads.pixels",
    }
    head, dot, rest = theirs.partition(".")
    return f"{renamed.get(head, f'encoder.{head}')}{dot}{rest}"


def test_fine_tuning_groups_are_those_of_the_authors_code() -> None:
    model = build_encoder(NARROW, 224, num_classes=10)
    groups = finetune_groups(model, EXPECTED["weight_decay"], EXPECTED["layer_decay"])
    assert _settings(model, groups) == EXPECTED_SETTINGS
    assert len(groups) == EXPECTED["num_groups"]


def test_timms_layer_decay_gives_the_authors_groups_too() -> None:
    model = timm.create_model("cvit_base", num_classes=10, dims=NARROW.dims)
    groups = param_groups_layer_decay(
        model, EXPECTED["weight_decay"], model.no_weight_decay(), layer_decay=EXPECTED["layer_decay"]
    )
    assert _settings(model, groups) == EXPECTED_SETTINGS
    assert len(groups) == EXPECTED["num_groups"]


def test_coarse_groups_are_stages() -> None:
    model = timm.create_model("cvit_tiny", num_classes=2)
    layers = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    parts = {(name.split(".")[0], layer) for name, layer in layers.items()}
    stages = (
        {"patch_embed1", "blocks1"},
        {"patch_embed2", "blocks2"},
        {"patch_embed3", "patch_embed4", "pos_embed", "blocks3"},
        {"fc_norm", "head"},
    )
    assert parts == {(part, layer) for layer, stage in enumerate(stages) for part in stage}


def test_pre_training_groups_are_those_of_the_authors_code() -> None:
    model = _pretrain_model(NARROW, 224, FusionSpec(stages=(1, 2)))
    groups = pretrain_groups(model, 0.05)
    assert _settings(model, groups) == {_our_name(name): (1.0, decay) for name, decay in EXPECTED["pretrain"].items()}
    assert sorted(len(group["params"]) for group in groups) == [105, 206]


def test_frozen_parameters_are_in_no_group() -> None:
    model = _pretrain_model(NARROW, 224, FusionSpec())
    grouped = _settings(model, pretrain_groups(model, 0.05))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"encoder.pos_embed", "decoder.pos_embed"}
    assert grouped.keys() == dict(model.named_parameters()).keys() - frozen


@pytest.mark.parametrize(("pool", "norm"), [("avg", "fc_norm"), ("token", "norm")])
def test_layer_decay_of_a_plain_vit_follows_its_depth(pool: Literal["avg", "token"], norm: str) -> None:
    model = MaskedViT(ViTSpec(16, 3, 2, patch=8), 32, num_classes=5, pool=pool)
    settings = _settings(model, finetune_groups(model, 0.1, 0.5))
    layers = {name: {0.0625: 0, 0.125: 1, 0.25: 2, 0.5: 3, 1.0: 4}[scale] for name, (scale, _) in settings.items()}
    assert {name for name, layer in layers.items() if layer == 0} == {
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
    }
    for i in range(3):
        assert {layer for name, layer in layers.items() if name.startswith(f"blocks.{i}.")} == {i + 1}
    assert {name.split(".")[0] for name, layer in layers.items() if layer == 4} == {norm, "head"}
    assert settings["cls_token"][1] == settings["pos_embed"][1] == settings["head.bias"][1] == 0.0
    assert settings["head.weight"][1] == settings["patch_embed.proj.weight"][1] == 0.1


@pytest.mark.parametrize("build", [lambda m: pretrain_groups(m, 0.05), lambda m: finetune_groups(m, 0.05, 0.8)])
def test_a_partitioned_model_has_the_same_groups(build: Callable[[nn.Module], list[dict[str, Any]]]) -> None:
    """Under ZeRO-3 every parameter is one-dimensional and empty, and its shape is in ``ds_shape``."""
    model = build_encoder(ViTSpec(16, 3, 2, patch=8), 32, num_classes=5)
    expected = _settings(model, build(model))
    for parameter in model.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    assert {parameter.ndim for parameter in model.parameters()} == {1}
    assert _settings(model, build(model)) == expected


def test_a_bias_is_not_decayed_whatever_its_shape() -> None:
    layer = nn.Module()
    layer.weight, layer.bias = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(2, 3))
    model = nn.ModuleDict({"layer": layer})
    assert _settings(model, pretrain_groups(model, 0.05)) == {"layer.weight": (1.0, 0.05), "layer.bias": (1.0, 0.0)}


def test_class_and_mask_tokens_are_decayed_in_pre_training() -> None:
    model = _pretrain_model(ViTSpec(16, 2, 2, patch=8), 32, FusionSpec())
    settings = _settings(model, pretrain_groups(model, 0.05))
    assert settings["encoder.cls_token"] == settings["decoder.mask_token"] == (1.0, 0.05)
    assert settings["encoder.patch_embed.proj.bias"] == settings["fusion.norm.weight"] == (1.0, 0.0)


@pytest.mark.parametrize("build", [lambda m: pretrain_groups(m, 0.05), lambda m: finetune_groups(m, 0.05, 1.0)])
def test_without_layer_decay_there_are_two_groups(build: Callable[[nn.Module], list[dict[str, Any]]]) -> None:
    model = build_encoder(ViTSpec(16, 3, 2, patch=8), 32, num_classes=5)
    groups = build(model)
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.05]
    assert [group["lr_scale"] for group in groups] == [1.0, 1.0]


def test_learned_positions_and_the_class_token_are_decayed_in_both_stages() -> None:
    """As MaskFeat's configurations have it (``MVIT.ZERO_DECAY_POS_CLS: False``)."""
    spec = ViTSpec(16, 2, 2, patch=8, positions="learned")
    model = _pretrain_model(spec, 32, FusionSpec())
    settings = _settings(model, pretrain_groups(model, 0.05))
    assert settings["encoder.pos_embed"] == settings["encoder.cls_token"] == (1.0, 0.05)
    classifier = build_encoder(spec, 32, num_classes=5)
    settings = _settings(classifier, finetune_groups(classifier, 0.05, 0.5))
    assert settings["pos_embed"] == settings["cls_token"] == (0.125, 0.05)
