"""Sections of the stage `detect`: the detector and its training."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator, model_validator

from mrmae_ds.config.optimizers import DetectOptimizerConfig, StepScheduleConfig
from mrmae_ds.config.sections import Ascending, Fraction, Positive
from mrmae_ds.config.stages import StageConfig
from mrmae_ds.errors import ConfigError
from mrmae_ds.models.sizes import PYRAMID_MULTIPLE, check_global_blocks, nearest_for_pyramid
from mrmae_ds.schema import Section

Count = Annotated[int, Field(ge=1)]


class DetectorConfig(Section):
    """Mask R-CNN on a simple feature pyramid.

    Attributes:
        window: side of the attention windows of the encoder's other blocks, in patches.
        global_blocks: transformer blocks with global attention, from 0.
        channels: of the pyramid.
        box_convs: convolutions of the box head.
        mask_convs: convolutions of the mask head.
        fc: width of the box head's linear layer.
        anchors: sides of the anchors at the five levels of the pyramid, pixels.
        boxes_per_image: proposals that are sampled for the losses of the box head.
    """

    window: Count = 14
    global_blocks: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Ascending]
    channels: Count = 256
    box_convs: Count = 4
    mask_convs: Count = 4
    fc: Count = 1024
    anchors: tuple[Positive, Positive, Positive, Positive, Positive] = (32.0, 64.0, 128.0, 256.0, 512.0)
    boxes_per_image: Count = 512

    def check_depth(self, depth: int) -> None:
        """Check the blocks of an encoder.

        Args:
            depth: number of its transformer blocks.

        Raises:
            ConfigError: if a global block does not exist.
        """
        check_global_blocks(self.global_blocks, depth, "global_blocks")


class DetectConfig(StageConfig):
    """Fine-tuning of the encoder in Mask R-CNN on COCO (the paper's Table 2).

    Attributes:
        init: ``pretrain`` (this run's own pre-training), ``scratch`` (random), or a run's stage folder or model file. A
            whole detector is loaded with its heads; ``FILE#backbone.net`` is its encoder alone.
        image_size: side of the square input in pixels, a multiple of 32.
        optimizer: AdamW.
        schedule: of the learning rate.
        layer_decay: factor of the learning rate from one layer to the one below it.
        drop_path: rate of stochastic depth in the last block, rising linearly from 0.
        jitter: bounds of the random size of a training image, relative to the largest that fits the square.
        flip: probability of a horizontal flip.
        eval_every_epochs: epochs between two evaluations; the last epoch is always evaluated.
        detector: sizes of the model.
    """

    init: str = "pretrain"
    batch_size: int = Field(16, ge=1)
    image_size: Count = 1024
    optimizer: DetectOptimizerConfig
    schedule: StepScheduleConfig = StepScheduleConfig()
    layer_decay: float = Field(gt=0, le=1)
    drop_path: float = Field(0.1, ge=0, lt=1)
    jitter: tuple[Positive, Positive] = (0.1, 2.0)
    flip: Fraction = 0.5
    eval_every_epochs: Count = 5
    detector: DetectorConfig

    @field_validator("image_size")
    @classmethod
    def _whole_cells(cls, value: int) -> int:
        if value % PYRAMID_MULTIPLE:
            raise ValueError(f"must be a multiple of {PYRAMID_MULTIPLE}; the nearest is {nearest_for_pyramid(value)}")
        return value

    @model_validator(mode="after")
    def _jitter_ascends(self) -> DetectConfig:
        if self.jitter[0] > self.jitter[1]:
            raise ConfigError("jitter", f"must be [low, high] with low <= high, not {list(self.jitter)}")
        return self

    def lr_at_step(self, step: int, steps_per_epoch: int) -> float:
        """Return the learning rate of an optimizer step."""
        return self.optimizer.lr * self.schedule.multiplier(step, steps_per_epoch * self.epochs)
