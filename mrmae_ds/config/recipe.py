"""The recipe: a strict, typed YAML file that defines a training.

Keys are grouped by their effect: ``model``, ``data``, ``teachers`` and ``stages`` change results (except
``stages.pretrain.placement`` and ``.knn``), the sections of :data:`NO_INFLUENCE` do not. A recipe may extend another
one (``extends: tiny.yaml``) and state the differences: mappings are merged, everything else is replaced, null removes a
key.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePath
from typing import Any, Literal, get_args, overload

import yaml
from pydantic import Field, ValidationError, model_validator

from mrmae_ds.config.detection import DetectConfig
from mrmae_ds.config.files import (
    apply_overrides,
    describe_errors,
    join_overrides,
    read_extended,
    refuse_other_kind,
    refuse_unknown_nulls,
)
from mrmae_ds.config.renamed import refuse_renamed, rename_overrides, values_hash
from mrmae_ds.config.sections import (
    CheckpointConfig,
    DataConfig,
    GarbageCollectionConfig,
    LoaderConfig,
    LoggingConfig,
    MemorySnapshotConfig,
    MlflowConfig,
    ModelConfig,
    NvtxConfig,
    ProfilerConfig,
    TeacherConfig,
    WandbConfig,
    WatchdogConfig,
)
from mrmae_ds.config.stages import (
    EvaluateConfig,
    FinetuneConfig,
    Name,
    PretrainConfig,
    ProbeConfig,
    StageConfig,
    StageName,
    TrainStageName,
)
from mrmae_ds.errors import ConfigError, UserError, errors_below
from mrmae_ds.models.hog import cell_size
from mrmae_ds.models.objectives import COMPUTED, HOG
from mrmae_ds.models.pretrain import check_taps, taps_latent
from mrmae_ds.models.sizes import BeitSpec, CViTSpec, token_grid
from mrmae_ds.schema import Section

# Sections that change no result.
OPTIONAL_CALLBACKS = ("profiler", "nvtx", "memory_snapshot", "garbage_collection", "wandb", "mlflow")
NO_INFLUENCE = ("loader", "logging", "checkpoint", "watchdog", *OPTIONAL_CALLBACKS)


class StagesConfig(Section):
    """Stages of the recipe; a recipe without ``pretrain`` trains from scratch."""

    pretrain: PretrainConfig | None = None
    finetune: FinetuneConfig | None = None
    probe: ProbeConfig = ProbeConfig()
    detect: DetectConfig | None = None
    evaluate: EvaluateConfig = EvaluateConfig()


class Recipe(Section):
    """A complete recipe.

    Attributes:
        name: of the run folder.
        method: row of the scaling table.
        size: column of the scaling table.
        seed: of initialization, sampling, augmentation and masking.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")
    method: str
    size: str
    seed: int = Field(0, ge=0, lt=2**63)
    model: ModelConfig
    data: DataConfig
    teachers: dict[Name, TeacherConfig] = Field({})
    stages: StagesConfig
    loader: LoaderConfig = LoaderConfig()
    logging: LoggingConfig = LoggingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    profiler: ProfilerConfig | None = None
    nvtx: NvtxConfig | None = None
    memory_snapshot: MemorySnapshotConfig | None = None
    garbage_collection: GarbageCollectionConfig | None = None
    wandb: WandbConfig | None = None
    mlflow: MlflowConfig | None = None

    @model_validator(mode="after")
    def _names_exist(self) -> Recipe:
        for name in COMPUTED & self.teachers.keys():
            raise ConfigError(f"teachers.{name}", "not a name for a teacher; it is computed as an objective's target")
        stage = self.stages.pretrain
        if stage is None:
            return self
        used = {f"stages.pretrain.teachers[{i}]": name for i, name in enumerate(stage.teachers)}
        for where, name in used.items():
            if name not in self.teachers:
                raise ConfigError(where, f"no teacher {name!r}; defined are {_listed(self.teachers)}")
        targets = [target for name in stage.teachers for target in self.teachers[name].targets(name)]
        for key, objective in stage.objectives.items():
            if objective.target not in {*COMPUTED, *targets}:
                raise ConfigError(
                    f"stages.pretrain.objectives.{key}.target",
                    f"{objective.target!r} is neither {' nor '.join(sorted(COMPUTED))} nor a target of "
                    f"stages.pretrain.teachers ({_listed(targets)})",
                )
            teacher = self.teachers.get(objective.target.partition(".")[0])
            if teacher and teacher.sees == "visible" and stage.encoder_input != "visible":
                raise ConfigError(
                    f"teachers.{objective.target}.sees",
                    f"visible needs stages.pretrain.encoder_input: visible, not {stage.encoder_input}",
                )
            if teacher and teacher.sees == "visible" and objective.tokens != "visible":
                raise ConfigError(
                    f"stages.pretrain.objectives.{key}.tokens",
                    f"its teacher sees visible tokens only, so tokens: {objective.tokens} have no target; use visible",
                )
        averages = {name for name in stage.teachers if self.teachers[name].kind == "ema"}
        for name, placement in stage.placement.items():
            if name in averages and placement.kind != "device":
                raise ConfigError(
                    f"stages.pretrain.placement.{name}",
                    f"{placement} has no effect on a moving average, which is partitioned as the model is; remove it",
                )
        if (masking := stage.masking) is None:
            return self
        if masking.teacher in averages:
            raise ConfigError(
                "stages.pretrain.masking.teacher", f"{masking.teacher} is a moving average without importance"
            )
        by_importance = masking.mode in ("sample", "topk")
        if masking.teacher not in stage.teachers and (masking.teacher is not None or by_importance):
            wanted = "needs" if by_importance else "uses no teacher; remove it or name"
            raise ConfigError(
                "stages.pretrain.masking.teacher",
                f"mode {masking.mode} {wanted} one of stages.pretrain.teachers ({_listed(stage.teachers)}), got "
                f"{masking.teacher!r}",
            )
        if masking.teacher is not None and self.teachers[masking.teacher].sees == "visible":
            raise ConfigError(
                "stages.pretrain.masking.teacher",
                f"{masking.teacher} sees the visible tokens only, which are not known before masking",
            )
        return self

    @model_validator(mode="after")
    def _taps_suit_the_model(self) -> Recipe:
        stage, spec = self.stages.pretrain, self.model.spec()
        if stage is None:
            return self
        if stage.encoder_input != "visible" and isinstance(spec, CViTSpec):
            raise ConfigError(
                "stages.pretrain.encoder_input",
                f"{stage.encoder_input}: a CViT computes visible tokens only; use visible, or a plain ViT or BEiT",
            )
        if stage.encoder_input == "visible" and isinstance(spec, BeitSpec):
            raise ConfigError(
                "stages.pretrain.encoder_input",
                "visible: a BEiT has relative positions of all tokens; use mask_tokens or full, or a plain ViT",
            )
        if stage.attention_dropout and isinstance(spec, CViTSpec):
            raise ConfigError("stages.pretrain.attention_dropout", "has no effect on a CViT; remove it")
        if stage.masking is not None:
            with errors_below("stages.pretrain.masking"):
                stage.masking.grid(token_grid(spec, self.model.image_size), spec.stride)
        with errors_below("stages.pretrain.objectives"):
            check_taps(stage.objectives, spec.num_blocks, 0 if isinstance(spec, CViTSpec) else 1)
        for name in stage.teachers:
            config = self.teachers[name]
            if config.kind == "ema" and max(config.layers or (0,)) >= spec.num_blocks:
                raise ConfigError(
                    f"teachers.{name}.layers",
                    f"block {max(config.layers or ())} does not exist; the encoder has 0 to {spec.num_blocks - 1}",
                )
        for name, objective in stage.objectives.items():
            if objective.target == HOG and spec.stride % cell_size(spec.stride):
                raise ConfigError(
                    f"stages.pretrain.objectives.{name}.target",
                    f"hog has cells of {cell_size(spec.stride)} pixels, which do not tile tokens of {spec.stride}",
                )
        if not taps_latent(stage.objectives) and (self.model.fusion.stages or self.model.fusion.blocks):
            raise ConfigError("model.fusion", "has no effect, since no objective taps the latent; set it to null")
        return self

    @model_validator(mode="after")
    def _finetuning_suits_the_model(self) -> Recipe:
        stage = self.stages.finetune
        for name, size in {"finetune": stage and stage.image_size, "probe": self.stages.probe.image_size}.items():
            with errors_below(f"stages.{name}"):
                token_grid(self.model.spec(), size or self.model.image_size)
        return self

    @model_validator(mode="after")
    def _detection_suits_the_model(self) -> Recipe:
        stage = self.stages.detect
        if stage is None:
            return self
        if self.data.detection is None:
            raise ConfigError(
                "data.detection", "stages.detect needs COCO's train and val, each with images and annotations"
            )
        spec = self.model.spec()
        if isinstance(spec, BeitSpec):
            raise ConfigError("stages.detect", "a BEiT has no windows; detectors need a CViT or a plain ViT")
        with errors_below("stages.detect.detector"):
            stage.detector.check_depth(spec.num_blocks)
        return self

    @overload
    def stage(self, name: TrainStageName) -> PretrainConfig | FinetuneConfig | ProbeConfig | DetectConfig: ...

    @overload
    def stage(self, name: Literal["evaluate"]) -> EvaluateConfig: ...

    def stage(self, name: StageName) -> StageConfig | EvaluateConfig:
        """Return the named stage.

        Raises:
            UserError: if the recipe does not have this stage.
        """
        stage = getattr(self.stages, name)
        if stage is None:
            has = [key for key in StagesConfig.model_fields if getattr(self.stages, key) is not None]
            raise UserError(f"recipe {self.name} has no stage {name}; it has {_listed(has)}")
        return stage

    def to_yaml(self) -> str:
        """Return the resolved recipe with all defaults."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=110)

    def counted(self, stage: StageName | None = None) -> dict[str, Any]:
        """Return the values that determine results, without the seed; :meth:`hash` hashes them.

        Excluded are the data's paths (checksums identify the data), teachers' placement and k-NN evaluation; of other
        runs that the recipe names, the parent folder and the seed in the name. Detection is included where it is used.

        Args:
            stage: include only this stage and its teachers; None includes the whole recipe.
        """
        ignored: dict[str, Any] = dict.fromkeys(("name", "seed", *NO_INFLUENCE), True)
        coco = {key: {"images", "annotations"} for key in ("train", "val")}
        ignored |= {"data": {"train": True, "val": True, "detection": coco}}
        ignored |= {"stages": {"pretrain": {"placement", "knn"}}}
        kept = self.model_dump(mode="json", exclude=ignored)
        if self.stages.detect is None or stage not in (None, "detect"):
            del kept["data"]["detection"]
        if self.stages.detect is None:
            del kept["stages"]["detect"]
        if stage is not None:
            named = getattr(self.stage(stage), "teachers", ())
            kept["teachers"] = {name: kept["teachers"][name] for name in named}
            kept["stages"] = {stage: kept["stages"][stage]}
        return _shorten_sources(kept)

    def hash(self, stage: StageName | None = None) -> str:
        """Return 12 hexadecimal digits of the SHA-256 of :meth:`counted`.

        Runs that differ only in their seed have the same hash.
        """
        return values_hash(self.counted(stage))


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read, merge, override and validate a recipe.

    Args:
        path: the YAML file.
        overrides: ``key.path=value`` strings; values are YAML. An old key is renamed, with a warning.

    Raises:
        UserError: naming file, key and nearest known key.
    """
    overrides = rename_overrides(overrides or [])
    given = join_overrides(overrides)
    refuse_renamed(given, path, source="override")
    refuse_unknown_nulls(given, Recipe, path, overrides=overrides)
    raw = read_extended(path, Recipe)
    refuse_other_kind(raw, "a recipe", path)
    try:
        return Recipe.model_validate(apply_overrides(raw, overrides, path))
    except ValidationError as error:
        raise UserError(describe_errors(error, Recipe, path, overrides)) from None


