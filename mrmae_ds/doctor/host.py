"""Check of the host time of a micro-batch: of torch alone, and of each ZeRO engine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

from mrmae_ds.config.engine import EngineConfig
from mrmae_ds.config.recipe import Recipe
from mrmae_ds.doctor.context import DoctorContext
from mrmae_ds.doctor.reading import Reading
from mrmae_ds.doctor.steps import ENGINES, chosen_recipe, engine_config
from mrmae_ds.doctor.workload import build_random_task, noise_batches, noise_training
from mrmae_ds.imagenet import IMAGENET_CLASSES
from mrmae_ds.planning.fake_step import build_meta_task, trace_micro_batch
from mrmae_ds.training.step_sync import StepSync, take_step
from mrmae_ds.training.tasks.base import MicroBatchKey

IMAGES = 2  # so few that the GPU waits for the host
WARM_UP, TIMED = 3, 10
MICRO_BATCHES = 3  # of a step: ZeRO-3 fetches parameters in the first and releases them in the last


def check_host(context: DoctorContext) -> list[Reading]:
    """Measure the host time to issue a micro-batch and an update, at a micro-batch that costs the GPU little."""
    recipe, config = chosen_recipe(context), engine_config(context, "ZeRO-1", IMAGES)
    plain, operators = _plain_micro_batch(context, recipe, config), count_operators(recipe, config)
    readings = [
        Reading("micro-batch without an engine", plain * 1e3, "ms"),
        Reading("operators of a micro-batch", float(operators)),
        # A CPU computes while it issues.
        Reading("per operator", plain / operators * 1e6, "us", None, "op_us" if context.on_cuda else None),
    ]
    updates: dict[str, float] = {}
    for zero in ENGINES:
        first, another, updates[zero], parameters = _step_parts(context, recipe, zero)
        extra = {"zero3_param_us" if zero == "ZeRO-3" else "zero1_param_us": another - plain}
        if zero == "ZeRO-3":
            extra["zero3_first_param_us"] = first - plain + updates[zero] - updates["ZeRO-1"]
        else:
            extra["update_param_us"] = updates[zero]
        readings += [
            Reading(f"{zero}: first micro-batch of a step", first * 1e3, "ms"),
            Reading(f"{zero}: another", another * 1e3, "ms"),
            Reading(f"{zero}: once a step", updates[zero] * 1e3, "ms"),
        ]
        for constant, seconds in extra.items():
            name = f"{zero}: {constant.removesuffix('_us').replace('_', ' ')}"
            readings.append(Reading(name, max(seconds, 0.0) / parameters * 1e6, "us", None, constant))
    return readings


def count_operators(recipe: Recipe, config: EngineConfig) -> int:
    """Return the planner's number of operators of a pre-training's micro-batch; weights are not read."""
    task = build_meta_task(recipe, "pretrain", config, IMAGENET_CLASSES)
    return len(trace_micro_batch(task, config).operators)


def _plain_micro_batch(context: DoctorContext, recipe: Recipe, config: EngineConfig) -> float:
    """Return the seconds of a micro-batch of the recipe in plain torch."""
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


def _step_parts(context: DoctorContext, recipe: Recipe, zero: str) -> tuple[float, float, float, int]:
    """Return seconds of a step's first micro-batch, of another, what the last takes longer, and the parameters."""
    config = engine_config(context, zero, IMAGES)
    steps: list[list[float]] = []
    with noise_training(recipe, config, context.launch, context.device, accumulation=MICRO_BATCHES) as training:
        engine, task, batch = training.engine, training.task, next(training.batches)
        for step in range(WARM_UP + TIMED):
            sync = StepSync()
            sync.begin()

            def micro_batch(index: int, step: int = step, sync: StepSync = sync) -> None:
                losses = task.losses(engine, batch, training.schedule.key(step, index))
                engine.backward(losses["loss"])
                sync.add(batch, losses)
                if index < MICRO_BATCHES - 1:
                    engine.step()
                else:
                    take_step(engine, sync.exchange(engine))

            steps.append([_timed(context, partial(micro_batch, index)) for index in range(MICRO_BATCHES)])
        parameters = sum(1 for _ in engine.module.parameters())
    first, another, last = (statistics.median(times) for times in zip(*steps[WARM_UP:], strict=True))
    return first, another, last - another, parameters


def _timed(context: DoctorContext, run: Callable[[], None]) -> float:
    """Return the host's seconds of a call that starts with an idle device."""
    context.synchronize()
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
