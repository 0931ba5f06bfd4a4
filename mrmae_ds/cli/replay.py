"""``mrmae replay``: repetition of a captured step."""

from __future__ import annotations

import argparse
from pathlib import Path

from mrmae_ds.cli.parser import CommandParser, add_device_option, requested_device

SUMMARY = "repeat a step that training skipped because a loss or a gradient was not finite"


def add_arguments(parser: CommandParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("capture", type=Path, metavar="CAPTURE", help="RUN/STAGE/captures/step_N")
    add_device_option(parser)


def run(args: argparse.Namespace) -> None:
    """Print the result of the repetition."""
    from mrmae_ds.training.replay import describe, replay

    print(describe(*replay(args.capture, requested_device(args.device))))
