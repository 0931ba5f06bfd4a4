"""Status of pipeline jobs, from run records and from Slurm."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mrmae_ds.errors import UserError
from mrmae_ds.files import make_folder, write_text
from mrmae_ds.pipeline.graph import PipelineJob
from mrmae_ds.records.record import RECORD_FILE, RunRecord
from mrmae_ds.weights.changed import changed_weights

State = Literal["finished", "submitted", "interrupted", "stopped", "failed", "not run"]
SLURM_JOBS_FILE = "slurm_jobs.json"
LOCK_FILE = ".pipeline.lock"


@dataclass(frozen=True)
class JobStatus:
    """Status of a pipeline job.

    Attributes:
        state: state of the job.
        slurm_job: its Slurm id while it is in the queue.
        detail: progress or result, for display.
    """

    state: State
    slurm_job: str | None = None
    detail: str = ""

    @property
    def missing(self) -> bool:
        """True if the job has to be started (again)."""
        return self.state not in ("finished", "submitted")


def job_statuses(
    jobs: Sequence[PipelineJob], slurm_jobs: Mapping[str, str], queue: Mapping[str, str]
) -> dict[str, JobStatus]:
    """Return the status of each job, by key.

    Args:
        jobs: of the pipeline.
        slurm_jobs: ids of the submitted Slurm jobs, by key.
        queue: states of the jobs in Slurm's queue, by id.

    Raises:
        UserError: if a job's folder holds a run of another recipe or seed, or of weights that were made over since,
            which can neither fill the table's cell nor be resumed.
    """
    return {job.key: _status(job, slurm_jobs.get(job.key), queue) for job in jobs}


def _status(job: PipelineJob, submitted: str | None, queue: Mapping[str, str]) -> JobStatus:
    record = RunRecord.load(job.stage_dir) if (job.stage_dir / RECORD_FILE).exists() else None
    if record is not None:
        _check_same_run(job, record)
        if record.status == "finished":
            top1 = record.results.top1
            return JobStatus("finished", detail="" if top1 is None else f"top-1 {top1:.2f} %")
    progress = f"after {record.schedule.steps_done} of {record.schedule.steps} steps" if record else ""
    # A requeued job keeps its id; a job submitted without this command is known by its record only.
    for slurm_id in (submitted, record.slurm_job if record else None):
        if slurm_id is not None and slurm_id in queue:
            state = f"job {slurm_id} {queue[slurm_id].lower()}"
            return JobStatus("submitted", slurm_id, ", ".join(filter(None, [state, progress])))
    if record is None:
        return JobStatus("not run")
    ended: dict[str, State] = {"running": "interrupted", "failed": "failed", "stopped": "stopped"}
    return JobStatus(ended[record.status], detail=progress)


def _check_same_run(job: PipelineJob, record: RunRecord) -> None:
    recipe_hash, seed = job.recipe.hash(job.stage), job.recipe.seed
    if (record.recipe_hash, record.seed) != (recipe_hash, seed):
        raise UserError(
            f"{job.stage_dir}: holds a run of another recipe (hash {record.recipe_hash}, seed {record.seed}; the "
            f"pipeline has {recipe_hash}, {seed}). Move it away, or pass another folder with --runs"
        )
    if changed := changed_weights(job.stage_dir, record):
        raise UserError(
            f"{job.stage_dir}: holds a run of other weights than {changed[0]} has by now. Move it away, or pass "
            "another folder with --runs"
        )


def read_slurm_jobs(root: Path) -> dict[str, str]:
    """Return the ids of the Slurm jobs submitted for this folder of runs, by key.

    Raises:
        UserError: if the file cannot be read.
    """
    path = root / SLURM_JOBS_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(
            f"{path}: not valid JSON ({error}); remove it once no job of the pipeline is in the queue"
        ) from None
    return {str(key): str(job) for key, job in content.items()}


def write_slurm_jobs(root: Path, slurm_jobs: Mapping[str, str]) -> None:
    """Replace the file that :func:`read_slurm_jobs` reads, atomically."""
    write_text(root / SLURM_JOBS_FILE, json.dumps(dict(sorted(slurm_jobs.items())), indent=2) + "\n")


@contextmanager
def lock_runs(root: Path) -> Iterator[None]:
    """Lock a folder of runs against other ``mrmae submit`` commands on this file system.

    Raises:
        UserError: if another command holds the lock.
    """
    make_folder(root)
    with (root / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{root}: locked by another mrmae submit; wait for it, or pass another --runs") from None
        yield
