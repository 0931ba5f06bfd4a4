"""The one training loop. It knows steps, rates and records; the task knows what is learned."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import deepspeed

from mrmae_ds.data.loaders.base import Batch, Loader
from mrmae_ds.errors import StopRequested, TrainingError
from mrmae_ds.training.checkpoint.train_state import TrainState
from mrmae_ds.training.engine.build import set_lr
from mrmae_ds.training.engine.nonfinite import skip_step
from mrmae_ds.training.meter import Meter
from mrmae_ds.training.perf_metrics import PerfMeter
from mrmae_ds.training.schedule import StageSchedule
from mrmae_ds.training.step_sync import MicroBatch, StepStatus, StepSync
from mrmae_ds.training.tasks.base import Task

# A few bad batches are skipped; when nothing else comes, going on is a waste.
MAX_BAD_STEPS = 5


def run_step(
    engine: deepspeed.DeepSpeedEngine,
    task: Task[Any],
    batches: Iterator[Batch],
    schedule: StageSchedule,
    step: int,
    meter: Meter,
    boundary: StepSync | None = None,
) -> StepStatus:
    """One optimizer step: all its micro-batches, forward, backward, and the update if all ranks find it finite."""
    boundary = boundary or StepSync()
    set_lr(engine, schedule.lr_at_step(step))
    boundary.begin()
    for index in range(schedule.accumulation):
        asked = time.perf_counter()
        batch = next(batches)
        meter.waited += time.perf_counter() - asked
        losses = task.losses(engine, batch, schedule.key(step, index))
        engine.backward(losses["loss"])
        meter.add(losses)
        boundary.add(batch, losses)
        if index < schedule.accumulation - 1:
            engine.step()  # counts the micro-batch, and no more
    verdict = boundary.agree(engine)
    if not verdict.finite:
        skip_step(engine)
        return verdict
    engine.step()
    if not engine.was_step_applied():
        # DeepSpeed's own check: the square of a gradient may overflow where the gradient does not.
        return replace(verdict, bad_gradient=True)
    task.after_step()
    return verdict


class Hooks(Protocol):
    """What happens around the steps. Every method is called on every rank, with the steps done."""

    def skipped(self, state: TrainState, verdict: StepStatus, micros: list[MicroBatch]) -> None:
        """A step was not taken, because of these micro-batches on some rank."""
        ...

    def save(self, state: TrainState, verdict: StepStatus) -> None:
        """Write a checkpoint if it is time; called after every step, before what follows it."""
        ...

    def end_of_epoch(self, epochs: int, step: int) -> dict[str, float]:
        """Evaluate if it is time; numbers to log with this step."""
        ...

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write the interval's means down."""
        ...


def train(
    engine: deepspeed.DeepSpeedEngine,
    task: Task[Any],
    reader: Loader,
    schedule: StageSchedule,
    state: TrainState,
    log_every: int,
    hooks: Hooks,
    boundary: StepSync,
    accountant: PerfMeter | None = None,
) -> None:
    """Train from where ``state`` stands to the end of the stage.

    Args:
        engine: wraps the task's model.
        task: gives the losses.
        reader: this rank's images.
        schedule: the stage's arithmetic.
        state: counters, kept up to date; what follows its last step (a line, an evaluation) is done first.
        log_every: steps between logged lines; the first step and every epoch's last are logged too.
        hooks: what happens around the steps.
        boundary: what is agreed on before every update.
        accountant: whose numbers are logged too.

    Raises:
        TrainingError: after :data:`MAX_BAD_STEPS` steps in a row that were not finite.
        StopRequested: after a signal, and a checkpoint.
    """
    start = state.step
    batches: Iterator[Batch] = iter(())
    follow_up = _FollowUp(engine, schedule, state, log_every, hooks, accountant)
    if start:
        follow_up.run()
    engine.train()
    for step in range(start, schedule.total_steps):
        epoch, within = divmod(step, schedule.steps_per_epoch)
        if step == start or within == 0:
            batches = reader.epoch(epoch, within * schedule.accumulation)
        verdict = run_step(engine, task, batches, schedule, step, state.meter, boundary)
        _count(engine, state, verdict)
        follow_up.steps += 1
        if not verdict.finite:
            hooks.skipped(state, verdict, boundary.micros)
            if state.bad_in_row >= MAX_BAD_STEPS:
                follow_up.run(at_any_rate=True)
                raise TrainingError(_gave_up(state))
        hooks.save(state, verdict)
        if verdict.signal and state.step < schedule.total_steps:
            raise StopRequested(verdict.signal, state.step)
        follow_up.run()


def _count(engine: deepspeed.DeepSpeedEngine, state: TrainState, verdict: StepStatus) -> None:
    state.step += 1
    state.grad_norm = engine.get_global_grad_norm()
    state.skipped += not verdict.finite
    state.bad_in_row = 0 if verdict.finite else state.bad_in_row + 1


def _gave_up(state: TrainState) -> str:
    return (
        f"loss or gradients were not finite in the last {state.bad_in_row} steps, up to step {state.step}; such steps "
        "are skipped, so the weights are as they were before. Lower the learning rate, or look at the images: "
        "mrmae replay runs the captured step again"
    )


@dataclass
class _FollowUp:
    """What follows a step: the line of its interval, and the evaluation of its epoch, if it is time for them.

    ``steps`` are those that this process took since the last line; fewer than the line's after a resume.
    """

    engine: deepspeed.DeepSpeedEngine
    schedule: StageSchedule
    state: TrainState
    log_every: int
    hooks: Hooks
    accountant: PerfMeter | None
    steps: int = 0

    def run(self, at_any_rate: bool = False) -> None:
        """All ranks must call it."""
        schedule, state, done = self.schedule, self.state, self.state.step
        epoch_ends = done % schedule.steps_per_epoch == 0
        if not (done % self.log_every == 0 or epoch_ends or done == 1 or at_any_rate):
            return
        values = self._interval()
        if epoch_ends:
            values |= self.hooks.end_of_epoch(done // schedule.steps_per_epoch, done)
            self.engine.train()
        self.hooks.log(done, values)
        state.meter.restart()
        self.steps = 0
        if self.accountant:
            self.accountant.restart()

    def _interval(self) -> dict[str, float]:
        """The numbers to log."""
        schedule, state = self.schedule, self.state
        losses, speeds, bad = state.meter.read(schedule.launch, schedule.micro_batch)
        values = {
            **{name if name == "loss" else f"loss/{name}": value for name, value in losses.items()},
            "lr": schedule.lr_at_step(state.step - 1),
            "epoch": state.step / schedule.steps_per_epoch,
            **speeds,
            "skipped_steps": state.skipped,
        }
        if state.grad_norm is not None:
            values["grad_norm"] = float(state.grad_norm)
        if bad:
            values["nonfinite_batches"] = bad
        if self.accountant and self.steps:
            values |= self.accountant.interval(self.steps)
        return values
