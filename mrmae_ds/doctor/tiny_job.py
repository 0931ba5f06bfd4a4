"""A complete tiny job of the doctor: generated images, a teacher with random weights, and a recipe."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from mrmae_ds.config.files import merge
from mrmae_ds.config.recipe import Recipe, load_recipe
from mrmae_ds.data.convert.options import WriteOptions
from mrmae_ds.data.convert.writer import write_beton
from mrmae_ds.doctor.context import DoctorContext
from mrmae_ds.doctor.ranks import RankStore
from mrmae_ds.doctor.reading import HardFailure
from mrmae_ds.doctor.workload import write_engine_config
from mrmae_ds.errors import CollectiveError, UserError, user_message
from mrmae_ds.factory import build_pretraining
from mrmae_ds.files import check_writable
from mrmae_ds.training.job import PreparedStage, TrainArgs, prepare_stage
from mrmae_ds.weights.model_file import encoder_metadata, save_weights
from mrmae_ds.weights.paths import MODEL_FILE

MICRO_BATCH = 8
LARGE, SMALL = (500, 375), (64, 48)
WRITE_S = 120.0
HALF = [0.5, 0.5, 0.5]
PIXELS = {"target": "pixels", "tap": "decoder", "tokens": "masked", "normalize": "standardize", "weight": 1.0}
MIMIC = {"target": "mae", "tap": "encoder", "tokens": "visible", "normalize": "layer_norm", "weight": 0.5}
RECIPE: dict[str, Any] = {
    "name": "doctor",
    "method": "MR-MAE",
    "size": "Tiny",
    "model": {
        "arch": "cvit_tiny",
        "image_size": 32,
        "fusion": {"stages": [1, 2]},
        "decoder": {"dim": 64, "depth": 2, "num_heads": 4},
    },
    "data": {"mean": HALF, "std": HALF, "backend": "pillow"},
    "loader": {"num_workers": 1},
    "stages": {
        "pretrain": {
            "epochs": 100,
            "optimizer": {"lr": 1e-3, "warmup_epochs": 0, "betas": [0.9, 0.95], "weight_decay": 0.05},
            "crop_scale": [0.5, 1.0],
            "objectives": {"pixels": PIXELS, "mimic": MIMIC},
            "teachers": ["mae"],
            "masking": {"keep_ratio": 0.25, "mode": "sample", "teacher": "mae"},
        }
    },
}
AS_TEACHER: dict[str, Any] = {
    "model": {"arch": "vit_tiny", "fusion": None},
    "stages": {
        "pretrain": {
            "teachers": None,
            "masking": {"mode": "random", "teacher": None},
            "objectives": {"mimic": None},
        }
    },
}


class GeneratedImages:
    """Smooth random images in ten classes, whose JPEGs have about the size of photographs'.

    Args:
        count: number of images.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        pixels = np.random.default_rng(index).integers(0, 256, (*SMALL[::-1], 3), dtype=np.uint8)
        return Image.fromarray(pixels).resize(LARGE, Image.Resampling.BICUBIC), index % 10


@dataclass(frozen=True)
class TinyJob:
    """Files of the job.

    Attributes:
        images: training and validation images.
        recipe: the recipe.
    """

    images: Path
    recipe: Path

    def load(self) -> Recipe:
        """Load the recipe."""
        return load_recipe(self.recipe)


def tiny_job(context: DoctorContext) -> TinyJob:
    """Return the job's files; the first call, which all ranks make, lets rank 0 write them."""
    job = TinyJob(context.folder / "images.beton", context.folder / "tiny.yaml")
    if context.launch.rank == 0 and not job.recipe.is_file():
        _write(context, job)
    context.ranks.gather(True, WRITE_S)
    if not job.recipe.is_file():
        raise HardFailure(f"{job.recipe} is not visible on every node; name a folder that is: --out FOLDER/doctor.json")
    return job


def make_job_folder(report: Path, ranks: RankStore) -> Path:
    """Make a new folder beside the report on rank 0, and return it on every rank.

    Its name is unique, so that the doctor can remove it without touching what it did not make. Making it shows before
    the first check that the report can be written.

    Raises:
        UserError: if the report cannot be written, or rank 0 does not answer.
    """
    made, problem = "", ""
    if ranks.launch.rank == 0:
        try:
            check_writable(report)
            made = tempfile.mkdtemp(prefix=f"{report.stem}-files-", dir=report.parent)
        except (UserError, OSError) as error:
            problem = f"--out {user_message(error) or error}"
    (first, *_) = ranks.gather([made, problem])
    if first is None:
        raise UserError("no answer from rank 0; check the launcher's output of its node")
    made, problem = first
    if problem:
        raise CollectiveError(problem)
    return Path(made)


def remove_files(context: DoctorContext) -> None:
    """Remove the checks' files; a node that does not see rank 0's folder has one of its own."""
    if context.launch.local_rank == 0:
        shutil.rmtree(context.folder, ignore_errors=True)


def prepare_tiny(context: DoctorContext, name: str, engine: dict[str, Any]) -> PreparedStage:
    """Prepare the job with an engine config as train.py does. Nothing is resumed.

    Args:
        context: of the doctor.
        name: of the engine config; its runs are in the folder of this name.
        engine: the engine config but the micro-batch.
    """
    job = tiny_job(context)
    content = {"train_micro_batch_size_per_gpu": MICRO_BATCH, "gradient_clipping": 0.0, **engine}
    config = write_engine_config(context.folder, name, context.launch.rank, content)
    options = TrainArgs(config.path, recipe=job.recipe, run=context.folder / name, resume="never")
    return prepare_stage(replace(options, dry_run=True), context.launch)


def _write(context: DoctorContext, job: TinyJob) -> None:
    context.folder.mkdir(parents=True, exist_ok=True)
    batch = MICRO_BATCH * context.launch.world_size
    write_beton(
        GeneratedImages(max(context.request.images, 2 * batch)),
        job.images,
        WriteOptions(),
        class_names=[f"class {number}" for number in range(10)],
        name="doctor",
        source="generated images",
    )
    files = {
        "data": {"train": str(job.images), "val": str(job.images)},
        "stages": {"pretrain": {"batch_size": batch}},
    }
    teacher = context.folder / "teacher" / MODEL_FILE
    config = Recipe.model_validate(merge(merge(RECIPE, files), AS_TEACHER))
    torch.manual_seed(0)
    assert config.stages.pretrain is not None
    model, _ = build_pretraining(config, config.stages.pretrain)
    teacher.parent.mkdir(exist_ok=True)
    metadata = {"kind": "pretrain", **encoder_metadata(model.encoder), "mean": HALF, "std": HALF}
    save_weights(teacher, model.state_dict(), metadata)
    files["teachers"] = {"mae": {"kind": "checkpoint", "source": str(teacher.parent), "precision": "fp32"}}
    partial = job.recipe.with_suffix(".part")
    partial.write_text(yaml.safe_dump(merge(RECIPE, files), sort_keys=False))
    partial.replace(job.recipe)
