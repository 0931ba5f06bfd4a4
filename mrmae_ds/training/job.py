"""One stage of one recipe, resolved and checked before any process group or GPU is taken."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mrmae_ds.config.engine import (
    EngineConfig,
    accumulation_steps,
    check_paired,
    check_ranks,
    default_recipe,
    load_engine_config,
    validate_sections,
)
from mrmae_ds.config.recipe import Recipe, load_recipe
from mrmae_ds.config.stages import (
    EvaluateConfig,
    FinetuneConfig,
    PretrainConfig,
    ProbeConfig,
    StageConfig,
    StageName,
)
from mrmae_ds.data.beton.sidecar import BetonInfo, check_beton
from mrmae_ds.data.loaders.build import check_backend
from mrmae_ds.data.loaders.sampler import steps_per_epoch
from mrmae_ds.data.node_cache import cache_all
from mrmae_ds.distributed.launch import Launch
from mrmae_ds.errors import UserError
from mrmae_ds.factory import build_pretraining
from mrmae_ds.training.checkpoint.manifest import RunIdentity
from mrmae_ds.training.checkpoint.run_dir import RunStart, decide_start
from mrmae_ds.training.loop import StageSchedule
from mrmae_ds.training.tasks.base import FinetuneTask, PretrainTask
from mrmae_ds.training.tasks.linear_probe import ProbeTask
from mrmae_ds.weights.load import build_encoder, find_weights, init_classifier, load_encoder, load_pretrained

TrainedStage = PretrainConfig | FinetuneConfig | ProbeConfig


@dataclass(frozen=True)
class TrainArgs:
    """The command line of train.py.

    Attributes:
        ds_config: engine config; the recipe of the same name beside it is the default recipe.
        stage: which stage of the recipe.
        recipe: another recipe. run: the run's folder, by default runs/NAME.
        resume: ``auto``, ``never`` or a checkpoint folder.
        overrides: ``key.path=value``.
        dry_run: two real steps, nothing written.
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
        """The recipe's file. Raises UserError if none is named and none is beside the engine config."""
        return self.recipe or default_recipe(self.ds_config)

    def stage_dir(self, recipe: Recipe) -> Path:
        """The folder of the stage in the run's."""
        return (self.run or Path("runs") / recipe.name) / self.stage


@dataclass(frozen=True)
class PreparedStage:
    """Everything a training stage needs, on the CPU of this process; see :func:`prepare_stage`."""

    recipe: Recipe
    stage_name: StageName
    engine_config: EngineConfig
    plan: StageSchedule
    stage_dir: Path
    identity: RunIdentity
    start: RunStart
    train_data: BetonInfo
    val_data: BetonInfo
    task: PretrainTask | FinetuneTask | ProbeTask
    image_size: int
    init: Path | None
    report: str

    @property
    def stage(self) -> StageConfig:
        """The stage's section of the recipe."""
        return self.plan.stage


def load_configs(options: TrainArgs) -> tuple[Recipe, EngineConfig]:
    """Both configuration files, validated.

    Raises:
        UserError: naming file and key.
    """
    engine_config = load_engine_config(options.ds_config)
    return load_recipe(options.recipe_path, list(options.overrides)), engine_config


