"""The starts of one Slurm job, noted beside the stage's folder, and whether there may be another.

A job that is interrupted goes on from its newest checkpoint when Slurm starts it again. One that gets no further from
start to start would do so until somebody looks, on hundreds of GPUs, so it ends.

    RUN/slurm/STAGE.jsonl    a line a start: job, restart, time, step of the newest checkpoint then, commit
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

# Starts of a job that may end where they began: a node can be lost before the first checkpoint, and once more.
MAX_IDLE_STARTS = 2


@dataclass(frozen=True)
class JobStart:
    """One start of a job.

    Attributes:
        job: Slurm's id. restart: how often Slurm has started the job again before.
        step: of the newest checkpoint when it began; 0 without one.
        time: in UTC. commit: of the code, with ``+`` if files differed from it; None outside a repository.
    """

    job: str
    restart: int
    step: int
    time: str
    commit: str | None


def notes_of(stage_dir: Path) -> Path:
    """How the names of a stage's notes begin: outside its folder, which starting anew sets aside."""
    return stage_dir.parent / "slurm" / stage_dir.name


def stage_of(notes: Path) -> Path:
    """The stage's folder, from what :func:`notes_of` said."""
    return notes.parent.parent / notes.name


def _starts_file(stage_dir: Path) -> Path:
    return notes_of(stage_dir).with_name(f"{stage_dir.name}.jsonl")


def newest_step(stage_dir: Path) -> int:
    """The step of a stage's newest checkpoint; 0 without one."""
    found = list_checkpoints(stage_dir)
    return step_of(found[-1]) if found else 0


def read_starts(stage_dir: Path) -> list[JobStart]:
    """The starts of a stage so far, oldest first. Raises UserError for a file that is not such notes."""
    path = _starts_file(stage_dir)
    if not path.exists():
        return []
    try:
        return [JobStart(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not readable as a job's starts ({error}); move it away") from None


def _starts_of(stage_dir: Path, job: str) -> list[JobStart]:
    return [start for start in read_starts(stage_dir) if start.job == job]


def begin_start(stage_dir: Path, job: str, restart: int, max_restarts: int, root: Path) -> JobStart:
    """Note that a job starts, if it may.

    Args:
        stage_dir: runs/NAME/STAGE. root: of the code's repository.
        job, restart: of Slurm. max_restarts: more are refused.

    Raises:
        UserError: if the job was started too often, or its last starts got no further.
    """
    step, before = newest_step(stage_dir), _starts_of(stage_dir, job)
    _check_count(job, restart, max_restarts)
    idle = sum(start.step == step for start in before[-MAX_IDLE_STARTS:])
    if idle == MAX_IDLE_STARTS:
        raise UserError(
            f"job {job}: its last {idle} starts got no further than step {step} ({stage_dir}). Look for the reason in "
            "its output; to go on, submit it again"
        )
    state = git_state(root)
    commit = state.commit[:12] + "+" * state.dirty if state else None
    start = JobStart(job=job, restart=restart, step=step, time=utc_now().isoformat(), commit=commit)
    path = _starts_file(stage_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = path.read_text(encoding="utf-8") if path.exists() else ""
    write_text(path, f"{earlier}{json.dumps(asdict(start))}\n")
    return start


def check_another(stage_dir: Path, job: str, restart: int, max_restarts: int, *, node_lost: bool) -> None:
    """Whether a job that ended early may be queued again.

    Args:
        stage_dir, job, restart, max_restarts: see :func:`begin_start`.
        node_lost: the cluster's fault; else the job stopped by itself after saving, so it must have got further.

    Raises:
        UserError: saying why it may not.
    """
    _check_count(job, restart + 1, max_restarts)
    starts, step = _starts_of(stage_dir, job), newest_step(stage_dir)
    if starts and not node_lost and step <= starts[-1].step:
        raise UserError(
            f"job {job}: this start got no further than step {step} ({stage_dir}), so another would not either. Is the "
            "time limit too short for a step and a checkpoint?"
        )


def resume_option(stage_dir: Path, job: str, restart: int) -> str | None:
    """What ``--resume`` must be in this start, whatever the command says; None to leave it to the command.

    A command with ``--resume never``, or with an older checkpoint, means the job's first start: what the job itself has
    begun, it goes on with.
    """
    if not restart or not (stage_dir / RECORD_FILE).exists():
        return None
    return "auto" if RunRecord.load(stage_dir).slurm_job == job else None


def _check_count(job: str, restart: int, max_restarts: int) -> None:
    if restart > max_restarts:
        raise UserError(
            f"job {job}: was started again {max_restarts} times, which is MAX_RESTARTS; to go on, submit it again"
        )
