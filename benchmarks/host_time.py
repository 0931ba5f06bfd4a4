"""Measure the host's time of a pre-training step on a GPU, without a GPU: a step can take no less.

    python benchmarks/host_time.py base huge --ranks 1 2 --out FILE.json

Names are those of ds_configs/NAME.json and its recipe. Task and engine are the real ones, on the GPU stand-in of
``tests/support/fake_gpu``: every kernel, copy and collective is issued as on a GPU and costs nothing there. Measured is
the process's CPU time: Python, the dispatcher, autograd, DeepSpeed; a launch on a real GPU adds about 2 us. Weights and
images are whatever memory holds, and no loader runs. Of several ranks, rank 0 alone runs, and its collectives end at
once.

A config with ZeRO-3 is also measured with ZeRO-1 in its place and everything else equal, in alternation, so that load
on the machine affects both; ``ratio`` relates them. ``ms a micro-batch`` is what one more micro-batch costs: the time
from one to the next, the least of all steps and rounds, since load only adds to it. ``ms once a step`` is what the
last micro-batch takes longer: status exchange, norm, optimizer. Counts are a micro-batch's + those once a step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ranks import RanksError, report_result, run_ranks
from result_file import write_result

REPOSITORY = Path(__file__).resolve().parents[1]
ZERO1 = {"stage": 1, "reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000}
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
SETTLED = 3  # steps after which DeepSpeed knows the order of the modules


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["base", "huge"], help="ds_configs/NAME.json and its recipe")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches per step")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-recompute", action="store_true", help="without activation checkpointing")
    parser.add_argument("--bf16", action="store_true", help="with the section bf16 in place of torch_autocast")
    parser.add_argument("--limit", type=float, default=600, help="seconds per process")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


class Clock:
    """Iterator over one batch that notes CPU time and the stand-in's counters whenever a batch is taken."""

    def __init__(self, batch: Any) -> None:
        from tests.support.fake_gpu.report import Counters

        self.batch, self.counters = batch, Counters()
        self.marks: list[tuple[float, dict[str, int]]] = []

    def mark(self) -> None:
        """Note the present."""
        self.marks.append((time.process_time(), self.counters.read()))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self.mark()
        return self.batch


def run_rank(settings: dict[str, Any]) -> None:
    """Measure one engine config in this process; report its samples."""
    from mrmae_ds.distributed.launch import prepare_environment

    launch = prepare_environment()
    import torch
    import torch.distributed as dist

    from mrmae_ds.config.engine import default_recipe, load_engine_config
    from mrmae_ds.config.recipe import load_recipe
    from mrmae_ds.distributed.process_group import choose_device, start_process_group
    from mrmae_ds.doctor.workload import build_random_task, noise_batches
    from mrmae_ds.training.loop import run_step
    from mrmae_ds.training.meter import Meter
    from mrmae_ds.training.schedule import StageSchedule
    from mrmae_ds.training.step_sync import StepSync
    from mrmae_ds.training.tasks.build import build_task_engine
    from tests.support.fake_gpu.watch import accept_every_step, adapt_torch

    adapt_torch()
    accept_every_step()
    config, device = load_engine_config(Path(settings["engine"])), choose_device(launch)
    recipe = load_recipe(default_recipe(REPOSITORY / "ds_configs" / f"{settings['name']}.json"), [])
    # A store of its own: the other ranks, which would be waited for, do not exist.
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=launch.world_size)
    start_process_group(device)
    with torch.device("meta"):
        task = build_random_task(recipe, config, "pretrain")
    for module in (task.model, *task.teachers.values()):
        module.to_empty(device="cpu")
    accumulation = settings["accumulation"]
    engine = build_task_engine(task, config, accumulation, device)
    schedule = StageSchedule(recipe.stage("pretrain"), 0, 1000, accumulation, config.micro_batch, launch)
    clock = Clock(next(noise_batches(config.micro_batch, task.image_size, device)))
    samples: dict[str, list[Any]] = {"micro_batch": [], "last": []}
    for step in range(SETTLED + settings["steps"]):
        clock.marks.clear()
        run_step(engine, task, clock, schedule, step, Meter(), StepSync())
        clock.mark()
        if step >= SETTLED:
            parts = [_difference(a, b) for a, b in zip(clock.marks, clock.marks[1:], strict=False)]
            samples["micro_batch"] += parts[:-1]
            samples["last"].append(parts[-1])
    report_result({"parameters": sum(getattr(p, "ds_numel", p.numel()) for p in task.model.parameters()), **samples})
    os._exit(0)


