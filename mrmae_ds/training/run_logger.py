"""Run records, metrics and progress of a stage, written by rank 0."""

from __future__ import annotations

import logging
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from mrmae_ds.config.recipe import Recipe
from mrmae_ds.config.stages import StageName
from mrmae_ds.distributed.launch import Launch
from mrmae_ds.records.environment import collect_hardware, collect_kernels, collect_versions, git_state
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
from mrmae_ds.training.callbacks import mlflow, wandb
from mrmae_ds.training.checkpoint.manifest import ResultValues
from mrmae_ds.training.evaluation.base import DataSet
from mrmae_ds.training.job import PreparedStage
from mrmae_ds.training.perf_metrics import device_peak, utilization
from mrmae_ds.weights.model_file import encoder_metadata

logger = logging.getLogger(__name__)

REPOSITORY = Path(__file__).resolve().parents[2]


class RecordWriter:
    """Keeps a stage's run record on disk up to date.

    Args:
        folder: output folder.
        record: the record.
        wall_before: seconds that earlier processes of the run took.
    """

    def __init__(self, folder: Path, record: RunRecord, wall_before: float = 0.0) -> None:
        self.folder, self.record, self.wall_before = folder, record, wall_before
        self.started = time.monotonic()

    def update(self, results: ResultValues) -> None:
        """Add results, replacing those of the same name. They are written with the next :meth:`write`."""
        self.record.results = Results(**(self.record.results.model_dump() | results))

    def write(self, status: Status) -> None:
        """Write the record."""
        self.record.status = status
        for name, file in {"wandb": wandb.ID_FILE, "mlflow": mlflow.ID_FILE}.items():
            if (self.folder / file).is_file():  # the tracker starts after the record, and may fail to
                self.record.trackers[name] = (self.folder / file).read_text(encoding="utf-8").strip()
        self.record.wall_seconds = round(self.wall_before + time.monotonic() - self.started, 1)
        self.record.write(self.folder)

    def close(self, status: Status) -> None:
        """Write the record with its end time."""
        self.record.ended = utc_now()
        self.write(status)


class RunLogger:
    """Writes record and metrics of a training stage and shows its progress.

    Args:
        job: the prepared stage.
        parameters: counts of the model before it was partitioned.
        device: device of this rank.
        start: optimizer steps completed; metrics of the last of them and of later ones are written again.
        results: results of the run so far.
    """

    def __init__(
        self, job: PreparedStage, parameters: Parameters, device: torch.device, start: int, results: ResultValues
    ) -> None:
        self.folder, self.schedule = job.stage_dir, job.schedule
        previous = RunRecord.load(self.folder) if start and (self.folder / RECORD_FILE).exists() else None
        record = new_record(job, parameters, device)
        if previous:
            record.started = previous.started
        self.writer = RecordWriter(self.folder, record, previous.wall_seconds if previous else 0.0)
        self.peak_tflops = device_peak(device)
        self.writer.update(results)
        self.metrics = MetricsWriter(self.folder, resume_step=start - 1 if start else None)
        label = f"{job.recipe.name} {job.stage_name}"
        self.progress = Progress(label, self.schedule.total_steps, start, every_seconds=10.0)
        self._set_step(start)
        self.writer.write("running")

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write the values of a logging interval.

        Args:
            step: optimizer steps completed.
            values: by name.
        """
        self.metrics.write(step, values | self._utilization(values["images_per_s"]))
        self.progress.update(step, values["loss"], values["lr"], values["images_per_s"])

    def saved(self, step: int, results: ResultValues) -> None:
        """Record a checkpoint.

        Args:
            step: optimizer steps completed in it.
            results: results of the run so far.
        """
        self.writer.update(results)
        self._set_step(step)
        self.writer.write("running")

    def finish(self, results: ResultValues) -> None:
        """Close the record of a finished stage.

        Args:
            results: results of the run.
        """
        speeds = [line["images_per_s"] for line in read_metrics(self.folder) if line.get("images_per_s")]
        self.writer.update(results | ({"images_per_s": round(statistics.median(speeds), 2)} if speeds else {}))
        self._close("finished", self.schedule.total_steps)

    def stop(self, step: int) -> None:
        """Close the record after a signal and a checkpoint, ``step`` steps completed."""
        self._close("stopped", step)

    def fail(self, step: int) -> None:
        """Close the record after an error, about ``step`` steps completed."""
        self._close("failed", step)

    def _utilization(self, images_per_s: float) -> dict[str, float]:
        operations, hardware = self.writer.record.operations, self.writer.record.hardware
        if operations is None:
            return {}
        needed = operations.training - operations.recomputed
        return utilization(images_per_s, needed, hardware.world_size, self.peak_tflops)

    def _close(self, status: Status, step: int) -> None:
        self.progress.close()
        self.metrics.close()
        self._set_step(step)
        self.writer.close(status)

    def _set_step(self, step: int) -> None:
        self.writer.record.schedule.steps_done = step
        self.writer.record.images_seen = step * self.schedule.stage.batch_size


def new_record(job: PreparedStage, parameters: Parameters, device: torch.device) -> RunRecord:
    """Return the record of a stage that is about to run.

    Args:
        job: the prepared stage.
        parameters: counts of the model before it was partitioned.
        device: device of this rank.
    """
    recipe, task, schedule = job.recipe, job.task, job.schedule
    model = ModelInfo(arch=recipe.model.arch, overridden=bool(recipe.model.overrides), image_size=task.image_size)
    return RunRecord(
        **describe_run(recipe, job.stage_name, job.launch, device),
        model=model,
        design=task.describe_design(recipe),
        detection=task.describe_detection(job.train_data, job.val_data),
        parameters=parameters,
        operations=count_operations(job),
        data=describe_data(job.train_data, task.num_classes, _count_copies(job)),
        teachers={
            name: TeacherInfo(
                kind=recipe.teachers[name].kind,
                source=recipe.teachers[name].source,
                sha256=teacher.sha256,
                facts=teacher.details,
            )
            for name, teacher in task.teachers.items()
        },
        schedule=Schedule(epochs=schedule.epochs, global_batch=schedule.stage.batch_size, steps=schedule.total_steps),
        init=_describe_init(task.init, job.identity.init, task.init_whole) if task.init else None,
    )


def describe_run(recipe: Recipe, stage: StageName, launch: Launch, device: torch.device) -> dict[str, Any]:
    """Return the fields of any stage's record that identify recipe, code and hardware."""
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
        "kernels": collect_kernels(device),
    }


