"""The command ``mrmae submit``."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from mrmae_ds.errors import UserError

if TYPE_CHECKING:
    from mrmae_ds.pipeline.graph import PipelineJob
    from mrmae_ds.pipeline.status import JobStatus

SUMMARY = "run what is missing of a chain of trainings behind a table, on Slurm or on this machine"
TFLOPS = 200.0


def add_submit_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments; :func:`run_submit` runs it."""
    parser.add_argument("chain", type=Path, help="a chain, slurm/NAME.yaml")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="the folder of all runs; default: runs")
    parser.add_argument("--seeds", type=_seeds, metavar="0,1", help="every recipe with each; default: the recipe's own")
    parser.add_argument("--only", action="append", metavar="RUN", help="only this run and what it needs; repeatable")
    parser.add_argument(
        "--set", action="append", default=[], metavar="key.path=value", help="changes to every recipe; repeatable"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan, with GPU-hours; start nothing")
    parser.add_argument(
        "--tflops",
        type=float,
        default=TFLOPS,
        help="what one GPU sustains, for the plan; default: %(default)g, assumed",
    )
    parser.add_argument("--local", action="store_true", help="run it here, without Slurm")
    parser.add_argument(
        "--processes", type=int, metavar="N", help="of each training with --local; default: the GPUs, or 1 without any"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings at a time, with --local")
    parser.add_argument(
        "--sbatch", type=shlex.split, default=[], metavar="'OPTIONS'", help="for every Slurm job: '--time=24:00:00 ...'"
    )


def run_submit(args: argparse.Namespace) -> None:
    """Look at what is there, and start what is missing.

    Raises:
        UserError: for a chain or a recipe that cannot be, or a folder that holds another run.
        SystemExit: with status 1 if a training here did not finish.
    """
    from mrmae_ds.pipeline.config import load_pipeline
    from mrmae_ds.pipeline.costs import plan
    from mrmae_ds.pipeline.graph import build_jobs
    from mrmae_ds.pipeline.status import alone, read_jobs, statuses

    chain = load_pipeline(args.chain)
    links = build_jobs(chain, args.runs, args.seeds, args.set)
    links = _chosen(links, args.only)
    _check(args)
    if args.dry_run:
        print(plan(links, statuses(links, read_jobs(args.runs), _queue(args.local, dry_run=True)), args.tflops))
        return
    with alone(args.runs):
        known = statuses(links, read_jobs(args.runs), _queue(args.local))
        if args.local:
            _run_here(args, links, known, chain.tables)
        else:
            _submit(args, chain.name, links, known, chain.tables)


def _queue(local: bool, dry_run: bool = False) -> dict[str, str]:
    """Slurm's queue. Where none is asked for it is empty; a plan is told without it, with a word on stderr."""
    from mrmae_ds.pipeline.slurm import queue

    if local:
        return {}
    try:
        return queue()
    except UserError as error:
        if not dry_run:
            raise
        reason = str(error).splitlines()[0]
        print(f"states are by the records alone, without Slurm's queue: {reason}", file=sys.stderr)
        return {}


def _run_here(
    args: argparse.Namespace, links: Sequence[PipelineJob], known: Mapping[str, JobStatus], tables: Sequence[int]
) -> None:
    import torch

    from mrmae_ds.pipeline.local import LocalPipeline

    gpus = torch.cuda.device_count()
    if args.jobs > 1 and gpus:
        raise UserError("--jobs: trainings at the same time would share the GPUs; leave it out")
    there = sum(status.state == "finished" for status in known.values())
    print(f"{len(links)} links, {there} finished already")
    signal.signal(signal.SIGTERM, _interrupt)
    chain = LocalPipeline(links, known, processes=args.processes or gpus or 1, gpus=gpus, at_once=args.jobs, say=_say)
    try:
        failed = chain.run()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from there", file=sys.stderr)
        raise SystemExit(130) from None
    _write_tables(args.runs, tables)
    if failed:
        for key, reason in failed.items():
            print(f"not finished: {key}: {reason}", file=sys.stderr)
        raise SystemExit(1)


def _submit(
    args: argparse.Namespace,
    name: str,
    links: Sequence[PipelineJob],
    known: Mapping[str, JobStatus],
    tables: Sequence[int],
) -> None:
    from mrmae_ds.pipeline.slurm import submit, submit_tables

    new = submit(links, known, args.runs, args.sbatch)
    for key, job in new.items():
        print(f"{key}: submitted as job {job}")
    waiting = [*new.values(), *(status.job for status in known.values() if status.job)]
    if not waiting:
        print(f"all {len(links)} links are finished")
        _write_tables(args.runs, tables)
    elif new:
        command = [str(Path(sys.executable).with_name("mrmae")), "table", *_numbers(tables), str(args.runs)]
        print(f"tables: job {submit_tables(name, command, waiting, args.runs, args.sbatch)}, after all of them")
    else:
        print(f"nothing to submit: {len(waiting)} jobs are in the queue")


def _write_tables(root: Path, tables: Sequence[int]) -> None:
    from mrmae_ds.tables.write import write_table

    for number in tables:
        _, written = write_table([root], root, number)
        print(f"written: {', '.join(map(str, written))}")


def _numbers(tables: Sequence[int]) -> list[str]:
    return [text for number in tables for text in ("--paper", str(number))]


def _chosen(links: Sequence[PipelineJob], only: Sequence[str] | None) -> list[PipelineJob]:
    """The links of the named runs, and those that they need."""
    if only is None:
        return list(links)
    names = dict.fromkeys(link.run for link in links)
    if unknown := [name for name in only if name not in names]:
        raise UserError(f"--only {unknown[0]}: no such run in the chain; it has {', '.join(names)}")
    kept: set[str] = set()
    for link in reversed(links):
        if link.run in only or link.key in kept:
            kept |= {link.key, *link.needs}
    return [link for link in links if link.key in kept]


def _check(args: argparse.Namespace) -> None:
    for option in ("jobs", "processes"):
        number = getattr(args, option)
        if number is not None and number < 1:
            raise UserError(f"--{option} must be at least 1, not {number}")
    if not args.tflops > 0:
        raise UserError(f"--tflops must be above 0, got {args.tflops:g}")


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers, as 0,1, got {text!r}") from None
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise argparse.ArgumentTypeError(f"seeds are different numbers from 0 on, got {text!r}")
    return seeds


def _say(text: str) -> None:
    print(text, flush=True)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
