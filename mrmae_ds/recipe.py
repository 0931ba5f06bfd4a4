"""The recipe: what is trained, as a strict, typed YAML file.

Keys are grouped by what they affect: ``model``, ``data``, ``teachers`` and ``stages`` change results, ``loader`` only
speed, ``record`` only what is written down. A recipe may start from another one (``extends: tiny.yaml``) and state the
difference: mappings are merged, everything else is replaced, null removes a key.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from mrmae_ds.config_files import apply_overrides, describe_errors, merge, read_yaml
from mrmae_ds.errors import UserError
from mrmae_ds.masking import MaskingMode
from mrmae_ds.models.decoder import DecoderSpec
from mrmae_ds.models.pretrain import FusionSpec
from mrmae_ds.models.sizes import EncoderSpec, encoder_spec
from mrmae_ds.objectives import PIXELS, Objective
from mrmae_ds.schema import Section

StageName = Literal["pretrain", "finetune"]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Rgb = tuple[float, float, float]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# Part of module, metric and folder names.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w-]*$")]
RESERVED_OBJECTIVES = {"loss": "the weighted total is called that", "keys": "torch reserves it"}


class ModelConfig(Section):
    """``arch`` names a row of models/sizes.py; ``overrides`` replaces single fields of it."""

    arch: str
    image_size: int = Field(gt=0)
    overrides: dict[str, Any] = Field({})
    fusion: FusionSpec = FusionSpec()
    decoder: DecoderSpec = DecoderSpec()

    @model_validator(mode="after")
    def _exists(self) -> ModelConfig:
        try:
            self.spec()
        except UserError as error:
            raise ValueError(str(error).removeprefix("model")) from None
        return self

    def spec(self) -> EncoderSpec:
        """The encoder's size."""
        return encoder_spec(self.arch, self.overrides)


class DataConfig(Section):
    """Paths of the .beton files, and the student's input statistics (of pixels in 0 to 1)."""

    train: Path
    val: Path
    mean: Rgb = IMAGENET_MEAN
    std: tuple[Positive, Positive, Positive] = IMAGENET_STD


class TeacherConfig(Section):
    """A frozen teacher.

    Attributes:
        kind: ``checkpoint`` a run of this project, ``clip`` an open_clip tower, ``timm`` any timm model with tokens or
            feature maps (DINO, DINOv2, a convolutional network).
        source: a run's stage folder or model file; or the model's name in open_clip or timm (``hf-hub:``,
            ``local-dir:`` too).
        weights: for clip and timm: a tag or local file; null takes those that the source names.
        image_size: side of the teacher's input in pixels; null is the student's.
        features: of the last block: ``raw``, ``ln_post`` after the final norm, ``proj`` also projected (clip).
        stage: of a network with feature maps, 0-based; null takes the deepest whose grid is the student's.
        position_resize: of a timm ViT's position embedding to another grid: ``library`` as timm does it, ``dino`` as
            DINO's and DINOv2's own code; null is ``dino`` for these two (without registers), else ``library``.
        quickgelu: whether CLIP weights were trained with QuickGELU; only for files that do not say.
        statistics: whose mean and standard deviation normalise its input.
        mean, std: its own statistics (of pixels in 0 to 1), where the library's are not those of the weights.
        precision: of its weights and arithmetic.
    """

    kind: Literal["checkpoint", "clip", "timm"]
    source: str
    weights: str | None = None
    image_size: int | None = Field(None, gt=0)
    features: Literal["raw", "ln_post", "proj"] = "raw"
    stage: int | None = Field(None, ge=0)
    position_resize: Literal["library", "dino"] | None = None
    quickgelu: bool | None = None
    statistics: Literal["teacher", "student"] = "teacher"
    mean: Rgb | None = None
    std: tuple[Positive, Positive, Positive] | None = None
    precision: Literal["bf16", "fp32"] = "bf16"

    @model_validator(mode="after")
    def _keys_have_an_effect(self) -> TeacherConfig:
        used_by = {"weights": "clip, timm", "stage": "clip, timm", "position_resize": "timm", "quickgelu": "clip"}
        for key, kinds in used_by.items():
            if getattr(self, key) is not None and self.kind not in kinds:
                raise ValueError(f".{key}: has no effect on kind {self.kind} (only on {kinds}); remove it")
        if (self.mean is None) != (self.std is None):
            raise ValueError("give both mean and std, or neither")
        if self.mean is not None and self.statistics == "student":
            raise ValueError(".mean: statistics: student takes the student's; remove one of the two")
        return self


class MaskingConfig(Section):
    """``keep_ratio`` is the visible share; modes other than random take their importance from ``teacher``."""

    keep_ratio: float = Field(0.25, gt=0, lt=1)
    mode: MaskingMode = "random"
    teacher: str | None = None


class OptimizerConfig(Section):
    """AdamW and its schedule: linear warm-up, cosine to ``min_lr``; give ``base_lr`` (times batch/256) or ``lr``."""

    base_lr: Positive | None = None
    lr: Positive | None = None
    min_lr: float = Field(0.0, ge=0, allow_inf_nan=False)
    warmup_epochs: float = Field(ge=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]
    weight_decay: float = Field(0.05, ge=0)

    @model_validator(mode="after")
    def _one_rate(self) -> OptimizerConfig:
        if (self.base_lr is None) == (self.lr is None):
            raise ValueError("give exactly one of base_lr (times batch_size/256) and lr (absolute)")
        return self

    def peak_lr(self, batch_size: int) -> float:
        """The rate at the end of warm-up."""
        return self.lr if self.lr is not None else (self.base_lr or 0.0) * batch_size / 256


