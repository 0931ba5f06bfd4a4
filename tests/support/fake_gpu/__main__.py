"""Run a program of the repository on the stand-in, and report waits of the host, launches, copies and races.

    python -m tests.support.fake_gpu [--out REPORT.json] [--kernels FILE] train.py --ds_config ... [key.path=value ...]
    python -m tests.support.fake_gpu --timing train.py ...      # CPU time of the host; device copies cost nothing
    python -m tests.support.fake_gpu mrmae_ds/__main__.py replay runs/tiny/pretrain/captures/step_000003

Losses are meaningless. A tensor on the wrong device raises as on a GPU. Ranks are started as a launcher would, each
with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; each gets a device of its own.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from pathlib import Path
from typing import NoReturn

from tests.support.fake_gpu import preload


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the report as JSON; of several ranks, to NAME-RANK.json")
    parser.add_argument("--kernels", type=Path, help="write names and launches of the last step's kernels")
    parser.add_argument("--timing", action="store_true", help="measure: allocate as on a GPU, watch no waits and races")
    parser.add_argument("program", type=Path, help="Python file")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    return parser.parse_args()


def main() -> NoReturn:
    """Run the program; the exit status is the program's."""
    options = parse()
    preload.restart(options.timing)
    from tests.support.fake_gpu.watch import watch

    watch(options.out, options.kernels, options.timing)
    sys.argv = [str(options.program), *options.arguments]
    sys.path.insert(0, str(options.program.resolve().parent))
    status = 0
    try:
        runpy.run_path(str(options.program), run_name="__main__")
    except SystemExit as error:
        status = int(error.code or 0)
    os._exit(status)  # as the programs do; it writes the report


if __name__ == "__main__":
    main()
