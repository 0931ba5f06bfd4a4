"""Preparation of a stage: everything is resolved and checked before a process group or a GPU is used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import deepspeed
import torch

from mrmae_ds.config.engine import (
    EngineConfig,
    accumulation_steps,
    check_ranks,
    default_recipe,
    load_engine_config,
    validate_sections,
)
from mrmae_ds.config.recipe import Recipe, load_recipe
from mrmae_ds.config.stages import StageConfig, StageName, TrainStageName
from mrmae_ds.data.loaders.base import Loader, LoaderRequest
from mrmae_ds.data.loaders.sampler import steps_per_epoch
from mrmae_ds.distributed.launch import Launch
from mrmae_ds.errors import UserError
from mrmae_ds.training.callbacks.build import check_optional_callbacks
from mrmae_ds.training.checkpoint.async_saver import AsyncCheckpointer, OnCommit
from mrmae_ds.training.checkpoint.folder import Retention
from mrmae_ds.training.checkpoint.manifest import RunIdentity
from mrmae_ds.training.checkpoint.run_dir import RunStart, decide_start
from mrmae_ds.training.engine.build import check_leaf_modules
from mrmae_ds.training.evaluation.base import DataSet
from mrmae_ds.training.schedule import StageSchedule
from mrmae_ds.training.tasks.base import Task
from mrmae_ds.training.tasks.build import build_task, task_class
from mrmae_ds.weights.paths import weights_sha256


@dataclass(frozen=True)
class TrainArgs:
    """Command line of train.py.

    Attributes:
        ds_config: engine config; the recipe of the same name beside it is the default recipe.
        stage: stage of the recipe.
        recipe: another recipe.
        run: folder of the run; None is runs/NAME.
        resume: ``auto``, ``never`` or a checkpoint folder.
        overrides: ``key.path=value`` strings.
        dry_run: run two steps and write nothing.
    """

    ds_config: Path
    stage: StageName = "pretrain"
    recipe: Path | None = None
    run: Path | None = None
    resume: str = "auto"
    overrides: tuple[str, ...] = ()
    dry_run: bool = False

    @property
    def recipe_path(self) -> Path:
        """Path of the recipe.

        Raises:
            UserError: if none is named and none is beside the engine config.
        """
        return self.recipe or default_recipe(self.ds_config)

    def stage_dir(self, recipe: Recipe) -> Path:
        """Return the stage's folder in the run's."""
        return (self.run or Path("runs") / recipe.name) / self.stage


@dataclass(frozen=True)
class PreparedStage:
    """A training stage on the CPU of this rank, ready to run.

    Attributes:
        recipe: resolved recipe.
        stage_name: name of the stage.
        engine_config: engine config from which the task's engine is built.
        schedule: step counts and learning rates.
        stage_dir: output folder.
        identity: everything that must be equal for a run to be resumed.
        start: whether to start, resume, or do nothing.
        train_data: training set.
        val_data: validation set.
        task: model, teachers and losses.
    """

    recipe: Recipe
    stage_name: StageName
    engine_config: EngineConfig
    schedule: StageSchedule
    stage_dir: Path
    identity: RunIdentity
    start: RunStart
    train_data: DataSet
    val_data: DataSet
    task: Task[Any]

    @property
    def stage(self) -> StageConfig:
        """The stage's section of the recipe."""
        return self.schedule.stage

    @property
    def launch(self) -> Launch:
        """This rank among the others."""
        return self.schedule.launch

    @property
    def train_request(self) -> LoaderRequest:
        """This rank's batches of the training set."""
        return LoaderRequest(
            split="train",
            image_size=self.task.image_size,
            micro_batch=self.schedule.micro_batch,
            seed=self.recipe.seed,
            transform=self.task.transform,
            accumulation=self.schedule.accumulation,
            world_size=self.launch.world_size,
            rank=self.launch.rank,
        )

    def train_loader(self, device: torch.device) -> Loader[Any]:
        """Open this rank's share of the training set.

        Args:
            device: device of the batches.
        """
        return self.task.train_loader(self.recipe, self.train_data, self.train_request, device)

    def checkpointer(
        self, engine: deepspeed.DeepSpeedEngine, retention: Retention, committed: OnCommit
    ) -> AsyncCheckpointer:
        """Return the writer of the stage's checkpoints.

        Args:
            engine: built from ``engine_config``.
            retention: of older checkpoints.
            committed: called with folder, step and results of each checkpoint once it is committed.
        """
        background = self.recipe.checkpoint.async_save
        micro_batch = self.schedule.micro_batch
        return AsyncCheckpointer(engine, self.stage_dir, self.identity, retention, micro_batch, background, committed)


def load_configs(args: TrainArgs) -> tuple[Recipe, EngineConfig]:
    """Load and validate both configuration files.

    Raises:
        UserError: naming file and key.
    """
    engine_config = load_engine_config(args.ds_config)
    validate_sections(engine_config)
    return load_recipe(args.recipe_path, list(args.overrides)), engine_config


def prepare_stage(args: TrainArgs, launch: Launch) -> PreparedStage:
    """Resolve and check a training stage, build its task on the CPU, and copy its data to this node's cache.

    Args:
        args: command line.
        launch: this rank among the others.

    Raises:
        UserError: for everything that the user can fix: a missing data file, a batch that does not divide, an image
            size that the patches do not tile, a teacher that does not fit, missing weights, a full disk or /dev/shm, a
            dry run of a single step, a leaf module that the model does not have.
    """
    recipe, engine_config = load_configs(args)
    check_optional_callbacks(recipe)
    stage_name = cast(TrainStageName, args.stage)
    stage = recipe.stage(stage_name)
    stage_dir = args.stage_dir(recipe)
    check_ranks(engine_config, launch.world_size, launch.local_size)
    accumulation = accumulation_steps(engine_config, stage.batch_size, launch.world_size, str(args.recipe_path))
    train_data, val_data = task_class(stage_name).open_data(recipe)
    schedule = StageSchedule(
        stage=stage,
        seed=recipe.seed,
        steps_per_epoch=steps_per_epoch(train_data.num_samples, stage.batch_size),
        accumulation=accumulation,
        micro_batch=engine_config.micro_batch,
        launch=launch,
    )
    if args.dry_run and schedule.total_steps < 2:
        raise UserError(
            f"--dry-run runs two steps, and stages.{stage_name} has one; raise its epochs or lower its batch_size"
        )
    torch.manual_seed(recipe.seed)
    task = build_task(recipe, stage_name, engine_config, train_data.num_classes, stage_dir.parent)
    engine_config = task.adapt_engine_config(engine_config)
    check_leaf_modules(task.model, engine_config)
    identity = RunIdentity(
        recipe_hash=recipe.hash(args.stage),
        seed=recipe.seed,
        train=train_data.sha256,
        val=val_data.sha256,
        teachers={name: teacher.sha256 for name, teacher in task.teachers.items()},
        init=weights_sha256(task.init) if task.init else "",
        recipe=recipe.counted(args.stage),
    )
    start = RunStart("fresh") if args.dry_run else decide_start(stage_dir, args.stage, identity, args.resume)
    job = PreparedStage(
        recipe=recipe,
        stage_name=args.stage,
        engine_config=engine_config,
        schedule=schedule,
        stage_dir=stage_dir,
        identity=identity,
        start=start,
        train_data=train_data,
        val_data=val_data,
        task=task,
    )
    if start.action != "done":
        task.prepare_data(recipe, job.train_request)
    return job
