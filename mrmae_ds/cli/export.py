"""``mrmae export``: weights of a finished run, or of another project, for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path

from mrmae_ds.cli.parser import CommandParser, require_path

SUMMARY = "export a finished run's weights to a safetensors file, for timm or complete"


def add_arguments(parser: CommandParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "run",
        type=Path,
        help="a finished stage, runs/NAME/STAGE, or a weights file that `mrmae check` calls usable",
    )
    parser.add_argument(
        "--to",
        choices=("timm", "safetensors"),
        help="timm (default): a file that timm.create_model loads, for a pre-training the encoder alone; safetensors "
        "(default of a detector): all weights",
    )
    parser.add_argument("--out", type=Path, help="file or folder; default: ./NAME-STAGE[-timm].safetensors")
    parser.add_argument("--force", action="store_true", help="replace a file that this project did not write")


def run(args: argparse.Namespace) -> None:
    """Write the file; print its path and the line of Python that loads it."""
    require_path(args.run)
    from mrmae_ds.weights.detectors import holds_detector
    from mrmae_ds.weights.export import export_run

    if args.to != "timm" and holds_detector(args.run):
        from mrmae_ds.detection.saved import export_detector

        exported = export_detector(args.run, args.out, args.force)
    else:
        exported = export_run(args.run, args.to or "timm", args.out, args.force)
    print("\n".join([f"written: {exported.path}", *exported.notes, "load it with", f"    {exported.line}"]))
