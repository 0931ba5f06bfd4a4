"""``mrmae features``: embeddings of images by a trained encoder."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from mrmae_ds.cli.parser import CommandParser, add_device_option, requested_device, require_path
from mrmae_ds.errors import UserError
from mrmae_ds.units import counted

SUMMARY = "write the embeddings of images by the encoder of a run or of released weights, and judge them"


def add_arguments(parser: CommandParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "run",
        type=Path,
        metavar="RUN",
        help="a finished stage, runs/NAME/STAGE, or a weights file that `mrmae check` calls usable",
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("features.npy"),
        help="NAME.npy, with the files' names in NAME.csv, or NAME.parquet; default: %(default)s",
    )
    parser.add_argument(
        "--accuracy",
        action="store_true",
        help="k-NN and linear-probe accuracy; IMAGE is then one folder of classes, or of train/ and val/ with classes",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time; default: %(default)s")
    parser.add_argument("--workers", type=int, help="processes that decode; default: one per CPU core, at most 8")
    add_device_option(parser)


def run(args: argparse.Namespace) -> None:
    """Write the files and print their paths, and the accuracies with ``--accuracy``."""
    for path in (args.run, *args.images):
        require_path(path)
    for option, value, least in (("--batch-size", args.batch_size, 1), ("--workers", args.workers, 0)):
        if value is not None and value < least:
            raise UserError(f"{option}: {value} is less than {least}")
    from mrmae_ds.api import ImageEncoder
    from mrmae_ds.figures.select_images import left_out
    from mrmae_ds.training.evaluation import embeddings

    embeddings.check_output(args.out)
    device = requested_device(args.device)
    encoder = ImageEncoder.from_file(args.run)
    files = embeddings.list_files(args.images, args.accuracy)
    batch_size, count = args.batch_size, len(files.paths)
    cores = len(os.sched_getaffinity(0))
    workers = args.workers if args.workers is not None else 0 if count <= batch_size else min(cores, 8)
    found = embeddings.embed(encoder, files.paths, device, batch_size, workers)
    features, files = found.features, files.select(found.rows)
    written = embeddings.write_embeddings(args.out, files, features)
    print(f"{counted(len(files.paths), 'image')}, {features.shape[1]} features each: {', '.join(map(str, written))}")
    if args.accuracy:
        val = counted(files.parts.count("val"), "image")
        for name, value in embeddings.quick_accuracy(files, features).items():
            print(f"{name}: {value:.2f} % of {val} of {counted(len(files.class_names), 'class')}")
    if found.problems:
        raise left_out(found.problems, count)
