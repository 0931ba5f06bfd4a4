"""A recipe's real model and engine on synthetic images: no data, no weights, no downloads."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch

from mrmae_ds.config.engine import EngineConfig, load_engine_config
from mrmae_ds.config.recipe import DataConfig, Recipe, TeacherConfig
from mrmae_ds.config.stages import TrainStageName
from mrmae_ds.data.loaders.base import Batch
from mrmae_ds.distributed.launch import Launch
from mrmae_ds.imagenet import IMAGENET_CLASSES
from mrmae_ds.teachers import Teacher, build_meta_teacher
from mrmae_ds.training.engine.build import build_engine
from mrmae_ds.training.loop import run_step
from mrmae_ds.training.meter import Meter
from mrmae_ds.training.schedule import StageSchedule
from mrmae_ds.training.step_sync import StepSync
from mrmae_ds.training.tasks.base import Task
from mrmae_ds.training.tasks.build import build_task


def random_teacher(
    name: str, config: TeacherConfig, data: DataConfig, student_size: int, student_grid: tuple[int, int]
) -> Teacher:
    """Build a teacher of the recipe with random weights; same arguments as ``build_teacher``."""
    teacher = build_meta_teacher(name, config, data, student_size, student_grid).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*teacher.parameters(), *teacher.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(std=0.02)
        teacher.mean.fill_(0.5)
        teacher.std.fill_(0.5)
    return teacher


def build_random_task(
    recipe: Recipe, engine_config: EngineConfig, stage_name: TrainStageName, classes: int = IMAGENET_CLASSES
) -> Task[Any]:
    """Build a stage's task with random weights."""
    return build_task(recipe, stage_name, engine_config, classes, teacher_builder=random_teacher)


def noise_batches(count: int, size: int, device: torch.device) -> Iterator[Batch]:
    """Yield the same synthetic batch forever: ``count`` images of ``size`` pixels."""
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, device=device)
    batch = Batch(
        images=images.contiguous(memory_format=torch.channels_last),
        labels=torch.arange(count, device=device),
        indices=torch.arange(count, device=device),
        valid=torch.ones(count, dtype=torch.bool, device=device),
        keys=np.arange(count, dtype=np.uint64),
    )
    while True:
        yield batch


def write_engine_config(folder: Path, name: str, rank: int, content: dict[str, Any]) -> EngineConfig:
    """Write an engine config of this rank into ``folder``, and load it as training does."""
    path = folder / f"{name}-{rank}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return load_engine_config(path)


@dataclass
class NoiseTraining:
    """A stage of a recipe in its engine, training on one noise batch.

    Attributes:
        engine: wraps the task's model.
        task: the stage's task with random weights.
        schedule: steps of one or more micro-batches.
        batches: the images.
        step: optimizer steps so far.
    """

    engine: deepspeed.DeepSpeedEngine
    task: Task[Any]
    schedule: StageSchedule
    batches: Iterator[Batch]
    step: int = 0

    def run(self) -> Meter:
        """Run an optimizer step; return the meter that holds its losses on the device."""
        meter = Meter()
        run_step(self.engine, self.task, self.batches, self.schedule, self.step, meter, StepSync())
        self.step += 1
        return meter

    def seconds(self) -> float:
        """Run an optimizer step; return its seconds with the wait for its losses."""
        began = time.perf_counter()
        self.run().read(self.schedule.launch, self.schedule.micro_batch)
        return time.perf_counter() - began


@contextmanager
def task_engine(
    task: Task[Any], config: EngineConfig, accumulation: int, device: torch.device
) -> Iterator[deepspeed.DeepSpeedEngine]:
    """Build a task's engine; at the end, also after a failure, free the memory of both."""
    engine = build_engine(task.model, task.param_groups(), task.make_optimizer, config, accumulation, device)
    try:
        task.to(device)
        engine.train()
        yield engine
    finally:
        task.release()
        engine.destroy()
        if device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def noise_training(
    recipe: Recipe, config: EngineConfig, launch: Launch, device: torch.device, accumulation: int = 1
) -> Iterator[NoiseTraining]:
    """Build pre-training of a recipe, and free it at the end."""
    torch.manual_seed(0)
    task = build_random_task(recipe, config, "pretrain")
    with task_engine(task, config, accumulation, device) as engine:
        schedule = StageSchedule(recipe.stage("pretrain"), 0, 1000, accumulation, config.micro_batch, launch)
        yield NoiseTraining(engine, task, schedule, noise_batches(config.micro_batch, task.image_size, device))
