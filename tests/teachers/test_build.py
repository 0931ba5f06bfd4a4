"""build_teacher: from a recipe's section to a teacher on the student's grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from mrmae_ds.config.recipe import DataConfig, TeacherConfig
from mrmae_ds.errors import UserError
from mrmae_ds.teachers import Teacher, build_meta_teacher, build_teacher
from mrmae_ds.teachers.build import _source
from tests.support.sample_teachers import CVIT, MEAN, VIT, pixels_of, save_run

DATA = DataConfig(train=Path("train.beton"), val=Path("val.beton"), mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.3))


def build(source: Path, student_size: int = 16, grid: int = 4, **options: Any) -> Teacher:
    config = TeacherConfig(kind="checkpoint", source=str(source), **options)
    return build_teacher("mae", config, DATA, student_size, (grid, grid))


def test_defaults_are_bf16_raw_features_and_its_own_statistics(tmp_path: Path) -> None:
    save_run(tmp_path, VIT)
    teacher = build(tmp_path)
    assert teacher.dtype == torch.bfloat16
    assert teacher.mean.flatten().tolist() == pytest.approx(MEAN)
    assert teacher.image_size == 16
    output = teacher(pixels_of(2, 16))
    assert output.tokens.shape == (2, 16, 16)
    assert output.importance.shape == (2, 16)


def test_student_statistics_and_fp32(tmp_path: Path) -> None:
    save_run(tmp_path, CVIT)
    teacher = build(tmp_path, statistics="student", precision="fp32")
    assert teacher.dtype == torch.float32
    assert teacher.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert teacher.std.flatten().tolist() == pytest.approx([0.5, 0.4, 0.3])


def test_teacher_of_another_size_on_the_students_grid(tmp_path: Path) -> None:
    save_run(tmp_path, VIT)
    teacher = build(tmp_path, student_size=32, image_size=16)
    assert teacher(pixels_of(1, 32)).tokens.shape == (1, 16, 16)


def test_grid_mismatch_names_the_fix(tmp_path: Path) -> None:
    save_run(tmp_path, VIT)
    with pytest.raises(UserError) as error:
        build(tmp_path, student_size=32, grid=4)
    message = str(error.value)
    assert "teachers.mae: its 8x8 tokens at 32 pixels do not match the student's 4x4 at 32" in message
    assert "set teachers.mae.image_size to 16" in message
    assert "patches of 8" in message
    build(tmp_path, student_size=32, grid=4, image_size=16)


def test_an_input_that_its_patches_do_not_tile_is_refused(tmp_path: Path) -> None:
    save_run(tmp_path, VIT)
    with pytest.raises(UserError, match=r"teachers.mae.image_size: patches of 4 do not tile 18 pixels; use 32, which"):
        build(tmp_path, image_size=18, grid=8)


def test_missing_weights_name_the_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"teachers.mae.source: .*run that stage first"):
        build(tmp_path / "runs/mae_tiny/pretrain")


@pytest.mark.parametrize(("kind", "message"), [("clip", "needs a tag"), ("timm", "could not be loaded")])
def test_each_kind_is_built_by_its_library(kind: str, message: str) -> None:
    config = TeacherConfig(kind=kind, source="no_such_model")
    with pytest.raises(UserError, match=rf"teachers.clip.*{message}"):
        build_teacher("clip", config, DATA, 64, (4, 4))


KINDS = [kind for kind in get_args(TeacherConfig.model_fields["kind"].annotation) if kind != "ema"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_but_moving_averages_is_module_of_sources(kind: str) -> None:
    source = _source(kind)
    assert callable(source.build) and callable(source.build_meta)


@pytest.mark.parametrize("spec", [VIT, CVIT])
def test_teacher_without_weights_has_same_shapes(spec: Any, tmp_path: Path) -> None:
    save_run(tmp_path, spec)
    config = TeacherConfig(kind="checkpoint", source=str(tmp_path))
    real = build(tmp_path)
    meta = build_meta_teacher("mae", config, DATA, 16, (4, 4))
    assert (meta.grid, meta.width, meta.image_size, meta.dtype) == (real.grid, real.width, 16, real.dtype)
    assert {parameter.device.type for parameter in meta.parameters()} == {"meta"}
