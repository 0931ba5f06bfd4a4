"""Options of a teacher, taken from its section of the recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from mrmae_ds.config.recipe import DataConfig, TeacherConfig
from mrmae_ds.errors import UserError
from mrmae_ds.imagenet import Rgb


@dataclass(frozen=True)
class TeacherOptions:
    """Options for building a teacher; :class:`~mrmae_ds.config.recipe.TeacherConfig` documents the recipe keys.

    Attributes:
        key: recipe key to name in errors, ``teachers.NAME``.
        source: name of the model in its library, or a path.
        image_size: side of the teacher's input in pixels.
        student_grid: rows and columns of the student's tokens, which the teacher's must match.
        weights: tag or local file; None uses the weights that the source names.
        features: features of the last block.
        stage: stage of a network with feature maps, 0-based; None uses the deepest one on the student's grid.
        position_resize: method for resizing the position embedding; None decides by the model.
        quickgelu: the recipe's statement about CLIP weights that do not record their GELU.
        statistics: mean and std of the input (of pixels in [0, 1]); None uses the model's own.
        dtype: of weights and arithmetic.
        layers: blocks whose outputs are the targets, 0-based; empty is the last one.
        sees_visible: it computes the student's visible tokens only.
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
    layers: tuple[int, ...] = ()
    sees_visible: bool = False

    @classmethod
    def from_config(
        cls, name: str, config: TeacherConfig, data: DataConfig, student_size: int, student_grid: tuple[int, int]
    ) -> TeacherOptions:
        """Return the options of a recipe section.

        Args:
            name: key under ``teachers`` in the recipe.
            config: the recipe section of that key.
            data: the recipe's data section.
            student_size: side of the student's input in pixels.
            student_grid: rows and columns of the student's token grid.
        """
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
            layers=config.layers or (),
            sees_visible=config.sees == "visible",
        )

    def check_layers(self, depth: int) -> None:
        """Check that the layers exist in a network of ``depth`` blocks.

        Raises:
            UserError: naming the recipe key.
        """
        missing = [layer for layer in self.layers if layer >= depth]
        if missing:
            raise UserError(f"{self.key}.layers: {self.source} has no block {missing[0]}; it has 0 to {depth - 1}")

    def check_tiles(self, patch: int) -> None:
        """Check that patches tile the image; libraries would silently ignore the remaining pixels.

        Args:
            patch: side of a patch in pixels.

        Raises:
            UserError: naming the recipe key and the size at which the tokens match the student's.
        """
        if self.image_size % patch:
            rows, columns = self.student_grid
            raise UserError(
                f"{self.key}.image_size: patches of {patch} do not tile {self.image_size} pixels; use {rows * patch}, "
                f"which gives the student's {rows}x{columns} tokens"
            )
