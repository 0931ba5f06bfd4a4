"""A tree of images, a folder a class, as train.beton and val.beton: python data/folder.py SRC --out DIR"""

from __future__ import annotations

import argparse
import sys

from mrmae_ds.cli.data import add_folder_arguments, run_folder, run_script

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add_folder_arguments(parser)
    sys.exit(run_script(run_folder, parser.parse_args()))
