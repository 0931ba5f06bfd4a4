"""When a checkpoint is due, and which stay."""

from __future__ import annotations

from dataclasses import dataclass

from mrmae_ds.config.sections import RecordConfig
from mrmae_ds.training.checkpoint.folder import Retention


@dataclass(frozen=True)
class SavePlan:
    """The recipe's ``record`` section in optimiser steps.

    Attributes:
        record: the section.
        steps_per_epoch, total_steps: of the stage.
    """

    record: RecordConfig
    steps_per_epoch: int
    total_steps: int

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after ``step`` steps, signals and the clock aside."""
        record = self.record
        every = [*self.retention().keep_every]
        if record.save_every_epochs is not None:
            every.append(record.save_every_epochs * self.steps_per_epoch)
        if record.save_every_steps is not None:
            every.append(record.save_every_steps)
        return step == self.total_steps or any(step % n == 0 for n in every)

    def retention(self) -> Retention:
        """Which checkpoints stay."""
        record = self.record
        epochs = [record.keep_every_epochs * self.steps_per_epoch] if record.keep_every_epochs else []
        steps = [record.keep_every_steps] if record.keep_every_steps else []
        return Retention(record.keep_checkpoints, (*epochs, *steps))
