"""``mrmae migrate``: files of earlier versions with the present keys."""

from __future__ import annotations

import argparse
from pathlib import Path

from mrmae_ds.cli.parser import CommandParser
from mrmae_ds.errors import UserError

SUMMARY = "rewrite recipes, pipeline files and run folders of earlier versions with the present keys"


def add_arguments(parser: CommandParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="FILE_OR_FOLDER", help="YAML files, or folders that hold runs or recipes"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the changes and make none")


def run(args: argparse.Namespace) -> None:
    """Print each change; files that cannot be rewritten are reported after all others were."""
    from mrmae_ds.training.migrate import migrate

    done, problems = migrate(args.paths, dry_run=args.dry_run)
    if done or not problems:
        print("\n".join(done or ["nothing to change"]))
    if problems:
        raise UserError("\n".join(problems))
