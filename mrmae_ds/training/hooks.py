"""What a running stage does around its steps: evaluate, write down, save, capture."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import deepspeed

from mrmae_ds.distributed.watchdog import Watchdog
from mrmae_ds.training.checkpoint.async_saver import AsyncCheckpointer
from mrmae_ds.training.checkpoint.folder import CheckpointPolicy
from mrmae_ds.training.checkpoint.manifest import ResultValues
from mrmae_ds.training.checkpoint.train_state import TrainState
from mrmae_ds.training.evaluation.base import Evaluator
from mrmae_ds.training.job import PreparedStage
from mrmae_ds.training.nonfinite_capture import Division, write_capture
from mrmae_ds.training.run_logger import RunLogger
from mrmae_ds.training.step_sync import MicroBatch, StepStatus, StepSync


@dataclass
class StageHooks:
    """The hooks of :func:`mrmae_ds.training.loop.train`.

    Attributes:
        job, engine: what runs.
        evaluator: of the stage, if it has one.
        recorder: on rank 0.
        saver, saves: write checkpoints, say when.
        boundary: whose clock a save starts again.
        monitor: is told that the process gets on.
        results: so far.
    """

    job: PreparedStage
    engine: deepspeed.DeepSpeedEngine
    evaluator: Evaluator | None
    recorder: RunLogger | None
    saver: AsyncCheckpointer
    saves: CheckpointPolicy
    boundary: StepSync
    monitor: Watchdog
    results: ResultValues

    def skipped(self, state: TrainState, verdict: StepStatus, micros: list[MicroBatch]) -> None:
        """See :class:`mrmae_ds.training.loop.Hooks`."""
        job, schedule = self.job, self.job.schedule
        division = Division(
            stage=job.stage_name,
            seed=schedule.seed,
            recipe_hash=job.recipe.hash(job.stage_name),
            world_size=schedule.launch.world_size,
            accumulation=schedule.accumulation,
            micro_batch=schedule.micro_batch,
            engine=job.engine_config.as_written(),
        )
        step, again = state.step - 1, state.bad_in_row > 1
        folder = write_capture(self.engine, job.stage_dir, division, step, verdict, micros, same_weights=again)
        self.engine.train()
        if schedule.launch.rank == 0:
            what = "a loss" if verdict.bad_loss else "a gradient"
            captured = f"; mrmae replay {folder} runs it again" if folder else ""
            print(
                f"step {state.step} skipped: {what} was not finite ({state.skipped} skipped so far, {state.bad_in_row} "
                f"in a row){captured}",
                file=sys.stderr,
                flush=True,
            )

    def save(self, state: TrainState, verdict: StepStatus) -> None:
        """See :class:`mrmae_ds.training.loop.Hooks`."""
        self.monitor.beat(f"step {state.step + 1}")
        self.saver.poll(verdict.writing)
        if not (self.saves.due(state.step) or verdict.save or verdict.signal):
            return
        self.monitor.beat(f"saving after step {state.step}")
        self.saver.save(state, self.results)
        if verdict.signal:
            self.saver.finish()
        self.boundary.saved()
        self.monitor.beat(f"step {state.step + 1}")

    def end_of_epoch(self, epochs: int, step: int) -> dict[str, float]:
        """See :class:`mrmae_ds.training.loop.Hooks`."""
        if self.evaluator is None or not self.evaluator.due(epochs):
            return {}
        self.monitor.beat(f"evaluating after epoch {epochs}")
        results = self.evaluator.run(self.engine)
        self.results |= results
        return {name: results[key] for key, name in self.evaluator.metrics.items()}

    def log(self, step: int, values: dict[str, float]) -> None:
        """See :class:`mrmae_ds.training.loop.Hooks`."""
        if step == 1:
            self.results["first_loss"] = values["loss"]
        self.results["last_loss"] = values["loss"]
        if self.recorder:
            self.recorder.log(step, values)
