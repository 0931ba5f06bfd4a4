"""Checks of optimizer steps on synthetic images: time, host time, memory, and waits of the host."""

from __future__ import annotations

import statistics
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from mrmae_ds.config.engine import EngineConfig, default_recipe, load_engine_config
from mrmae_ds.config.files import merge
from mrmae_ds.config.recipe import Recipe, load_recipe
from mrmae_ds.doctor import expectations
from mrmae_ds.doctor.context import DoctorContext
from mrmae_ds.doctor.numerics import ZERO1, ZERO3
from mrmae_ds.doctor.reading import NotApplicable, Reading
from mrmae_ds.doctor.tiny_job import tiny_job
from mrmae_ds.doctor.workload import noise_training, write_engine_config
from mrmae_ds.imagenet import IMAGENET_CLASSES
from mrmae_ds.planning.fake_step import build_meta_task
from mrmae_ds.planning.stage import count_stage, stage_memory
from mrmae_ds.profiling.flops import recipe_cost
from mrmae_ds.training.perf_metrics import peak_memory
from mrmae_ds.units import GIB

MICRO_BATCHES = (16, 128)
PRECISION = ("torch_autocast", "bf16", "data_types")
WARM_UP, TIMED = 3, 10
WATCHED = 20
WAIT = "called a synchronizing CUDA operation"  # torch's words in its synchronization debug mode
LARGE_BUCKETS = {"reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000}
ENGINES: dict[str, dict[str, Any]] = {
    "ZeRO-1": ZERO1 | LARGE_BUCKETS,
    "ZeRO-3": ZERO3
    | {
        "reduce_bucket_size": 50_000_000,
        "stage3_prefetch_bucket_size": 50_000_000,
        "stage3_max_live_parameters": 3_000_000_000,
        "stage3_max_reuse_distance": 3_000_000_000,
    },
}


def check_steps(context: DoctorContext) -> list[Reading]:
    """Measure steps of the chosen recipe: ZeRO-1 and ZeRO-3, two micro-batches, blocks compiled or not."""
    recipe, readings = chosen_recipe(context), []
    compiled = (False, True) if context.on_cuda and not context.request.quick else (False,)
    micro_batches = MICRO_BATCHES[-1:] if context.request.quick else MICRO_BATCHES
    readings.append(Reading("recipe", recipe.name))
    for zero in ENGINES:
        for micro_batch in micro_batches:
            for compile_blocks in compiled:
                name = f"{zero}, {micro_batch}{', compiled' if compile_blocks else ''}"
                if context.time_is_left(0.15):
                    readings += _measure(context, recipe, name, zero, micro_batch, compile_blocks)
                else:
                    readings.append(Reading(f"{name}: not run", "no time left"))
    return readings


def check_memory(context: DoctorContext) -> list[Reading]:
    """Compare the peak memory of the measured steps with the plan's."""
    context.require_cuda()
    recipe, readings = chosen_recipe(context), []
    for zero in ENGINES:
        measured = {size: context.value("steps", f"{zero}, {size}: peak memory") or 0.0 for size in MICRO_BATCHES}
        for size in (size for size, found in measured.items() if found):
            share = measured[size] * GIB / _planned_memory(context, recipe, zero, size)
            readings.append(Reading(f"{zero}, {size}: measured / planned", share, "", expectations.MEMORY))
    if not readings:
        raise NotApplicable("needs the check steps")
    return readings


def _planned_memory(context: DoctorContext, recipe: Recipe, zero: str, size: int) -> float:
    """Return the bytes that the plan predicts for a step of a single micro-batch."""
    ranks, config = context.launch.world_size, engine_config(context, zero, size)
    stage = recipe.stage("pretrain").model_copy(update={"batch_size": size * ranks})
    recipe = recipe.model_copy(update={"stages": recipe.stages.model_copy(update={"pretrain": stage})})
    task = build_meta_task(recipe, "pretrain", config, IMAGENET_CLASSES)
    (cost,) = recipe_cost(recipe, config.checkpointing, IMAGENET_CLASSES, only="pretrain")
    return stage_memory(count_stage(task, config, cost), config.zero, ranks, size).peak.total


def check_waits(context: DoctorContext) -> list[Reading]:
    """Count the places in a step at which the host waits for the device, from the second step on."""
    context.require_cuda()
    recipe = tiny_job(context).load()
    with noise_training(recipe, engine_config(context, "ZeRO-1", 8), context.launch, context.device) as training:
        training.run()
        places: Counter[str] = Counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                for _ in range(WATCHED):
                    training.run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        for warning in caught:
            if WAIT in str(warning.message):
                places["/".join(Path(warning.filename).parts[-3:]) + f":{warning.lineno}"] += 1
    total = sum(places.values()) / WATCHED
    shown = "; ".join(f"{count / WATCHED:g} x {place}" for place, count in places.most_common(8))
    return [Reading("waits per step", total, "", expectations.WAITS), Reading("places", shown or "none")]


def chosen_recipe(context: DoctorContext) -> Recipe:
    """Return the recipe of ``--ds_config``, or the doctor's tiny one."""
    request = context.request
    if request.ds_config is None:
        return tiny_job(context).load()
    return load_recipe(request.recipe or default_recipe(request.ds_config))


def engine_config(context: DoctorContext, zero: str, micro_batch: int, compile_blocks: bool = False) -> EngineConfig:
    """Return an engine config of a ZeRO stage, without activation checkpointing.

    Precision and, if it has this stage, ZeRO's settings are those of ``--ds_config``.
    """
    given = context.request.ds_config
    content = load_engine_config(given).as_written() if given else {}
    kept = {key: value for key, value in content.items() if key in PRECISION}
    own = content.get("zero_optimization", {})
    settings = own if f"ZeRO-{own.get('stage')}" == zero else ENGINES[zero]
    ours = {"train_micro_batch_size_per_gpu": micro_batch, "gradient_clipping": 0.0, "zero_optimization": settings}
    if compile_blocks:
        pretrain = chosen_recipe(context).stages.pretrain
        resident = pretrain is not None and all(p.kind == "device" for p in pretrain.placement.values())
        ours["compile"] = {"blocks": True, "teachers": resident}
    name = f"steps-{zero}-{micro_batch}"
    context.folder.mkdir(parents=True, exist_ok=True)
    return write_engine_config(context.folder, name, context.launch.rank, merge(kept, ours))


def _measure(
    context: DoctorContext, recipe: Recipe, name: str, zero: str, micro_batch: int, compile_blocks: bool
) -> list[Reading]:
    config = engine_config(context, zero, micro_batch, compile_blocks)
    if context.on_cuda:
        torch.cuda.reset_peak_memory_stats(context.device)
    try:
        with noise_training(recipe, config, context.launch, context.device) as training:
            times = [training.seconds() for _ in range(WARM_UP)]
            while len(times) < WARM_UP + TIMED and context.time_is_left(0.1):
                times.append(training.seconds())
            memory = peak_memory(context.device) / GIB
    except (RuntimeError, torch.OutOfMemoryError) as error:  # on all ranks alike
        return [Reading(f"{name}: failed", f"{type(error).__name__}: {error}".partition("\n")[0])]
    step = statistics.median(times[WARM_UP:] or times)
    return [
        Reading(f"{name}: step", step * 1e3, "ms"),
        Reading(f"{name}: images per s and rank", micro_batch / step, "images/s"),
        Reading(f"{name}: peak memory", memory, "GiB"),
    ]
