from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from mrmae_ds.models.checkpointing import CheckpointPlan
from mrmae_ds.models.decoder import DecoderSpec
from mrmae_ds.models.pretrain import FusionSpec, PretrainModel
from mrmae_ds.models.sizes import ViTSpec
from mrmae_ds.models.weights import build_encoder
from mrmae_ds.objectives import Objective
from mrmae_ds.training.engine import build_engine, set_checkpointing, set_learning_rate
from mrmae_ds.training.engine_config import EngineConfig
from mrmae_ds.training.optimizer import pretrain_groups

SPEC = ViTSpec(16, 2, 2, patch=8)
PLAN = CheckpointPlan(conv_stages=3, transformer=2, decoder=1)
CONFIG = EngineConfig(Path("engine.json"), {}, 4, None, 3, torch.float32, PLAN)


def _model(tap: str) -> PretrainModel:
    tokens = "masked" if tap == "decoder" else "visible"
    objective = Objective(target="pixels", tap=tap, tokens=tokens, normalize="none", weight=1)
    decoder = DecoderSpec(dim=8, depth=1, num_heads=2)
    return PretrainModel(build_encoder(SPEC, 32), FusionSpec(), decoder, {"pixels": objective}, {})


def test_the_groups_must_be_the_trainable_parameters() -> None:
    model = nn.Linear(2, 2)
    own = [model.weight, model.bias]
    for params in ([model.weight], [*own, model.bias], [*own, nn.Parameter(torch.zeros(1))], []):
        groups = [{"params": params, "lr_scale": 1.0}]
        with pytest.raises(ValueError, match=rf"{len(params)} parameters in groups, 2 trainable"):
            build_engine(model, groups, (0.9, 0.95), CONFIG, 1, torch.device("cpu"))


def test_frozen_parameters_must_not_be_in_them() -> None:
    model = _model("decoder")
    groups = pretrain_groups(model, 0.05)
    groups[0]["params"].append(model.encoder.pos_embed)
    with pytest.raises(ValueError, match="trainable ones"):
        build_engine(model, groups, (0.9, 0.95), CONFIG, 1, torch.device("cpu"))


def test_the_checkpointing_plan_reaches_encoder_and_decoder() -> None:
    model = _model("decoder")
    set_checkpointing(model, CONFIG)
    assert model.encoder.checkpointing == PLAN
    assert model.decoder is not None and model.decoder.checkpoint_every == 1
    without = _model("encoder")
    set_checkpointing(without, CONFIG)
    assert without.encoder.checkpointing == PLAN and without.decoder is None
    classifier = build_encoder(SPEC, 32, num_classes=3)
    set_checkpointing(classifier, CONFIG)
    assert classifier.checkpointing == PLAN


def test_the_rate_of_each_group_is_scaled() -> None:
    class Engine:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=9.0)

    Engine.optimizer.param_groups = [{"lr": 9.0, "lr_scale": 1.0}, {"lr": 9.0, "lr_scale": 0.25}]
    set_learning_rate(Engine(), 0.8)
    assert [group["lr"] for group in Engine.optimizer.param_groups] == [0.8, 0.2]
