"""Preview of a recipe's teachers: architecture summary and attention maps.

Shapes: N images, S x S pixels, L tokens on the student's grid.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mrmae_ds.config.recipe import Recipe
from mrmae_ds.config.sections import TeacherConfig
from mrmae_ds.config.stages import PretrainConfig
from mrmae_ds.errors import UserError
from mrmae_ds.figures.plots import attention_grid
from mrmae_ds.figures.select_images import NUM_IMAGES, select_images
from mrmae_ds.models.masking import TokenMask, VisibleSet
from mrmae_ds.models.sizes import token_grid
from mrmae_ds.teachers import Teacher, build_teacher
from mrmae_ds.teachers.base import TeacherOutput, draw_visible

logger = logging.getLogger(__name__)

CHUNK = 8  # images per forward pass, to limit memory


def build_teachers(recipe: Recipe) -> dict[str, Teacher]:
    """Build every teacher that a recipe defines, used by a stage or not, by name, on the CPU; no moving averages.

    Raises:
        UserError: if there is none, or one cannot be loaded or does not fit the student's grid.
    """
    configs = {name: config for name, config in recipe.teachers.items() if config.kind != "ema"}
    if not configs:
        raise UserError(f"recipe {recipe.name} has no teachers with weights of their own")
    size = recipe.model.image_size
    grid = token_grid(recipe.model.spec(), size)
    return {name: build_teacher(name, config, recipe.data, size, grid) for name, config in configs.items()}


def describe_teacher(name: str, config: TeacherConfig, teacher: Teacher) -> str:
    """Describe a teacher and the decisions made while it was built, as a paragraph of text."""
    weights = f", weights {config.weights}" if config.weights else ""
    count = sum(parameter.numel() for parameter in teacher.network.parameters())
    lines = {
        "sha256": teacher.sha256,
        "size": f"{count / 1e6:.2f} M parameters in {str(teacher.dtype).removeprefix('torch.')}",
        "tokens": f"{teacher.grid[0]}x{teacher.grid[1]} of width {teacher.width}, {_features(config)}",
        "input": f"{teacher.image_size} pixels, mean {_numbers(teacher.mean)}, std {_numbers(teacher.std)}",
        **teacher.details,
    }
    width = max(map(len, lines))
    body = "\n".join(f"  {topic:{width}}  {value}" for topic, value in lines.items())
    return f"{name}: {config.kind} {config.source}{weights}\n{body}"


@torch.no_grad()
def draw_teachers(
    recipe: Recipe,
    teachers: dict[str, Teacher],
    images: Sequence[str],
    out: Path,
    *,
    count: int | None = None,
    seed: int = 0,
) -> None:
    """Draw images, each teacher's attention, and the patches that the recipe's masking keeps.

    Args:
        recipe: with input size, grid and masking.
        teachers: from :func:`build_teachers`.
        images: image files or folders, or numbers of the recipe's validation set.
        out: the PNG file.
        count: number of images of folders; None is eight.
        seed: of the mask.

    Raises:
        UserError: if all teachers see visible tokens only, if no image can be read, and, when the others are drawn, if
            some cannot.
    """
    selection = select_images(recipe.data.val, images, count, NUM_IMAGES)
    if selection.note:
        logger.info(selection.note)
    size = recipe.model.image_size
    pixels = selection.crop(size, size)
    drawn = {name: teacher for name, teacher in teachers.items() if not teacher.sees_visible}
    if not drawn:
        raise UserError(f"no teacher of recipe {recipe.name} sees the whole image, so there is no importance to draw")
    importance = {name: importance_of(teacher, pixels) for name, teacher in drawn.items()}
    grid = next(iter(teachers.values())).grid
    visible, legend = _sample_mask(recipe, importance, grid, len(pixels), seed)
    attention_grid(
        pixels,
        {
            f"{name}\n{short_source(recipe.teachers[name].source)}": values.unflatten(1, grid)
            for name, values in importance.items()
        },
        visible,
        out,
        captions=selection.captions,
        title=f"{recipe.name}: attention of its teachers",
        legend=[*(f"{name}: {teacher.details['importance']}." for name, teacher in drawn.items()), *legend],
    )
    selection.check([out])


def short_source(source: str) -> str:
    """Return a teacher's source for a label: a library's name unchanged, or the last two components of a path."""
    return "/".join(source.rstrip("/").split("/")[-2:])


def importance_of(teacher: Teacher, pixels: Tensor) -> Tensor:
    """Return importance [N, L] for pixels [N, 3, S, S] in [0, 1]."""
    return torch.cat([teacher(part).importance for part in pixels.split(CHUNK)])


def _sample_mask(
    recipe: Recipe, importance: dict[str, Tensor], grid: tuple[int, int], count: int, seed: int
) -> tuple[Tensor | None, list[str]]:
    """Return kept patches as 1, [N, rows, columns], with a legend; None without a pre-training."""
    stage = recipe.stages.pretrain
    if stage is None or stage.masking is None:
        return None, []
    masking = stage.masking
    visible = sample_mask(stage, importance, grid, recipe.model.spec().stride, count, seed)
    source = "" if masking.teacher is None else f", by {masking.teacher}"
    return 1 - visible.mask.unflatten(1, grid), [f"Patches are kept by the recipe's masking: {masking.mode}{source}."]


def sample_mask(
    stage: PretrainConfig, importance: Mapping[str, Tensor], grid: tuple[int, int], stride: int, count: int, seed: int
) -> VisibleSet | TokenMask:
    """Draw the masks of images as a pre-training does.

    Args:
        stage: the pre-training.
        importance: of the patches [N, L], by the teacher's name.
        grid: rows and columns of tokens.
        stride: side of a token in pixels.
        count: N, number of images.
        seed: of the masks.
    """
    rows, columns = grid if stage.masking is None else stage.masking.grid(grid, stride)
    noise = torch.rand(count, rows * columns, generator=torch.Generator().manual_seed(seed))
    outputs = {name: TeacherOutput(values, values) for name, values in importance.items()}
    return draw_visible(stage, outputs, noise, grid, stride)


def _features(config: TeacherConfig) -> str:
    """Describe the features, the blocks that they are of, and the tokens that are computed."""
    layers = "" if config.layers is None else f" of block {', '.join(map(str, config.layers))}"
    return f"features {config.features}{layers}" + (", visible tokens only" if config.sees == "visible" else "")


def _numbers(values: Tensor) -> str:
    """Format a buffer's values, [1, 3, 1, 1]."""
    return " ".join(f"{value:.4g}" for value in values.flatten().tolist())
