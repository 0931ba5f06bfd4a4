"""Expand a pipeline to its jobs, one stage of one recipe with one seed each, and find their dependencies.

A job depends on the stage that it starts from (``init``), learns from (a teacher that is a run) or evaluates
(``members``). Recipes name those as ``runs/NAME/STAGE``. Where a recipe of the pipeline has that name, the path is
replaced by that of the run with the job's own seed in the pipeline's runs folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from mrmae_ds.config.engine import default_recipe
from mrmae_ds.config.files import apply_overrides
from mrmae_ds.config.recipe import Recipe, StagesConfig, load_recipe
from mrmae_ds.config.stages import EvaluateConfig, StageName
from mrmae_ds.errors import UserError
from mrmae_ds.pipeline.config import PipelineConfig, PipelineRun, to_overrides
from mrmae_ds.weights.paths import HUB, find_weights

RUNS = Path("runs")
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class PipelineJob:
    """One stage of one recipe with one seed.

    Attributes:
        run: name of the run's folder.
        stage: stage of the recipe.
        stage_dir: folder of the stage.
        config: engine config.
        recipe_path: recipe file.
        overrides: ``key.path=value`` strings for the recipe.
        recipe: the resolved recipe.
        dependencies: keys of the jobs that must finish first.
        nodes: number of nodes of its Slurm job; None if the pipeline does not set it.
        absent: a problem for each source that is neither a job of the pipeline nor a file or run on disk; it names
            recipe, key and fix.
    """

    run: str
    stage: StageName
    stage_dir: Path
    config: Path
    recipe_path: Path
    overrides: tuple[str, ...]
    recipe: Recipe
    dependencies: tuple[str, ...]
    nodes: int | None = None
    absent: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Its name in the pipeline: RUN/STAGE."""
        return f"{self.run}/{self.stage}"

    @property
    def arguments(self) -> list[str]:
        """Arguments of train.py after the engine config."""
        options = ["--recipe", str(self.recipe_path), "--stage", self.stage, "--run", str(self.stage_dir.parent)]
        return [*options, *self.overrides]


@dataclass
class _Draft:
    """A run of the pipeline with one seed, before paths to other runs are resolved."""

    run: PipelineRun
    folder_name: str
    config: Path
    recipe_path: Path
    overrides: tuple[str, ...]
    recipe: Recipe
    stages: tuple[StageName, ...]


def build_jobs(
    pipeline: PipelineConfig, root: Path = RUNS, seeds: Sequence[int] | None = None, overrides: Sequence[str] = ()
) -> list[PipelineJob]:
    """Build all jobs, each after those that it depends on.

    Args:
        pipeline: the recipes.
        root: folder of all runs.
        seeds: seeds to run every recipe with; None uses the recipe's own. A run whose seed is not its recipe's is
            named NAME-seedN.
        overrides: ``key.path=value`` strings for every recipe.

    Raises:
        UserError: for a recipe that cannot be read, two runs of one name, or jobs that depend on each other. Sources
            that do not exist are those of :func:`refuse_absent_sources`.
    """
    common = _CommonOverrides(pipeline, overrides)
    requested: Sequence[int | None] = seeds or [None]
    drafts = [_draft(pipeline, run, seed, common) for run in pipeline.runs for seed in requested]
    if common.unused:
        raise UserError(f"pipeline {pipeline.name}: no recipe has the section of {sorted(common.unused)[0]}")
    names: set[str] = set()
    for draft in drafts:
        if draft.folder_name in names:
            raise UserError(
                f"pipeline {pipeline.name}: two runs would write to {root / draft.folder_name}; rename one with "
                "set: {name: ...}"
            )
        names.add(draft.folder_name)
    jobs = [_job(draft, stage, drafts, root, pipeline) for draft in drafts for stage in draft.stages]
    return _sort(jobs, pipeline.name)


def refuse_absent_sources(jobs: Iterable[PipelineJob]) -> None:
    """Check that all that jobs start from, learn from or evaluate exists or is a job of the pipeline.

    Args:
        jobs: those to start.

    Raises:
        UserError: naming job, recipe, key, source and fix.
    """
    for job in jobs:
        if job.absent:
            raise UserError(f"{job.key}: {job.absent[0]}; other runs of the pipeline: --only RUN")


def _draft(pipeline: PipelineConfig, run: PipelineRun, seed: int | None, common: _CommonOverrides) -> _Draft:
    config = run.config or pipeline.config
    assert config is not None  # PipelineConfig checks it
    config = _locate(config)
    path = _locate(run.recipe) if run.recipe else default_recipe(config)
    overrides = common.merge(path, pipeline.run_overrides(run))
    recipe = load_recipe(path, overrides)
    folder_name = recipe.name
    if seed is not None and seed != recipe.seed:
        overrides.append(f"seed={seed}")
        recipe, folder_name = load_recipe(path, overrides), f"{recipe.name}-seed{seed}"
    requested = run.stages or pipeline.stages
    stages = tuple(stage for stage in requested if getattr(recipe.stages, stage) is not None)
    return _Draft(run, folder_name, config, path, tuple(overrides), recipe, stages)


def _locate(path: Path) -> Path:
    """Return the path of a configuration file, in the repository if it is not in the working directory."""
    in_repository = REPOSITORY / path
    return in_repository if not path.exists() and in_repository.exists() else path


