"""Stages of the recipe: objectives, schedule and augmentation of each."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from mrmae_ds.config.files import nearest_key
from mrmae_ds.config.optimizers import LarsConfig, OptimizerConfig, RateConfig
from mrmae_ds.config.sections import Fraction, Positive
from mrmae_ds.errors import ConfigError
from mrmae_ds.models.block_masking import block_masks
from mrmae_ds.models.masking import MaskingMode, num_visible
from mrmae_ds.models.objectives import Objective
from mrmae_ds.schema import Section

TrainStageName = Literal["pretrain", "finetune", "probe", "detect"]
StageName = Literal[TrainStageName, "evaluate"]
# Part of module, metric and folder names.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w-]*$")]
PlacementKind = Literal["device", "step", "stream", "sharded"]
_DRAWN = 32  # masks of mode block that a check draws
RESERVED_OBJECTIVES = {"loss": "name of the weighted total", "keys": "reserved by torch"}


class MaskingConfig(Section):
    """Masking of the student's input.

    Attributes:
        keep_ratio: share of visible tokens, 0.25 by default; not of mode ``block``.
        mode: selection of the visible tokens; ``sample`` and ``topk`` use the importance that ``teacher`` computes.
            ``block`` removes blocks of random area and aspect (BEiT).
        teacher: name of one of the stage's teachers.
        unit: side in pixels of the squares of tokens that mode ``random`` keeps or removes whole (SimMIM: 32); null is
            one token.
        masked: of mode ``block``: largest number of removed tokens; most images have it.
        min_block: of mode ``block``: smallest area of a block, in tokens.
        max_block: of mode ``block``: largest number of tokens that a block removes; null is no bound.
        exact: of mode ``block``: draw until ``masked`` tokens are removed, instead of stopping after ten vain draws.
    """

    keep_ratio: float | None = Field(None, gt=0, lt=1)
    mode: Literal[MaskingMode, "block"] = "random"
    teacher: str | None = None
    # Left out of records and hashes at their defaults, so that runs from before they existed keep their hash.
    unit: int | None = Field(None, ge=1, exclude_if=lambda value: value is None)
    masked: int | None = Field(None, ge=1, exclude_if=lambda value: value is None)
    min_block: int = Field(16, ge=1, exclude_if=lambda value: value == 16)
    max_block: int | None = Field(None, ge=1, exclude_if=lambda value: value is None)
    exact: bool = Field(False, exclude_if=lambda value: not value)

    @model_validator(mode="before")
    @classmethod
    def _a_quarter_is_visible(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("mode") != "block":
            return {"keep_ratio": 0.25, **values}
        return values

    @model_validator(mode="after")
    def _keys_have_an_effect(self) -> MaskingConfig:
        blocks = self.mode == "block"
        for key in ("masked", "min_block", "max_block", "exact") if not blocks else ("keep_ratio",):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ConfigError(key, f"has no effect on mode: {self.mode}; set it to null")
        required = "masked" if blocks else "keep_ratio"
        if getattr(self, required) is None:
            raise ConfigError(required, f"mode: {self.mode} needs it")
        if self.masked is not None and self.masked < self.min_block:
            raise ConfigError("min_block", f"{self.min_block} is above masked ({self.masked})")
        if self.unit is not None and self.mode != "random":
            raise ConfigError("unit", f"has no effect on mode: {self.mode} (only on random); remove it")
        return self

    def draw_blocks(self, seeds: Iterable[int | bytes], grid: tuple[int, int]) -> Tensor:
        """Draw the removed tokens of images by mode ``block``, bool [B, L].

        Args:
            seeds: one an image.
            grid: rows and columns of the token grid.
        """
        assert self.masked is not None
        return block_masks(seeds, grid, self.masked, self.min_block, self.max_block, self.exact)

    def grid(self, grid: tuple[int, int], stride: int) -> tuple[int, int]:
        """Return rows and columns of what is kept or removed as one: the token grid, or the squares of ``unit``.

        Args:
            grid: rows and columns of the token grid.
            stride: side of a token in pixels.

        Raises:
            ConfigError: if the squares do not tile the image, the tokens do not tile them, too few tokens are left, or
                blocks do not fit.
        """
        rows, columns = grid
        if self.unit is not None:
            side, rest = divmod(self.unit, stride)
            if rest or not side or rows % side or columns % side:
                size = f"{rows * stride}x{columns * stride}"
                raise ConfigError("unit", f"{self.unit} must be a multiple of the token's {stride} that tiles {size}")
            rows, columns = rows // side, columns // side
        if self.keep_ratio is not None and num_visible(rows * columns, self.keep_ratio) < 1:
            raise ConfigError(
                "keep_ratio",
                f"{self.keep_ratio} of {rows}x{columns} tokens leaves none visible; raise it or model.image_size",
            )
        if self.masked is not None and self.masked >= rows * columns:
            raise ConfigError("masked", f"{self.masked} must be below the number of tokens, {rows}x{columns}")
        if self.masked is not None:
            # Never exact: its loop does not end where no block fits.
            drawn = block_masks(range(_DRAWN), grid, self.masked, self.min_block, self.max_block)
            if not drawn.any(1).all():
                raise ConfigError(
                    "min_block",
                    f"{self.min_block}: of {rows}x{columns} tokens, most draws of such a block do not fit, and some "
                    "images would have no removed token; lower it",
                )
        return rows, columns


class StageConfig(Section):
    """Base of the stages that train.

    Attributes:
        epochs: length of the stage.
        batch_size: images per optimizer step, over all ranks.
    """

    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)

    def lr_at_step(self, step: int, steps_per_epoch: int) -> float:
        """Return the learning rate of an optimizer step.

        Args:
            step: optimizer steps completed before it.
            steps_per_epoch: optimizer steps per epoch.
        """
        raise NotImplementedError


class CropStageConfig(StageConfig):
    """Base of the stages that train on random crops, with a warm-up.

    Attributes:
        optimizer: with its schedule.
        crop_scale: smallest and largest share of the image's area in a random crop.
        flip: probability of a horizontal flip.
    """

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
    def _warmup_ends(self) -> CropStageConfig:
        if self.optimizer.warmup_epochs >= self.epochs:
            raise ValueError(f"optimizer.warmup_epochs must be below epochs ({self.epochs}); change both")
        milestones = self.optimizer.milestones
        if milestones and not self.optimizer.warmup_epochs <= milestones[0] <= milestones[-1] < self.epochs:
            raise ValueError(
                f"optimizer.milestones must be between warmup_epochs ({self.optimizer.warmup_epochs:g}) and epochs "
                f"({self.epochs}); change them"
            )
        return self

    @model_validator(mode="after")
    def _rate_falls(self) -> CropStageConfig:
        peak = self.optimizer.peak_lr(self.batch_size)
        if self.optimizer.min_lr > peak:
            raise ConfigError("optimizer.min_lr", f"{self.optimizer.min_lr:g} is above the peak learning rate {peak:g}")
        return self

    def lr_at_step(self, step: int, steps_per_epoch: int) -> float:
        """Return the learning rate of an optimizer step, from the fractional epoch before it."""
        return self.optimizer.lr_at_epoch(step / steps_per_epoch, self.batch_size, self.epochs)


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


class PretrainConfig(CropStageConfig):
    """Pre-training: teachers, masking and objectives.

    Attributes:
        init: initial weights: a run's stage folder or a weights file, of this project or released; null is random.
        teachers: names of the recipe's teachers that this stage uses.
        encoder_input: the ``visible`` tokens alone, all tokens with ``mask_tokens`` in place of removed ones (BEiT), or
            the ``full`` image without masking (FD).
        masking: selection of the visible tokens; null with ``encoder_input: full``.
        objectives: losses by name.
        drop_path: rate of stochastic depth in the last block, rising linearly from 0.
        attention_dropout: rate of dropout of the attention.
        color_jitter: largest relative change of brightness, contrast and saturation, in random order, after the crop.
        placement: placement of the teachers' weights: one kind for all (``device``, ``step``, ``stream``,
            ``sharded``), or by teacher a kind or a section (:class:`PlacementConfig`); others are on the device. It
            affects speed and memory, not results, and no hash.
        knn: k-NN evaluation of the features; null disables it. It does not affect training.
    """

    optimizer: OptimizerConfig

    init: str | None = None
    teachers: tuple[str, ...] = ()
    # Left out of records and hashes at its default, so that runs from before it existed keep their hash.
    encoder_input: Literal["visible", "mask_tokens", "full"] = Field(
        "visible", exclude_if=lambda value: value == "visible"
    )
    masking: MaskingConfig | None = None
    objectives: dict[Name, Objective] = Field(min_length=1)
    drop_path: float = Field(0.0, ge=0, lt=1, exclude_if=lambda value: value == 0)
    attention_dropout: float = Field(0.0, ge=0, lt=1, exclude_if=lambda value: value == 0)
    color_jitter: float = Field(0.0, ge=0, le=1, exclude_if=lambda value: value == 0)
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

    @model_validator(mode="before")
    @classmethod
    def _masked_unless_full(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("encoder_input") != "full":
            return {"masking": {}, **values}
        return values

    @model_validator(mode="after")
    def _masking_suits_the_input(self) -> PretrainConfig:
        masking, encoder_input = self.masking, self.encoder_input
        if (masking is None) != (encoder_input == "full"):
            raise ConfigError("masking", "null belongs to encoder_input: full, and a section to the others")
        if masking is not None and encoder_input == "visible" and (masking.mode == "block" or masking.unit):
            key = "mode" if masking.mode == "block" else "unit"
            raise ConfigError(f"masking.{key}", f"{getattr(masking, key)} needs encoder_input: mask_tokens")
        return self

    @model_validator(mode="after")
    def _tokens_are_computed(self) -> PretrainConfig:
        for name, objective in self.objectives.items():
            tap, tokens, where = objective.tap, objective.tokens, f"objectives.{name}"
            if self.encoder_input == "visible" and tap == "encoder" and tokens != "visible":
                raise ConfigError(
                    f"{where}.tokens",
                    f"tap: encoder has visible tokens only, so tokens: {tokens} cannot be supervised; use visible, or "
                    "encoder_input: mask_tokens",
                )
            if self.encoder_input != "visible" and tap == "decoder":
                raise ConfigError(f"{where}.tap", f"encoder_input: {self.encoder_input} has no decoder; use encoder")
            if self.encoder_input == "mask_tokens" and tokens == "visible":
                raise ConfigError(
                    f"{where}.tokens",
                    "encoder_input: mask_tokens predicts removed patches, and the encoder sees the visible ones; use "
                    "masked or all",
                )
            if self.encoder_input == "full" and tokens != "all":
                raise ConfigError(f"{where}.tokens", f"encoder_input: full removes none, so {tokens} is all; write all")
        return self

    def visible_share(self, num_tokens: int) -> float:
        """Return the share of tokens that are not removed; of mode ``block`` its least.

        Args:
            num_tokens: L, of the encoder's grid.
        """
        if self.masking is None:
            return 1.0
        return self.masking.keep_ratio or 1 - (self.masking.masked or 0) / num_tokens

    @field_validator("objectives")
    @classmethod
    def _names_are_free(cls, value: dict[str, Objective]) -> dict[str, Objective]:
        for name, reason in RESERVED_OBJECTIVES.items():
            if name in value:
                raise ConfigError(name, f"not a name for an objective ({reason})")
        return value


class FinetuneConfig(CropStageConfig):
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


class ProbeConfig(CropStageConfig):
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
    """Accuracy of fine-tuned models on the validation set, or AP of a detector on that of ``data.detection``.

    Attributes:
        members: stage folders or model files, of classifiers, whose softmax outputs are averaged, or of one detector;
            null is this run's own fine-tuning.
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
