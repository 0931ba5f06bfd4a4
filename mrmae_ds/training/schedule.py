"""Arithmetic of a stage: steps, learning rates and micro-batch identities."""

from __future__ import annotations

from dataclasses import dataclass

from mrmae_ds.config.stages import StageConfig
from mrmae_ds.distributed.launch import Launch
from mrmae_ds.training.tasks.base import MicroBatchKey


@dataclass(frozen=True)
class StageSchedule:
    """Counts of a stage, all fixed before its first step.

    Attributes:
        stage: the recipe's section.
        seed: seed of the run.
        steps_per_epoch: optimizer steps per epoch.
        accumulation: micro-batches per optimizer step.
        micro_batch: images per micro-batch, B.
        launch: this rank among the others.
    """

    stage: StageConfig
    seed: int
    steps_per_epoch: int
    accumulation: int
    micro_batch: int
    launch: Launch

    @property
    def epochs(self) -> int:
        """Epochs of the stage."""
        return self.stage.epochs

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the stage."""
        return self.steps_per_epoch * self.epochs

    def lr_at_step(self, step: int) -> float:
        """Return the learning rate of an optimizer step.

        Args:
            step: number of the step, from 0.
        """
        return self.stage.lr_at_step(step, self.steps_per_epoch)

    def key(self, step: int, index: int) -> MicroBatchKey:
        """Return the identity of a micro-batch on this rank.

        Args:
            step: number of the optimizer step, from 0.
            index: number of the micro-batch in the step, from 0.
        """
        launch = self.launch
        return MicroBatchKey(self.seed, step, index, launch.rank, launch.world_size, self.micro_batch)
