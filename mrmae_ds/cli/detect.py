"""``mrmae detect``: objects in images, by a trained detector."""

from __future__ import annotations

import argparse
from pathlib import Path

from mrmae_ds.cli.parser import CommandParser, add_device_option, requested_device, require_path
from mrmae_ds.errors import UserError
from mrmae_ds.units import counted

SUMMARY = "detect objects in images with a finished stage detect: boxes, masks and names drawn, and JSON"


def add_arguments(parser: CommandParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a finished stage, runs/NAME/detect, or its weights file")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("--out", type=Path, required=True, help="folder for NAME.png and NAME.json of each image")
    parser.add_argument(
        "--score", type=float, default=0.5, help="least score that is drawn, 0 to 1; default: %(default)s"
    )
    add_device_option(parser)


def run(args: argparse.Namespace) -> None:
    """Write the files and print their paths."""
    for path in (args.run, *args.images):
        require_path(path)
    if not 0 <= args.score <= 1:
        raise UserError(f"--score {args.score:g}: scores are 0 to 1")
    from mrmae_ds.detection.predict import detect_images

    device = requested_device(args.device)
    for figure, count in detect_images(args.run, args.images, args.out, args.score, device):
        print(f"{figure}: {counted(count, 'object')}", flush=True)