class _CommonOverrides:
    """Overrides of every recipe of a pipeline, each applied to the recipes that have the section that it changes."""

    def __init__(self, pipeline: PipelineConfig, given: Sequence[str]) -> None:
        self.first, self.last = tuple(to_overrides(pipeline.set)), tuple(given)
        self.unused = {*self.first, *self.last}

    def merge(self, path: Path, own: Sequence[str]) -> list[str]:
        """Return all overrides of one recipe in order: the pipeline's, its own, the command line's."""
        raw = apply_overrides(load_recipe(path).model_dump(mode="json"), own, path)
        first, last = ([text for text in texts if _applies(text, raw)] for texts in (self.first, self.last))
        self.unused -= {*first, *last}
        return [*first, *own, *last]


def _applies(override: str, recipe: dict[str, Any]) -> bool:
    """Return True unless an override changes a stage or a teacher that the recipe does not have."""
    section, *names = override.partition("=")[0].split(".")
    if section not in ("stages", "teachers") or not names:
        return True
    if section == "stages" and names[0] not in StagesConfig.model_fields:
        return True  # load_recipe reports the unknown stage
    return (recipe.get(section) or {}).get(names[0]) is not None


def _job(
    draft: _Draft, stage: StageName, drafts: Sequence[_Draft], root: Path, pipeline: PipelineConfig
) -> PipelineJob:
    dependencies: list[str] = []
    paths: dict[str, str] = {}
    outside: dict[str, str] = {}
    for key, source in _sources(draft.recipe, stage):
        if source in ("pretrain", "finetune"):  # a stage of the same run
            if source in draft.stages:
                dependencies.append(f"{draft.folder_name}/{source}")
            else:
                outside[key] = str(root / draft.folder_name / source)
            continue
        other = _find_job(source, draft, drafts)
        if other is None:
            outside[key] = source
            continue
        dependencies.append(other)
        if (path := str(root / other)) != source:
            paths[key] = path
    overrides = (*draft.overrides, *_path_overrides(draft.recipe, paths))
    return PipelineJob(
        run=draft.folder_name,
        stage=stage,
        stage_dir=root / draft.folder_name / stage,
        config=draft.config,
        recipe_path=draft.recipe_path,
        overrides=overrides,
        recipe=load_recipe(draft.recipe_path, list(overrides)),
        dependencies=tuple(dict.fromkeys(dependencies)),
        nodes=1 if stage == "evaluate" else draft.run.nodes or pipeline.nodes,
        absent=tuple(_absent(outside, draft.recipe_path)),
    )


def _sources(recipe: Recipe, stage: StageName) -> Iterator[tuple[str, str]]:
    """Yield the keys and values by which a stage names other stages: a path, or the name of a stage of its own run."""
    config = recipe.stage(stage)
    init = getattr(config, "init", None)
    if init not in (None, "scratch"):
        yield f"stages.{stage}.init", init
    for name in getattr(config, "teachers", ()):
        if recipe.teachers[name].kind == "checkpoint":
            yield f"teachers.{name}.source", recipe.teachers[name].source
    if isinstance(config, EvaluateConfig):
        for number, member in enumerate(config.members or ()):
            yield f"stages.{stage}.members.{number}", member
        if config.members is None:
            yield f"stages.{stage}.members", "finetune"


def _find_job(source: str, draft: _Draft, drafts: Sequence[_Draft]) -> str | None:
    """Return the key of the job that ``runs/NAME/STAGE`` means: the recipe of that name with the same seed."""
    parts = Path(source).parts
    if len(parts) != 3 or parts[0] != RUNS.name:
        return None
    for other in drafts:
        if other.recipe.name == parts[1] and other.recipe.seed == draft.recipe.seed and parts[2] in other.stages:
            return f"{other.folder_name}/{parts[2]}"
    return None


def _absent(sources: Mapping[str, str], recipe: Path) -> Iterator[str]:
    """Yield the problems of sources, by key, that are not on disk; those of a hub are left to the job."""
    for key, source in sources.items():
        try:
            if not source.startswith(HUB):
                find_weights(Path(source), key)
        except UserError as error:
            yield f"{recipe}: {error}"


def _path_overrides(recipe: Recipe, paths: dict[str, str]) -> Iterator[str]:
    """Yield overrides for the resolved sources, by key; a list is replaced as a whole."""
    members = {int(key.rpartition(".")[2]): path for key, path in paths.items() if ".members." in key}
    for key, path in paths.items():
        if ".members." not in key:
            yield f"{key}={path}"
    if members:
        named = recipe.stages.evaluate.members or ()
        yield f"stages.evaluate.members={json.dumps([members.get(n, member) for n, member in enumerate(named)])}"


def _sort(jobs: list[PipelineJob], pipeline: str) -> list[PipelineJob]:
    """Sort jobs topologically; of those that are ready, the first in the file comes first."""
    position = {job.key: number for number, job in enumerate(jobs)}
    sorter = TopologicalSorter({job.key: job.dependencies for job in jobs})
    try:
        sorter.prepare()
    except CycleError as error:
        raise UserError(f"pipeline {pipeline}: jobs depend on each other: {' -> '.join(error.args[1])}") from None
    ready: set[str] = set()
    order: list[PipelineJob] = []
    while sorter.is_active():
        ready |= set(sorter.get_ready())
        key = min(ready, key=position.__getitem__)
        ready.remove(key)
        sorter.done(key)
        order.append(jobs[position[key]])
    return order
