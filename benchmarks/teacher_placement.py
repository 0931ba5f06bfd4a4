"""Measure memory and time of every placement of a frozen teacher's weights.

    python benchmarks/teacher_placement.py --dino dinov2_vits14.safetensors --processes 1 2
    python benchmarks/teacher_placement.py --clip ViT-L-14 --processes 1 --batch 2 --out FILE.json

``--dino`` takes a weights file of timm's vit_small_patch14_dinov2, ``--clip`` the name of an open_clip model, which has
random weights: neither memory nor time depends on them. Teachers compute on noise at 224 pixels, by default in bf16. In
each round, every placement is built, warmed up, timed and released in turn, so that other load on the machine affects
all equally; ``ratio`` is relative to ``device`` in the same round, and the median, minimum and maximum over rounds are
reported.

``between`` and ``peak`` count weights on the device; on a GPU, ``allocated`` is torch's peak allocation during a call,
including activations. On a CPU, host and device share one memory: a copy to the device is a copy within it, so times
include the CPU cost of hooks and copies but no PCIe transfers, and copies cannot overlap computation. There,
``cpu_ratio`` is the ratio of the process's CPU time, which other processes affect less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
MB = 1e6
ON_CPU = "copies within the memory of a CPU: this says nothing of PCIe, nor of what runs beside a GPU's computing"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dino", type=Path, metavar="FILE", help="weights of timm's vit_small_patch14_dinov2")
    parser.add_argument("--clip", nargs="*", default=[], metavar="NAME", help="open_clip models, random weights")
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument("--batch", type=int, default=8, help="images per call and rank")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=3, help="timed calls per round; the median is used")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--limit", type=float, default=1800, help="seconds per teacher and number of ranks")
    parser.add_argument("--out", type=Path, help="JSON file; its rows of other teachers are kept")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not args.rank_of and not (args.dino or args.clip):
        parser.error("name a teacher: --dino FILE, --clip NAME")
    return args


def teacher_builder(kind: str, source: str, precision: str) -> Callable[[], Any]:
    """Return a function that builds the same teacher on the CPU each time."""
    from mrmae_ds.config.recipe import DataConfig, TeacherConfig
    from mrmae_ds.doctor.placements import random_clip
    from mrmae_ds.teachers import build_teacher

    if kind == "dino":
        config = TeacherConfig(kind="timm", source="vit_small_patch14_dinov2", weights=source, precision=precision)
        data = DataConfig(train="none", val="none")
        return lambda: build_teacher("dino", config, data, 224, (16, 16))
    return lambda: random_clip(source, precision)


def run_rank(settings: dict[str, Any]) -> None:
    """Run one rank; rank 0 writes its measurements to the settings' ``result``."""
    from mrmae_ds.distributed.launch import prepare_environment

    launch = prepare_environment()
    import torch

    from mrmae_ds.distributed.process_group import choose_device, end_process_group, start_process_group
    from mrmae_ds.doctor.placements import PLACEMENTS, measure_placement

    device = choose_device(launch)
    start_process_group(device)
    generator = torch.Generator().manual_seed(launch.rank)
    pixels = torch.rand(settings["batch"], 3, 224, 224, generator=generator).to(device)
    build = teacher_builder(settings["kind"], settings["source"], settings["precision"])
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in PLACEMENTS}
    for number in range(settings["rounds"]):
        for name, placement in PLACEMENTS.items():
            rounds[name].append(measure_placement(build, placement, pixels, settings["calls"]))
            if launch.rank == 0:
                print(f"round {number + 1}: {name} {rounds[name][-1]['seconds']:.3f} s", file=sys.stderr, flush=True)
    if launch.rank == 0:
        Path(settings["result"]).write_text(json.dumps(rounds))
    end_process_group()


