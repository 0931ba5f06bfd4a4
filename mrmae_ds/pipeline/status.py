"""What has become of a chain's links, by their records and, on Slurm, by the jobs that were submitted for them."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mrmae_ds.errors import UserError
from mrmae_ds.files import write_text
from mrmae_ds.pipeline.graph import PipelineJob
from mrmae_ds.records.record import RECORD_FILE, RunRecord

State = Literal["finished", "submitted", "interrupted", "stopped", "failed", "not run"]
JOBS_FILE = "slurm_jobs.json"
LOCK_FILE = ".chain.lock"


@dataclass(frozen=True)
class JobStatus:
    """What has become of a link. ``job`` is its Slurm job as long as that is in the queue; ``detail`` in words."""

    state: State
    job: str | None = None
    detail: str = ""

    @property
    def missing(self) -> bool:
        """Whether it has to be started (again)."""
        return self.state not in ("finished", "submitted")


def statuses(links: Sequence[PipelineJob], jobs: Mapping[str, str], queue: Mapping[str, str]) -> dict[str, JobStatus]:
    """The status of each link by its key.

    Args:
        links: of the chain.
        jobs: Slurm jobs that were submitted, by the key of the link.
        queue: states of the jobs that Slurm has now, by their ids.

    Raises:
        UserError: if a link's folder holds a run of another recipe or seed, which would neither fill the table's cell
            nor be continued.
    """
    return {link.key: _status(link, jobs.get(link.key), queue) for link in links}


def _status(link: PipelineJob, job: str | None, queue: Mapping[str, str]) -> JobStatus:
    record = RunRecord.load(link.folder) if (link.folder / RECORD_FILE).exists() else None
    if record is not None:
        _check_same(link, record)
        if record.status == "finished":
            top1 = record.results.top1
            return JobStatus("finished", detail="" if top1 is None else f"top-1 {top1:.2f} %")
    done = _progress(record) if record else ""
    # A requeued job keeps its id; one that was started by hand is on record.
    for known in (job, record.slurm_job if record else None):
        if known is not None and known in queue:
            return JobStatus("submitted", known, ", ".join(filter(None, [f"job {known} {queue[known].lower()}", done])))
    if record is None:
        return JobStatus("not run")
    ended: dict[str, State] = {"running": "interrupted", "failed": "failed", "stopped": "stopped"}
    return JobStatus(ended[record.status], detail=done)


def _check_same(link: PipelineJob, record: RunRecord) -> None:
    wanted = (link.recipe.hash(link.stage), link.recipe.seed)
    if (record.recipe_hash, record.seed) != wanted:
        raise UserError(
            f"{link.folder}: holds a run of another recipe (hash {record.recipe_hash}, seed {record.seed}; the chain's "
            f"are {wanted[0]}, {wanted[1]}). Move it away, or give the chain another folder with --runs"
        )


def _progress(record: RunRecord) -> str:
    return f"after {record.schedule.steps_done} of {record.schedule.steps} steps"


def read_jobs(root: Path) -> dict[str, str]:
    """The Slurm jobs that were submitted for the links of this folder of runs, by key.

    Raises UserError if the file cannot be read.
    """
    path = root / JOBS_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path}: unreadable as JSON ({error}); remove it once no job of the chain is queued") from None
    return {str(key): str(job) for key, job in content.items()}


def write_jobs(root: Path, jobs: Mapping[str, str]) -> None:
    """Replace the file that :func:`read_jobs` reads, in one step."""
    write_text(root / JOBS_FILE, json.dumps(dict(sorted(jobs.items())), indent=2) + "\n")


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Hold this folder of runs: no other chain on this file system works in it meanwhile.

    Raises UserError if one does.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{root}: another mrmae submit is at work here; wait for it, or give --runs") from None
        yield