class StageConfig(Section):
    """What all stages have; ``batch_size`` is global, in pictures per optimiser step."""

    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    optimizer: OptimizerConfig
    crop_scale: tuple[Fraction, Fraction]
    flip: Fraction = 0.5

    @field_validator("crop_scale")
    @classmethod
    def _low_to_high(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError("must be [low, high] with 0 < low <= high <= 1")
        return value

    @model_validator(mode="after")
    def _warmup_ends(self) -> StageConfig:
        if self.optimizer.warmup_epochs >= self.epochs:
            raise ValueError(f"optimizer.warmup_epochs must be below epochs ({self.epochs})")
        return self


class PretrainConfig(StageConfig):
    """Pre-training: which teachers exist, what is visible, what is learned."""

    teachers: tuple[str, ...] = ()
    masking: MaskingConfig = MaskingConfig()
    objectives: dict[Name, Objective] = Field(min_length=1)

    @field_validator("objectives")
    @classmethod
    def _names_are_free(cls, value: dict[str, Objective]) -> dict[str, Objective]:
        for name, reason in RESERVED_OBJECTIVES.items():
            if name in value:
                raise ValueError(f".{name}: not a name for an objective ({reason})")
        return value


class FinetuneConfig(StageConfig):
    """Supervised fine-tuning of the whole encoder.

    Attributes:
        init: ``pretrain`` this run's own pre-training, ``scratch`` none, or a run's stage folder or model file.
        image_size: null is the model's; the position embedding is resized for another.
        mixup, cutmix: alpha of each; 0 is off. smoothing: of labels. erasing: probability.
    """

    init: str = "pretrain"
    image_size: int | None = Field(None, gt=0)
    layer_decay: float = Field(gt=0, le=1)
    drop_path: float = Field(0.0, ge=0, lt=1)
    mixup: float = Field(0.0, ge=0)
    cutmix: float = Field(0.0, ge=0)
    smoothing: Fraction = 0.0
    erasing: Fraction = 0.0
    eval_every_epochs: int = Field(1, ge=1)


class StagesConfig(Section):
    """The stages of the recipe; a recipe trained from scratch has no ``pretrain``."""

    pretrain: PretrainConfig | None = None
    finetune: FinetuneConfig | None = None


class LoaderConfig(Section):
    """How pictures are read; no influence on results. ``workers``: threads per process, null decides by itself."""

    workers: int | None = Field(None, ge=1)


class RecordConfig(Section):
    """What is written down: a metrics line every so many steps, a checkpoint every so many epochs, pictures."""

    log_every: int = Field(20, ge=1)
    save_every_epochs: int = Field(1, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    pictures: int = Field(8, ge=0)


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
    record: RecordConfig = RecordConfig()

    @model_validator(mode="after")
    def _names_exist(self) -> Recipe:
        if PIXELS in self.teachers:
            raise ValueError(f"teachers.{PIXELS}: not a name for a teacher; objectives mean the picture by it")
        stage = self.stages.pretrain
        if stage is None:
            return self
        used = {f"stages.pretrain.teachers[{i}]": name for i, name in enumerate(stage.teachers)}
        for where, name in used.items():
            if name not in self.teachers:
                raise ValueError(f"{where}: no teacher {name!r}; defined are {_listed(self.teachers)}")
        for key, objective in stage.objectives.items():
            if objective.target not in {PIXELS, *stage.teachers}:
                raise ValueError(
                    f"stages.pretrain.objectives.{key}.target: {objective.target!r} is neither pixels nor one of "
                    f"stages.pretrain.teachers ({_listed(stage.teachers)})"
                )
        masking = stage.masking
        if masking.mode != "random" and masking.teacher not in stage.teachers:
            raise ValueError(
                f"stages.pretrain.masking.teacher: mode {masking.mode} needs one of stages.pretrain.teachers "
                f"({_listed(stage.teachers)}), got {masking.teacher!r}"
            )
        return self

    def stage(self, name: StageName) -> PretrainConfig | FinetuneConfig:
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

    def hash(self, stage: StageName | None = None) -> str:
        """12 hex digits that change with anything that changes results but the seed.

        Runs that differ in their seed alone share it. Paths of the data do not count: the data's identity is its
        checksum, recorded beside this.

        Args:
            stage: count only this stage and the teachers that it names; None counts the whole recipe.
        """
        ignored: dict[str, Any] = dict.fromkeys(("name", "seed", "loader", "record"), True)
        kept = self.model_dump(mode="json", exclude=ignored | {"data": {"train", "val"}})
        if stage is not None:
            named = getattr(self.stage(stage), "teachers", ())
            kept["teachers"] = {name: kept["teachers"][name] for name in named}
            kept["stages"] = {stage: kept["stages"][stage]}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read, merge, override and validate a recipe.

    Args:
        path: the YAML file.
        overrides: ``key.path=value`` strings; values are YAML.

    Raises:
        UserError: naming file, key and nearest known key.
    """
    raw = apply_overrides(_read_extended(path, ()), overrides or [], path)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise UserError(describe_errors(error, Recipe, path)) from None


def _read_extended(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise UserError(f"{path}: extends itself through {' -> '.join(map(str, seen))}")
    raw = read_yaml(path)
    parent = raw.pop("extends", None)
    if parent is None:
        return raw
    base = _read_extended(path.parent / str(parent), (*seen, path.resolve()))
    return merge(base, raw)


def _listed(names: Any) -> str:
    return ", ".join(names) or "none"
