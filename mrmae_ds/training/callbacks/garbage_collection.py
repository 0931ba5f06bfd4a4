"""Python garbage collection at fixed steps, so that all ranks pause together."""

from __future__ import annotations

import gc

from mrmae_ds.config.sections import GarbageCollectionConfig
from mrmae_ds.training.callbacks.base import Callback, TrainContext
from mrmae_ds.training.step_sync import StepStatus


class GarbageCollectionCallback(Callback):
    """Disables automatic collection while training and collects the young generations every N steps.

    Args:
        config: the recipe's ``garbage_collection`` section.
    """

    def __init__(self, config: GarbageCollectionConfig) -> None:
        self.every_steps = config.every_steps

    def on_train_start(self, context: TrainContext) -> None:
        """Disable automatic collection."""
        gc.disable()
        gc.collect()

    def on_step_end(self, context: TrainContext, status: StepStatus) -> None:
        """Collect if it is due."""
        if context.state.step % self.every_steps == 0:
            gc.collect(1)

    def close(self) -> None:
        """Enable automatic collection again."""
        gc.enable()
