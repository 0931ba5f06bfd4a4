"""Measure the host's time of a pre-training step on a GPU, without a GPU: a step can take no less.

    python benchmarks/host_time.py base huge --ranks 1 2 --out FILE.json

Names are those of ds_configs/NAME.json and its recipe. Task and engine are the real ones, on the GPU stand-in of
``tests/support/fake_gpu``: every kernel, copy and collective is issued as on a GPU and costs nothing there. Measured is
the process's CPU time: Python, the dispatcher, autograd, DeepSpeed; a launch on a real GPU adds about 2 us. Weights and
images are whatever memory holds, and no loader runs. Of several ranks, rank 0 alone runs, and its collectives end at
once.

A config with ZeRO-3 is also measured without an engine and with ZeRO-1 in its place, everything else equal, in
alternation, so that load on the machine affects all; ``ratio`` relates ZeRO-3 to ZeRO-1. Times are the least of all
steps and rounds, since load only adds to them. ``first`` is the first micro-batch of a step, in which ZeRO-3 fetches
the parameters, ``another`` one between first and last, and ``once a step`` what the last takes longer: status exchange,
norm, optimizer; under ZeRO-3 the release of the parameters. Counts are another micro-batch's + those once a step.

Without an engine, gradients add up over all micro-batches. ``constants`` are those of the planner in us
(``mrmae_ds/planning/estimates/constants.yaml``), with the number of operators of its own trace.
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
PLAIN = 0
NAMES = {PLAIN: "none", 1: "ZeRO-1", 3: "ZeRO-3"}
PARTS = ("first", "another", "last")  # micro-batches of a step
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
    args = parser.parse_args(argv)
    if args.accumulation < len(PARTS):
        parser.error(f"--accumulation {args.accumulation}: a first, another and a last micro-batch are needed")
    return args


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
    import torch.distributed as dist

    from mrmae_ds.config.engine import default_recipe, load_engine_config
    from mrmae_ds.config.recipe import load_recipe
    from mrmae_ds.distributed.process_group import choose_device, start_process_group
    from mrmae_ds.doctor.workload import noise_batches
    from mrmae_ds.training.loop import run_step
    from mrmae_ds.training.meter import Meter
    from mrmae_ds.training.schedule import StageSchedule
    from mrmae_ds.training.step_sync import StepSync
    from mrmae_ds.training.tasks.build import build_task_engine
    from tests.support.fake_gpu.watch import accept_every_step, adapt_torch, build_empty_task

    adapt_torch()
    accept_every_step()
    config, device = load_engine_config(Path(settings["engine"])), choose_device(launch)
    recipe = load_recipe(default_recipe(REPOSITORY / "ds_configs" / f"{settings['name']}.json"), [])
    # A store of its own: the other ranks, which would be waited for, do not exist.
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=launch.world_size)
    start_process_group(device)
    task = build_empty_task(recipe, config)
    accumulation = settings["accumulation"]
    clock = Clock(next(noise_batches(config.micro_batch, task.image_size, device)))
    schedule = StageSchedule(recipe.stage("pretrain"), 0, 1000, accumulation, config.micro_batch, launch)
    if settings["plain"]:
        task.model.to(device, config.model_dtype)
        task.to(device)
    else:
        engine = build_task_engine(task, config, accumulation, device)

    def run(step: int) -> None:
        if not settings["plain"]:
            run_step(engine, task, clock, schedule, step, Meter(), StepSync())
            return
        for index in range(accumulation):
            batch = next(clock)
            with config.autocast(device):
                loss = task.losses(task.model, batch, schedule.key(step, index))["loss"]
            loss.backward()

    samples: dict[str, list[Any]] = {part: [] for part in PARTS}
    for step in range(SETTLED + settings["steps"]):
        clock.marks.clear()
        run(step)
        clock.mark()
        if step >= SETTLED:
            first, *others, last = [_difference(a, b) for a, b in zip(clock.marks, clock.marks[1:], strict=False)]
            for part, found in zip(PARTS, ([first], others, [last]), strict=True):
                samples[part] += found
    report_result({"tensors": sum(1 for _ in task.model.parameters()), "samples": samples})
    os._exit(0)


def _difference(begin: tuple[float, dict[str, int]], end: tuple[float, dict[str, int]]) -> dict[str, float]:
    return {"ms": 1e3 * (end[0] - begin[0]), **{name: value - begin[1][name] for name, value in end[1].items()}}


def engine_json(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Return the engine config ``name`` with the changes of the command line."""
    config: dict[str, Any] = json.loads((REPOSITORY / "ds_configs" / f"{name}.json").read_text())
    if args.no_recompute:
        config.pop("activation_checkpointing", None)
    if args.bf16:
        from mrmae_ds.doctor.numerics import BF16

        config.pop("torch_autocast", None)
        config |= BF16
    return config


def measure(args: argparse.Namespace, name: str, ranks: int, engine: int) -> dict[str, Any]:
    """Run one process: ``name`` as written, with ZeRO-1 in place of its own stage, or without an engine."""
    from tests.support.fake_gpu import preload

    config = engine_json(args, name)
    if engine != config["zero_optimization"]["stage"]:
        config["zero_optimization"] = ZERO1
    with tempfile.TemporaryDirectory() as folder:
        path, job = Path(folder) / "engine.json", Path(folder) / "job.json"
        path.write_text(json.dumps(config))
        settings = {key: getattr(args, key) for key in ("steps", "accumulation")} | {"plain": engine == PLAIN}
        job.write_text(json.dumps({"name": name, "engine": str(path), **settings}))
        variables = preload.variables(timing=True) | {"WORLD_SIZE": str(ranks), "PYTHONPATH": str(REPOSITORY)}
        variables.pop("DS_ACCELERATOR")
        return dict(run_ranks([__file__, "--rank-of", str(job)], 1, "cuda", args.limit, **variables))


