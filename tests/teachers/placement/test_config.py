"""The recipe's ``stages.pretrain.placement``."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mrmae_ds.config.recipe import load_recipe
from mrmae_ds.errors import UserError

RECIPE = """
name: two
method: MR-MAE
size: Small
model: {arch: cvit_small, image_size: 224}
data: {train: train.beton, val: val.beton}
teachers:
  clip: {kind: clip, source: ViT-B-16-quickgelu, weights: openai}
  dino: {kind: timm, source: vit_base_patch16_224.dino}
  spare: {kind: timm, source: vit_base_patch16_224.dino}
stages:
  pretrain:
    epochs: 4
    batch_size: 512
    optimizer: {base_lr: 1.5e-4, warmup_epochs: 1, betas: [0.9, 0.95]}
    crop_scale: [0.2, 1.0]
    teachers: [clip, dino]
    objectives:
      clip: {target: clip, tap: encoder, tokens: visible, normalize: layer_norm, weight: 0.5}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Write a recipe with two teachers, and a third that no stage uses."""
    file = tmp_path / "two.yaml"
    file.write_text(RECIPE)
    return file


def _kinds(path: Path, *overrides: str) -> dict[str, str]:
    stage = load_recipe(path, [f"stages.pretrain.{override}" for override in overrides]).stages.pretrain
    assert stage is not None
    return {name: str(placement) for name, placement in stage.placement.items()}


def test_every_teacher_of_the_stage_has_a_placement(path: Path) -> None:
    assert _kinds(path) == {"clip": "device", "dino": "device"}
    assert _kinds(path, "placement=stream") == {"clip": "stream", "dino": "stream"}
    assert _kinds(path, "placement.dino=step") == {"clip": "device", "dino": "step"}
    assert _kinds(path, "placement={dino: sharded, clip: step}") == {"clip": "step", "dino": "sharded"}
    nested = "placement.clip={kind: sharded, offload: nvme, nvme_path: /disk}"
    assert _kinds(path, nested) == {"clip": "sharded, offload to nvme", "dino": "device"}
    assert _kinds(path, "teachers=[]", "objectives.clip.target=pixels", "placement=stream") == {}


def test_resolved_recipe_contains_the_placement_of_each_teacher(path: Path) -> None:
    recipe = load_recipe(path, ["stages.pretrain.placement.clip={kind: sharded, offload: cpu}"])
    written = yaml.safe_load(recipe.to_yaml())["stages"]["pretrain"]["placement"]
    assert written["clip"] == {"kind": "sharded", "offload": "cpu", "nvme_path": None}
    assert written["dino"]["kind"] == "device"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("placement=steam", "placement: no such placement: 'steam'; did you mean 'stream'?"),
        ("placement.clip=shard", "placement.clip.kind: no such placement; did you mean 'sharded'? (got 'shard')"),
        ("placement.clipp=step", "placement.clipp: not one of this stage's teachers; did you mean 'clip'?"),
        ("placement.spare=step", "placement.spare: not one of this stage's teachers; known are clip, dino"),
        ("placement.clip={kind: sharded, offlod: cpu}", "placement.clip.offlod: unknown key; did you mean 'offload'?"),
        ("placement.clip={kind: step, offload: cpu}", "placement.clip.offload: has no effect on step"),
        ("placement.clip={kind: sharded, offload: nvme}", "placement.clip.nvme_path: required with offload: nvme"),
        ("placement.clip.nvme_path=/disk", "placement.clip.nvme_path: required with offload: nvme"),
        ("placement=[step]", "placement: Input should be a valid dictionary"),
        ("placement=true", "placement: expected a value, got true"),
    ],
)
def test_refuses_invalid_placements(override: str, message: str, path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(path, [f"stages.pretrain.{override}"])
    assert str(caught.value).startswith(f"override 'stages.pretrain.{override}' of {path}: stages.pretrain.{message}")
