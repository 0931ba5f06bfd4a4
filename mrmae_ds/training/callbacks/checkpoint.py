"""Checkpoints while a stage trains."""

from __future__ import annotations

from mrmae_ds.training.callbacks.base import Callback, TrainContext
from mrmae_ds.training.checkpoint.async_saver import AsyncCheckpointer
from mrmae_ds.training.checkpoint.folder import CheckpointPolicy
from mrmae_ds.training.step_sync import StepStatus


class CheckpointCallback(Callback):
    """Saves a checkpoint when the policy, the clock or a signal demands one.

    Args:
        checkpointer: writes the checkpoints.
        policy: intervals in steps.
    """

    def __init__(self, checkpointer: AsyncCheckpointer, policy: CheckpointPolicy) -> None:
        self.checkpointer, self.policy = checkpointer, policy

    def on_step_end(self, context: TrainContext, status: StepStatus) -> None:
        """Save if a checkpoint is due, and commit what was written in the background."""
        step = context.state.step
        self.checkpointer.poll(status.writing)
        if not (self.policy.due(step) or status.save or status.signal):
            return
        context.heartbeat(f"saving after step {step}")
        self.checkpointer.save(context.state, context.results)
        if status.signal:
            self.checkpointer.finish()
        context.step_sync.saved()
        context.heartbeat(f"step {step + 1}")

    def on_train_end(self, context: TrainContext) -> None:
        """Wait for the checkpoint that is being written in the background."""
        self.checkpointer.finish()
