"""The recipe's stages: what is trained, for how long, at which rate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from mrmae_ds.config.files import nearest_key
from mrmae_ds.config.sections import Positive
from mrmae_ds.errors import ConfigError
from mrmae_ds.models.masking import MaskingMode
from mrmae_ds.models.objectives import Objective
from mrmae_ds.schema import Section

TrainStageName = Literal["pretrain", "finetune", "probe"]
StageName = Literal[TrainStageName, "evaluate"]
Fraction = Annotated[float, Field(ge=0, le=1)]
# Part of module, metric and folder names.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w-]*$")]
PlacementKind = Literal["device", "step", "stream", "sharded"]
RESERVED_OBJECTIVES = {"loss": "the weighted total is called that", "keys": "torch reserves it"}


class MaskingConfig(Section):
    """``keep_ratio`` is the visible share; modes other than random take their importance from ``teacher``."""

    keep_ratio: float = Field(0.25, gt=0, lt=1)
    mode: MaskingMode = "random"
    teacher: str | None = None


class RateConfig(Section):
    """The schedule: linear warm-up, cosine to ``min_lr``; give ``base_lr`` (times batch/256) or ``lr``."""

    base_lr: Positive | None = None
    lr: Positive | None = None
    min_lr: float = Field(0.0, ge=0, allow_inf_nan=False)
    warmup_epochs: float = Field(ge=0)

    @model_validator(mode="after")
    def _one_rate(self) -> RateConfig:
        if (self.base_lr is None) == (self.lr is None):
            raise ValueError("give exactly one of base_lr (times batch_size/256) and lr (absolute)")
        return self

    def peak_lr(self, batch_size: int) -> float:
        """The rate at the end of warm-up."""
        return self.lr if self.lr is not None else (self.base_lr or 0.0) * batch_size / 256


class OptimizerConfig(RateConfig):
    """AdamW and its schedule."""

    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]
    weight_decay: float = Field(0.05, ge=0)


class LarsConfig(RateConfig):
    """LARS and its schedule. The layer-wise rate is of the weight alone, as in MAE's linear probing."""

    base_lr: Positive | None = 0.1
    warmup_epochs: float = Field(10, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _an_absolute_rate_replaces_the_base_rate(cls, values: Any) -> Any:
        return {"base_lr": None, **values} if isinstance(values, dict) and "lr" in values else values


class StageConfig(Section):
    """What all stages have; ``batch_size`` is global, in images per optimizer step."""

    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    optimizer: RateConfig
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

    @model_validator(mode="after")
    def _rate_falls(self) -> StageConfig:
        peak = self.optimizer.peak_lr(self.batch_size)
        if self.optimizer.min_lr > peak:
            raise ConfigError("optimizer.min_lr", f"{self.optimizer.min_lr:g} is above the peak rate {peak:g}")
        return self


class PlacementConfig(Section):
    """Where a frozen teacher's weights live. Its targets are the same wherever that is.

    Attributes:
        kind: ``device`` on the accelerator, all the time; ``step`` there only while targets are computed; ``stream``
            block by block, one computing while the next is copied; ``sharded`` divided among the processes, each block
            gathered while it computes. For ``step`` and ``stream`` the weights stay in (pinned) host memory.
        offload: of ``sharded``: each process's share waits in host memory (``cpu``) or in files (``nvme``).
        nvme_path: the folder of those files, on a fast disk of the node.
    """

    kind: PlacementKind = "device"
    offload: Literal["cpu", "nvme"] | None = None
    nvme_path: Path | None = None

    @field_validator("kind", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if value not in get_args(PlacementKind):
            raise ValueError(f"no such placement{nearest_key(str(value), get_args(PlacementKind))}")
        return value

    @model_validator(mode="after")
    def _keys_have_an_effect(self) -> PlacementConfig:
        if self.offload is not None and self.kind != "sharded":
            raise ConfigError("offload", f"has no effect on {self.kind} (only on sharded); remove it")
        if (self.nvme_path is None) == (self.offload == "nvme"):
            raise ConfigError("nvme_path", "offload: nvme needs this folder, and nothing else takes one")
        return self

    def __str__(self) -> str:
        return self.kind if self.offload is None else f"{self.kind}, offload to {self.offload}"


class KnnConfig(Section):
    """A quick look at a pre-training: the accuracy of its features by their nearest neighbors (DINO's protocol).

    The features of an image are the mean of the encoder's tokens, all of them visible; those of ``samples`` training
    images, evenly spaced in the set (null: all), vote for each validation image.

    Attributes:
        every_epochs: how often; the last epoch is always looked at.
        k: neighbors that vote, each with weight exp(cosine / ``temperature``).
    """

    every_epochs: int = Field(10, ge=1)
    k: int = Field(20, ge=1)
    temperature: Positive = 0.07
    samples: int | None = Field(25_600, ge=1)


class PretrainConfig(StageConfig):
    """Pre-training: which teachers exist, what is visible, what is learned.

    Attributes:
        init: null is random weights; else a run's stage folder or a file of weights, ours or released, to go on from.
        teachers: those that are asked, of the recipe's. objectives: the losses, by name.
        placement: where the teachers' weights live: a word for all (``device``, ``step``, ``stream``, ``sharded``), or
            by teacher's name a word or a section (:class:`PlacementConfig`); those not named are on the device. It
            changes speed and memory, never results, and so no hash.
        knn: null is no such check; nor does it change what is learned.
    """

    optimizer: OptimizerConfig

    init: str | None = None
    teachers: tuple[str, ...] = ()
    masking: MaskingConfig = MaskingConfig()
    objectives: dict[Name, Objective] = Field(min_length=1)
    placement: dict[str, PlacementConfig] = Field({})
    knn: KnnConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _placement_of_each(cls, values: Any) -> Any:
        """Words become sections, and every teacher gets one."""
        if not isinstance(values, dict) or not isinstance(values.get("teachers", ()), list | tuple):
            return values
        given, names = values.get("placement", "device"), values.get("teachers", ())
        if isinstance(given, str):
            if given not in get_args(PlacementKind):
                near = nearest_key(given, get_args(PlacementKind))
                raise ConfigError("placement", f"no such placement: {given!r}{near}")
            given = dict.fromkeys(names, given)
        if not isinstance(given, dict):
            return values
        unknown = next((name for name in given if name not in names), None)
        if unknown is not None:
            near = nearest_key(unknown, names)
            raise ConfigError(f"placement.{unknown}", f"not one of this stage's teachers{near}")
        sections = {name: given.get(name, "device") for name in names}
        return values | {"placement": {n: {"kind": s} if isinstance(s, str) else s for n, s in sections.items()}}

    @field_validator("objectives")
    @classmethod
    def _names_are_free(cls, value: dict[str, Objective]) -> dict[str, Objective]:
        for name, reason in RESERVED_OBJECTIVES.items():
            if name in value:
                raise ConfigError(name, f"not a name for an objective ({reason})")
        return value


class FinetuneConfig(StageConfig):
    """Supervised fine-tuning of the whole encoder.

    Attributes:
        init: ``pretrain`` this run's own pre-training, ``scratch`` none, or a run's stage folder or model file.
        image_size: null is the model's; the position embedding is resized for another.
        pool: what the head sees: ``avg`` the mean of the patches, ``token`` the class token (a plain ViT's).
        rand_augment: timm's RandAugment policy (``rand-m9-mstd0.5-inc1``); null is none.
        mixup, cutmix: alpha of each; 0 is off. label_smoothing: of labels. random_erasing: probability.
    """

    optimizer: OptimizerConfig
    init: str = "pretrain"
    image_size: int | None = Field(None, gt=0)
    pool: Literal["avg", "token"] = "avg"
    layer_decay: float = Field(gt=0, le=1)
    drop_path: float = Field(0.0, ge=0, lt=1)
    rand_augment: str | None = None
    mixup: float = Field(0.0, ge=0)
    cutmix: float = Field(0.0, ge=0)
    label_smoothing: Fraction = 0.0
    random_erasing: Fraction = 0.0
    eval_every_epochs: int = Field(1, ge=1)

    @property
    def pairs(self) -> bool:
        """Whether mixup or cutmix pairs the images of a micro-batch, which must be even then."""
        return self.mixup > 0 or self.cutmix > 0


class ProbeConfig(StageConfig):
    """Linear probing: the encoder is frozen, a linear classifier learns from its features (MAE's recipe).

    The features are the mean of the patches, normalized by a BatchNorm without parameters whose statistics are those
    of a micro-batch over all processes.

    Attributes:
        init: as for fine-tuning. image_size: null is the model's.
    """

    epochs: int = Field(90, ge=1)
    batch_size: int = Field(4096, ge=1)
    optimizer: LarsConfig = LarsConfig()
    crop_scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    init: str = "pretrain"
    image_size: int | None = Field(None, gt=0)
    eval_every_epochs: int = Field(1, ge=1)


class EvaluateConfig(Section):
    """The accuracy of fine-tuned models on the validation set; several are averaged, after their softmax.

    Attributes:
        members: stage folders or model files; null is this run's own fine-tuning.
        image_size: null is each model's own; the position embedding is resized for another.
    """

    members: tuple[str, ...] | None = Field(None, min_length=1)
    image_size: int | None = Field(None, gt=0)

    @field_validator("members")
    @classmethod
    def _each_once(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("a model is named twice; each counts once")
        return value


class StagesConfig(Section):
    """The stages of the recipe; a recipe trained from scratch has no ``pretrain``."""

    pretrain: PretrainConfig | None = None
    finetune: FinetuneConfig | None = None
    probe: ProbeConfig = ProbeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
