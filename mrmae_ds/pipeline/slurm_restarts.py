"""Count the starts of a Slurm job per stage; stop requeueing it when it makes no progress.

A requeued job resumes from its newest checkpoint. A job that makes no progress between starts would repeat this without
end, on hundreds of GPUs, so it is ended.

    RUN/slurm/STAGE.jsonl    one line per start: job, restart, time, step of the newest checkpoint, commit
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from mrmae_ds.errors import UserError
from mrmae_ds.files import write_text
from mrmae_ds.records.environment import git_state
from mrmae_ds.records.record import RECORD_FILE, RunRecord, utc_now
from mrmae_ds.training.checkpoint.folder import list_checkpoints, step_of
from mrmae_ds.units import counted

# Consecutive starts of a job without progress: a node may fail before the first checkpoint, and once more.
MAX_IDLE_STARTS = 2


@dataclass(frozen=True)
class JobStart:
    """One start of a job.

    Attributes:
        job: Slurm's id.
        restart: number of restarts by Slurm before this start.
        step: step of the newest checkpoint at the start; 0 without one.
        time: UTC, ISO 8601.
        commit: of the code, with ``+`` if files were modified; None outside a repository.
    """

    job: str
    restart: int
    step: int
    time: str
    commit: str | None


def status_prefix(stage_dir: Path) -> Path:
    """Return the path prefix of a stage's Slurm files: outside its folder, which `--resume never` moves aside."""
    return stage_dir.parent / "slurm" / stage_dir.name


def stage_dir_of(prefix: Path) -> Path:
    """Return the stage's folder; the inverse of :func:`status_prefix`."""
    return prefix.parent.parent / prefix.name


def _starts_file(stage_dir: Path) -> Path:
    return status_prefix(stage_dir).with_name(f"{stage_dir.name}.jsonl")


def newest_step(stage_dir: Path) -> int:
    """Return the step of a stage's newest checkpoint; 0 without one."""
    checkpoints = list_checkpoints(stage_dir)
    return step_of(checkpoints[-1]) if checkpoints else 0


def read_starts(stage_dir: Path) -> list[JobStart]:
    """Return the starts of a stage so far, oldest first.

    Raises:
        UserError: if the file cannot be read.
    """
    path = _starts_file(stage_dir)
    if not path.exists():
        return []
    try:
        return [JobStart(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a valid list of job starts ({error}); move it away") from None


def _starts_of(stage_dir: Path, job: str) -> list[JobStart]:
    return [start for start in read_starts(stage_dir) if start.job == job]


def record_start(stage_dir: Path, job: str, restart: int, max_restarts: int, root: Path) -> JobStart:
    """Record that a job starts, if it may.

    Args:
        stage_dir: runs/NAME/STAGE.
        job: Slurm's id.
        restart: number of restarts so far.
        max_restarts: largest number of restarts.
        root: the code's repository.

    Raises:
        UserError: if the job was restarted too often, or its last starts made no progress.
    """
    step, before = newest_step(stage_dir), _starts_of(stage_dir, job)
    _check_count(job, restart, max_restarts)
    idle = sum(start.step == step for start in before[-MAX_IDLE_STARTS:])
    if idle == MAX_IDLE_STARTS:
        raise UserError(
            f"job {job}: no progress beyond step {step} in its last {idle} starts ({stage_dir}). Find the reason in "
            "its output; to resume, submit it again"
        )
    state = git_state(root)
    commit = state.commit[:12] + "+" * state.dirty if state else None
    start = JobStart(job=job, restart=restart, step=step, time=utc_now().isoformat(), commit=commit)
    path = _starts_file(stage_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = path.read_text(encoding="utf-8") if path.exists() else ""
    write_text(path, f"{earlier}{json.dumps(asdict(start))}\n")
    return start


def check_requeue(stage_dir: Path, job: str, restart: int, max_restarts: int, *, node_lost: bool) -> None:
    """Check that a job that ended early may be requeued.

    Args:
        stage_dir: runs/NAME/STAGE.
        job: Slurm's id.
        restart: number of restarts so far.
        max_restarts: largest number of restarts.
        node_lost: True if a node failed. Otherwise the job stopped after a checkpoint, so it must have made progress.

    Raises:
        UserError: naming the reason why it may not.
    """
    _check_count(job, restart + 1, max_restarts)
    starts, step = _starts_of(stage_dir, job), newest_step(stage_dir)
    if starts and not node_lost and step <= starts[-1].step:
        raise UserError(
            f"job {job}: no progress beyond step {step} in this start ({stage_dir}), so a restart would not help. Is "
            "the time limit too short for a step and a checkpoint?"
        )


def resume_option(stage_dir: Path, job: str, restart: int) -> str | None:
    """Return the ``--resume`` option of this start; None to use the command's.

    ``--resume never`` or an older checkpoint on the command line applies to the job's first start. Restarts resume the
    run that the job itself has begun.
    """
    if not restart or not (stage_dir / RECORD_FILE).exists():
        return None
    return "auto" if RunRecord.load(stage_dir).slurm_job == job else None


def _check_count(job: str, restart: int, max_restarts: int) -> None:
    if restart > max_restarts:
        raise UserError(
            f"job {job}: restarted {counted(max_restarts, 'time')} (MAX_RESTARTS); to resume, submit it again"
        )
