"""From a chain to its links: one stage of one recipe with one seed each, and which other links each waits for.

A link waits for what its stage starts from (``init``), learns from (a teacher that is a run) or evaluates
(``members``). Recipes name those as ``runs/NAME/STAGE``; where a recipe of the chain has that name, the link's own seed
and the chain's folder of runs take their place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mrmae_ds.config.engine import default_recipe
from mrmae_ds.config.files import apply_overrides
from mrmae_ds.config.recipe import Recipe, load_recipe
from mrmae_ds.config.stages import PretrainConfig, StageName, StagesConfig
from mrmae_ds.errors import UserError
from mrmae_ds.pipeline.config import PipelineConfig, PipelineRun, assignments
from mrmae_ds.weights.load import MODEL_FILE

RUNS = Path("runs")
STAGES_FROM_WEIGHTS = ("finetune", "probe")


@dataclass(frozen=True)
class PipelineJob:
    """One stage of one recipe with one seed.

    Attributes:
        run: name of the run's folder. stage: of the recipe. folder: of the stage.
        config, recipe_path, overrides: train.py's arguments. recipe: what they say.
        needs: keys of the links that must have finished before.
        nodes: of its Slurm job, if the chain says.
    """

    run: str
    stage: StageName
    folder: Path
    config: Path
    recipe_path: Path
    overrides: tuple[str, ...]
    recipe: Recipe
    needs: tuple[str, ...]
    nodes: int | None = None

    @property
    def key(self) -> str:
        """Its name in the chain: RUN/STAGE."""
        return f"{self.run}/{self.stage}"

    @property
    def arguments(self) -> list[str]:
        """What train.py is told after its engine config."""
        told = ["--recipe", str(self.recipe_path), "--stage", self.stage, "--run", str(self.folder.parent)]
        return [*told, *self.overrides]


@dataclass
class _Draft:
    """A run of the chain with one seed, before paths to other runs are settled."""

    run: PipelineRun
    name: str
    folder_name: str
    config: Path
    recipe_path: Path
    overrides: tuple[str, ...]
    recipe: Recipe
    stages: tuple[StageName, ...] = field(default=())


def build_jobs(
    chain: PipelineConfig, root: Path = RUNS, seeds: Sequence[int] | None = None, overrides: Sequence[str] = ()
) -> list[PipelineJob]:
    """All links in an order in which each comes after those that it needs.

    Args:
        chain: which recipes.
        root: the folder of all runs.
        seeds: every recipe once with each; None is the seed that it says. A run with another seed than its recipe's is
            called NAME-seedN.
        overrides: further changes to every recipe.

    Raises:
        UserError: for a recipe that cannot be read, two of one name, a stage that is named but is neither in the chain
            nor there already, or links that wait for each other.
    """
    wanted: Sequence[int | None] = seeds or [None]
    common = _Common(chain, overrides)
    drafts = [_draft(chain, run, seed, common) for run in chain.runs for seed in wanted]
    if common.unused:
        raise UserError(f"chain {chain.name}: no recipe has what {sorted(common.unused)[0]} changes")
    by_folder: dict[str, _Draft] = {}
    for draft in drafts:
        if draft.folder_name in by_folder:
            raise UserError(
                f"chain {chain.name}: two runs would be {root / draft.folder_name}; give one another name "
                "(set: {name: ...})"
            )
        by_folder[draft.folder_name] = draft
    links = [_link(draft, stage, drafts, root, chain) for draft in drafts for stage in draft.stages]
    return _sorted(links, chain.name)


def _draft(chain: PipelineConfig, run: PipelineRun, seed: int | None, common: _Common) -> _Draft:
    config = run.config or chain.config
    assert config is not None  # the chain's check
    path = run.recipe or default_recipe(config)
    changes = common.with_own(path, chain.own_changes(run))
    own = load_recipe(path, changes)
    name, folder_name = own.name, own.name
    if seed is not None and seed != own.seed:
        changes.append(f"seed={seed}")
        own, folder_name = load_recipe(path, changes), f"{name}-seed{seed}"
    wanted = run.stages or chain.stages
    there = tuple(stage for stage in wanted if getattr(own.stages, stage) is not None)
    return _Draft(run, name, folder_name, config, path, tuple(changes), own, there)


class _Common:
    """Changes to every recipe of a chain, each for those recipes that have what it changes."""

    def __init__(self, chain: PipelineConfig, given: Sequence[str]) -> None:
        self.first, self.last = tuple(assignments(chain.set)), tuple(given)
        self.unused = {*self.first, *self.last}

    def with_own(self, path: Path, own: Sequence[str]) -> list[str]:
        """All changes to one recipe, in order: the chain's, its own, those of the command."""
        raw = apply_overrides(load_recipe(path).model_dump(mode="json"), own, path)
        first, last = ([text for text in texts if _concerns(text, raw)] for texts in (self.first, self.last))
        self.unused -= {*first, *last}
        return [*first, *own, *last]