def prepare_stage(options: TrainArgs, launch: Launch) -> PreparedStage:
    """Resolve, check, build model and teachers on the CPU, for a stage that trains, and stage its data on this node.

    Raises:
        UserError: for anything a user can mend: a missing data file, a batch that does not divide, an image size that
            the patches do not tile, a teacher that does not fit, weights that are not there, too small a node's disk.
    """
    recipe, engine_config = load_configs(options)
    stage = recipe.stage(options.stage)
    if isinstance(stage, EvaluateConfig):
        raise ValueError("evaluating trains nothing; see training/evaluation/evaluate.py")
    validate_sections(engine_config)
    for backend in {recipe.data.backend, recipe.data.val_backend}:
        check_backend(backend)
    stage_dir = options.stage_dir(recipe)
    check_ranks(engine_config, launch.world_size, launch.local_size)
    accumulation = accumulation_steps(engine_config, stage.batch_size, launch.world_size, str(options.recipe_path))
    train_data, val_data = check_beton(recipe.data.train), check_beton(recipe.data.val)
    if train_data.class_names != val_data.class_names:
        raise UserError(
            f"data.train and data.val: {train_data.path} and {val_data.path} name different classes "
            f"({train_data.num_classes} and {val_data.num_classes}); write both from the same tree"
        )
    plan = StageSchedule(
        stage=stage,
        seed=recipe.seed,
        steps_per_epoch=steps_per_epoch(train_data.num_samples, stage.batch_size),
        accumulation=accumulation,
        micro_batch=engine_config.micro_batch,
        launch=launch,
    )
    torch.manual_seed(recipe.seed)
    init = _init_file(stage, stage_dir)
    image_size = recipe.model.image_size
    task: PretrainTask | FinetuneTask | ProbeTask
    if isinstance(stage, PretrainConfig):
        task, report = _pretrain_task(recipe, stage, init)
    elif isinstance(stage, ProbeConfig):
        image_size = stage.image_size or image_size
        task, report = _probe_task(recipe, stage, engine_config, image_size, train_data.num_classes, init)
        engine_config = engine_config.for_probe()
    else:
        image_size = stage.image_size or image_size
        task, report = _finetune_task(recipe, stage, engine_config, image_size, train_data.num_classes, init)
    identity = RunIdentity(
        recipe_hash=recipe.hash(options.stage),
        seed=recipe.seed,
        train=train_data.sha256,
        val=val_data.sha256,
        teachers={name: teacher.sha256 for name, teacher in task.teachers.items()},
        recipe=recipe.counted(options.stage),
    )
    start = RunStart("fresh") if options.dry_run else decide_start(stage_dir, options.stage, identity, options.resume)
    _cache_data(recipe, stage, start)
    return PreparedStage(
        recipe=recipe,
        stage_name=options.stage,
        engine_config=engine_config,
        plan=plan,
        stage_dir=stage_dir,
        identity=identity,
        start=start,
        train_data=train_data,
        val_data=val_data,
        task=task,
        image_size=image_size,
        init=init,
        report=report,
    )


def _cache_data(recipe: Recipe, stage: TrainedStage, start: RunStart) -> None:
    """Copy the data sets that the stage reads to this node if the recipe names a cache."""
    if start.action != "done":
        evaluates = not isinstance(stage, PretrainConfig) or stage.knn is not None
        read = [recipe.data.train, recipe.data.val] if evaluates else [recipe.data.train]
        cache_all(read, recipe.loader.cache_dir)


def _init_file(stage: TrainedStage, stage_dir: Path) -> Path | None:
    """The weights to start from; None for random ones."""
    if isinstance(stage, PretrainConfig):
        return None if stage.init is None else find_weights(Path(stage.init), "stages.pretrain.init")
    if stage.init == "scratch":
        return None
    source = stage_dir.parent / "pretrain" if stage.init == "pretrain" else Path(stage.init)
    return find_weights(source, f"stages.{stage_dir.name}.init")


def _pretrain_task(recipe: Recipe, stage: PretrainConfig, init: Path | None) -> tuple[PretrainTask, str]:
    model, teachers = build_pretraining(recipe, stage)
    report = f"{init}: {load_pretrained(model, init, 'stages.pretrain.init')}" if init else ""
    return PretrainTask(model, teachers, stage, recipe.data), report


def _finetune_task(
    recipe: Recipe,
    stage: FinetuneConfig,
    engine_config: EngineConfig,
    image_size: int,
    num_classes: int,
    init: Path | None,
) -> tuple[FinetuneTask, str]:
    check_paired(engine_config, stage.pairs)
    model = build_encoder(recipe.model.spec(), image_size, num_classes, stage.drop_path, stage.pool)
    init_classifier(model)
    report = f"{init}: {load_encoder(model, init, 'stages.finetune.init')}" if init else "random weights"
    return FinetuneTask(model, stage, recipe.data, num_classes, engine_config.model_dtype), report


def _probe_task(
    recipe: Recipe,
    stage: ProbeConfig,
    engine_config: EngineConfig,
    image_size: int,
    num_classes: int,
    init: Path | None,
) -> tuple[ProbeTask, str]:
    encoder = build_encoder(recipe.model.spec(), image_size, num_classes)
    init_classifier(encoder)
    report = f"{init}: {load_encoder(encoder, init, 'stages.probe.init')}" if init else "random weights"
    return ProbeTask(encoder, stage, recipe.data, num_classes, engine_config), report
