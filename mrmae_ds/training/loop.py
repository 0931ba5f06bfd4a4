"""The training loop. It handles steps, learning rates and intervals; the task defines what is learned."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import deepspeed

from mrmae_ds.errors import StopRequested, TrainingError
from mrmae_ds.profiling.step_ranges import step_range
from mrmae_ds.training.callbacks.base import TrainContext
from mrmae_ds.training.checkpoint.train_state import TrainState
from mrmae_ds.training.engine.build import set_lr
from mrmae_ds.training.meter import Meter
from mrmae_ds.training.schedule import StageSchedule
from mrmae_ds.training.step_sync import StepStatus, StepSync, take_step
from mrmae_ds.training.tasks.base import Task

# Training is given up after this many consecutive skipped (non-finite) steps.
MAX_BAD_STEPS = 5


def run_step(
    engine: deepspeed.DeepSpeedEngine,
    task: Task[Any],
    batches: Iterator[Any],
    schedule: StageSchedule,
    step: int,
    meter: Meter,
    step_sync: StepSync,
) -> StepStatus:
    """Run one optimizer step: forward and backward of its micro-batches, and the update if it is finite on all ranks.

    Args:
        engine: wraps the task's model, in training mode.
        task: computes the losses.
        batches: this rank's micro-batches.
        schedule: step counts and learning rates.
        step: number of the step, from 0.
        meter: counts losses and waiting time.
        step_sync: status exchange before the update.

    Returns:
        The status of the step, the same on every rank.
    """
    set_lr(engine, schedule.lr_at_step(step))
    step_sync.begin()
    for index in range(schedule.accumulation):
        started = time.perf_counter()
        with step_range("loader"):
            batch = next(batches)
        meter.data_wait_s += time.perf_counter() - started
        with step_range("forward"):
            losses = task.losses(engine, batch, schedule.key(step, index))
        with step_range("backward"):
            engine.backward(losses["loss"])
        meter.add(losses)
        step_sync.add(batch, losses)
        if index < schedule.accumulation - 1:
            engine.step()  # only counts the micro-batch
    with step_range("sync"):
        exchange = step_sync.exchange(engine)
    with step_range("optimizer"):
        status = take_step(engine, exchange)
    if status.finite:
        task.after_step((step + 1) / schedule.steps_per_epoch)
    return status


def train(context: TrainContext) -> None:
    """Train from ``context.state`` to the end of the stage.

    If the state is a checkpoint's, what follows its last step (a logged line, an evaluation) is done first.

    Args:
        context: engine, data, state and callbacks.

    Raises:
        TrainingError: after :data:`MAX_BAD_STEPS` consecutive steps that were not finite.
        StopRequested: after a signal and a checkpoint.
    """
    try:
        for callback in context.callbacks:
            callback.on_train_start(context)
        _train(context)
    finally:
        for callback in context.callbacks:
            callback.close()


def _train(context: TrainContext) -> None:
    engine, schedule, state = context.engine, context.schedule, context.state
    start = state.step
    batches: Iterator[Any] = iter(())
    if start:
        _end_interval(context)
    engine.train()
    for step in range(start, schedule.total_steps):
        epoch, step_in_epoch = divmod(step, schedule.steps_per_epoch)
        if step == start or step_in_epoch == 0:
            batches = context.loader.epoch(epoch, step_in_epoch * schedule.accumulation)
        status = run_step(engine, context.task, batches, schedule, step, state.meter, context.step_sync)
        _count(context, status)
        if not status.finite:
            for callback in context.callbacks:
                callback.on_step_skipped(context, status)
            if state.bad_in_row >= MAX_BAD_STEPS:
                _end_interval(context, force=True)
                _end_training(context)
                raise TrainingError(_too_many_skipped(state))
        context.heartbeat(f"step {state.step + 1}")
        for callback in context.callbacks:
            callback.on_step_end(context, status)
        if status.signal and state.step < schedule.total_steps:
            raise StopRequested(status.signal, state.step)
        _end_interval(context)
    _end_training(context)


def _end_training(context: TrainContext) -> None:
    for callback in context.callbacks:
        callback.on_train_end(context)


def _count(context: TrainContext, status: StepStatus) -> None:
    state = context.state
    state.step += 1
    state.grad_norm = context.engine.get_global_grad_norm()
    state.skipped += not status.finite
    state.bad_in_row = 0 if status.finite else state.bad_in_row + 1
    context.steps_since_log += 1


def _too_many_skipped(state: TrainState) -> str:
    return (
        f"loss or gradients were not finite in the last {state.bad_in_row} steps, up to step {state.step}; such steps "
        "are skipped, so the weights are those from before. Lower the learning rate, or check the images: "
        "mrmae replay repeats the captured step"
    )


def _end_interval(context: TrainContext, force: bool = False) -> None:
    """Evaluate and log if it is due after the last step, or in any case if ``force``. All ranks must call it."""
    schedule, state = context.schedule, context.state
    epoch, step_in_epoch = divmod(state.step, schedule.steps_per_epoch)
    if not (state.step % context.log_every == 0 or step_in_epoch == 0 or state.step == 1 or force):
        return
    values = _interval_means(context)
    if step_in_epoch == 0:
        for callback in context.callbacks:
            values |= callback.on_epoch_end(context, epoch)
        context.engine.train()
    for callback in context.callbacks:
        callback.on_log(context, values)
    state.meter.restart()
    context.steps_since_log = 0
    if context.perf_meter:
        context.perf_meter.restart()


def _interval_means(context: TrainContext) -> dict[str, float]:
    schedule, state = context.schedule, context.state
    losses, speeds, bad = state.meter.read(schedule.launch, schedule.micro_batch)
    values = {
        **{name if name == "loss" or "/" in name else f"loss/{name}": value for name, value in losses.items()},
        "lr": schedule.lr_at_step(state.step - 1),
        "epoch": state.step / schedule.steps_per_epoch,
        **speeds,
        "skipped_steps": state.skipped,
    }
    if state.grad_norm is not None:
        values["grad_norm"] = float(state.grad_norm)
    if bad:
        values["nonfinite_batches"] = bad
    if context.perf_meter and context.steps_since_log:
        values |= context.perf_meter.interval(context.steps_since_log)
    return values
