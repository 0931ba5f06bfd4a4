"""Rank 0's side of a stage: progress, metrics, the run record, and what is drawn at the end."""

from __future__ import annotations

import logging
import os
import statistics
import time
from pathlib import Path
from typing import Any

from mrmae_ds.config.recipe import Recipe
from mrmae_ds.config.stages import StageName
from mrmae_ds.distributed.launch import Launch
from mrmae_ds.files import file_sha256
from mrmae_ds.records.environment import collect_hardware, collect_versions, git_state
from mrmae_ds.records.metrics import MetricsWriter, read_metrics
from mrmae_ds.records.progress import Progress
from mrmae_ds.records.record import RECORD_FILE, RunRecord, Status, summarize_pretraining, utc_now
from mrmae_ds.records.sections import (
    DataInfo,
    Init,
    ModelInfo,
    Operations,
    Parameters,
    Results,
    Schedule,
    TeacherInfo,
)
from mrmae_ds.training.job import PreparedStage
from mrmae_ds.training.perf_metrics import device_peak, utilization
from mrmae_ds.weights.model_file import encoder_metadata

logger = logging.getLogger(__name__)

REPOSITORY = Path(__file__).resolve().parents[2]


class RunLogger:
    """Writes one stage's records.

    Args:
        job: what runs.
        parameters: counts of the model, taken before it was partitioned.
        device: as text, for the record.
        start: optimizer steps already done; what was logged after the last but one of them is logged again.
        results: of the run so far.
    """

    def __init__(
        self, job: PreparedStage, parameters: Parameters, device: Any, start: int, results: dict[str, float | int]
    ) -> None:
        self.folder, self.schedule = job.stage_dir, job.schedule
        self.began, self.start = time.monotonic(), start
        previous = RunRecord.load(self.folder) if start and (self.folder / RECORD_FILE).exists() else None
        self.wall_before = previous.wall_seconds if previous else 0.0
        self.record = new_record(job, parameters, device)
        self.peak_tflops = device_peak(device)
        if previous:
            self.record.started = previous.started
        self._update(results)
        self.metrics = MetricsWriter(self.folder, resume_step=start - 1 if start else None)
        label = f"{job.recipe.name} {job.stage_name}"
        self.progress = Progress(label, self.schedule.total_steps, start, every_seconds=10.0)
        self._write("running", start)

    def log(self, step: int, values: dict[str, float]) -> None:
        """A logged interval that ended after ``step`` steps."""
        self.metrics.write(step, values | self._utilization(values["images_per_s"]))
        self.progress.update(step, values["loss"], values["lr"], values["images_per_s"])

    def saved(self, step: int, results: dict[str, float | int]) -> None:
        """A checkpoint was written after ``step`` steps, with the results so far."""
        self._update(results)
        self._write("running", step)

    def finish(self, results: dict[str, float | int]) -> None:
        """The stage is done."""
        speeds = [line["images_per_s"] for line in read_metrics(self.folder) if line.get("images_per_s")]
        self._update(results | ({"images_per_s": round(statistics.median(speeds), 2)} if speeds else {}))
        self._close("finished", self.schedule.total_steps)

    def stop(self, step: int) -> None:
        """The stage was asked to stop, after ``step`` steps and a checkpoint."""
        self._close("stopped", step)

    def fail(self, step: int) -> None:
        """The stage ended with an error after about ``step`` steps."""
        self._close("failed", step)

    def _utilization(self, images_per_s: float) -> dict[str, float]:
        counted, hardware = self.record.operations, self.record.hardware
        if counted is None:
            return {}
        needed = counted.training - counted.recomputed
        return utilization(images_per_s, needed, hardware.world_size, self.peak_tflops)

    def _update(self, results: dict[str, float | int]) -> None:
        self.record.results = Results(**(self.record.results.model_dump() | results))

    def _close(self, status: Status, step: int) -> None:
        self.progress.close()
        self.metrics.close()
        self.record.ended = utc_now()
        self._write(status, step)

    def _write(self, status: Status, step: int) -> None:
        self.record.status = status
        self.record.schedule.steps_done = step
        self.record.images_seen = step * self.schedule.stage.batch_size
        self.record.wall_seconds = round(self.wall_before + time.monotonic() - self.began, 1)
        self.record.write(self.folder)


def new_record(job: PreparedStage, parameters: Parameters, device: Any) -> RunRecord:
    """The record of a stage that is about to run."""
    recipe, data = job.recipe, job.train_data
    return RunRecord(
        **identity(recipe, job.stage_name, job.schedule.launch, device),
        model=ModelInfo(
            arch=recipe.model.arch, overridden=bool(recipe.model.overrides), image_size=job.task.image_size
        ),
        design=job.task.describe_design(recipe),
        parameters=parameters,
        operations=count_operations(job),
        data=DataInfo(
            dataset=data.name,
            file=data.path.name,
            sha256=data.sha256,
            samples=data.num_samples,
            classes=job.task.num_classes or None,
        ),
        teachers={
            name: TeacherInfo(
                kind=recipe.teachers[name].kind,
                source=recipe.teachers[name].source,
                sha256=teacher.sha256,
                facts=teacher.details,
            )
            for name, teacher in job.task.teachers.items()
        },
        schedule=Schedule(
            epochs=job.schedule.epochs, global_batch=job.schedule.stage.batch_size, steps=job.schedule.total_steps
        ),
        init=_describe_init(job.task.init) if job.task.init else None,
    )


def count_operations(job: PreparedStage) -> Operations | None:
    """Count the operations of a stage for one image; None, with a warning, if they cannot be counted.

    They are used in the tables alone, so a stage trains whatever becomes of its count.
    """
    try:
        return job.task.count_operations(job.recipe, job.engine_config.checkpointing, job.train_data.num_classes)
    except Exception as error:
        logger.warning("%s: operations are not counted: %s", job.stage_dir, error)
        return None


def identity(recipe: Recipe, stage: StageName, launch: Launch, device: Any) -> dict[str, Any]:
    """The fields of any stage's record that tell which recipe ran, with which code, on what."""
    return {
        "name": recipe.name,
        "method": recipe.method,
        "size": recipe.size,
        "stage": stage,
        "seed": recipe.seed,
        "recipe_hash": recipe.hash(stage),
        "git": git_state(REPOSITORY),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "versions": collect_versions(),
        "hardware": collect_hardware(launch.world_size, device),
    }


def _describe_init(path: Path) -> Init:
    beside = RunRecord.load(path.parent) if (path.parent / RECORD_FILE).exists() else None
    summary = None
    if beside is not None:  # fine-tuned weights: what counts is how they were pre-trained
        summary = summarize_pretraining(beside) if beside.stage == "pretrain" else beside.init and beside.init.pretrain
    return Init(file=path.name, sha256=file_sha256(path), pretrain=summary)


def export_metadata(job: PreparedStage, results: dict[str, float | int]) -> dict[str, Any]:
    """What the weights file of a finished stage says about itself."""
    task = job.task
    return {
        "kind": task.weights_kind,
        **encoder_metadata(task.encoder),
        "num_classes": task.num_classes,
        "class_names": list(job.train_data.class_names) if task.num_classes else [],
        "mean": job.recipe.data.mean,
        "std": job.recipe.data.std,
        "recipe": job.recipe.model_dump(mode="json"),
        "recipe_hash": job.recipe.hash(job.stage_name),
        "stage": job.stage_name,
        "step": job.schedule.total_steps,
        "results": results,
    }
