"""The recipe: what is trained, as a strict, typed YAML file.

Keys are grouped by what they affect: ``model``, ``data``, ``teachers`` and ``stages`` change results (but for
``stages.pretrain.placement``), ``loader`` only speed; ``logging``,
``checkpoint`` and ``watchdog`` only what is written and when. A recipe may start from
another one (``extends: tiny.yaml``) and state the difference: mappings are merged, everything else is replaced, null
removes a key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, overload

import yaml
from pydantic import Field, ValidationError, model_validator

from mrmae_ds.config.files import apply_overrides, describe_errors, read_extended
from mrmae_ds.config.renamed import refuse_renamed, values_hash
from mrmae_ds.config.run_names import shorten_sources
from mrmae_ds.config.sections import (
    CheckpointConfig,
    DataConfig,
    LoaderConfig,
    LoggingConfig,
    ModelConfig,
    TeacherConfig,
    WatchdogConfig,
)
from mrmae_ds.config.stages import (
    EvaluateConfig,
    FinetuneConfig,
    Name,
    PretrainConfig,
    ProbeConfig,
    StageName,
    StagesConfig,
    TrainStageName,
)
from mrmae_ds.errors import ConfigError, UserError
from mrmae_ds.models.objectives import PIXELS
from mrmae_ds.models.sizes import CViTSpec, token_grid
from mrmae_ds.schema import Section

# Sections that change no result.
NO_INFLUENCE = ("loader", "logging", "checkpoint", "watchdog")


class Recipe(Section):
    """A whole recipe. ``method`` and ``size`` are its row and column in the scaling table."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")
    method: str
    size: str
    seed: int = Field(0, ge=0)
    model: ModelConfig
    data: DataConfig
    teachers: dict[Name, TeacherConfig] = Field({})
    stages: StagesConfig
    loader: LoaderConfig = LoaderConfig()
    logging: LoggingConfig = LoggingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    watchdog: WatchdogConfig = WatchdogConfig()

    @model_validator(mode="after")
    def _names_exist(self) -> Recipe:
        if PIXELS in self.teachers:
            raise ConfigError(f"teachers.{PIXELS}", "not a name for a teacher; objectives mean the image by it")
        stage = self.stages.pretrain
        if stage is None:
            return self
        used = {f"stages.pretrain.teachers[{i}]": name for i, name in enumerate(stage.teachers)}
        for where, name in used.items():
            if name not in self.teachers:
                raise ConfigError(where, f"no teacher {name!r}; defined are {_listed(self.teachers)}")
        for key, objective in stage.objectives.items():
            if objective.target not in {PIXELS, *stage.teachers}:
                raise ConfigError(
                    f"stages.pretrain.objectives.{key}.target",
                    f"{objective.target!r} is neither pixels nor one of stages.pretrain.teachers "
                    f"({_listed(stage.teachers)})",
                )
        masking = stage.masking
        if masking.teacher not in stage.teachers and (masking.teacher is not None or masking.mode != "random"):
            wanted = "needs" if masking.mode != "random" else "uses no teacher; remove it or name"
            raise ConfigError(
                "stages.pretrain.masking.teacher",
                f"mode {masking.mode} {wanted} one of stages.pretrain.teachers ({_listed(stage.teachers)}), got "
                f"{masking.teacher!r}",
            )
        return self

    @model_validator(mode="after")
    def _finetuning_suits_the_model(self) -> Recipe:
        stage = self.stages.finetune
        if stage is not None and stage.pool == "token" and isinstance(self.model.spec(), CViTSpec):
            raise ConfigError("stages.finetune.pool", "a CViT has no class token; use avg, or a plain ViT")
        for name, size in {"finetune": stage and stage.image_size, "probe": self.stages.probe.image_size}.items():
            try:
                token_grid(self.model.spec(), size or self.model.image_size)
            except ConfigError as error:
                raise ConfigError(f"stages.{name}.{error.key}", error.reason) from None
        return self

    @overload
    def stage(self, name: TrainStageName) -> PretrainConfig | FinetuneConfig | ProbeConfig: ...

    @overload
    def stage(self, name: Literal["evaluate"]) -> EvaluateConfig: ...

    def stage(self, name: StageName) -> PretrainConfig | FinetuneConfig | ProbeConfig | EvaluateConfig:
        """The named stage.

        Raises:
            UserError: if the recipe does not have it.
        """
        stage = getattr(self.stages, name)
        if stage is None:
            has = [key for key in StagesConfig.model_fields if getattr(self.stages, key) is not None]
            raise UserError(f"recipe {self.name} has no stage {name}; it has {_listed(has)}")
        return stage

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=110)

    def counted(self, stage: StageName | None = None) -> dict[str, Any]:
        """Everything that changes results but the seed; what :meth:`hash` is taken of.

        Paths of the data do not count: the data's identity is its checksum, recorded beside this. Nor does where a
        teacher's weights live, nor a look at the features, nor in which folder of runs, and with which seed, another
        run lies that it names.

        Args:
            stage: count only this stage and the teachers that it names; None counts the whole recipe.
        """
        ignored: dict[str, Any] = dict.fromkeys(("name", "seed", *NO_INFLUENCE), True)
        ignored |= {"data": {"train", "val"}, "stages": {"pretrain": {"placement", "knn"}}}
        kept = self.model_dump(mode="json", exclude=ignored)
        if stage is not None:
            named = getattr(self.stage(stage), "teachers", ())
            kept["teachers"] = {name: kept["teachers"][name] for name in named}
            kept["stages"] = {stage: kept["stages"][stage]}
        return shorten_sources(kept)

    def hash(self, stage: StageName | None = None) -> str:
        """12 hex digits that change with anything that :meth:`counted` names.

        Runs that differ in their seed alone share it.
        """
        return values_hash(self.counted(stage))


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read, merge, override and validate a recipe.

    Args:
        path: the YAML file.
        overrides: ``key.path=value`` strings; values are YAML.

    Raises:
        UserError: naming file, key and nearest known key.
    """
    refuse_renamed(apply_overrides({}, overrides or [], path), path, source="override")
    raw = apply_overrides(read_extended(path), overrides or [], path)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise UserError(describe_errors(error, Recipe, path)) from None


def _listed(names: Any) -> str:
    return ", ".join(names) or "none"
