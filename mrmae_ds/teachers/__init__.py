"""Frozen teachers: one interface, several sources."""

from __future__ import annotations

from mrmae_ds.config.recipe import DataConfig, TeacherConfig
from mrmae_ds.errors import UserError
from mrmae_ds.teachers.base import Teacher, TeacherOutput
from mrmae_ds.teachers.options import TeacherOptions
from mrmae_ds.teachers.placement.build import PlacedTeacher, place_teacher

__all__ = [
    "PlacedTeacher",
    "Teacher",
    "TeacherOptions",
    "TeacherOutput",
    "build_teacher",
    "check_grid",
    "place_teacher",
]


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
    options = TeacherOptions.of(name, config, data, student_size, student_grid)
    teacher = _build(config.kind, options)
    check_grid(teacher, options, student_size)
    return teacher


def check_grid(teacher: Teacher, options: TeacherOptions, student_size: int) -> None:
    """Check that a teacher's tokens lie on the student's.

    Raises:
        UserError: naming the key and the input size that would do.
    """
    key, image_size, (rows, columns) = options.key, options.image_size, options.student_grid
    if teacher.grid != options.student_grid:
        stride = image_size // teacher.grid[0]
        raise UserError(
            f"{key}: its {teacher.grid[0]}x{teacher.grid[1]} tokens at {image_size} pixels do not match the student's "
            f"{rows}x{columns} at {student_size}; set {key}.image_size to {stride * rows}, or choose a teacher with "
            f"patches of {student_size // rows}"
        )


def _build(kind: str, options: TeacherOptions) -> Teacher:
    """The libraries behind each kind are imported only where a recipe names it."""
    if kind == "checkpoint":
        from mrmae_ds.teachers.sources.checkpoint import CheckpointTeacher

        return CheckpointTeacher(options)
    if kind == "clip":
        from mrmae_ds.teachers.sources.clip import ClipTeacher

        return ClipTeacher(options)
    from mrmae_ds.teachers.sources.timm import TimmTeacher

    return TimmTeacher(options)
