"""Convert ImageNet-1K to train.beton and val.beton.

Usage: python data/imagenet.py SRC --out DIR
"""

from __future__ import annotations

import sys

from mrmae_ds.cli.data import add_imagenet_arguments, run_imagenet
from mrmae_ds.cli.parser import CommandParser, run_command

if __name__ == "__main__":
    parser = CommandParser(description=__doc__.splitlines()[0])
    add_imagenet_arguments(parser)
    sys.exit(run_command(run_imagenet, parser.parse_args()))
