"""Pipeline configuration: a YAML file that lists recipes, their stages and the overrides of each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from mrmae_ds.config.files import describe_errors, merge, nearest_key, read_extended, refuse_other_kind
from mrmae_ds.config.stages import StageName
from mrmae_ds.errors import ConfigError, UserError
from mrmae_ds.schema import Section
from mrmae_ds.tables.paper import TABLES

Count = Annotated[int, Field(ge=1)]
Stages = Annotated[tuple[StageName, ...], Field(min_length=1)]


class PipelineRun(Section):
    """One recipe of a pipeline.

    Attributes:
        config: engine config; null uses the pipeline's.
        recipe: null uses the recipe beside the engine config.
        stages: null uses the pipeline's; stages that the recipe does not have are skipped.
        use: names of the pipeline's ``sets``, applied in this order and before ``set``.
        set: recipe keys to replace, as in an overlay; null removes a key.
        nodes: number of nodes of its Slurm jobs; null uses the pipeline's.
    """

    config: Path | None = None
    recipe: Path | None = None
    stages: Stages | None = None
    use: tuple[str, ...] = ()
    set: dict[str, Any] = Field({})
    nodes: Count | None = None


class PipelineConfig(Section):
    """A pipeline.

    Engine configs and recipes are relative to the working directory or, if not there, to the repository. The recipes'
    own paths, of data and of other runs, are relative to the working directory, as in ``train.py``.

    Attributes:
        name: used in messages and as the name of the Slurm job that builds the tables.
        tables: numbers of the paper's tables that its runs fill.
        config: default engine config of the runs.
        stages: default stages of the runs.
        nodes: default number of nodes of the Slurm jobs.
        set: recipe keys to replace in every run, before those of ``use`` and of the run itself. Keys of a stage or a
            teacher that a run's recipe does not have are skipped for that run.
        sets: named overrides that runs refer to in ``use``.
        runs: the recipes. A run's jobs depend on those whose weights they start from or learn from.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")
    tables: Annotated[tuple[int, ...], Field(min_length=1)] = (6,)
    config: Path | None = None
    stages: Stages = ("pretrain", "finetune")
    nodes: Count | None = None
    set: dict[str, Any] = Field({})
    sets: dict[str, dict[str, Any]] = Field({})
    runs: Annotated[tuple[PipelineRun, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_exist(self) -> PipelineConfig:
        for number, run in enumerate(self.runs):
            for name in run.use:
                if name not in self.sets:
                    raise ConfigError(f"runs.{number}.use", f"no set {name!r}{nearest_key(name, self.sets)}")
            if run.config is None and self.config is None:
                raise ConfigError(f"runs.{number}.config", "required, here or for the whole pipeline")
        for number in self.tables:
            if number not in TABLES:
                raise ConfigError("tables", f"{number} is none of {', '.join(map(str, TABLES))}")
        return self

    def run_overrides(self, run: PipelineRun) -> tuple[str, ...]:
        """Return a run's own overrides, without the pipeline's, as ``key.path=value`` strings."""
        layers = [*(self.sets[name] for name in run.use), run.set]
        return tuple(text for layer in layers for text in to_overrides(layer))


def to_overrides(changes: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Flatten nested changes to ``key.path=value`` strings; values are JSON, which YAML parses to the same value."""
    for key, value in changes.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from to_overrides(value, f"{path}.")
        else:
            yield f"{path}={json.dumps(value)}"


def _extend(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge a pipeline file into the one that it extends.

    As anywhere, null removes a key, but inside ``set`` and ``sets.NAME`` it stays: there it removes a recipe's key.
    """
    merged, kept = merge(base, over), merge(base, over, keep_null=True)
    if isinstance(over.get("set"), dict):
        merged["set"] = kept["set"]
    named = over.get("sets")
    for name, changes in named.items() if isinstance(named, dict) else ():
        if isinstance(changes, dict):
            merged["sets"][name] = kept["sets"][name]
    return merged


def load_pipeline(path: Path) -> PipelineConfig:
    """Read and validate a pipeline file. Like a recipe, it may contain ``extends: other.yaml``.

    Raises:
        UserError: naming file, key and nearest known key.
    """
    raw = read_extended(path, PipelineConfig, join=_extend)
    refuse_other_kind(raw, "a pipeline file", path)
    try:
        return PipelineConfig.model_validate(raw)
    except ValidationError as error:
        raise UserError(describe_errors(error, PipelineConfig, path)) from None