def least(samples: list[dict[str, float]]) -> dict[str, float]:
    """Return the least milliseconds and the median counts of micro-batches."""
    return {key: (min if key == "ms" else statistics.median)(sample[key] for sample in samples) for key in samples[0]}


def rows_of(args: argparse.Namespace, name: str, ranks: int) -> list[dict[str, Any]]:
    """Measure a config, ZeRO-1 in its place and no engine, in alternation."""
    stage = json.loads((REPOSITORY / "ds_configs" / f"{name}.json").read_text())["zero_optimization"]["stage"]
    engines = sorted({PLAIN, 1, stage})
    rounds: dict[int, list[dict[str, Any]]] = {engine: [] for engine in engines}
    for _ in range(args.rounds):
        for engine in engines:
            rounds[engine].append(measure(args, name, ranks, engine))
            note = {part: round(least(found)["ms"], 1) for part, found in rounds[engine][-1]["samples"].items()}
            print(f"{name}, {NAMES[engine]}, {ranks} ranks: {note}", file=sys.stderr, flush=True)
    rows = []
    for engine, results in rounds.items():
        parts = {part: [sample for found in results for sample in found["samples"][part]] for part in PARTS}
        first, another, last = (least(parts[part]) for part in PARTS)
        row = {"config": name, "engine": NAMES[engine], "ranks": ranks, "tensors": results[0]["tensors"]}
        row |= {"first": first, "another": another, "once_a_step": {key: last[key] - another[key] for key in another}}
        rows.append(row | {"rounds_ms": [least(found["samples"]["another"])["ms"] for found in results]})
    return rows


def operators(args: argparse.Namespace, name: str) -> int:
    """Return the planner's number of operators of a micro-batch."""
    from mrmae_ds.config.engine import default_recipe
    from mrmae_ds.config.recipe import load_recipe
    from mrmae_ds.doctor.host import count_operators
    from mrmae_ds.doctor.workload import write_engine_config

    with tempfile.TemporaryDirectory() as folder:
        config = write_engine_config(Path(folder), name, 0, engine_json(args, name))
    return count_operators(load_recipe(default_recipe(REPOSITORY / "ds_configs" / f"{name}.json"), []), config)


def constants(rows: list[dict[str, Any]], count: int) -> dict[str, float]:
    """Return the planner's constants in us, from the rows of one config and number of ranks.

    Args:
        rows: those without an engine, with ZeRO-1 and with ZeRO-3.
        count: operators of a micro-batch.
    """
    plain, one, three = rows
    us = 1e3 / plain["tensors"]
    fetched = three["first"]["ms"] - plain["another"]["ms"] + three["once_a_step"]["ms"] - one["once_a_step"]["ms"]
    return {
        "op": 1e3 * plain["another"]["ms"] / count,
        "zero1_param": us * (one["another"]["ms"] - plain["another"]["ms"]),
        "zero3_first_param": us * fetched,
        "zero3_param": us * (three["another"]["ms"] - plain["another"]["ms"]),
        "update_param": us * one["once_a_step"]["ms"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Format as Markdown: time and counts per micro-batch, plus what a step adds once."""
    lines = [
        "| config | engine | ranks | first, ms | another, ms | ratio | once a step, ms | launches | library | copies "
        "| waits |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        first, micro, step = row["first"], row["another"], row["once_a_step"]
        copies, waits = (
            [sum(value for key, value in part.items() if word in key) for part in (micro, step)]
            for word in ("copies", "waits")
        )
        pairs = [(micro[key], step[key]) for key in ("launches", "library_calls")] + [copies, waits]
        counts = " | ".join(f"{a:,.0f} + {b:,.0f}" for a, b in pairs)
        zero1 = [other for other in rows if _same(other, row) and other["engine"] == NAMES[1]]
        ratio = f"{micro['ms'] / zero1[0]['another']['ms']:.2f}" if row["engine"] == NAMES[3] else ""
        which = f"{row['config']} | {row['engine']} | {row['ranks']}"
        lines.append(f"| {which} | {first['ms']:.1f} | {micro['ms']:.1f} | {ratio} | {step['ms']:.1f} | {counts} |")
    return "\n".join(lines)


def _same(row: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(row[key] == other[key] for key in ("config", "ranks"))


def main() -> None:
    """Measure all configs, print the table, write the JSON."""
    args = parse()
    sys.path.insert(0, str(REPOSITORY))
    if args.rank_of:
        run_rank(json.loads(args.rank_of.read_text()))
    from tests.support.fake_gpu import preload

    if reason := preload.missing_requirement():
        sys.exit(f"the GPU stand-in {reason}")
    rows, per = [], []
    try:
        for name in args.names:
            count = operators(args, name)
            for ranks in args.ranks:
                found = rows_of(args, name, ranks)
                rows += found
                if len(found) == len(NAMES):
                    per.append({"config": name, "ranks": ranks, "operators": count, **constants(found, count)})
    except RanksError as error:
        sys.exit(str(error))
    print(table(rows))
    for each in per:
        print(
            ", ".join(f"{key} {value:.1f}" if isinstance(value, float) else str(value) for key, value in each.items())
        )
    if args.out:
        write_result(args.out, 1, "cpu", note="GPU stand-in: host time only, no GPU", rows=rows, constants=per)


if __name__ == "__main__":
    main()
