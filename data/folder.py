"""Convert a tree of images, a folder per class, to train.beton and val.beton.

Usage: python data/folder.py SRC --out DIR
"""

from __future__ import annotations

import sys

from mrmae_ds.cli.data import add_folder_arguments, run_folder
from mrmae_ds.cli.parser import CommandParser, run_command

if __name__ == "__main__":
    parser = CommandParser(description=__doc__.splitlines()[0])
    add_folder_arguments(parser)
    sys.exit(run_command(run_folder, parser.parse_args()))
