"""Text report of a recipe's FLOPs: ``mrmae cost``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from mrmae_ds.config.engine import default_recipe, load_engine_config
from mrmae_ds.config.recipe import Recipe, load_recipe
from mrmae_ds.config.stages import TrainStageName
from mrmae_ds.detection.flops import detector_cost, meta_detector
from mrmae_ds.errors import UserError, errors_of
from mrmae_ds.imagenet import IMAGENET_CLASSES, IMAGENET_TRAIN_SAMPLES
from mrmae_ds.models.activation_checkpointing import CheckpointPlan
from mrmae_ds.profiling.flops import COUNTED_STAGES, Flops, StageFlops, recipe_cost
from mrmae_ds.tables.detectors import COCO_2017
from mrmae_ds.units import EXA, GIGA, SECONDS_PER_HOUR, TERA, counted, significant

_COLUMNS = ("forward", "backward", "recomputed", "total")
_NAME_WIDTH, _NUMBER_WIDTH = 28, 12


def describe_cost(
    ds_config: Path,
    recipe: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    num_images: int | None = None,
    tflops: float | None = None,
    gpus: int | None = None,
) -> str:
    """Return the report that ``mrmae cost`` prints.

    Args:
        ds_config: engine config; its activation checkpointing determines the recomputation.
        recipe: default: the one of the same name beside ``ds_config``.
        overrides: ``key.path=value`` for the recipe.
        num_images: number of training images; None is ImageNet-1K's, in ``detect`` COCO's.
        tflops: sustained throughput of a GPU, in TFLOP/s; without it, no hours are reported.
        gpus: number of GPUs, assumed to scale perfectly.

    Raises:
        UserError: for an invalid number, or as :func:`~mrmae_ds.profiling.flops.recipe_cost`.
    """
    _check_numbers(num_images, tflops, gpus)
    path = recipe or default_recipe(ds_config)
    checkpointing = load_engine_config(ds_config).checkpointing
    loaded = load_recipe(path, list(overrides))
    with errors_of(path):
        costs = stage_costs(loaded, checkpointing)
    lines = [
        f"{path} with {ds_config}, {_epochs(costs, num_images)} images per epoch; evaluation is not counted",
        cost_table(costs),
        cost_line(costs, num_images, tflops),
    ]
    if tflops and gpus:
        lines.append(f"{significant(gpu_hours(costs, num_images, tflops) / gpus)} hours on {counted(gpus, 'GPU')}")
    return "\n".join(lines)


def stage_costs(recipe: Recipe, checkpointing: CheckpointPlan, classes: int | None = None) -> list[StageFlops]:
    """Count the FLOPs of a recipe's stages for one image, in order.

    Args:
        recipe: with any training stages.
        checkpointing: the engine config's activation checkpointing.
        classes: of the data set; None is ImageNet-1K's, in ``detect`` COCO's.

    Raises:
        UserError: as :func:`~mrmae_ds.profiling.flops.recipe_cost`.
    """
    stage = recipe.stages.detect
    others = stage is None or any(getattr(recipe.stages, name) for name in COUNTED_STAGES)
    costs = recipe_cost(recipe, checkpointing, classes or IMAGENET_CLASSES) if others else []
    if stage is None:
        return costs
    detector = meta_detector(recipe.model, stage, classes or COCO_2017["classes"])
    return [*costs, detector_cost(detector, stage, checkpointing)]


def epoch_images(stage: TrainStageName, num_images: int | None) -> int:
    """Return the number of training images: ``num_images``, or that of the paper's data set of a stage."""
    return num_images or (COCO_2017["train images"] if stage == "detect" else IMAGENET_TRAIN_SAMPLES)


def cost_table(costs: list[StageFlops]) -> str:
    """Format one line per part, in GFLOP per image."""
    lines = ["GFLOP per image".ljust(_NAME_WIDTH) + "".join(f"{column:>{_NUMBER_WIDTH}}" for column in _COLUMNS)]
    for cost in costs:
        lines += [_line(f"{cost.stage}: {name}", part) for name, part in cost.parts.items()]
        if len(cost.parts) > 1:
            width = _NUMBER_WIDTH * len(_COLUMNS)
            lines.append(f"{cost.stage}, total".ljust(_NAME_WIDTH) + f"{cost.per_image / GIGA:>{width}.2f}")
    return "\n".join(lines)


def cost_line(costs: list[StageFlops], num_images: int | None, tflops: float | None) -> str:
    """Format the whole recipe in one line, as in the recipes' headers; arguments as for :func:`describe_cost`."""
    exa = " + ".join(significant(cost.total(epoch_images(cost.stage, num_images)) / EXA) for cost in costs)
    stages = " + ".join(cost.stage for cost in costs)
    line = f"{exa} exaFLOP ({stages})"
    if tflops is None:
        return line
    return f"{line}, {significant(gpu_hours(costs, num_images, tflops))} GPU-hours at an assumed {tflops:g} TFLOP/s"


def gpu_hours(costs: list[StageFlops], num_images: int | None, tflops: float) -> float:
    """Return the hours of one GPU that sustains ``tflops`` TFLOP/s."""
    total = sum(cost.total(epoch_images(cost.stage, num_images)) for cost in costs)
    return total / (tflops * TERA) / SECONDS_PER_HOUR


def _line(name: str, part: Flops) -> str:
    numbers = (part.forward, part.backward, part.recomputed, part.total)
    return name.ljust(_NAME_WIDTH) + "".join(f"{number / GIGA:>{_NUMBER_WIDTH}.2f}" for number in numbers)


def _epochs(costs: list[StageFlops], num_images: int | None) -> str:
    counts = {cost.stage: epoch_images(cost.stage, num_images) for cost in costs}
    if len(set(counts.values())) > 1:
        return ", ".join(f"{count:,} ({stage})" for stage, count in counts.items())
    return "".join({f"{count:,}" for count in counts.values()})


def _check_numbers(num_images: int | None, tflops: float | None, gpus: int | None) -> None:
    for option, number in {"--num-images": num_images, "--tflops": tflops, "--gpus": gpus}.items():
        if number is not None and not (0 < number < math.inf):
            raise UserError(f"{option} must be above 0, got {number:g}")
    if gpus is not None and tflops is None:
        raise UserError("--gpus: hours need --tflops, the sustained TFLOP/s of one GPU")
