"""Factory of tasks, the one place that maps a stage's name to its task, and of their engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import deepspeed
import torch

from mrmae_ds.config.engine import EngineConfig
from mrmae_ds.config.recipe import Recipe
from mrmae_ds.config.stages import TrainStageName
from mrmae_ds.factory import TeacherBuilder
from mrmae_ds.teachers import build_teacher
from mrmae_ds.training.engine.build import build_engine
from mrmae_ds.training.tasks.base import Task
from mrmae_ds.training.tasks.finetune import FinetuneTask
from mrmae_ds.training.tasks.linear_probe import ProbeTask
from mrmae_ds.training.tasks.pretrain import PretrainTask

TASKS: dict[TrainStageName, type[Task[Any]]] = {
    task.stage_name: cast(type[Task[Any]], task) for task in (PretrainTask, FinetuneTask, ProbeTask)
}


def task_class(stage_name: TrainStageName) -> type[Task[Any]]:
    """Return the class of a stage's task.

    Raises:
        UserError: if the stage needs a package that is not installed.
        KeyError: if the stage trains nothing.
    """
    if stage_name == "detect":
        from mrmae_ds.training.tasks.detect import DetectTask  # needs pycocotools, an extra

        return DetectTask
    return TASKS[stage_name]


def build_task(
    recipe: Recipe,
    stage_name: TrainStageName,
    engine_config: EngineConfig,
    num_classes: int,
    run_dir: Path | None = None,
    teacher_builder: TeacherBuilder = build_teacher,
) -> Task[Any]:
    """Build the task of a training stage on the CPU, with weights drawn from torch's global generator or loaded.

    Args:
        recipe: recipe of the run.
        stage_name: stage to train.
        engine_config: engine config, for the precision of what the engine does not own.
        num_classes: classes of the training data.
        run_dir: folder of the run, in which ``init: pretrain`` is found; None leaves the weights random whatever
            ``init`` is.
        teacher_builder: function with the signature of :func:`~mrmae_ds.teachers.build_teacher`.

    Raises:
        UserError: if the recipe does not have the stage, the weights or a teacher cannot be loaded, the patches do not
            tile the image, or the micro-batch is odd where images are mixed in pairs.
        KeyError: if the stage trains nothing.
    """
    config = recipe.stage(stage_name)
    return task_class(stage_name).from_recipe(recipe, config, engine_config, num_classes, run_dir, teacher_builder)


def build_task_engine(
    task: Task[Any], config: EngineConfig, accumulation: int, device: torch.device
) -> deepspeed.DeepSpeedEngine:
    """Wrap a task's model for training, and move what the engine does not own to the device. All ranks must call it.

    Args:
        task: on the CPU.
        config: engine config.
        accumulation: micro-batches per step.
        device: of this rank.
    """
    engine = build_engine(task.model, task.param_groups(), task.make_optimizer, config, accumulation, device)
    task.to(device)
    engine.train()
    return engine
