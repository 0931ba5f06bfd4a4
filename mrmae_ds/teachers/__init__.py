"""Frozen teachers: one interface, several sources."""

from __future__ import annotations

from pathlib import Path

import torch

from mrmae_ds.errors import UserError
from mrmae_ds.recipe import DataConfig, TeacherConfig
from mrmae_ds.teachers.base import Teacher, TeacherOutput

__all__ = ["Teacher", "TeacherOutput", "build_teacher"]


def build_teacher(
    name: str, config: TeacherConfig, data: DataConfig, student_size: int, student_grid: tuple[int, int]
) -> Teacher:
    """Build a teacher on the CPU and check that its tokens lie on the student's.

    Args:
        name: its key under ``teachers`` in the recipe.
        config: its section.
        data: whose statistics it uses if the section says so.
        student_size: side of the student's input in pixels.
        student_grid: rows and columns of the student's token grid.

    Raises:
        UserError: naming the key: weights that cannot be had, or a grid that differs from the student's.
    """
    key = f"teachers.{name}"
    image_size = config.image_size or student_size
    statistics = (data.mean, data.std) if config.statistics == "student" else None
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    teacher: Teacher
    # The libraries behind each kind are imported only where a recipe names it.
    if config.kind == "checkpoint":
        from mrmae_ds.teachers.own import CheckpointTeacher

        teacher = CheckpointTeacher(
            Path(config.source),
            key,
            image_size=image_size,
            features=config.features,
            statistics=statistics,
            dtype=dtype,
        )
    else:
        if config.kind == "clip":
            from mrmae_ds.teachers.clip import ClipTeacher as Named
        else:
            from mrmae_ds.teachers.timm_vit import TimmTeacher as Named
        teacher = Named(
            config.source,
            config.weights,
            key,
            image_size=image_size,
            features=config.features,
            statistics=statistics,
            dtype=dtype,
        )
    if image_size % teacher.grid[0]:
        raise UserError(f"{key}.image_size: the teacher's patches do not tile {image_size} pixels")
    if teacher.grid != student_grid:
        stride = image_size // teacher.grid[0]
        raise UserError(
            f"{key}: its {teacher.grid[0]}x{teacher.grid[1]} tokens at {image_size} pixels do not match the student's "
            f"{student_grid[0]}x{student_grid[1]} at {student_size}; set {key}.image_size to "
            f"{stride * student_grid[0]}, or choose a teacher with patches of {student_size // student_grid[0]}"
        )
    return teacher
