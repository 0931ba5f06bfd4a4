"""The one training loop. It knows steps, rates and records; the task knows what is learned."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import deepspeed
import torch
from torch import Tensor

from mrmae_ds.data.reader import Batch, Reader
from mrmae_ds.recipe_stages import StageConfig
from mrmae_ds.training.accounting import Accountant
from mrmae_ds.training.distributed import sum_over_ranks
from mrmae_ds.training.engine import set_learning_rate
from mrmae_ds.training.launch import Launch
from mrmae_ds.training.schedule import learning_rate
from mrmae_ds.training.tasks import StepKey, Task

# A few bad batches are skipped; when nothing else comes, going on is a waste. Judged where losses are read.
MAX_BAD_STEPS = 5


class TrainingError(RuntimeError):
    """Training cannot go on; the process group is intact and every rank raises it."""


@dataclass(frozen=True)
class Plan:
    """The arithmetic of a stage: every count is fixed before the first step.

    Attributes:
        stage: the recipe's section. seed: the run's.
        steps_per_epoch: optimiser steps.
        accumulation: micro-batches a step. micro_batch: pictures of each.
        launch: this process among the others.
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
        """Optimiser steps of the stage."""
        return self.steps_per_epoch * self.epochs

    def rate(self, step: int) -> float:
        """The learning rate of an optimiser step, from the fractional epoch before it."""
        optimizer = self.stage.optimizer
        return learning_rate(
            step / self.steps_per_epoch,
            peak=optimizer.peak_lr(self.stage.batch_size),
            floor=optimizer.min_lr,
            warmup_epochs=optimizer.warmup_epochs,
            epochs=self.epochs,
        )

    def key(self, step: int, micro: int) -> StepKey:
        """The identity of a micro-batch on this rank."""
        launch = self.launch
        return StepKey(self.seed, step, micro, launch.rank, launch.world_size, self.micro_batch)


@dataclass
class Meter:
    """Sums losses on the device and looks at them only when asked, so that no step waits for the host."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    nonfinite: Tensor | None = None
    batches: int = 0
    waited: float = 0.0
    since: float = field(default_factory=time.perf_counter)

    def add(self, losses: dict[str, Tensor]) -> None:
        """Count one micro-batch's losses, each a scalar."""
        finite = torch.isfinite(losses["loss"].detach())
        for name, value in losses.items():
            safe = torch.where(finite, value.detach().float(), 0.0)
            self.sums[name] = self.sums[name] + safe if name in self.sums else safe
        bad = (~finite).float()
        self.nonfinite = bad if self.nonfinite is None else self.nonfinite + bad
        self.batches += 1

    def read(self, launch: Launch, micro_batch: int) -> tuple[dict[str, float], dict[str, float], int]:
        """Means over the finite micro-batches of all ranks since the last read, speeds, and how many were not finite.

        All ranks must call it. The speeds are ``images_per_s`` of the whole job and ``data_wait``, the share of
        this rank's time spent waiting for pictures.
        """
        assert self.nonfinite is not None
        packed = sum_over_ranks(torch.stack([*self.sums.values(), self.nonfinite])).tolist()
        *totals, bad = packed
        everything = self.batches * launch.world_size
        elapsed = time.perf_counter() - self.since
        good = everything - bad
        means = {name: total / good if good else float("nan") for name, total in zip(self.sums, totals, strict=True)}
        speeds = {"images_per_s": everything * micro_batch / elapsed, "data_wait": self.waited / elapsed}
        self.restart()
        return means, speeds, int(bad)

    def restart(self) -> None:
        """Forget everything; the clock starts now."""
        self.sums, self.nonfinite, self.batches, self.waited = {}, None, 0, 0.0
        self.since = time.perf_counter()


def run_step(
    engine: deepspeed.DeepSpeedEngine,
    task: Task,
    batches: Iterator[Batch],
    plan: Plan,
    step: int,
    meter: Meter,
) -> None:
    """One optimiser step: all its micro-batches, forward, backward, update."""
    set_learning_rate(engine, plan.rate(step))
    for micro in range(plan.accumulation):
        asked = time.perf_counter()
        batch = next(batches)
        meter.waited += time.perf_counter() - asked
        losses = task.losses(engine, batch, plan.key(step, micro))
        engine.backward(losses["loss"])
        engine.step()
        meter.add(losses)


class Hooks(Protocol):
    """What happens around the steps. Every method is called on every rank, with the steps done."""

    def end_of_epoch(self, epochs: int, step: int) -> dict[str, float]:
        """Evaluate if it is time; numbers to log with this step."""
        ...

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write the interval's means down."""
        ...

    def save(self, epochs: int, step: int) -> None:
        """Write a checkpoint if it is time; called at the end of an epoch, after :meth:`log`."""
        ...


def train(
    engine: deepspeed.DeepSpeedEngine,
    task: Task,
    reader: Reader,
    plan: Plan,
    start: int,
    log_every: int,
    hooks: Hooks,
    accountant: Accountant | None = None,
) -> None:
    """Train from step ``start`` to the end of the stage.

    Args:
        engine: wraps the task's model.
        task: gives the losses.
        reader: this rank's pictures.
        plan: the stage's arithmetic.
        start: optimiser steps already done.
        log_every: steps between logged lines; the first step and every epoch's last are logged too.
        hooks: what happens around the steps.
        accountant: whose numbers are logged too.

    Raises:
        TrainingError: after :data:`MAX_BAD_STEPS` or more steps in a row without one finite loss.
    """
    engine.train()
    meter = Meter()
    bad_steps = 0
    batches: Iterator[Batch] = iter(())
    for step in range(start, plan.total_steps):
        epoch, within = divmod(step, plan.steps_per_epoch)
        if step == start or within == 0:
            batches = reader.epoch(epoch, within * plan.accumulation)
        run_step(engine, task, batches, plan, step, meter)
        done = step + 1
        epoch_ends = done % plan.steps_per_epoch == 0
        if done % log_every == 0 or epoch_ends or done == 1:
            steps = meter.batches // plan.accumulation
            values, all_bad = _interval(engine, plan, meter, done)
            if accountant:
                values |= accountant.interval(steps)
            bad_steps = bad_steps + steps if all_bad else 0
            if epoch_ends:
                values |= hooks.end_of_epoch(epoch + 1, done)
            hooks.log(done, values)
            if bad_steps >= MAX_BAD_STEPS:
                raise TrainingError(
                    f"the loss was not finite in any micro-batch of the last {bad_steps} steps, up to step {done}; "
                    "such steps are skipped, so the weights are as they were before. Lower the learning rate, or "
                    "look at the pictures"
                )
            if epoch_ends:
                hooks.save(epoch + 1, done)
            engine.train()
            meter.restart()
            if accountant:
                accountant.restart()


def _interval(engine: deepspeed.DeepSpeedEngine, plan: Plan, meter: Meter, done: int) -> tuple[dict[str, float], bool]:
    """The numbers to log after ``done`` steps, and whether not one loss of the interval was finite."""
    total = meter.batches * plan.launch.world_size
    losses, speeds, bad = meter.read(plan.launch, plan.micro_batch)
    values = {
        **{name if name == "loss" else f"loss/{name}": value for name, value in losses.items()},
        "lr": plan.rate(done - 1),
        "epoch": done / plan.steps_per_epoch,
        **speeds,
        "skipped_steps": engine.skipped_steps,
    }
    norm = engine.get_global_grad_norm()
    if norm is not None:
        values["grad_norm"] = float(norm)
    if bad:
        values["nonfinite_batches"] = bad
    return values, bad == total
