"""Memory of teachers by placement, against measurements of benchmarks/teacher_placement.py on real teachers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from mrmae_ds.config.recipe import DataConfig, TeacherConfig
from mrmae_ds.config.stages import PlacementConfig
from mrmae_ds.planning.fake_step import make_fake
from mrmae_ds.planning.teacher_memory import TeacherWeights
from mrmae_ds.teachers import build_meta_teacher

MEASURED = Path(__file__).resolve().parents[2] / "benchmarks/results/teacher_placement_cpu.json"
TEACHERS = {
    "DINOv2 ViT-S/14": ("timm", "vit_small_patch14_dinov2.lvd142m"),
    "CLIP ViT-L-14, random weights": ("clip", "ViT-L-14"),
}


@pytest.fixture(scope="module")
def weights() -> dict[str, TeacherWeights]:
    weights = {}
    for name, (kind, source) in TEACHERS.items():
        config = TeacherConfig.model_validate({"kind": kind, "source": source})
        teacher = build_meta_teacher("t", config, DataConfig(train=Path("a"), val=Path("b")), 224, (16, 16))
        with FakeTensorMode():
            make_fake(teacher)
        weights[name] = TeacherWeights.of(teacher)
    return weights


def rows() -> list[dict[str, Any]]:
    return [row for row in json.loads(MEASURED.read_text())["rows"] if row["teacher"] in TEACHERS]


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row['teacher']} {row['placement']} {row['processes']}")
def test_planned_teacher_memory_equals_the_measured_one(
    row: dict[str, Any], weights: dict[str, TeacherWeights]
) -> None:
    kind, _, offload = row["placement"].partition(", offload")
    placement = PlacementConfig.model_validate({"kind": kind, "offload": "cpu" if offload else None})
    placed = weights[row["teacher"]].placed(placement, row["processes"])
    assert weights[row["teacher"]].total == row["weights"]
    assert placed.idle == pytest.approx(row["between"], rel=1e-3, abs=1000)
    # DeepSpeed prefetches whole parameters, slightly more than one unit.
    assert placed.calling == pytest.approx(row["peak"], rel=0.15 if kind == "sharded" else 1e-3)
    assert placed.host == (0 if kind == "device" or (kind == "sharded" and not offload) else placed.copied)