def summary(rounds: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return one row per placement; raise RuntimeError if a target differs."""
    rows = {}
    for name, seen in rounds.items():
        if {entry["sum"] for entry in seen} != {rounds["device"][0]["sum"]}:
            raise RuntimeError(f"{name}: targets differ from those of placement device")
        row = {key: max(e[key] for e in seen) for key in ("weights", "between", "peak", "allocated") if key in seen[0]}
        row["seconds"] = round(statistics.median(entry["seconds"] for entry in seen), 4)
        for key, label in {"seconds": "ratio", "cpu_seconds": "cpu_ratio"}.items():
            ratios = [entry[key] / base[key] for entry, base in zip(seen, rounds["device"], strict=True)]
            row[label] = [round(value, 3) for value in (statistics.median(ratios), min(ratios), max(ratios))]
        rows[name] = row
    return rows


def run(args: argparse.Namespace, kind: str, source: str, processes: int) -> dict[str, dict[str, Any]]:
    """Run the ranks of one teacher; they are killed in any case."""
    from tests.support.processes import environment, free_port

    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder) / "job.json", Path(folder) / "result.json"
        settings = {key: getattr(args, key) for key in ("batch", "rounds", "calls", "precision")}
        job.write_text(json.dumps({"kind": kind, "source": source, "result": str(result), **settings}))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
        started = [
            subprocess.Popen(
                [sys.executable, __file__, "--rank-of", str(job)],
                env=environment(RANK=str(r), LOCAL_RANK=str(r), DS_ACCELERATOR=args.accelerator, **address),
                stdout=subprocess.DEVNULL,
            )
            for r in range(processes)
        ]
        deadline = time.monotonic() + args.limit
        try:
            for process in started:
                process.wait(timeout=max(1.0, deadline - time.monotonic()))
        finally:
            for process in started:
                process.kill()
        if any(process.returncode for process in started):
            raise RuntimeError(f"{kind} on {processes} processes failed; see the error above")
        return summary(json.loads(result.read_text()))


def table(rows: list[dict[str, Any]]) -> str:
    """Format as Markdown."""
    lines = [
        "| teacher | processes | placement | weights, MB | between | peak | s a batch | ratio | CPU time ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sizes = " | ".join(f"{row[key] / MB:.1f}" for key in ("weights", "between", "peak"))
        ratios = " | ".join("{:.2f} ({:.2f} to {:.2f})".format(*row[key]) for key in ("ratio", "cpu_ratio"))
        which = f"{row['teacher']} | {row['processes']} | {row['placement']}"
        lines.append(f"| {which} | {sizes} | {row['seconds']:.3f} | {ratios} |")
    return "\n".join(lines)


def main() -> None:
    """Measure every teacher on every number of processes, print the table, write the JSON."""
    args = parse()
    sys.path.insert(0, str(REPOSITORY))
    if args.rank_of:
        run_rank(json.loads(args.rank_of.read_text()))
        return
    import torch

    from mrmae_ds.records.environment import collect_hardware, collect_versions

    args.accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    teachers = [("dino", str(args.dino))] if args.dino else []
    teachers += [("clip", name) for name in args.clip]
    rows = []
    for kind, source in teachers:
        for processes in args.processes:
            name = "DINOv2 ViT-S/14" if kind == "dino" else f"CLIP {source}, random weights"
            common = {"teacher": name, "processes": processes, "batch": args.batch, "precision": args.precision}
            found = run(args, kind, source, processes)
            rows += [{**common, "placement": placement, **row} for placement, row in found.items()]
    print(table(rows))
    if args.accelerator == "cpu":
        print(ON_CPU)
    if args.out:
        write(args, rows, collect_hardware(max(args.processes), args.accelerator).model_dump(), collect_versions())


def write(args: argparse.Namespace, rows: list[dict[str, Any]], hardware: Any, versions: Any) -> None:
    """Write the JSON: these rows, and the file's rows of other teachers or numbers of ranks on the same device."""
    new = {(row["teacher"], row["processes"]) for row in rows}
    earlier = json.loads(args.out.read_text()) if args.out.exists() else {"rows": [], "hardware": hardware}
    same = earlier["hardware"].get("device") == hardware.get("device")
    kept = [row for row in earlier["rows"] if same and (row["teacher"], row["processes"]) not in new]
    given = [argument.replace(str(args.dino), "FILE") if args.dino else argument for argument in sys.argv[1:]]
    kept_arguments = [a for before, a in zip(["", *given], given, strict=False) if "--out" not in (before, a[:5])]
    command = " ".join(["python benchmarks/teacher_placement.py", *kept_arguments])
    for row in rows:
        row["command"] = command
    content = {
        "hardware": hardware,
        "cores": os.cpu_count(),
        "versions": versions,
        "note": ON_CPU if args.accelerator == "cpu" else "",
        "rows": kept + rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
