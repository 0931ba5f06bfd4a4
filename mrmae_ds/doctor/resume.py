"""Check of a signal, its checkpoint, and the resumed training."""

from __future__ import annotations

import os
import signal

from mrmae_ds.distributed.signals import StopSignals
from mrmae_ds.doctor import expectations
from mrmae_ds.doctor.context import DoctorContext
from mrmae_ds.doctor.numerics import ENGINES
from mrmae_ds.doctor.reading import Expected, Reading
from mrmae_ds.doctor.tiny_job import prepare_tiny
from mrmae_ds.doctor.workload import task_engine
from mrmae_ds.errors import StopRequested
from mrmae_ds.training.callbacks.base import Callback, TrainContext
from mrmae_ds.training.callbacks.checkpoint import CheckpointCallback
from mrmae_ds.training.checkpoint.folder import CheckpointPolicy
from mrmae_ds.training.checkpoint.resume import load_checkpoint
from mrmae_ds.training.checkpoint.run_dir import decide_start
from mrmae_ds.training.checkpoint.train_state import TrainState
from mrmae_ds.training.loop import train
from mrmae_ds.training.step_sync import StepStatus, StepSync

INTERRUPTED, TOTAL = 10, 15
ENGINE = "ZeRO-1"
SIGNALED = Expected(INTERRUPTED, INTERRUPTED, "the step of the signal")


class _Observer(Callback):
    """Keeps the losses, sends USR1 to this process during one step, and ends training after another.

    Args:
        signal_after: completed steps after which the signal is sent; None sends none.
    """

    def __init__(self, signal_after: int | None) -> None:
        self.signal_after = signal_after
        self.losses: dict[int, float] = {}

    def on_step_end(self, context: TrainContext, status: StepStatus) -> None:
        if context.state.step == self.signal_after and context.schedule.launch.rank == 0:
            os.kill(os.getpid(), signal.SIGUSR1)

    def on_log(self, context: TrainContext, values: dict[str, float]) -> None:
        self.losses[context.state.step] = values["loss"]
        if context.state.step == TOTAL:
            raise _Enough


class _Enough(Exception):
    """Training has gone far enough."""


def check_resume(context: DoctorContext) -> list[Reading]:
    """Stop a training by USR1 during step 10, resume it, and compare five losses with an uninterrupted run's."""
    readings: list[Reading] = []
    for deterministic, expected in {True: expectations.EQUAL, False: expectations.RESUME}.items():
        label = "deterministic" if deterministic else "default kernels"
        whole = _train(context, f"whole-{deterministic}", deterministic, None)
        _train(context, f"stopped-{deterministic}", deterministic, INTERRUPTED - 1)
        resumed = _train(context, f"stopped-{deterministic}", deterministic, None)
        compared = range(INTERRUPTED + 1, TOTAL + 1)
        difference = max(abs(resumed[step] - whole[step]) / max(abs(whole[step]), 1e-12) for step in compared)
        readings += [
            Reading(f"{label}: resumed after step", min(resumed), "", SIGNALED),
            Reading(f"{label}: loss, relative difference", difference, "", expected),
        ]
    return readings


def _train(context: DoctorContext, name: str, deterministic: bool, signal_after: int | None) -> dict[int, float]:
    """Train up to the signal or to step TOTAL, from the newest checkpoint if there is one. Return losses by step."""
    job = prepare_tiny(context, name, ENGINES[ENGINE] | {"deterministic": deterministic})
    start = decide_start(job.stage_dir, job.stage_name, job.identity, "auto")
    observer, state = _Observer(signal_after), TrainState()
    built = task_engine(job.task, job.engine_config, job.schedule.accumulation, context.device)
    with built as engine, StopSignals() as signals:
        if start.checkpoint:
            state, _ = load_checkpoint(engine, start.checkpoint, job.launch, job.schedule.micro_batch)
        config, schedule = job.recipe.checkpoint, job.schedule
        policy = CheckpointPolicy(config, 10 * TOTAL, schedule.total_steps)
        checkpointer = job.checkpointer(engine, policy.retention(), committed=lambda *_: None)
        callbacks = [observer, CheckpointCallback(checkpointer, policy)]
        loader = job.train_loader(context.device)
        try:
            train(TrainContext(engine, job.task, loader, schedule, state, StepSync(signals), 1, callbacks))
        except (StopRequested, _Enough):
            pass
        finally:
            loader.close()
    return observer.losses