def _difference(begin: tuple[float, dict[str, int]], end: tuple[float, dict[str, int]]) -> dict[str, float]:
    return {"ms": 1e3 * (end[0] - begin[0]), **{name: value - begin[1][name] for name, value in end[1].items()}}


def measure(args: argparse.Namespace, name: str, ranks: int, zero: int | None) -> dict[str, Any]:
    """Run one process: ``name`` as written, or with ZeRO stage ``zero`` in place of its own."""
    from tests.support.fake_gpu import preload

    config = json.loads((REPOSITORY / "ds_configs" / f"{name}.json").read_text())
    if zero is not None:
        config["zero_optimization"] = ZERO1
    if args.no_recompute:
        config.pop("activation_checkpointing", None)
    if args.bf16:
        config.pop("torch_autocast", None)
        config |= BF16
    with tempfile.TemporaryDirectory() as folder:
        engine, job = Path(folder) / "engine.json", Path(folder) / "job.json"
        engine.write_text(json.dumps(config))
        settings = {key: getattr(args, key) for key in ("steps", "accumulation")}
        job.write_text(json.dumps({"name": name, "engine": str(engine), **settings}))
        variables = preload.variables(timing=True) | {"WORLD_SIZE": str(ranks), "PYTHONPATH": str(REPOSITORY)}
        variables.pop("DS_ACCELERATOR")
        return dict(run_ranks([__file__, "--rank-of", str(job)], 1, "cuda", args.limit, **variables))


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Return a micro-batch's least milliseconds and median counts, and what the last one of a step has more of them."""
    micro, last = (
        {
            key: (min if key == "ms" else statistics.median)(sample[key] for sample in found[part])
            for key in found[part][0]
        }
        for part in ("micro_batch", "last")
    )
    return {"micro_batch": micro, "once_a_step": {key: last[key] - micro[key] for key in micro}}


def rows_of(args: argparse.Namespace, name: str, ranks: int) -> list[dict[str, Any]]:
    """Measure a config, and ZeRO-1 in its place, in alternation."""
    stage = json.loads((REPOSITORY / "ds_configs" / f"{name}.json").read_text())["zero_optimization"]["stage"]
    variants = {1: 1, 3: None} if stage == 3 else {stage: None}
    rounds: dict[int, list[dict[str, Any]]] = {zero: [] for zero in variants}
    for _ in range(args.rounds):
        for zero, replaced in variants.items():
            found = measure(args, name, ranks, replaced)
            rounds[zero].append(summary(found))
            note = {part: round(values["ms"], 1) for part, values in rounds[zero][-1].items()}
            print(f"{name}, ZeRO-{zero}, {ranks} ranks: {note}", file=sys.stderr, flush=True)
    rows = []
    for zero, results in rounds.items():
        best = min(results, key=lambda result: result["micro_batch"]["ms"])
        row = {"config": name, "zero": zero, "ranks": ranks, "parameters": found["parameters"], **best}
        row["rounds_ms"] = [result["micro_batch"]["ms"] for result in results]
        if rows:
            row["ratio"] = best["micro_batch"]["ms"] / rows[0]["micro_batch"]["ms"]
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Format as Markdown: time and counts per micro-batch, plus what a step adds once."""
    lines = [
        "| config | ZeRO | ranks | ms a micro-batch | ratio | ms once a step | launches | library | copies | waits |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        micro, step = row["micro_batch"], row["once_a_step"]
        copies, waits = (
            [sum(value for key, value in part.items() if word in key) for part in (micro, step)]
            for word in ("copies", "waits")
        )
        pairs = [(micro[key], step[key]) for key in ("launches", "library_calls")] + [copies, waits]
        counts = " | ".join(f"{a:,.0f} + {b:,.0f}" for a, b in pairs)
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
        which = f"{row['config']} | {row['zero']} | {row['ranks']}"
        lines.append(f"| {which} | {micro['ms']:.1f} | {ratio} | {step['ms']:.1f} | {counts} |")
    return "\n".join(lines)


def main() -> None:
    """Measure all configs, print the table, write the JSON."""
    args = parse()
    sys.path.insert(0, str(REPOSITORY))
    if args.rank_of:
        run_rank(json.loads(args.rank_of.read_text()))
    from tests.support.fake_gpu import preload

    if reason := preload.missing_requirement():
        sys.exit(f"the GPU stand-in {reason}")
    try:
        rows = [row for name in args.names for ranks in args.ranks for row in rows_of(args, name, ranks)]
    except RanksError as error:
        sys.exit(str(error))
    print(table(rows))
    if args.out:
        write_result(args.out, 1, "cpu", note="GPU stand-in: host time only, no GPU", rows=rows)


if __name__ == "__main__":
    main()
