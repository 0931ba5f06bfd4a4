from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.utils import see_memory_usage
from deepspeed.utils.z3_leaf_module import get_z3_leaf_modules
from torch import nn

from mrmae_ds.config.engine import EngineConfig
from mrmae_ds.config.zero import ZeroSettings
from mrmae_ds.errors import UserError
from mrmae_ds.models.activation_checkpointing import CheckpointPlan
from mrmae_ds.models.decoder import DecoderSpec
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.objectives import Objective
from mrmae_ds.models.pretrain import FusionSpec, PretrainModel, set_checkpointing
from mrmae_ds.models.sizes import CViTSpec, ViTSpec
from mrmae_ds.training.engine import build
from mrmae_ds.training.engine.build import (
    build_engine,
    check_leaf_modules,
    compile_blocks,
    mark_leaf_modules,
    set_lr,
)
from mrmae_ds.training.param_groups import adamw, pretrain_groups

SPEC = ViTSpec(16, 2, 2, patch=8)
PLAN = CheckpointPlan(conv_stages=3, transformer=2, decoder=1)
ZERO = ZeroSettings(3, autocast=False, bf16=False)
CONFIG = EngineConfig(Path("engine.json"), {}, 4, None, ZERO, torch.float32, PLAN)


def _model(tap: str) -> PretrainModel:
    tokens = "masked" if tap == "decoder" else "visible"
    objective = Objective(target="pixels", tap=tap, tokens=tokens, normalize="none", weight=1)
    decoder = DecoderSpec(dim=8, depth=1, num_heads=2)
    return PretrainModel(build_encoder(SPEC, 32), FusionSpec(), decoder, {"pixels": objective}, {})


def test_rejects_groups_that_are_not_the_trainable_parameters() -> None:
    model = nn.Linear(2, 2)
    own = [model.weight, model.bias]
    for params in ([model.weight], [*own, model.bias], [*own, nn.Parameter(torch.zeros(1))], []):
        groups = [{"params": params, "lr_scale": 1.0}]
        with pytest.raises(ValueError, match=rf"{len(params)} parameters in groups, 2 trainable"):
            build_engine(model, groups, adamw((0.9, 0.95)), CONFIG, 1, torch.device("cpu"))


def test_rejects_frozen_parameters_in_groups() -> None:
    model = _model("decoder")
    groups = pretrain_groups(model, 0.05)
    groups[0]["params"].append(model.encoder.pos_embed)
    with pytest.raises(ValueError, match="trainable ones"):
        build_engine(model, groups, adamw((0.9, 0.95)), CONFIG, 1, torch.device("cpu"))


def test_sets_checkpointing_of_encoder_and_decoder() -> None:
    model = _model("decoder")
    set_checkpointing(model, CONFIG.checkpointing)
    assert model.encoder.checkpointing == PLAN
    assert model.decoder is not None and model.decoder.checkpoint_every == 1
    without = _model("encoder")
    set_checkpointing(without, CONFIG.checkpointing)
    assert without.encoder.checkpointing == PLAN and without.decoder is None
    classifier = build_encoder(SPEC, 32, num_classes=3)
    set_checkpointing(classifier, CONFIG.checkpointing)
    assert classifier.checkpointing == PLAN


def _leaves(*classes: str) -> EngineConfig:
    return replace(CONFIG, leaf_module_classes=classes)


def test_names_leaf_modules_that_do_not_exist() -> None:
    model = _model("decoder")
    # A plain ViT has no ConvBlock, but the engine config of its size names it.
    for classes in ((), ("Block", "ConvBlock"), ("timm.models.vision_transformer.Block",), ("Decoder",)):
        check_leaf_modules(model, _leaves(*classes))
    with pytest.raises(UserError, match=r"engine\.json: .*classes: the model has no Blok; its blocks are Block, Conv"):
        check_leaf_modules(model, _leaves("Blok", "ConvBlock"))
    with pytest.raises(UserError, match="Blok"):
        build_engine(model, pretrain_groups(model, 0.05), adamw((0.9, 0.95)), _leaves("Blok"), 1, torch.device("cpu"))


def test_a_class_derived_from_a_leaf_class_is_a_leaf() -> None:
    objective = Objective(target="pixels", tap="decoder", tokens="masked", normalize="none", weight=1)
    decoder = DecoderSpec(kind="prompting", dim=8, depth=2, num_heads=2)
    model = PretrainModel(build_encoder(SPEC, 32), FusionSpec(), decoder, {"pixels": objective}, {})
    mark_leaf_modules(model, replace(CONFIG, zero=replace(ZERO, leaves=("Block",))))
    assert get_z3_leaf_modules(model) == [*model.encoder.transformer_blocks, *model.decoder.blocks]


def test_compiles_blocks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []

    def compile(forward: Any, dynamic: bool, fullgraph: bool) -> Any:
        assert dynamic is False and fullgraph is True
        compiled.append(forward.__self__)
        return forward

    monkeypatch.setattr(torch, "compile", compile)
    spec = CViTSpec((8, 12, 16), (1, 1, 2), 4, patches=(2, 2, 1))
    objective = Objective(target="pixels", tap="decoder", tokens="masked", normalize="none", weight=1)
    decoder = DecoderSpec(dim=8, depth=1, num_heads=2)
    model = PretrainModel(build_encoder(spec, 32), FusionSpec(), decoder, {"pixels": objective}, {})
    compile_blocks(model)
    encoder = model.encoder
    assert model.decoder is not None
    expected = [encoder.blocks1[0], encoder.blocks2[0], *encoder.blocks3, model.decoder.blocks[0]]
    assert {id(block) for block in compiled} == {id(block) for block in expected} and len(compiled) == 5


@pytest.mark.parametrize(("device", "fused"), [("cuda:0", True), ("cpu", False)])
def test_a_gpu_gets_the_fused_adamw(
    device: str, fused: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[torch.optim.Optimizer] = []

    def initialize(optimizer: torch.optim.Optimizer, **_: Any) -> tuple[None]:
        given.append(optimizer)
        see_memory_usage("begin bf16_optimizer", force=True)
        return (None,)

    monkeypatch.setattr(build.deepspeed, "initialize", initialize)
    for name in ("apply_kernel_settings", "apply_patches", "watch_gradients", "mark_reduction"):
        monkeypatch.setattr(build, name, lambda *_: None)
    model = _model("decoder")
    build_engine(model, pretrain_groups(model, 0.05), adamw((0.9, 0.95)), CONFIG, 1, torch.device(device))
    assert [type(optimizer) for optimizer in given] == [torch.optim.AdamW]
    assert given[0].defaults["fused"] is fused
    assert capsys.readouterr().out == ""


def test_scales_the_learning_rate_of_each_group() -> None:
    class Engine:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=9.0)

    Engine.optimizer.param_groups = [{"lr": 9.0, "lr_scale": 1.0}, {"lr": 9.0, "lr_scale": 0.25}]
    set_lr(Engine(), 0.8)
    assert [group["lr"] for group in Engine.optimizer.param_groups] == [0.8, 0.2]
