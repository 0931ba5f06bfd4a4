"""Whether a reader's memory stays flat: the process tree's anonymous and shared memory after each of many epochs.

    python benchmarks/loader_memory.py train.beton [--epochs 20] [--out loader_memory.json]

The mapped .beton itself is not counted: its pages belong to the system's cache. Fails (status 1) if the second half of
the epochs needs more than 2 % above the end of the first half.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import psutil
from loader import CONTENDERS, Settings


def memory() -> float:
    """MiB of this process and its descendants that are theirs alone or shared memory (not files)."""
    own = psutil.Process()
    total = 0
    for process in [own, *own.children(recursive=True)]:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith(("RssAnon", "RssShmem")):
                total += int(line.split()[1])
    return total / 1024


def main() -> None:
    """Parse, measure in this process, print a line a reader, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("beton", type=Path)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--reader", choices=CONTENDERS, default=next(iter(CONTENDERS)))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    batches = CONTENDERS[args.reader](Settings(args.beton, Path(), args.size, args.batch, args.workers))
    used = []
    for epoch in range(args.epochs):
        sum(batches(epoch))
        used.append(round(memory(), 1))
    print(f"{args.reader}: MiB after each epoch: {' '.join(f'{value:.0f}' for value in used)}")
    if args.out:
        args.out.write_text(json.dumps({"reader": args.reader, "mib_after_epoch": used}, indent=1) + "\n")
    half = args.epochs // 2
    grown = max(used[half:]) / used[half - 1] - 1
    print(f"second half: at most {100 * grown:+.1f} % of the end of the first half")
    sys.stdout.flush()
    os._exit(int(grown > 0.02))


if __name__ == "__main__":
    main()
