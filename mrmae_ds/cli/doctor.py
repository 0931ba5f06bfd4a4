"""``mrmae doctor``: checks of a node, its links and the training engines, one rank per process like train.py."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from mrmae_ds.cli.parser import CommandParser
from mrmae_ds.cli.train import end_process
from mrmae_ds.distributed.launch import prepare_environment
from mrmae_ds.distributed.logs import configure_logging

SUMMARY = "check a node, its links and the training engines; start it with the launcher of the job"


def add_arguments(parser: CommandParser) -> None:
    """Add the command's arguments, and those that the deepspeed launcher passes."""
    add = parser.add_argument
    add("--ds_config", type=Path, help="engine config whose recipe and precision are timed; default: a tiny model")
    add("--recipe", type=Path, help="recipe; default: the YAML of the same name beside the engine config")
    add("--only", action="append", default=[], metavar="CHECK", help="run this check; may be repeated")
    add("--skip", action="append", default=[], metavar="CHECK", help="leave this check out; may be repeated")
    add("--quick", action="store_true", help="run the 15-minute order only")
    add(
        "--out",
        type=Path,
        default=Path("doctor.json"),
        help="report; all nodes must see its folder; default: %(default)s",
    )
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's; LOCAL_RANK has it too


def run(args: argparse.Namespace) -> NoReturn:
    """Run the checks and end the process: status 0, 1 after a hard failure, 2 for bad input."""
    end_process(doctor(args))


def doctor(args: argparse.Namespace) -> int:
    """Run the checks and return the exit status."""
    launch = None
    try:
        launch = prepare_environment()
        configure_logging(launch)
        from mrmae_ds.doctor.context import DoctorRequest
        from mrmae_ds.doctor.run import run_doctor

        request = DoctorRequest(
            ds_config=args.ds_config,
            recipe=args.recipe,
            only=tuple(args.only),
            skip=tuple(args.skip),
            quick=args.quick,
            out=args.out,
        )
        return run_doctor(request, launch)
    except Exception as error:
        from mrmae_ds.distributed.exit_status import report_exit

        return report_exit(error, launch, started=False)
