"""A tree of pictures, a folder a class, as train.beton and val.beton: python data/folder.py SRC --out DIR"""

from __future__ import annotations

import argparse
import sys

from mrmae_ds.data.console import report
from mrmae_ds.data.folder import write_folder


def main() -> int:
    """Parse the arguments, write, report. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", metavar="SRC", help="SRC/train/CLASS/* and SRC/val/CLASS/*, or SRC/CLASS/*")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to, made if missing")
    parser.add_argument("--name", help="of the data set, as tables show it; default: the folder's")
    parser.add_argument("--max-side", type=int, default=512, metavar="PIXELS", help="reduce the longer side to this")
    parser.add_argument("--quality", type=int, default=90, metavar="Q", help="of the JPEGs, 1 to 100")
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=0.1,
        metavar="F",
        help="split off from each class where SRC has no val/",
    )
    parser.add_argument("--train-count", type=int, metavar="N", help="at most N, class-balanced; default: all")
    parser.add_argument("--val-count", type=int, metavar="N", help="at most N, class-balanced; default: all")
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default: the cores, 8 at most")
    parser.add_argument("--skip-bad", action="store_true", help="leave undecodable pictures out and list them")
    options = vars(parser.parse_args())
    return report(lambda: write_folder(options.pop("source"), options.pop("out"), **options))


if __name__ == "__main__":
    sys.exit(main())
