"""Convert Fashion-MNIST to train.beton and val.beton (its test part).

Usage: python data/fashion_mnist.py --out DIR
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args

from mrmae_ds.cli.data import report
from mrmae_ds.cli.parser import CommandParser, run_command
from mrmae_ds.data.convert.fashion_mnist import write_fashion_mnist
from mrmae_ds.data.convert.options import Output, Storage, WriteOptions
from mrmae_ds.files import expand_home


def _run(args: argparse.Namespace) -> None:
    options = WriteOptions(storage=args.storage)
    output = Output(args.out, None, options, args.num_train_images, args.num_val_images)
    report(write_fashion_mnist(output, expand_home(args.source)))


if __name__ == "__main__":
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to, made if missing")
    parser.add_argument(
        "--source", default="auto", metavar="DIR",
        help="folder with the four idx-ubyte.gz files; auto: Debian's dataset-fashion-mnist, else a download",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=get_args(Storage), default=WriteOptions.storage, dest="storage",
        help="raw stores pixels without loss, three times the size; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--num-train-images", type=int, metavar="N", help="class-balanced subset; default: all 60,000")
    parser.add_argument("--num-val-images", type=int, metavar="N", help="class-balanced subset; default: all 10,000")
    sys.exit(run_command(_run, parser.parse_args()))
