"""A chain on Slurm: one job a link, each waiting for those it needs, and one that makes the tables."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from mrmae_ds.errors import UserError
from mrmae_ds.pipeline.graph import PipelineJob
from mrmae_ds.pipeline.status import JobStatus, read_jobs, write_jobs

SCRIPT = Path("slurm/train.sbatch")
TABLE_KEY = "tables"
_LIMIT_S = 120


def queue() -> dict[str, str]:
    """This user's jobs that Slurm has now: states by id ("PENDING", "RUNNING", "REQUEUED", ...)."""
    lines = _slurm("squeue", "--noheader", "--me", "--format=%i %T").splitlines()
    return {job: state for job, _, state in (line.strip().partition(" ") for line in lines) if job}


def submit(
    links: Sequence[PipelineJob],
    known: Mapping[str, JobStatus],
    root: Path,
    options: Sequence[str],
    script: Path = SCRIPT,
) -> dict[str, str]:
    """Submit every link that is missing; the new jobs' ids by key. Each is on record before the next is submitted.

    Args:
        links: in the order of their needs.
        known: the status of each.
        root: the folder of all runs.
        options: sbatch's, for every job.
        script: gets the engine config and train.py's arguments.

    Raises:
        UserError: if sbatch refuses; what was submitted before stays submitted, and the next call goes on after it.
    """
    jobs = read_jobs(root)
    new: dict[str, str] = {}
    for link in links:
        if not known[link.key].missing:
            continue
        waits = [new.get(need) or known[need].job for need in link.needs]
        told = [
            f"--job-name={link.key.replace('/', '-')}",
            *_after("afterok", [job for job in waits if job]),
            *([f"--nodes={link.nodes}"] if link.nodes else []),
        ]
        new[link.key] = jobs[link.key] = _sbatch([*told, *options, str(script), str(link.config), *link.arguments])
        write_jobs(root, jobs)
    return new


def submit_tables(name: str, command: Sequence[str], jobs: Sequence[str], root: Path, options: Sequence[str]) -> str:
    """Submit the job that makes the tables once ``jobs`` have ended, well or not; its id."""
    told = [f"--job-name={name}-tables", *_after("afterany", jobs), "--nodes=1", "--ntasks=1", "--time=30"]
    job = _sbatch([*told, *options, f"--wrap={shlex.join(command)}"])
    write_jobs(root, read_jobs(root) | {TABLE_KEY: job})
    return job


def _after(kind: str, jobs: Sequence[str]) -> list[str]:
    """A job whose need has failed is taken out of the queue: the next submission starts both again."""
    ids = sorted(set(jobs), key=lambda job: (len(job), job))
    return [f"--dependency={':'.join((kind, *ids))}", "--kill-on-invalid-dep=yes"] if ids else []


def _sbatch(arguments: Sequence[str]) -> str:
    """Submit; the job's id ("4711", or "4711;cluster" as sbatch may print it)."""
    text = _slurm("sbatch", "--parsable", *arguments).strip()
    job = text.splitlines()[-1].split(";")[0] if text else ""
    if not job.isdigit():
        raise UserError(f"sbatch printed {text!r} where a job's number was expected")
    return job


def _slurm(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    except FileNotFoundError:
        raise UserError(f"{command[0]}: not found; submit on a login node, or run it here with --local") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not answer within {_LIMIT_S} s; try again later") from None
    if done.returncode:
        raise UserError(f"{shlex.join(command)}: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return done.stdout
