"""Estimate the compute of a pipeline, job by job, before anything is submitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mrmae_ds.config.engine import load_engine_config
from mrmae_ds.data.beton.sidecar import check_beton
from mrmae_ds.detection.flops import detector_cost, meta_detector
from mrmae_ds.errors import UserError
from mrmae_ds.imagenet import IMAGENET_CLASSES, IMAGENET_TRAIN_SAMPLES
from mrmae_ds.pipeline.graph import PipelineJob
from mrmae_ds.pipeline.status import JobStatus
from mrmae_ds.profiling.flops import COUNTED_STAGES, recipe_cost
from mrmae_ds.tables.detectors import COCO_2017
from mrmae_ds.units import PETA, SECONDS_PER_HOUR, TERA, counted, significant

_COLUMNS = ("job", "state", "waits for", "nodes", "PFLOP", "GPU-hours")
_RIGHT_ALIGNED = {"nodes", "PFLOP", "GPU-hours"}


def stage_flops(job: PipelineJob) -> float | None:
    """Count the FLOPs of a job's whole stage, without evaluation, on its data set or, if that is missing, ImageNet-1K.

    Detectors are counted on COCO.

    Returns:
        None for stages that are not counted.

    Raises:
        UserError: if a teacher is a file or run that does not exist (yet), or does not fit the recipe.
    """
    if job.stage == "detect":
        return _detection_flops(job)
    if job.stage not in COUNTED_STAGES:
        return None
    images, classes = training_set(job) or (IMAGENET_TRAIN_SAMPLES, IMAGENET_CLASSES)
    checkpointing = load_engine_config(job.config).checkpointing
    (cost,) = recipe_cost(job.recipe, checkpointing, classes, only=job.stage)
    return float(cost.total(images))


def _detection_flops(job: PipelineJob) -> float | None:
    checkpointing = load_engine_config(job.config).checkpointing
    stage = job.recipe.stages.detect
    assert stage is not None
    detector = meta_detector(job.recipe.model, stage, COCO_2017["classes"])
    return float(detector_cost(detector, stage, checkpointing).total(COCO_2017["train images"]))


def training_set(job: PipelineJob) -> tuple[int, int] | None:
    """Return the numbers of images and classes of a job's training set; None if its file is missing."""
    try:
        data = check_beton(job.recipe.data.train)
    except UserError:
        return None
    return data.num_samples, data.num_classes


def describe_pipeline(jobs: Sequence[PipelineJob], statuses: Mapping[str, JobStatus], tflops: float) -> str:
    """Format a pipeline as a table, one line per job, with the compute that is still to be spent.

    Args:
        jobs: in topological order.
        statuses: status of each job, by key.
        tflops: assumed sustained throughput of a GPU, in TFLOP/s.
    """
    rows, total, awaiting = [_COLUMNS], 0.0, 0
    flops_by_recipe: dict[tuple[str, Path], float | None] = {}
    problems: list[str] = []
    for job in jobs:
        status = statuses[job.key]
        # Seeds of one recipe cost the same.
        recipe_key = (job.recipe.hash(job.stage), job.config)
        reason = None
        try:
            if recipe_key not in flops_by_recipe:
                flops_by_recipe[recipe_key] = stage_flops(job)
        except UserError as error:
            reason = f"{job.recipe_path}: {error}"
        flops = flops_by_recipe.get(recipe_key)
        hours = None if flops is None else flops / (tflops * TERA) / SECONDS_PER_HOUR
        if status.missing and hours:
            total += hours
        if status.missing:
            for problem in job.absent:
                what = "cannot start yet and is not counted" if problem == reason else "cannot start yet"
                problems.append(f"{job.key} {what}: {problem}")
            if reason and reason not in job.absent and _awaits_teacher(job, statuses):
                awaiting += 1
            elif reason and reason not in job.absent:
                problems.append(f"{job.key} is not counted: {reason}")
        rows.append(
            (
                job.key,
                f"{status.state}{f' ({status.detail})' if status.detail else ''}",
                ", ".join(key for key in job.dependencies if statuses[key].state != "finished"),
                str(job.nodes or ""),
                "" if flops is None else significant(flops / PETA),
                "" if hours is None else significant(hours),
            )
        )
    missing = sum(status.missing for status in statuses.values())
    lines = [
        *_align(rows),
        f"{missing} of {len(jobs)} jobs to run, {significant(total)} GPU-hours at an assumed {tflops:g} TFLOP/s per "
        "GPU; evaluation is not counted, and steps completed by interrupted jobs are not subtracted",
    ]
    absent = dict.fromkeys(
        str(job.recipe.data.train) for job in jobs if job.stage != "detect" and training_set(job) is None
    )
    lines += [f"{path}: no such file; counted on ImageNet-1K's {IMAGENET_TRAIN_SAMPLES:,} images" for path in absent]
    if awaiting:
        lines.append(f"not counted either: {counted(awaiting, 'job')} with a run as teacher that does not exist yet")
    return "\n".join([*lines, *problems])


def _awaits_teacher(job: PipelineJob, statuses: Mapping[str, JobStatus]) -> bool:
    """Return True if a teacher of a job is a job of the pipeline that has not finished."""
    names = getattr(job.recipe.stage(job.stage), "teachers", ())
    sources = {job.recipe.teachers[name].source for name in names}
    root = job.stage_dir.parents[1]
    return any(str(root / key) in sources and statuses[key].state != "finished" for key in job.dependencies)


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if name in _RIGHT_ALIGNED else cell.ljust(width)
            for name, cell, width in zip(_COLUMNS, row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
