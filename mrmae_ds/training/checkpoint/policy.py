"""When a checkpoint is due, and which stay."""

from __future__ import annotations

from dataclasses import dataclass

from mrmae_ds.config.sections import CheckpointConfig
from mrmae_ds.training.checkpoint.folder import Retention


@dataclass(frozen=True)
class CheckpointPolicy:
    """The recipe's ``record`` section in optimizer steps.

    Attributes:
        config: the recipe's section.
        steps_per_epoch, total_steps: of the stage.
    """

    config: CheckpointConfig
    steps_per_epoch: int
    total_steps: int

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after ``step`` steps, signals and the clock aside."""
        every = [*self.retention().keep_every]
        if self.config.every_epochs is not None:
            every.append(self.config.every_epochs * self.steps_per_epoch)
        if self.config.every_steps is not None:
            every.append(self.config.every_steps)
        return step == self.total_steps or any(step % n == 0 for n in every)

    def retention(self) -> Retention:
        """Which checkpoints stay."""
        epochs = [self.config.keep_every_epochs * self.steps_per_epoch] if self.config.keep_every_epochs else []
        steps = [self.config.keep_every_steps] if self.config.keep_every_steps else []
        return Retention(self.config.keep_last, (*epochs, *steps))