def run_and_stage(source: str) -> str:
    """Return ``huge/pretrain`` for ``runs/huge-seed1/pretrain``, and anything else than a stage's folder unchanged."""
    parts = PurePath(source).parts
    if len(parts) < 2 or parts[-1] not in get_args(StageName):
        return source
    return f"{re.sub(r'-seed[0-9]+$', '', parts[-2])}/{parts[-1]}"


def _shorten_sources(values: dict[str, Any]) -> dict[str, Any]:
    """Shorten every run that a recipe names to RUN/STAGE.

    Runs with different seeds, each initialized from a run with the same seed, then have the same values. Records hold
    the checksums of the runs' weights.
    """
    teachers = {
        name: teacher | {"source": run_and_stage(teacher["source"])} if teacher["kind"] == "checkpoint" else teacher
        for name, teacher in values["teachers"].items()
    }
    stages = {name: stage and _shorten_stage(stage) for name, stage in values["stages"].items()}
    return values | {"teachers": teachers, "stages": stages}


def _shorten_stage(stage: dict[str, Any]) -> dict[str, Any]:
    shortened: dict[str, Any] = {}
    if stage.get("init"):
        shortened["init"] = run_and_stage(stage["init"])
    if stage.get("members"):
        shortened["members"] = [run_and_stage(member) for member in stage["members"]]
    return stage | shortened


def _listed(names: Any) -> str:
    return ", ".join(names) or "none"
