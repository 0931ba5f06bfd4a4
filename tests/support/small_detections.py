"""Runs of the stage detect in seconds: a small detector on crops of a photograph with rectangles as objects."""

from __future__ import annotations

from pathlib import Path

import torch

from mrmae_ds.config.recipe import load_recipe
from mrmae_ds.detection.detector import Detector, build_detector
from tests.support.coco import CATEGORIES, small_coco, write_coco
from tests.support.ranks import Ranks, start

RECIPE = Path("ds_configs/detection/demo.yaml")
EPOCHS, STEPS_PER_EPOCH, BATCH = 3, 2, 2
SETTINGS = (
    "model.image_size=64",
    "model.overrides={dims: [8, 12, 16], patches: [4, 2, 2]}",
    "stages.detect.image_size=64",
    f"stages.detect.epochs={EPOCHS}",
    f"stages.detect.batch_size={BATCH}",
    "stages.detect.eval_every_epochs=10",
    "stages.detect.schedule.warmup_steps=1",
    "stages.detect.drop_path=0.2",
    "stages.detect.layer_decay=0.9",
    "stages.detect.jitter=[0.5, 2.0]",
    "stages.detect.flip=0.5",
    "stages.detect.detector.window=2",
    "stages.detect.detector.global_blocks=[1]",
    "stages.detect.detector.channels=16",
    "stages.detect.detector.fc=32",
    "stages.detect.detector.boxes_per_image=16",
    "loader.num_workers=1",
    "logging.every_steps=1",
    "checkpoint.every_epochs=null",
)


def write_detection_data(folder: Path) -> None:
    """Write annotations and images; of six images, one has a crowd alone and one nothing."""
    write_coco(folder, small_coco())


def detector_of_recipe(folder: Path) -> Detector:
    """Write the data into a folder, and build the detector of its recipe with random weights."""
    write_detection_data(folder)
    recipe = load_recipe(RECIPE, overrides(folder))
    assert recipe.stages.detect is not None
    torch.manual_seed(1)
    return build_detector(recipe.model, recipe.stages.detect, len(CATEGORIES))


def overrides(folder: Path, *more: str) -> list[str]:
    """Return recipe values that read a folder's data, for :data:`RECIPE`."""
    files = f"{{images: {folder / 'images'}, annotations: {folder / 'annotations.json'}}}"
    return [f"data.detection.train={files}", f"data.detection.val={files}", *SETTINGS, *more]


def launch(folder: Path, name: str, world_size: int, engine: Path, *more: str, fault: str = "") -> Ranks:
    """Start or resume a run in ``FOLDER/NAME``, with data of ``FOLDER``."""
    command = ["--ds_config", engine, "--recipe", RECIPE, "--stage", "detect", "--run", folder / name]
    return start(world_size, [*command, *overrides(folder, *more)], folder / "logs" / name, fault)
