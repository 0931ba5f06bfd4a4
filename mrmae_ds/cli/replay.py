"""``mrmae replay``: repetition of a captured step."""

from __future__ import annotations

import argparse
from pathlib import Path

from mrmae_ds.cli.parser import CommandParser

SUMMARY = "repeat a step that training skipped because a loss or a gradient was not finite"


def add_arguments(parser: CommandParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("capture", type=Path, metavar="CAPTURE", help="RUN/STAGE/captures/step_N")
    parser.add_argument("--device", help="cpu or cuda; default: cuda if available")


def run(args: argparse.Namespace) -> None:
    """Print the result of the repetition."""
    import torch

    from mrmae_ds.training.replay import describe, replay

    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    print(describe(*replay(args.capture, torch.device(name))))
