"""Check of the host time of a micro-batch: of torch alone, and of each ZeRO engine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from mrmae_ds.doctor.context import DoctorContext
from mrmae_ds.doctor.reading import Reading
from mrmae_ds.doctor.steps import ENGINES, chosen_recipe, engine_config
from mrmae_ds.doctor.workload import build_random_task, noise_batches, noise_training
from mrmae_ds.training.step_sync import StepSync, take_step
from mrmae_ds.training.tasks.base import MicroBatchKey

IMAGES = 2  # so few that the GPU waits for the host
WARM_UP, TIMED = 3, 10
CONSTANTS = {"ZeRO-1": "zero1_param_us", "ZeRO-3": "zero3_param_us"}


def check_host(context: DoctorContext) -> list[Reading]:
    """Measure the host time to issue a micro-batch and an update, at a micro-batch that costs the GPU little."""
    plain = _plain_micro_batch(context)
    readings = [Reading("micro-batch without an engine", plain * 1e3, "ms")]
    for zero in ENGINES:
        micro_batch, update, parameters = _micro_batch_and_update(context, zero)
        extra = max(micro_batch - plain, 0.0) / parameters
        readings += [
            Reading(f"{zero}: micro-batch", micro_batch * 1e3, "ms"),
            Reading(f"{zero}: more per parameter", extra * 1e6, "us", None, CONSTANTS[zero]),
            Reading(f"{zero}: update", update * 1e3, "ms"),
        ]
        if zero == "ZeRO-1":
            readings.append(Reading("update per parameter", update / parameters * 1e6, "us", None, "update_param_us"))
    return readings


def _plain_micro_batch(context: DoctorContext) -> float:
    """Return the seconds of a micro-batch of the recipe in plain torch."""
    recipe, config = chosen_recipe(context), engine_config(context, "ZeRO-1", IMAGES)
    task = build_random_task(recipe, config, "pretrain")
    task.model.to(context.device, config.model_dtype)
    task.to(context.device)
    batch = next(noise_batches(IMAGES, task.image_size, context.device))
    key = MicroBatchKey(0, 0, 0, context.launch.rank, context.launch.world_size, IMAGES)

    def micro_batch() -> None:
        with config.autocast(context.device):
            loss = task.losses(task.model, batch, key)["loss"]
        loss.backward()

    times = [_timed(context, micro_batch) for _ in range(WARM_UP + TIMED)]
    task.release()
    return statistics.median(times[WARM_UP:])


def _micro_batch_and_update(context: DoctorContext, zero: str) -> tuple[float, float, int]:
    """Return the seconds of a micro-batch that is not a step's last and of the update, and the number of parameters."""
    recipe, config = chosen_recipe(context), engine_config(context, zero, IMAGES)
    inner, updates = [], []
    with noise_training(recipe, config, context.launch, context.device, accumulation=2) as training:
        engine, task, batch = training.engine, training.task, next(training.batches)
        for step in range(WARM_UP + TIMED):
            sync = StepSync()
            sync.begin()
            for index in range(2):

                def micro_batch(index: int = index, step: int = step, sync: StepSync = sync) -> None:
                    losses = task.losses(engine, batch, training.schedule.key(step, index))
                    engine.backward(losses["loss"])
                    sync.add(batch, losses)
                    if not index:
                        engine.step()

                seconds = _timed(context, micro_batch)
                inner += [seconds] if not index else []

            def update(sync: StepSync = sync) -> None:
                take_step(engine, sync.exchange(engine))

            updates.append(_timed(context, update))
        parameters = sum(1 for _ in engine.module.parameters())
    return statistics.median(inner[WARM_UP:]), statistics.median(updates[WARM_UP:]), parameters


def _timed(context: DoctorContext, run: Callable[[], None]) -> float:
    """Return the host's seconds of a call that starts with an idle device."""
    context.synchronize()
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
