"""Optimizers of the stages and their learning rates."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mrmae_ds.config.sections import Ascending, Fraction, Positive
from mrmae_ds.errors import ConfigError
from mrmae_ds.schema import Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class RateConfig(Section):
    """Learning-rate schedule: linear warm-up, then cosine to ``min_lr``, or constant with steps down.

    Attributes:
        base_lr: peak learning rate for a batch of 256 images, scaled linearly with the batch size.
        lr: absolute peak learning rate, instead of ``base_lr``.
        min_lr: learning rate at the end.
        warmup_epochs: length of the warm-up.
        schedule: ``cosine``, or ``step``: the rate is divided by 10 at each of ``milestones`` (SimMIM).
        milestones: epochs.
    """

    base_lr: Positive | None = None
    lr: Positive | None = None
    min_lr: float = Field(0.0, ge=0, allow_inf_nan=False)
    warmup_epochs: float = Field(ge=0)
    # Left out of records and hashes at their defaults, so that runs from before they existed keep their hash.
    schedule: Literal["cosine", "step"] = Field("cosine", exclude_if=lambda value: value == "cosine")
    milestones: Annotated[tuple[Positive, ...], Ascending] = Field((), exclude_if=lambda value: not value)

    @model_validator(mode="after")
    def _one_rate(self) -> RateConfig:
        if (self.base_lr is None) == (self.lr is None):
            raise ValueError("give exactly one of base_lr (times batch_size/256) and lr (absolute)")
        return self

    @model_validator(mode="after")
    def _milestones_are_of_steps(self) -> RateConfig:
        if (self.schedule == "step") != bool(self.milestones):
            raise ConfigError("milestones", "schedule: step needs some, and cosine has none")
        if self.schedule == "step" and self.min_lr:
            raise ConfigError("min_lr", "has no effect on schedule: step (only on cosine); remove it")
        return self

    def lr_at_epoch(self, epoch: float, batch_size: int, epochs: float) -> float:
        """Return the learning rate at a fractional epoch.

        Args:
            epoch: step / steps_per_epoch before the optimizer step.
            batch_size: images per optimizer step.
            epochs: length of the training.
        """
        peak = self.peak_lr(batch_size)
        if self.schedule == "step" and epoch >= self.warmup_epochs:
            return peak * 0.1 ** sum(epoch >= milestone for milestone in self.milestones)
        return lr_at_epoch(epoch, peak=peak, floor=self.min_lr, warmup_epochs=self.warmup_epochs, epochs=epochs)

    def peak_lr(self, batch_size: int) -> float:
        """Return the learning rate at the end of warm-up."""
        return self.lr if self.lr is not None else (self.base_lr or 0.0) * batch_size / 256


class OptimizerConfig(RateConfig):
    """AdamW and its schedule.

    Attributes:
        betas: AdamW's.
        weight_decay: of weights; biases and norms have none.
        clip_grad: largest norm of the gradient; it becomes the engine config's ``gradient_clipping``. null leaves that
            to the engine config.
    """

    betas: tuple[Beta, Beta]
    weight_decay: float = Field(0.05, ge=0)
    clip_grad: Positive | None = Field(None, exclude_if=lambda value: value is None)


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


class DetectOptimizerConfig(Section):
    """AdamW of detectors.

    Attributes:
        lr: absolute peak learning rate; another batch size needs another one.
        betas: AdamW's.
        weight_decay: of the parameters that have any.
        groups: parameters without weight decay: ``detectron2`` (the encoder's norms and position embedding) or
            ``project`` (also all other biases and norms).
    """

    lr: Positive
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: float = Field(0.1, ge=0)
    groups: Literal["detectron2", "project"] = "detectron2"


class StepScheduleConfig(Section):
    """Learning-rate schedule: linear warm-up, then constant with steps down.

    Attributes:
        kind: ``steps``.
        milestones: shares of the training after which the rate is multiplied by ``factor``.
        factor: of the rate at each milestone.
        warmup_steps: optimizer steps of the warm-up.
        warmup_from: multiplier of the rate in the first step.
    """

    kind: Literal["steps"] = "steps"
    milestones: Annotated[tuple[Fraction, ...], Ascending] = (0.888889, 0.962963)
    factor: float = Field(0.1, gt=0, lt=1)
    warmup_steps: int = Field(250, ge=0)
    warmup_from: float = Field(0.001, gt=0, le=1)

    def multiplier(self, step: int, total_steps: int) -> float:
        """Return the learning rate of an optimizer step, relative to the peak.

        Args:
            step: optimizer steps completed before it.
            total_steps: of the whole training.
        """
        value = self.factor ** sum(step >= round(share * total_steps) for share in self.milestones)
        if step < self.warmup_steps:
            value *= self.warmup_from + (1 - self.warmup_from) * step / self.warmup_steps
        return value


def lr_at_epoch(epoch: float, *, peak: float, floor: float, warmup_epochs: float, epochs: float) -> float:
    """Return the learning rate: linear warm-up from 0 to ``peak``, then half a cosine to ``floor`` (MAE's rule).

    Args:
        epoch: fractional epoch, step / steps_per_epoch before each optimizer step.
        peak: learning rate at the end of the warm-up.
        floor: learning rate at the end of training.
        warmup_epochs: length of the warm-up.
        epochs: length of the training.
    """
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