def _count_copies(job: PreparedStage) -> int | None:
    """Count validation images that are exact copies of training images, with a warning if there are any."""
    copies = job.task.count_copies(job.train_data, job.val_data)
    if copies:
        logger.warning(
            "data: %d of %d images of %s are exact copies of images of %s: accuracies count what was trained on",
            copies, job.val_data.num_samples, job.val_data.path, job.train_data.path,
        )  # fmt: skip
    return copies


def describe_data(data: DataSet, num_classes: int, val_copies: int | None = None) -> DataInfo:
    """Return the record's description of a data set.

    Args:
        data: the data set.
        num_classes: 0 where its labels are not used.
        val_copies: validation images that are exact copies of training images; None if unknown.
    """
    return DataInfo(
        dataset=data.name,
        file=data.path.name,
        sha256=data.sha256,
        samples=data.num_samples,
        classes=num_classes or None,
        val_copies=val_copies,
    )


def count_operations(job: PreparedStage) -> Operations | None:
    """Count the operations of a stage for one image; None, with a warning, if they cannot be counted.

    They are used in the tables alone, so a stage trains whatever becomes of its count.

    Args:
        job: the prepared stage.
    """
    try:
        return job.task.count_operations(job.recipe, job.engine_config.checkpointing, job.train_data.num_classes)
    except Exception as error:
        logger.warning("%s: operations are not counted: %s", job.stage_dir, error)
        return None


def _describe_init(path: Path, sha256: str, whole: bool) -> Init:
    record = RunRecord.load(path.parent) if (path.parent / RECORD_FILE).exists() else None
    summary = None
    if record is not None:  # of fine-tuned weights, their pre-training is what counts
        summary = summarize_pretraining(record) if record.stage == "pretrain" else record.init and record.init.pretrain
    return Init(file=path.name, sha256=sha256, pretrain=summary, whole=whole)


def export_metadata(job: PreparedStage, results: ResultValues) -> dict[str, Any]:
    """Return the metadata of a finished stage's weights file.

    Args:
        job: the prepared stage.
        results: results of the run.
    """
    task = job.task
    return {
        "kind": task.weights_kind,
        **encoder_metadata(task.encoder),
        "num_classes": task.num_classes,
        "class_names": list(job.train_data.class_names) if task.num_classes else [],
        **task.export_metadata(job.train_data),
        "mean": job.recipe.data.mean,
        "std": job.recipe.data.std,
        "recipe": job.recipe.model_dump(mode="json"),
        "recipe_hash": job.recipe.hash(job.stage_name),
        "stage": job.stage_name,
        "step": job.schedule.total_steps,
        "results": results,
    }