def _concerns(change: str, recipe: dict[str, Any]) -> bool:
    """Whether a recipe has the stage or the teacher that a change is about."""
    section, *names = change.partition("=")[0].split(".")
    if section not in ("stages", "teachers") or not names:
        return True
    if section == "stages" and names[0] not in StagesConfig.model_fields:
        return True  # for the recipe to refuse
    return (recipe.get(section) or {}).get(names[0]) is not None


def _link(draft: _Draft, stage: StageName, drafts: Sequence[_Draft], root: Path, chain: PipelineConfig) -> PipelineJob:
    needs, changes = [], []
    for key, source in _sources(draft.recipe, stage):
        if source == "pretrain":
            needs.append(_own(draft, "pretrain", root, key))
            continue
        other = _named(source, draft, drafts)
        if other is None:
            _check_there(source, key)
            continue
        needs.append(other)
        if (path := str(root / other)) != source:
            changes.append((key, path))
    overrides = (*draft.overrides, *_replacements(draft.recipe, changes))
    return PipelineJob(
        run=draft.folder_name,
        stage=stage,
        folder=root / draft.folder_name / stage,
        config=draft.config,
        recipe_path=draft.recipe_path,
        overrides=overrides,
        recipe=load_recipe(draft.recipe_path, list(overrides)),
        needs=tuple(dict.fromkeys(need for need in needs if need)),
        nodes=1 if stage == "evaluate" else draft.run.nodes or chain.nodes,
    )


def _sources(recipe: Recipe, stage: StageName) -> Iterator[tuple[str, str]]:
    """Keys and values by which a stage names other stages; ``pretrain`` and members that are not named are its own."""
    config = recipe.stage(stage)
    if isinstance(config, PretrainConfig):
        if config.init is not None:
            yield "stages.pretrain.init", config.init
        for name in config.teachers:
            if recipe.teachers[name].kind == "checkpoint":
                yield f"teachers.{name}.source", recipe.teachers[name].source
    elif stage in STAGES_FROM_WEIGHTS:
        init = getattr(config, "init")  # noqa: B009  (each of these sections has one)
        if init != "scratch":
            yield f"stages.{stage}.init", init
    else:
        for number, member in enumerate(getattr(config, "members", None) or ()):
            yield f"stages.{stage}.members.{number}", member
        if not getattr(config, "members", None):
            yield f"stages.{stage}.members", "pretrain"


def _own(draft: _Draft, stage: StageName, root: Path, key: str) -> str | None:
    """The run's own earlier stage: of an evaluation its fine-tuning, else its pre-training."""
    wanted: StageName = "finetune" if key.startswith("stages.evaluate") else stage
    if wanted in draft.stages:
        return f"{draft.folder_name}/{wanted}"
    _check_there(str(root / draft.folder_name / wanted), key)
    return None


def _named(source: str, draft: _Draft, drafts: Sequence[_Draft]) -> str | None:
    """The key of the link that ``runs/NAME/STAGE`` means: the chain's recipe of that name with the same seed."""
    parts = Path(source).parts
    if len(parts) != 3 or parts[0] != RUNS.name:
        return None
    for other in drafts:
        if other.name == parts[1] and other.recipe.seed == draft.recipe.seed and parts[2] in other.stages:
            return f"{other.folder_name}/{parts[2]}"
    return None


def _check_there(source: str, key: str) -> None:
    path = Path(source)
    if not (path.is_file() or (path / MODEL_FILE).is_file()):
        raise UserError(f"{key}: {source} is neither a run of this chain nor there already")


def _replacements(recipe: Recipe, changes: list[tuple[str, str]]) -> Iterator[str]:
    """Overrides for the changed sources; a list is replaced as a whole."""
    members = {int(key.rpartition(".")[2]): path for key, path in changes if ".members." in key}
    for key, path in changes:
        if ".members." not in key:
            yield f"{key}={path}"
    if members:
        named = recipe.stages.evaluate.members or ()
        yield f"stages.evaluate.members={json.dumps([members.get(n, member) for n, member in enumerate(named)])}"


def _sorted(links: list[PipelineJob], chain: str) -> list[PipelineJob]:
    by_key = {link.key: link for link in links}
    done: dict[str, PipelineJob] = {}

    def visit(link: PipelineJob, waiting: tuple[str, ...]) -> None:
        if link.key in waiting:
            raise UserError(f"chain {chain}: {' waits for '.join((*waiting, link.key))}")
        for need in link.needs:
            visit(by_key[need], (*waiting, link.key))
        done.setdefault(link.key, link)

    for link in links:
        visit(link, ())
    return list(done.values())
