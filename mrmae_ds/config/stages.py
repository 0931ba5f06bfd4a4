"""Stages of the recipe: objectives, schedule and augmentation of each."""

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
RESERVED_OBJECTIVES = {"loss": "name of the weighted total", "keys": "reserved by torch"}


class MaskingConfig(Section):
    """Masking of the student's input.

    Attributes:
        keep_ratio: share of visible tokens.
        mode: selection of the visible tokens; all modes but ``random`` use the importance that ``teacher`` computes.
        teacher: name of one of the stage's teachers.
    """

    keep_ratio: float = Field(0.25, gt=0, lt=1)
    mode: MaskingMode = "random"
    teacher: str | None = None


class RateConfig(Section):
    """Learning-rate schedule: linear warm-up, then cosine to ``min_lr``.

    Attributes:
        base_lr: peak learning rate for a batch of 256 images, scaled linearly with the batch size.
        lr: absolute peak learning rate, instead of ``base_lr``.
        min_lr: learning rate at the end.
        warmup_epochs: length of the warm-up.
    """

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
        """Return the learning rate at the end of warm-up."""
        return self.lr if self.lr is not None else (self.base_lr or 0.0) * batch_size / 256


class OptimizerConfig(RateConfig):
    """AdamW and its schedule.

    Attributes:
        betas: AdamW's.
        weight_decay: of weights; biases and norms have none.
    """

    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]
    weight_decay: float = Field(0.05, ge=0)


class LarsConfig(RateConfig):
    """LARS and its schedule; the layer-wise rate is computed from the weight alone, as in MAE's linear probing.

    Attributes:
        momentum: of the gradient.
        weight_decay: of weights.
    """

    base_lr: Positive | None = 0.1
    warmup_epochs: float = Field(10, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _an_absolute_rate_replaces_the_base_rate(cls, values: Any) -> Any:
        return {"base_lr": None, **values} if isinstance(values, dict) and "lr" in values else values


class StageConfig(Section):
    """Base of the stages that train.

    Attributes:
        epochs: length of the stage.
        batch_size: images per optimizer step, over all ranks.
        optimizer: with its schedule.
        crop_scale: smallest and largest share of the image's area in a random crop.
        flip: probability of a horizontal flip.
    """

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
            raise ConfigError("optimizer.min_lr", f"{self.optimizer.min_lr:g} is above the peak learning rate {peak:g}")
        return self


class PlacementConfig(Section):
    """Placement of a frozen teacher's weights; it does not change the targets.

    Attributes:
        kind: ``device`` (resident on the accelerator), ``step`` (offloaded to pinned host memory, copied to the
            accelerator for each step), ``stream`` (offloaded, copied block by block, overlapped with computation) or
            ``sharded`` (partitioned over the ranks, each block gathered for its computation).
        offload: for ``sharded``, location of each rank's share: host memory (``cpu``) or files (``nvme``).
        nvme_path: folder of these files, on a fast disk of the node.
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
            raise ConfigError("nvme_path", "required with offload: nvme, and has no effect otherwise")
        return self

    def __str__(self) -> str:
        return self.kind if self.offload is None else f"{self.kind}, offload to {self.offload}"


class KnnConfig(Section):
    """k-NN evaluation of the encoder's features during pre-training (DINO's protocol).

    The features of an image are the mean of the encoder's tokens, all of them visible.

    Attributes:
        every_epochs: epochs between two evaluations; the last epoch is always evaluated.
        k: number of neighbors that vote, each with weight exp(cosine / ``temperature``).
        temperature: of these weights.
        samples: number of training images, evenly spaced in the set; null is all of them.
    """

    every_epochs: int = Field(10, ge=1)
    k: int = Field(20, ge=1)
    temperature: Positive = 0.07
    samples: int | None = Field(25_600, ge=1)


class PretrainConfig(StageConfig):
    """Pre-training: teachers, masking and objectives.

    Attributes:
        init: initial weights: a run's stage folder or a weights file, of this project or released; null is random.
        teachers: names of the recipe's teachers that this stage uses.
        masking: selection of the visible tokens.
        objectives: losses by name.
        placement: placement of the teachers' weights: one kind for all (``device``, ``step``, ``stream``,
            ``sharded``), or by teacher a kind or a section (:class:`PlacementConfig`); others are on the device. It
            affects speed and memory, not results, and no hash.
        knn: k-NN evaluation of the features; null disables it. It does not affect training.
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
        """Expand placement kinds to sections, one for every teacher."""
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
        init: ``pretrain`` (this run's own pre-training), ``scratch`` (random), or a run's stage folder or model file.
        image_size: side of the input in pixels; null is the model's. The position embedding is resized to another.
        pool: input of the head: mean of the patches (``avg``) or class token (``token``; a CViT's ``init`` must then
            have one).
        layer_decay: factor of the learning rate from one layer to the one below it.
        drop_path: rate of stochastic depth in the last block, rising linearly from 0.
        rand_augment: timm's RandAugment policy (``rand-m9-mstd0.5-inc1``); null disables it.
        mixup: alpha; 0 disables it.
        cutmix: alpha; 0 disables it.
        label_smoothing: share of the target that is spread over all classes.
        random_erasing: probability.
        eval_every_epochs: epochs between two evaluations; the last epoch is always evaluated.
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
        """True if mixup or cutmix pairs the images of a micro-batch, which must then be even."""
        return self.mixup > 0 or self.cutmix > 0


class ProbeConfig(StageConfig):
    """Linear probing: a linear classifier trained on the frozen encoder's features (MAE's recipe).

    The features are the mean of the patches, normalized by a BatchNorm without parameters whose statistics are those
    of a micro-batch over all ranks.

    Attributes:
        init: as in :class:`FinetuneConfig`.
        image_size: side of the input in pixels; null is the model's.
        eval_every_epochs: epochs between two evaluations; the last epoch is always evaluated.
    """

    epochs: int = Field(90, ge=1)
    batch_size: int = Field(4096, ge=1)
    optimizer: LarsConfig = LarsConfig()
    crop_scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    init: str = "pretrain"
    image_size: int | None = Field(None, gt=0)
    eval_every_epochs: int = Field(1, ge=1)


class EvaluateConfig(Section):
    """Accuracy of fine-tuned models on the validation set; the softmax outputs of several are averaged.

    Attributes:
        members: stage folders or model files; null is this run's own fine-tuning.
        image_size: side of the input in pixels; null is each model's own. The position embedding is resized to another.
    """

    members: tuple[str, ...] | None = Field(None, min_length=1)
    image_size: int | None = Field(None, gt=0)

    @field_validator("members")
    @classmethod
    def _each_once(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("a model is listed twice")
        return value


class StagesConfig(Section):
    """Stages of the recipe; a recipe without ``pretrain`` trains from scratch."""

    pretrain: PretrainConfig | None = None
    finetune: FinetuneConfig | None = None
    probe: ProbeConfig = ProbeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
