"""``mrmae show``: attention maps and reconstructions of finished runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from mrmae_ds.cli.parser import CommandParser, require_path

SUMMARY = "draw attention maps and reconstructions of one or several runs on the same images"


def add_arguments(parser: CommandParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a finished stage, runs/NAME/STAGE, or a weights file"
    )
    parser.add_argument(
        "--images",
        nargs="+",
        default=(),
        metavar="IMAGE",
        help="image files, folders of them, or indices into the first run's validation set; default: evenly spaced "
        "images of the validation set",
    )
    parser.add_argument("--num-images", type=int, help="number of images; default: the recipe's logging.num_images")
    parser.add_argument("--seed", type=int, default=0, help="seed of the mask; default: %(default)s")
    parser.add_argument("--out", type=Path, help="folder for the PNG files; default: images/ in the first RUN")


def run(args: argparse.Namespace) -> None:
    """Write the figures and print their paths."""
    for path in args.runs:
        require_path(path)
    from mrmae_ds.figures.visualize import show_runs

    for path in show_runs(args.runs, args.images, count=args.num_images, seed=args.seed, out=args.out):
        print(path)
