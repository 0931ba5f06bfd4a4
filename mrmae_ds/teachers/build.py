"""Build a teacher from its section of a recipe and check its grid against the student's."""

from __future__ import annotations

from importlib import import_module
from typing import Protocol, cast

import torch

from mrmae_ds.config.recipe import DataConfig, TeacherConfig
from mrmae_ds.errors import UserError
from mrmae_ds.teachers.base import Teacher
from mrmae_ds.teachers.options import TeacherOptions


class TeacherSource(Protocol):
    """Interface of the modules in ``sources/`` that implement a kind of teacher; the kind is the module's name."""

    def build(self, options: TeacherOptions, /) -> Teacher:
        """Build a teacher with its weights on the CPU.

        Raises:
            UserError: naming the recipe key.
        """

    def build_meta(self, options: TeacherOptions, /) -> Teacher:
        """Build a teacher without weights, within ``torch.device("meta")``.

        Raises:
            UserError: naming the recipe key.
        """


def build_teacher(
    name: str, config: TeacherConfig, data: DataConfig, student_size: int, student_grid: tuple[int, int]
) -> Teacher:
    """Build a teacher on the CPU and check that its tokens coincide with the student's.

    Args:
        name: key under ``teachers`` in the recipe.
        config: the recipe section of that key.
        data: the recipe's data section, whose statistics are used if ``config`` says so.
        student_size: side of the student's input in pixels.
        student_grid: rows and columns of the student's token grid.

    Raises:
        UserError: naming the key, if the weights are unavailable or the grid differs from the student's.
    """
    options = TeacherOptions.from_config(name, config, data, student_size, student_grid)
    teacher = _source(config.kind).build(options)
    check_grid(teacher, options, student_size)
    return teacher


def build_meta_teacher(
    name: str, config: TeacherConfig, data: DataConfig, student_size: int, student_grid: tuple[int, int]
) -> Teacher:
    """Build a teacher like :func:`build_teacher`, without weights and downloads, on the meta device.

    It serves to count FLOPs and memory and to check recipes.

    Raises:
        UserError: naming the key, for a model that the library does not have, a run that does not exist, or a grid that
            differs from the student's.
    """
    options = TeacherOptions.from_config(name, config, data, student_size, student_grid)
    with torch.device("meta"):
        teacher = _source(config.kind).build_meta(options)
    check_grid(teacher, options, student_size)
    return teacher


def check_grid(teacher: Teacher, options: TeacherOptions, student_size: int) -> None:
    """Check that a teacher's token grid equals the student's.

    Args:
        teacher: the built teacher.
        options: the options that it was built with.
        student_size: side of the student's input in pixels.

    Raises:
        UserError: naming the key and the input size that would fit.
    """
    key, image_size, (rows, columns) = options.key, options.image_size, options.student_grid
    if teacher.grid != options.student_grid:
        stride = image_size // teacher.grid[0]
        raise UserError(
            f"{key}: its {teacher.grid[0]}x{teacher.grid[1]} tokens at {image_size} pixels do not match the student's "
            f"{rows}x{columns} at {student_size}; set {key}.image_size to {stride * rows}, or choose a teacher with "
            f"patches of {student_size // rows} at {student_size} pixels"
        )


def _source(kind: str) -> TeacherSource:
    # Imported late: open_clip and timm are slow to import, and a recipe rarely needs both.
    return cast(TeacherSource, import_module(f"mrmae_ds.teachers.sources.{kind}"))
