"""Sections of the stage `detect`: defaults of the published recipe, schedule, and values that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from mrmae_ds.config.detection import DetectConfig
from mrmae_ds.config.optimizers import StepScheduleConfig
from mrmae_ds.config.recipe import load_recipe
from mrmae_ds.config.sections import DetectionDataConfig
from mrmae_ds.errors import ConfigError

STAGE = """
init: pretrain
epochs: 25
optimizer: {lr: 2.0e-4, betas: [0.9, 0.999], weight_decay: 0.1, groups: detectron2}
schedule: {kind: steps, milestones: [0.888889, 0.962963], factor: 0.1, warmup_steps: 250, warmup_from: 0.001}
layer_decay: 0.8
drop_path: 0.1
jitter: [0.1, 2.0]
detector: {window: 14, global_blocks: [1, 4, 7, 10], channels: 256, box_convs: 4, mask_convs: 4, fc: 1024}
"""
DATA = """
train: {images: coco/train2017, annotations: coco/instances_train2017.json}
val: {images: coco/val2017, annotations: coco/instances_val2017.json, first: 8}
"""
# fvcore's multipliers of a training of 184,375 steps with the authors' settings.
MULTIPLIERS = {0: 0.001, 1: 0.004996, 50: 0.2008, 125: 0.5005, 249: 0.996004, 250: 1.0, 251: 1.0, 163888: 1.0}
MULTIPLIERS |= {163889: 0.1, 163890: 0.1, 177545: 0.1, 177546: 0.01, 184374: 0.01}


def stage(**values: Any) -> DetectConfig:
    return DetectConfig.model_validate(yaml.safe_load(STAGE) | values)


def test_the_published_recipe() -> None:
    config = stage()
    assert (config.batch_size, config.image_size, config.eval_every_epochs, config.flip) == (16, 1024, 5, 0.5)
    assert config.detector.anchors == (32, 64, 128, 256, 512) and config.detector.boxes_per_image == 512
    data = DetectionDataConfig.model_validate(yaml.safe_load(DATA))
    assert (data.train.first, data.val.first) == (None, 8)


@pytest.mark.parametrize(("step", "multiplier"), MULTIPLIERS.items())
def test_the_schedule_is_fvcores(step: int, multiplier: float) -> None:
    assert StepScheduleConfig().multiplier(step, 184_375) == pytest.approx(multiplier, rel=1e-12)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 1000}, "multiple of 32; the nearest is 992"),
        ({"image_size": 8}, "the nearest is 32"),
        ({"jitter": [2.0, 0.1]}, "low <= high"),
        ({"schedule": {"milestones": [0.9, 0.8]}}, "must ascend"),
        ({"detector": {"global_blocks": [4, 1]}}, "must ascend"),
        ({"detector": {"global_blocks": [1], "windows": 14}}, "windows"),
        ({"optimizer": {"lr": 1e-4, "groups": "timm"}}, "groups"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        stage(**values)


def test_learning_rates_of_the_recipe() -> None:
    """Of 25 epochs of 7,329 steps; milestones are shares of the whole."""
    config = stage()
    assert config.lr_at_step(0, 7329) == pytest.approx(2e-7)
    assert config.lr_at_step(125, 7329) == pytest.approx(2e-4 * 0.5005)
    assert [config.lr_at_step(step, 7329) for step in (162_866, 162_867)] == pytest.approx([2e-4, 2e-5])


def test_detection_changes_the_hash_of_its_own_stage_alone() -> None:
    base = load_recipe(Path("ds_configs/ablations/table5_400.yaml"))
    recipe = load_recipe(Path("ds_configs/detection/mr_mae_base.yaml"))
    for name in ("pretrain", "finetune", "probe"):
        assert recipe.hash(name) == base.hash(name)  # type: ignore[arg-type]
    assert "detect" not in base.counted()["stages"] and "detection" not in base.counted()["data"]
    assert recipe.hash() != base.hash()
    moved = ["data.detection.train.images=elsewhere", "logging.draw_score=0.1", "loader.num_workers=3"]
    path = Path("ds_configs/detection/mr_mae_base.yaml")
    assert load_recipe(path, moved).hash("detect") == recipe.hash("detect")
    for change in ("data.detection.train.first=8", "stages.detect.jitter=[0.5, 1.0]"):
        assert load_recipe(path, [change]).hash("detect") != recipe.hash("detect")


def test_global_blocks_beyond_the_depth() -> None:
    detector = stage().detector
    detector.check_depth(11)
    with pytest.raises(ConfigError, match=r"global_blocks: there is no block 10; .* numbered 0 to 9"):
        detector.check_depth(10)
