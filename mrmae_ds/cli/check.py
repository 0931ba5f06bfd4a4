"""``mrmae check``: identification of a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from mrmae_ds.cli.parser import CommandParser, require_path

SUMMARY = "identify a checkpoint, verify its checksums, and print how to load it"


def add_arguments(parser: CommandParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "path",
        type=Path,
        help="a weights file (FILE#KEY if it holds several sets of weights), a stage's folder, or a checkpoint in it",
    )


def run(args: argparse.Namespace) -> None:
    """Print the description."""
    require_path(args.path)
    from mrmae_ds.cli.inspect import describe

    print(describe(args.path))
