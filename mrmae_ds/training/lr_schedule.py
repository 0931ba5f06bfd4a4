"""The learning rate as a pure function of the fractional epoch (MAE's rule)."""

from __future__ import annotations

import math


def learning_rate(epoch: float, *, peak: float, floor: float, warmup_epochs: float, epochs: float) -> float:
    """Linear warm-up from 0 to ``peak``, then half a cosine to ``floor``.

    Args:
        epoch: fractional epoch, (step + 0) / steps_per_epoch before each optimizer step.
        peak: the rate at the end of warm-up.
        floor: the rate at the end of training.
        warmup_epochs: length of the warm-up.
        epochs: length of the whole training.
    """
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
