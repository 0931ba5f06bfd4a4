"""Convert ImageNet-1K to train.beton and val.beton.

Usage: python data/imagenet.py SRC --out DIR
"""

from __future__ import annotations

import argparse
import sys

from mrmae_ds.cli.data import add_imagenet_arguments, run_imagenet, run_script

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_imagenet_arguments(parser)
    sys.exit(run_script(run_imagenet, parser.parse_args()))
