"""What every kind of teacher is told, taken from its section of the recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from mrmae_ds.config.recipe import DataConfig, TeacherConfig
from mrmae_ds.imagenet import Rgb


@dataclass(frozen=True)
class TeacherOptions:
    """How to build a teacher; see :class:`~mrmae_ds.config.recipe.TeacherConfig` for the keys.

    Attributes:
        key: the recipe key to name in errors, ``teachers.NAME``.
        source: the model's name in its library, or a path.
        image_size: side of the teacher's input in pixels.
        student_grid: rows and columns of the student's tokens, on which the teacher's must lie.
        weights: a tag or local file; None takes those that the source names.
        features: of the last block.
        stage: of a network with feature maps, 0-based; None takes the deepest on the student's grid.
        position_resize: how a position embedding gets to another grid; None decides by the model.
        quickgelu: what the recipe says of CLIP weights that do not say it themselves.
        statistics: mean and std of its input (of pixels in 0 to 1); None takes the model's own.
        dtype: of weights and arithmetic.
    """

    key: str
    source: str
    image_size: int
    student_grid: tuple[int, int]
    weights: str | None = None
    features: Literal["raw", "ln_post", "proj"] = "raw"
    stage: int | None = None
    position_resize: Literal["library", "dino"] | None = None
    quickgelu: bool | None = None
    statistics: tuple[Rgb, Rgb] | None = None
    dtype: torch.dtype = torch.bfloat16

    @classmethod
    def of(
        cls, name: str, config: TeacherConfig, data: DataConfig, student_size: int, student_grid: tuple[int, int]
    ) -> TeacherOptions:
        """The options of a recipe's section; arguments as in :func:`~mrmae_ds.teachers.build_teacher`."""
        statistics = None
        if config.statistics == "student":
            statistics = (data.mean, data.std)
        elif config.mean is not None and config.std is not None:
            statistics = (config.mean, config.std)
        return cls(
            key=f"teachers.{name}",
            source=config.source,
            image_size=config.image_size or student_size,
            student_grid=student_grid,
            weights=config.weights,
            features=config.features,
            stage=config.stage,
            position_resize=config.position_resize,
            quickgelu=config.quickgelu,
            statistics=statistics,
            dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32,
        )
