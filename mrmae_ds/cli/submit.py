"""``mrmae submit``: run the missing jobs of a pipeline."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from mrmae_ds.cli.parser import INTERRUPTED, CommandParser
from mrmae_ds.errors import UserError
from mrmae_ds.units import counted

if TYPE_CHECKING:
    from mrmae_ds.pipeline.graph import PipelineJob
    from mrmae_ds.pipeline.status import JobStatus

SUMMARY = "run the missing training jobs behind a table, on Slurm or on this machine"
TFLOPS = 200.0


def add_arguments(parser: CommandParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("pipeline", type=Path, help="pipeline file, pipelines/NAME.yaml")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs; default: runs")
    parser.add_argument(
        "--seeds", type=_seeds, metavar="0,1", help="seeds to run every recipe with; default: the recipe's own"
    )
    parser.add_argument(
        "--only", action="append", metavar="RUN", help="only this run and its dependencies; may be repeated"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the jobs and their GPU-hours; start nothing")
    parser.add_argument(
        "--tflops", type=float, default=TFLOPS, help="assumed TFLOP/s of a GPU, for --dry-run; default: %(default)g"
    )
    parser.add_argument("--local", action="store_true", help="run on this machine, without Slurm")
    parser.add_argument(
        "--processes", type=int, metavar="N", help="ranks of each job with --local; default: all GPUs, or 1 without any"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="number of parallel jobs with --local")
    parser.add_argument(
        "--sbatch",
        type=shlex.split,
        default=[],
        metavar="'OPTIONS'",
        help="sbatch options of every Slurm job: '--time=24:00:00 ...'",
    )
    parser.add_overrides("recipe values to replace in every run")


def run(args: argparse.Namespace) -> None:
    """Start the missing jobs of a pipeline.

    Raises:
        UserError: for an invalid pipeline or recipe, a folder that holds another run, or a teacher or initial weights
            of a job to start that do not exist.
        SystemExit: with status 1 if a job run with --local did not finish.
    """
    from mrmae_ds.pipeline.config import load_pipeline
    from mrmae_ds.pipeline.costs import describe_pipeline
    from mrmae_ds.pipeline.graph import build_jobs, refuse_absent_sources
    from mrmae_ds.pipeline.status import job_statuses, lock_runs, read_slurm_jobs

    pipeline = load_pipeline(args.pipeline)
    jobs = _select(build_jobs(pipeline, args.runs, args.seeds, args.overrides), args.only)
    _check(args)
    if args.dry_run:
        statuses = job_statuses(jobs, read_slurm_jobs(args.runs), _queue(args.local, dry_run=True))
        print(describe_pipeline(jobs, statuses, args.tflops))
        return
    with lock_runs(args.runs):
        statuses = job_statuses(jobs, read_slurm_jobs(args.runs), _queue(args.local))
        refuse_absent_sources(job for job in jobs if statuses[job.key].missing)
        if args.local:
            _run_locally(args, jobs, statuses, pipeline.tables)
        else:
            _submit(args, pipeline.name, jobs, statuses, pipeline.tables)


def _queue(local: bool, dry_run: bool = False) -> dict[str, str]:
    """Return Slurm's queue; empty with --local, and where --dry-run finds no Slurm, with a warning on stderr."""
    from mrmae_ds.pipeline.slurm import queued_jobs

    if local:
        return {}
    try:
        return queued_jobs()
    except UserError as error:
        if not dry_run:
            raise
        reason = str(error).splitlines()[0]
        print(f"states are from run records alone, without Slurm's queue: {reason}", file=sys.stderr)
        return {}


def _run_locally(
    args: argparse.Namespace, jobs: Sequence[PipelineJob], statuses: Mapping[str, JobStatus], tables: Sequence[int]
) -> None:
    import torch

    from mrmae_ds.pipeline.local import LocalPipeline

    gpus = torch.cuda.device_count()
    if args.jobs > 1 and gpus:
        raise UserError("--jobs: parallel jobs would share the GPUs; remove the option")
    finished = sum(status.state == "finished" for status in statuses.values())
    print(f"{counted(len(jobs), 'job')}, {finished} finished already")
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # not under nohup; the jobs have sessions of their own
        signal.signal(signal.SIGHUP, _interrupt)
    pipeline = LocalPipeline(
        jobs, statuses, processes=args.processes or gpus or 1, gpus=gpus, parallel_jobs=args.jobs, log=_print_line
    )
    try:
        failed = pipeline.run()
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    _write_tables(args.runs, tables)
    if failed:
        for key, reason in failed.items():
            print(f"not finished: {key}: {reason}", file=sys.stderr)
        raise SystemExit(1)


def _submit(
    args: argparse.Namespace,
    name: str,
    jobs: Sequence[PipelineJob],
    statuses: Mapping[str, JobStatus],
    tables: Sequence[int],
) -> None:
    from mrmae_ds.pipeline.slurm import submit_jobs, submit_tables

    new = submit_jobs(jobs, statuses, args.runs, args.sbatch)
    for key, slurm_id in new.items():
        print(f"{key}: submitted as job {slurm_id}")
    queued = [*new.values(), *(status.slurm_job for status in statuses.values() if status.slurm_job)]
    if not queued:
        print(f"all {len(jobs)} jobs are finished")
        _write_tables(args.runs, tables)
    elif new:
        numbers = [text for number in tables for text in ("--paper", str(number))]
        command = [str(Path(sys.executable).with_name("mrmae")), "table", *numbers, str(args.runs)]
        slurm_id = submit_tables(name, command, queued, args.runs, args.sbatch)
        print(f"tables: submitted as job {slurm_id}, after all jobs")
    else:
        print(f"nothing to submit: {counted(len(queued), 'job')} in the queue")


def _write_tables(root: Path, tables: Sequence[int]) -> None:
    from mrmae_ds.records.record import find_records
    from mrmae_ds.tables.write import write_table

    records = find_records([root]) if tables else []
    for number in tables:
        _, written = write_table(records, root, number)
        print(f"written: {', '.join(map(str, written))}")


def _select(jobs: Sequence[PipelineJob], only: Sequence[str] | None) -> list[PipelineJob]:
    """Return the jobs of the named runs, and their dependencies."""
    from mrmae_ds.config.files import nearest_key

    if only is None:
        return list(jobs)
    names = dict.fromkeys(job.run for job in jobs)
    if unknown := [name for name in only if name not in names]:
        raise UserError(f"--only {unknown[0]}: no such run in the pipeline{nearest_key(unknown[0], names)}")
    selected: set[str] = set()
    for job in reversed(jobs):
        if job.run in only or job.key in selected:
            selected |= {job.key, *job.dependencies}
    return [job for job in jobs if job.key in selected]


def _check(args: argparse.Namespace) -> None:
    for option in ("jobs", "processes"):
        number = getattr(args, option)
        if number is not None and number < 1:
            raise UserError(f"--{option} must be at least 1, got {number}")
    if not args.tflops > 0:
        raise UserError(f"--tflops must be above 0, got {args.tflops:g}")


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers such as 0,1, got {text!r}") from None
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise argparse.ArgumentTypeError(f"expected distinct seeds of at least 0, got {text!r}")
    return seeds


def _print_line(text: str) -> None:
    print(text, flush=True)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
