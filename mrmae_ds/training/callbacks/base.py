"""Callback interface of the training loop, and the state that callbacks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import deepspeed

from mrmae_ds.data.loaders.base import Loader
from mrmae_ds.training.checkpoint.manifest import ResultValues
from mrmae_ds.training.checkpoint.train_state import TrainState
from mrmae_ds.training.perf_metrics import PerfMeter
from mrmae_ds.training.schedule import StageSchedule
from mrmae_ds.training.step_sync import StepStatus, StepSync
from mrmae_ds.training.tasks.base import Task


class Callback:
    """Actions around the steps of training. Every method is a no-op here.

    All methods are called on every rank, in the order of the list of callbacks, so they may use collectives; only
    :meth:`close` must not. After a step the order is: :meth:`on_step_skipped` if the step was skipped,
    :meth:`on_step_end`, :meth:`on_epoch_end` at the end of an epoch, :meth:`on_log` at the end of a logging interval.

    A checkpoint is written in :meth:`on_step_end`, so what follows is repeated when a run is resumed from it: neither
    lost nor done twice.
    """

    def on_train_start(self, context: TrainContext) -> None:
        """Run before the first step of this process."""

    def on_step_skipped(self, context: TrainContext, status: StepStatus) -> None:
        """Run after a step that changed no weights because a loss or gradient was not finite on some rank."""

    def on_step_end(self, context: TrainContext, status: StepStatus) -> None:
        """Run after every step."""

    def on_epoch_end(self, context: TrainContext, epoch: int) -> dict[str, float]:
        """Run after the last step of an epoch.

        Args:
            context: state of the training; its engine may be left in eval mode.
            epoch: epochs completed.

        Returns:
            Values to log with this step.
        """
        return {}

    def on_log(self, context: TrainContext, values: dict[str, float]) -> None:
        """Run at the end of a logging interval.

        Args:
            context: state of the training.
            values: means over the interval and results of :meth:`on_epoch_end`, by name.
        """

    def on_train_end(self, context: TrainContext) -> None:
        """Run after the last step, also if training is given up, but not after a signal or an error."""

    def close(self) -> None:
        """Release resources, however training ended. No collectives: other ranks may be gone."""


@dataclass
class TrainContext:
    """Everything that the training loop works on.

    Attributes:
        engine: wraps the task's model.
        task: computes the losses.
        loader: this rank's share of the training set.
        schedule: step counts and learning rates.
        state: counters, kept up to date; training starts from them.
        step_sync: status exchange before every update.
        log_every: steps between two logged lines; the first step and every epoch's last are logged too.
        callbacks: called in this order.
        results: results of the run so far, stored in checkpoints and in the run record.
        perf_meter: source of further logged values; None for none.
        heartbeat: reports progress to the watchdog, with the current activity.
        steps_since_log: steps of this process since the last logged line; fewer than the line's after a resume.
    """

    engine: deepspeed.DeepSpeedEngine
    task: Task[Any]
    loader: Loader[Any]
    schedule: StageSchedule
    state: TrainState
    step_sync: StepSync
    log_every: int
    callbacks: Sequence[Callback] = ()
    results: ResultValues = field(default_factory=dict)
    perf_meter: PerfMeter | None = None
    heartbeat: Callable[[str], None] = lambda activity: None
    steps_since_log: int = 0
