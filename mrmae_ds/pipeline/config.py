"""A chain as data: a YAML file that names recipes, their stages and what is changed in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from mrmae_ds.config.files import describe_errors, nearest_key, read_extended
from mrmae_ds.config.stages import StageName
from mrmae_ds.errors import ConfigError, UserError
from mrmae_ds.schema import Section
from mrmae_ds.tables.paper import TABLES

Count = Annotated[int, Field(ge=1)]
Stages = Annotated[tuple[StageName, ...], Field(min_length=1)]


class PipelineRun(Section):
    """One recipe of a chain.

    Attributes:
        config: engine config; null is the chain's. recipe: null is the one beside the engine config.
        stages: null is the chain's; a stage that the recipe does not have is left out.
        use: names of the chain's ``sets``, applied in this order, and then ``set``.
        set: recipe keys to replace, as in an overlay; null removes one.
        nodes: of its Slurm jobs; null is the chain's.
    """

    config: Path | None = None
    recipe: Path | None = None
    stages: Stages | None = None
    use: tuple[str, ...] = ()
    set: dict[str, Any] = Field({})
    nodes: Count | None = None


class PipelineConfig(Section):
    """A chain. Paths are relative to the folder in which the command is given, the repository's root.

    Attributes:
        name: of the chain, in messages and of the job that makes the tables.
        tables: the paper's tables that its runs fill.
        config, stages, nodes: of runs that do not say.
        set: recipe keys to replace in every run, before those of ``use`` and of the run itself. Keys of a stage or a
            teacher that a run's recipe does not have are left out of that run.
        sets: changes by name, for runs to ``use``.
        runs: the recipes; a run waits for those that its stages start from or learn from.
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
                raise ConfigError(f"runs.{number}.config", "this key is required, here or for the whole chain")
        shown = tuple(number for number in TABLES if number != 2)
        for number in self.tables:
            if number not in shown:
                raise ConfigError("tables", f"{number} is none of {', '.join(map(str, shown))}")
        return self

    def own_changes(self, run: PipelineRun) -> tuple[str, ...]:
        """A run's changes without the chain's, as ``key.path=value`` strings."""
        layers = [*(self.sets[name] for name in run.use), run.set]
        return tuple(text for layer in layers for text in assignments(layer))


def assignments(changes: dict[str, Any], above: str = "") -> Iterator[str]:
    """Nested changes as ``key.path=value`` strings; values are JSON, which YAML reads the same."""
    for key, value in changes.items():
        path = f"{above}{key}"
        if isinstance(value, dict) and value:
            yield from assignments(value, f"{path}.")
        else:
            yield f"{path}={json.dumps(value)}"


def load_pipeline(path: Path) -> PipelineConfig:
    """Read and check a chain. It may say ``extends: other.yaml``, as a recipe may: its keys are laid on the other's.

    Raises:
        UserError: naming file, key and nearest known key.
    """
    try:
        return PipelineConfig.model_validate(read_extended(path))
    except ValidationError as error:
        raise UserError(describe_errors(error, PipelineConfig, path)) from None
