"""Submit a pipeline to Slurm: one Slurm job per pipeline job with its dependencies, and one that builds the tables."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from mrmae_ds.errors import UserError
from mrmae_ds.pipeline.graph import REPOSITORY, PipelineJob
from mrmae_ds.pipeline.status import JobStatus, read_slurm_jobs, write_slurm_jobs

SCRIPT = Path("slurm/train.sbatch")
TABLES_KEY = "tables"
_TIMEOUT_S = 120


def queued_jobs() -> dict[str, str]:
    """Return this user's jobs in Slurm's queue: states by id ("PENDING", "RUNNING", "REQUEUED", ...)."""
    lines = _slurm("squeue", "--noheader", "--me", "--format=%i %T").splitlines()
    return {job: state for job, _, state in (line.strip().partition(" ") for line in lines) if job}


def submit_jobs(
    jobs: Sequence[PipelineJob],
    statuses: Mapping[str, JobStatus],
    root: Path,
    options: Sequence[str],
    script: Path = SCRIPT,
) -> dict[str, str]:
    """Submit every missing job. Each id is written to disk before the next job is submitted.

    Args:
        jobs: in topological order.
        statuses: status of each job, by key.
        root: folder of all runs.
        options: sbatch options of every job.
        script: receives the engine config and train.py's arguments.

    Returns:
        Slurm ids of the submitted jobs, by key.

    Raises:
        UserError: outside the repository, or if sbatch fails. Jobs submitted before that stay submitted; the next call
            continues after them.
    """
    if not script.is_file():
        raise UserError(f"{script}: not in {Path.cwd()}; Slurm jobs run in the repository, so first: cd {REPOSITORY}")
    ids = read_slurm_jobs(root)
    new: dict[str, str] = {}
    for job in jobs:
        if not statuses[job.key].missing:
            continue
        upstream = [new.get(key) or statuses[key].slurm_job for key in job.dependencies]
        own = [
            f"--job-name={job.key.replace('/', '-')}",
            *_dependency("afterok", [slurm_id for slurm_id in upstream if slurm_id]),
            *([f"--nodes={job.nodes}"] if job.nodes else []),
        ]
        new[job.key] = ids[job.key] = _sbatch([*own, *options, str(script), str(job.config), *job.arguments])
        write_slurm_jobs(root, ids)
    return new


def submit_tables(name: str, command: Sequence[str], ids: Sequence[str], root: Path, options: Sequence[str]) -> str:
    """Submit the job that builds the tables.

    Args:
        name: name of the pipeline.
        command: command that builds the tables.
        ids: Slurm jobs to wait for, whether they finish or fail.
        root: folder of all runs.
        options: sbatch options of every job.

    Returns:
        The Slurm id.
    """
    own = [f"--job-name={name}-tables", *_dependency("afterany", ids), "--nodes=1", "--ntasks=1", "--time=30"]
    job = _sbatch([*own, *options, f"--wrap={shlex.join(command)}"])
    write_slurm_jobs(root, read_slurm_jobs(root) | {TABLES_KEY: job})
    return job


def _dependency(kind: str, ids: Sequence[str]) -> list[str]:
    """Return dependency options. Slurm removes a job whose dependency failed; the next submission starts both again."""
    ids = sorted(set(ids), key=lambda job: (len(job), job))
    return [f"--dependency={':'.join((kind, *ids))}", "--kill-on-invalid-dep=yes"] if ids else []


def _sbatch(arguments: Sequence[str]) -> str:
    """Submit and return the job's id; sbatch prints "4711" or "4711;cluster"."""
    text = _slurm("sbatch", "--parsable", *arguments).strip()
    job = text.splitlines()[-1].split(";")[0] if text else ""
    if not job.isdigit():
        raise UserError(f"sbatch printed {text!r} instead of a job id")
    return job


def _slurm(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise UserError(f"{command[0]}: not found; submit on a login node, or run here with --local") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not answer within {_TIMEOUT_S} s; try again later") from None
    if result.returncode and command[0] == "squeue":  # the first contact; the last of its lines is the cause
        cause = (result.stderr.strip() or f"exit status {result.returncode}").splitlines()[-1]
        raise UserError(f"squeue: {cause.removeprefix('squeue: ')}; without Slurm: --local")
    if result.returncode:
        raise UserError(f"{shlex.join(command)}: {result.stderr.strip() or f'exit status {result.returncode}'}")
    return result.stdout
