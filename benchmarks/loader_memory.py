"""Memory growth of a loader: the process tree's anonymous and shared memory after each of many epochs.

    python benchmarks/loader_memory.py train.beton [--epochs 20] [--loader NAME ...] [--out loader_memory.json]

Each loader runs in a process of its own. The mapped .beton is not counted, because its pages belong to the system's
cache. Fails (status 1) if the second half of the epochs needs more than 2 % above the end of the first half.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
from loader import CONTENDERS, Settings, recorded

LOADERS = ("mrmae_ds, ffcv backend", "mrmae_ds, pillow backend", "mrmae_ds, ffcv + RandAugment")


def memory() -> float:
    """Return the anonymous and shared memory of this process and its descendants, MiB."""
    own = psutil.Process()
    total = 0
    for process in [own, *own.children(recursive=True)]:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith(("RssAnon", "RssShmem")):
                total += int(line.split()[1])
    return total / 1024


def measure(args: argparse.Namespace) -> list[float]:
    """Return the memory after each epoch of one loader in this process, MiB."""
    settings = Settings(args.beton, Path(), None, args.size, args.batch, args.workers)
    batches = CONTENDERS[args.alone](settings)
    used = []
    for epoch in range(args.epochs):
        sum(batches(epoch))
        used.append(round(memory(), 1))
    return used


def growth(used: list[float]) -> float:
    """Return the largest growth in the second half of the epochs over the end of the first, as a share."""
    half = len(used) // 2
    return max(used[half:]) / used[half - 1] - 1


def main() -> None:
    """Parse, measure each loader in a process, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("beton", type=Path)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--loader", action="append", choices=CONTENDERS, help=f"default: {', '.join(LOADERS)}")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(measure(args)), flush=True)
        os._exit(0)  # some contenders' threads outlive their loader
    from mrmae_ds.records.environment import collect_versions, cpu_name

    results = {}
    print("| loader | MiB after epoch 1 | halfway | at the end | second half, at most |\n|---|---|---|---|---|")
    for loader in args.loader or LOADERS:
        command = [sys.executable, __file__, *sys.argv[1:], "--alone", loader]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=3600)
        used = results[loader] = json.loads(done.stdout.splitlines()[-1])
        middle = used[len(used) // 2 - 1]
        print(f"| {loader} | {used[0]:.0f} | {middle:.0f} | {used[-1]:.0f} | {100 * growth(used):+.1f} % |", flush=True)
    if args.out:
        settings = recorded(args)
        machine = {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "versions": collect_versions()}
        content = {"settings": settings, "machine": machine, "mib_after_epoch": results}
        args.out.write_text(json.dumps(content, indent=1, default=str) + "\n")
    sys.exit(int(any(growth(used) > 0.02 for used in results.values())))


if __name__ == "__main__":
    main()
