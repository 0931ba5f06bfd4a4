"""The command line of ``mrmae replay``."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "run a step again that training skipped because a loss or a gradient was not finite"


def add_replay_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("capture", type=Path, metavar="CAPTURE", help="RUN/STAGE/captures/step_N")
    parser.add_argument("--device", help="to compute on, cpu or cuda; default: cuda where there is one")


def run_replay(args: argparse.Namespace) -> None:
    """Print what came of it. Raises UserError."""
    import torch

    from mrmae_ds.training.replay import describe, replay

    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    print(describe(*replay(args.capture, torch.device(name))))
