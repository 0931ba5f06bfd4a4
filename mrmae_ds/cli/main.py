"""The ``mrmae`` command: assembly of its subcommands."""

from __future__ import annotations

import shtab

from mrmae_ds import __version__
from mrmae_ds.cli import (
    check,
    cost,
    data,
    detect,
    doctor,
    export,
    features,
    migrate,
    plan,
    replay,
    report,
    show,
    submit,
    table,
    teachers,
    train,
)
from mrmae_ds.cli.parser import Command, CommandParser, quiet_without_reader, run_command

COMMANDS: dict[str, Command] = {
    "data": data,
    "train": train,
    "plan": plan,
    "cost": cost,
    "doctor": doctor,
    "submit": submit,
    "table": table,
    "teachers": teachers,
    "detect": detect,
    "show": show,
    "features": features,
    "report": report,
    "export": export,
    "check": check,
    "replay": replay,
    "migrate": migrate,
}


def build_parser() -> CommandParser:
    """Build the parser of the command line. It imports neither torch nor DeepSpeed."""
    parser = CommandParser(
        prog="mrmae",
        description="Tools for MR-MAE pre-training: data, training, planning, visualization, tables and export.",
    )
    parser.add_argument("--version", action="version", version=f"mrmae_ds {__version__}")
    shtab.add_argument_to(parser, "--print-completion", help="print a completion script of this shell")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.SUMMARY, description=command.SUMMARY)
        command.add_arguments(subparser)
        subparser.set_defaults(run_command=command.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments; default: those of the process.

    Returns:
        The exit status: 0, 2 for bad input, or 130 after Ctrl-C.

    Raises:
        SystemExit: by argparse, by commands with other statuses, and with status 141 if nobody reads the output.
    """
    with quiet_without_reader():
        args = build_parser().parse_args(argv)
        return run_command(args.run_command, args)
