"""Finished stages as training leaves them, of tiny models with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from mrmae_ds.config.recipe import Recipe
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.pretrain import PretrainModel
from mrmae_ds.weights.model_file import encoder_metadata, save_weights
from mrmae_ds.weights.paths import MODEL_FILE
from tests.support.records import make_record
from tests.support.reference import perturb

OPTIMIZER = {"lr": 1.0e-3, "warmup_epochs": 0, "betas": [0.9, 0.95]}
STAGE = {"epochs": 4, "batch_size": 8, "optimizer": OPTIMIZER, "crop_scale": [0.5, 1.0]}
PIXELS = {"target": "pixels", "tap": "decoder", "tokens": "masked", "normalize": "standardize", "weight": 1.0}
MIMIC = {"target": "guide", "tap": "encoder", "tokens": "visible", "normalize": "layer_norm", "weight": 1.0}
CVIT = {"arch": "cvit_tiny", "overrides": {"dims": [8, 12, 16], "depths": [1, 1, 2]}}
VIT = {"arch": "vit_tiny", "overrides": {"dim": 16, "depth": 2}}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def make_recipe(val: Path, method: str, model: dict[str, Any], image_size: int, teacher: Path | None) -> Recipe:
    """Build a small recipe. A teacher's folder adds ``guide``, which is mimicked and selects the visible patches."""
    pretrain: dict[str, Any] = {**STAGE, "objectives": {"pixels": PIXELS}}
    if teacher:
        pretrain["objectives"] = {"pixels": PIXELS, "mimic": MIMIC}
        pretrain |= {"teachers": ["guide"], "masking": {"mode": "topk", "teacher": "guide"}}
    guide = {"kind": "checkpoint", "source": str(teacher), "precision": "fp32"}
    content = {
        "name": "of-the-recipe",
        "method": method,
        "size": "Tiny",
        "model": {**model, "image_size": image_size, "decoder": {"dim": 16, "depth": 1, "num_heads": 4}},
        "data": {"train": "train.beton", "val": str(val), "mean": MEAN, "std": STD},
        "teachers": {"guide": guide} if teacher else {},
        "stages": {"pretrain": pretrain, "finetune": {**STAGE, "epochs": 2, "layer_decay": 0.8}},
        "logging": {"num_images": 3},
    }
    return Recipe.model_validate(content)


def save_pretraining(folder: Path, recipe: Recipe, seed: int = 0, teacher_width: int = 16) -> PretrainModel:
    """Write ``folder/pretrain``; returns the model in it, in eval mode."""
    stage = recipe.stages.pretrain
    assert stage is not None
    mask_token = stage.encoder_input == "mask_tokens"
    encoder = build_encoder(recipe.model.spec(), recipe.model.image_size, mask_token=mask_token)
    widths = {"guide": teacher_width, "ema": encoder.embed_dim}
    model = PretrainModel(encoder, recipe.model.fusion, recipe.model.decoder, stage.objectives, widths)
    _save(folder / "pretrain", recipe, model, "pretrain", seed)
    return model.eval()


def save_finetuning(folder: Path, recipe: Recipe, seed: int = 0) -> nn.Module:
    """Write ``folder/finetune``, a classifier of three classes; returns it, in eval mode."""
    model = build_encoder(recipe.model.spec(), recipe.model.image_size, num_classes=3)
    _save(folder / "finetune", recipe, model, "classifier", seed)
    return model.eval()


def _save(folder: Path, recipe: Recipe, model: nn.Module, kind: str, seed: int) -> None:
    perturb(model, seed=seed, scale=0.3)
    encoder = model.encoder if isinstance(model, PretrainModel) else model
    about = {"kind": kind, **encoder_metadata(encoder), "num_classes": encoder.num_classes, "mean": MEAN, "std": STD}
    about |= {"recipe": recipe.model_dump(mode="json"), "stage": folder.name}
    save_weights(folder / MODEL_FILE, model.state_dict(), about)
    make_record(dataset="photographs", stage=folder.name).write(folder)
