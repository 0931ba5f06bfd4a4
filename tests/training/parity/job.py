"""Job that both sides train: real images, a teacher, the tiny recipe with everything that draws at random."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from mrmae_ds.config.recipe import load_recipe
from mrmae_ds.data.loaders.base import Batch
from mrmae_ds.distributed.launch import Launch
from mrmae_ds.factory import build_pretraining
from mrmae_ds.training.job import PreparedStage, TrainArgs, prepare_stage
from mrmae_ds.weights.model_file import encoder_metadata, save_weights
from tests.support import small_detections
from tests.support.sample_data import write_sample_beton
from tests.training.parity.cases import (
    BETAS,
    DECAY,
    DETECT_WARMUP,
    EPOCHS,
    GLOBAL_BATCH,
    LAYER_DECAY,
    LR,
    MILESTONES,
    MIN_LR,
    OF_AVERAGES,
    STEPS_PER_EPOCH,
    WARMUP,
    WEIGHT_DECAY,
    WITHOUT_TEACHER,
    Case,
)

REPOSITORY = Path(__file__).resolve().parents[3]


def write_workspace(folder: Path) -> None:
    """Write images, objects, and a teacher as this project trains it: a plain ViT with a class token."""
    small_detections.write_detection_data(folder / "coco")
    write_sample_beton(folder, train=GLOBAL_BATCH["pretrain"] * STEPS_PER_EPOCH, val=9)
    recipe = load_recipe(REPOSITORY / "ds_configs/baselines/mae_tiny.yaml")
    assert recipe.stages.pretrain is not None
    torch.manual_seed(11)
    model, _ = build_pretraining(recipe, recipe.stages.pretrain)
    metadata = {"kind": "pretrain", **encoder_metadata(model.encoder), "mean": [0.5] * 3, "std": [0.5] * 3}
    save_weights(folder / "teacher" / "model.safetensors", model.state_dict(), metadata)


WIDE = "{dims: [64, 128, 512]}"
RISING = f"teachers.ema={{decay: {DECAY[1]}, decay_start: {DECAY[0]}, decay_epochs: 1}}"
AVERAGE = [
    "teachers.ema={kind: ema, layers: [0, 2], layer_norm: each}",
    RISING,
    "stages.pretrain.teachers=[mae, ema]",
    "stages.pretrain.objectives.latent={target: ema, tap: decoder, tokens: masked, loss: smooth_l1, beta: 2.0, "
    "normalize: layer_norm, weight: 1.0}",
]


def overrides(case: Case, folder: Path) -> tuple[str, ...]:
    """Return recipe values: a short run, a real schedule, and everything that draws at random."""
    stage = case.stage
    if stage == "detect":
        return detect_overrides(folder)
    optimizer = f"{{lr: {LR}, min_lr: {MIN_LR}, warmup_epochs: {WARMUP}, betas: {list(BETAS[stage])}}}"
    ours = {
        "data.train": folder / "train.beton",
        "data.val": folder / "val.beton",
        "data.backend": "pillow",
        "loader.num_workers": 1,
        "teachers.mae.source": folder / "teacher",
        f"stages.{stage}.batch_size": GLOBAL_BATCH[stage],
        f"stages.{stage}.epochs": EPOCHS[stage],
        f"stages.{stage}.optimizer": "null",
    }
    if stage == "finetune":
        ours |= {"init": "scratch", "drop_path": 0.2, "mixup": 0.8, "cutmix": 1.0, "layer_decay": LAYER_DECAY}
    if case.method in WITHOUT_TEACHER:
        del ours["teachers.mae.source"]
    keys = {key if "." in key else f"stages.finetune.{key}": value for key, value in ours.items()}
    rest = [f"stages.{stage}.optimizer={optimizer}"]
    rest += [f"stages.pretrain.placement={case.placement}"] if case.placement != "device" else []
    rest += [f"model.overrides={WIDE}"] if case.wide else []
    rest += [] if case.dropout else ["stages.pretrain.attention_dropout=0"]
    rest += AVERAGE if case.average else [RISING] if case.method in OF_AVERAGES else []
    return (*(f"{key}={value}" for key, value in keys.items()), *rest)


def detect_overrides(folder: Path) -> tuple[str, ...]:
    """Return recipe values of detection."""
    optimizer = f"{{lr: {LR}, betas: {list(BETAS['detect'])}, weight_decay: {WEIGHT_DECAY}}}"
    schedule = f"{{milestones: {list(MILESTONES)}, factor: 0.1, warmup_steps: {DETECT_WARMUP}, warmup_from: 0.1}}"
    ours = {"batch_size": GLOBAL_BATCH["detect"], "epochs": EPOCHS["detect"], "layer_decay": LAYER_DECAY}
    ours |= {"optimizer": optimizer, "schedule": schedule}
    values = [f"stages.detect.{key}={value}" for key, value in ours.items()]
    return tuple(small_detections.overrides(folder / "coco", *values))


def prepare(case: Case, folder: Path, launch: Launch) -> PreparedStage:
    """Do what train.py does before it starts a process group."""
    path = folder / f"{case.name}-{launch.rank}.json"
    path.write_text(json.dumps(case.engine_config()))
    settings = overrides(case, folder)
    recipe = REPOSITORY / f"ds_configs/{case.recipe}.yaml"
    if case.stage == "detect":
        recipe = REPOSITORY / small_detections.RECIPE
    options = TrainArgs(path, case.stage, recipe, folder / "runs", overrides=settings)
    return prepare_stage(replace(options, dry_run=True), launch)


def batches(job: PreparedStage) -> Iterator[Batch]:
    """Yield the job's micro-batches of this rank, all epochs."""
    reader = job.train_loader(torch.device("cpu"))
    for epoch in range(job.schedule.epochs):
        yield from reader.epoch(epoch)
    reader.close()
