"""Gather volume of Huge under ZeRO-3: its structure with narrow layers and accordingly scaled thresholds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mrmae_ds.config.files import merge, read_json
from mrmae_ds.models.decoder import DecoderSpec
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.masking import choose_visible
from mrmae_ds.models.objectives import Objective
from mrmae_ds.models.pretrain import FusionSpec, PretrainModel
from mrmae_ds.models.sizes import CViTSpec, encoder_spec
from tests.training.parity.job import REPOSITORY

IMAGE = 56
NARROW = {"dims": (48, 64, 80), "num_heads": 4}
# Counted in elements of the model, so that they shrink with it.
ELEMENTS = (
    "reduce_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
)


@dataclass(frozen=True)
class Gathered:
    """Gather volume of one optimizer step.

    Attributes:
        models: bytes relative to every parameter once, in the type that is sent.
        calls: number of all-gathers.
    """

    models: float
    calls: int


def huge(narrow: bool) -> PretrainModel:
    """Build Huge's pre-training model with a pixel objective and a mimic head; on meta unless ``narrow``."""
    spec = encoder_spec("cvit_huge", NARROW if narrow else None)
    assert isinstance(spec, CViTSpec)
    objectives = {
        "pixels": Objective(target="pixels", tap="decoder", tokens="masked", normalize="standardize", weight=0.5),
        "mimic": Objective(target="teacher", tap="encoder", tokens="visible", normalize="layer_norm", weight=0.5),
    }
    decoder = DecoderSpec(dim=32, num_heads=4) if narrow else DecoderSpec()
    with torch.device("cpu" if narrow else "meta"):
        encoder = build_encoder(spec, IMAGE if narrow else 224)
        return PretrainModel(
            encoder, FusionSpec(stages=(1, 2)), decoder, objectives, {"teacher": 8 if narrow else 1024}
        )


def elements(model: nn.Module) -> int:
    """Return the number of elements of all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def gathered_bytes(model: nn.Module, autocast: bool) -> int:
    """Return the bytes of every parameter once; DeepSpeed gathers ``Linear`` and ``Conv2d`` in autocast's type."""
    halved = {id(p) for m in model.modules() if type(m) in (nn.Linear, nn.Conv2d) for p in m.parameters(recurse=False)}
    return sum(p.numel() * (2 if autocast and id(p) in halved else 4) for p in model.parameters())


def narrow_config(changes: dict[str, Any]) -> dict[str, Any]:
    """Return ds_configs/huge.json with ``changes``, in float32, its thresholds scaled to the narrow model."""
    config = read_json(REPOSITORY / "ds_configs/huge.json") | {"train_micro_batch_size_per_gpu": 1}
    config.pop("torch_autocast")
    config = merge(config, changes)
    ratio = elements(huge(narrow=True)) / elements(huge(narrow=False))
    zero = config["zero_optimization"]
    zero |= {key: round(zero[key] * ratio) for key in ELEMENTS if key in zero}
    return config


def gathered(changes: dict[str, Any], accumulation: int, folder: Path, rank: int, steps: int = 4) -> list[Gathered]:
    """Return the volume of each optimizer step; in the first two DeepSpeed records the order of the modules."""
    from mrmae_ds.config.engine import load_engine_config
    from mrmae_ds.training.engine.build import build_engine
    from mrmae_ds.training.engine.comm_volume import GatherCounter
    from mrmae_ds.training.param_groups import adamw, pretrain_groups

    path = folder / f"gathers-{rank}.json"
    path.write_text(json.dumps(narrow_config(changes)))
    config, model = load_engine_config(path), huge(narrow=True)
    size = gathered_bytes(model, config.zero.autocast)
    engine = build_engine(
        model, pretrain_groups(model, 0.05), adamw((0.9, 0.95)), config, accumulation, torch.device("cpu")
    )
    engine.train()
    images, grid = torch.randn(1, 3, IMAGE, IMAGE), (IMAGE // 14, IMAGE // 14)
    visible = choose_visible(torch.rand(1, grid[0] * grid[1]), grid, 0.25)
    targets = {"teacher": torch.randn(1, grid[0] * grid[1], 8)}
    counter, found = GatherCounter(), []
    counter.install(engine)
    for _ in range(steps):
        before, calls = counter.bytes, counter.calls
        for _ in range(accumulation):
            engine.backward(engine(images, visible, targets)["loss"])
            engine.step()
        found.append(Gathered((counter.bytes - before) / size, counter.calls - calls))
    counter.close()
    engine.destroy()
    return found
