"""What a recipe's teachers are, and where they look, before anything is trained.

Shapes: N images, S x S pixels, L tokens on the student's grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mrmae_ds.config.recipe import Recipe
from mrmae_ds.config.sections import TeacherConfig
from mrmae_ds.errors import UserError
from mrmae_ds.figures.plots import attention_grid
from mrmae_ds.figures.select_images import choose_images
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.masking import choose_visible
from mrmae_ds.teachers import Teacher, build_teacher

_USUAL = 8
_AT_ONCE = 8  # images through a teacher


def build_teachers(recipe: Recipe) -> dict[str, Teacher]:
    """Every teacher that a recipe defines, used by a stage or not, by name, on the CPU.

    Raises:
        UserError: if there is none, or one cannot be had or does not fit the student's grid.
    """
    if not recipe.teachers:
        raise UserError(f"recipe {recipe.name} has no teachers")
    size = recipe.model.image_size
    grid = build_encoder(recipe.model.spec(), size).grid
    return {name: build_teacher(name, config, recipe.data, size, grid) for name, config in recipe.teachers.items()}


def describe_teacher(name: str, config: TeacherConfig, teacher: Teacher) -> str:
    """A paragraph of text: what the teacher is, and what was decided while it was built."""
    weights = f", weights {config.weights}" if config.weights else ""
    count = sum(parameter.numel() for parameter in teacher.network.parameters())
    lines = {
        "sha256": teacher.sha256,
        "size": f"{count / 1e6:.2f} M parameters in {str(teacher.dtype).removeprefix('torch.')}",
        "tokens": f"{teacher.grid[0]}x{teacher.grid[1]} of width {teacher.width}, features {config.features}",
        "input": f"{teacher.image_size} pixels, mean {_numbers(teacher.mean)}, std {_numbers(teacher.std)}",
        **teacher.details,
    }
    width = max(map(len, lines))
    body = "\n".join(f"  {topic:{width}}  {words}" for topic, words in lines.items())
    return f"{name}: {config.kind} {config.source}{weights}\n{body}"


@torch.no_grad()
def draw_teachers(
    recipe: Recipe, teachers: dict[str, Teacher], wanted: Sequence[str], out: Path, *, seed: int = 0
) -> str | None:
    """Draw images, where each teacher looks, and the patches that the recipe's masking keeps.

    Args:
        recipe: whose input size, grid and masking these are.
        teachers: of :func:`build_teachers`.
        wanted: image files or folders, or numbers of the recipe's validation set.
        out: the PNG file.
        seed: of the mask.

    Returns:
        What the user should be told of the choice of images, if anything.

    Raises:
        UserError: for images that cannot be read.
    """
    chosen, told = choose_images(recipe.data.val, wanted, None, _USUAL)
    size = recipe.model.image_size
    pixels = chosen.cut(size, size)
    importance = {name: _importance(teacher, pixels) for name, teacher in teachers.items()}
    grid = next(iter(teachers.values())).grid
    visible, how = _keep(recipe, importance, grid, len(pixels), seed)
    attention_grid(
        pixels,
        {
            f"{name}\n{short_source(recipe.teachers[name].source)}": values.unflatten(1, grid)
            for name, values in importance.items()
        },
        visible,
        out,
        captions=chosen.captions,
        title=f"{recipe.name}: where its teachers look",
        legend=[*(f"{name}: {teacher.details['importance']}." for name, teacher in teachers.items()), *how],
    )
    return told


def short_source(source: str) -> str:
    """A teacher's source for a label: a library's name as it is, of a path its last two parts."""
    return "/".join(source.rstrip("/").split("/")[-2:])


def _importance(teacher: Teacher, pixels: Tensor) -> Tensor:
    """[N, 3, S, S] in 0 to 1 to [N, L]."""
    return torch.cat([teacher(part).importance for part in pixels.split(_AT_ONCE)])


def _keep(
    recipe: Recipe, importance: dict[str, Tensor], grid: tuple[int, int], count: int, seed: int
) -> tuple[Tensor | None, list[str]]:
    """1 for patches that are kept, [N, rows, columns], and how they were chosen; None without a pre-training."""
    stage = recipe.stages.pretrain
    if stage is None:
        return None, []
    masking = stage.masking
    noise = torch.rand(count, grid[0] * grid[1], generator=torch.Generator().manual_seed(seed))
    by = importance.get(masking.teacher or "")
    visible = choose_visible(noise, grid, masking.keep_ratio, masking.mode, by)
    source = "" if masking.mode == "random" else f", by {masking.teacher}"
    return 1 - visible.mask.unflatten(1, grid), [f"Patches are kept as the recipe says: {masking.mode}{source}."]


def _numbers(values: Tensor) -> str:
    """A buffer's values, [1, 3, 1, 1], as text."""
    return " ".join(f"{value:.4g}" for value in values.flatten().tolist())
