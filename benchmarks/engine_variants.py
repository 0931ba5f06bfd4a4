"""Compare time and memory of the engine configs of a size: its own (ZeRO-3), -zero1 and -offload.

    python benchmarks/engine_variants.py small --stage finetune --micro-batch 2

Real optimizer steps on synthetic images (benchmarks/train_step.py). For time and gathered bytes, all engines run in the
same processes in turn, step by step, so that other load on the machine affects all equally; a time is the median, and a
ratio the median over rounds of the ratio to the size's own config. For memory, each config has its own processes: the
peak resident memory of a rank minus its memory before the model was built. On the CPU the device is the host: states
that -offload moves off a GPU stay resident, and moving them is a memory copy instead of a PCIe transfer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from result_file import write_result

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]
GIB = 2**30


def run_rank(folder: Path) -> None:
    """Run one rank: the engines of all configs in FOLDER/job.json, in turn; rank 0 writes result.json."""
    from mrmae_ds.distributed.launch import prepare_environment

    launch = prepare_environment()
    import torch
    import torch.distributed as dist

    from mrmae_ds.distributed.process_group import choose_device, end_process_group, start_process_group
    from mrmae_ds.training.engine.comm_volume import GatherCounter
    from mrmae_ds.training.perf_metrics import peak_memory

    job = json.loads((folder / "job.json").read_text())
    device = choose_device(launch)
    start_process_group(device)
    before, runs = peak_memory(device), {name: _Run(name, job, device, launch) for name in job["names"]}
    counter = GatherCounter()
    counter.install(None)
    times: dict[str, list[float]] = {name: [] for name in runs}
    gathered: dict[str, int] = {}
    for _ in range(job["warmup"] + job["steps"]):
        for name, run in runs.items():
            seen = counter.bytes
            dist.barrier()
            began = time.perf_counter()
            run.step()
            times[name].append(time.perf_counter() - began)
            gathered[name] = counter.bytes - seen
    memory = torch.tensor(peak_memory(device) - before, dtype=torch.float64, device=device)
    dist.all_reduce(memory, dist.ReduceOp.MAX)
    if launch.rank == 0:
        steady = {name: values[job["warmup"] :] for name, values in times.items()}
        result = {"times": steady, "gathered": gathered, "memory": memory.item()}
        (folder / "result.json").write_text(json.dumps(result))
    end_process_group()
    os._exit(0)


class _Run:
    """Engine and task of a config."""

    def __init__(self, name: str, job: dict[str, Any], device: Any, launch: Any) -> None:
        import torch

        from mrmae_ds.config.engine import default_recipe, load_engine_config
        from mrmae_ds.config.recipe import load_recipe
        from mrmae_ds.doctor.workload import build_random_task, noise_batches
        from mrmae_ds.training.schedule import StageSchedule
        from mrmae_ds.training.tasks.build import build_task_engine

        source = REPOSITORY / "ds_configs" / f"{name}.json"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "engine.json"
            content = json.loads(source.read_text()) | {"train_micro_batch_size_per_gpu": job["micro_batch"]}
            path.write_text(json.dumps(content))
            config = load_engine_config(path)
        recipe = load_recipe(default_recipe(source))
        stage = recipe.stage(job["stage"])
        torch.manual_seed(0)
        self.task = build_random_task(recipe, config, job["stage"])
        self.engine = build_task_engine(self.task, config, 1, device)
        self.batches = noise_batches(job["micro_batch"], self.task.image_size, device)
        self.schedule, self.taken = StageSchedule(stage, 0, 1000, 1, job["micro_batch"], launch), 0

    def step(self) -> None:
        """Run an optimizer step and copy its loss to the host."""
        from mrmae_ds.training.loop import run_step
        from mrmae_ds.training.meter import Meter
        from mrmae_ds.training.step_sync import StepSync

        meter = Meter()
        run_step(self.engine, self.task, self.batches, self.schedule, self.taken, meter, StepSync())
        meter.read(self.schedule.launch, self.schedule.micro_batch)
        self.taken += 1


def start(names: list[str], args: argparse.Namespace, warmup: int, steps: int) -> dict[str, Any]:
    """Run these configs in new processes and return the results."""
    from tests.support.processes import finish, rank_processes

    with tempfile.TemporaryDirectory() as folder:
        job = {"names": names, "warmup": warmup, "steps": steps, "stage": args.stage, "micro_batch": args.micro_batch}
        (Path(folder) / "job.json").write_text(json.dumps(job))
        ended = finish(rank_processes(args.processes, args.name, "--rank-of", folder, program=(__file__,)), args.limit)
        if any(process.status for process in ended):
            sys.exit(f"{names}: " + "\n".join(process.stderr[-2000:] for process in ended))
        return json.loads((Path(folder) / "result.json").read_text())


def summary(names: list[str], together: dict[str, Any], memory: dict[str, float]) -> dict[str, dict[str, float]]:
    """Return the numbers of each config, and their ratios to the first one's."""
    times, gathered, first = together["times"], together["gathered"], names[0]
    return {
        name: {
            "step_s": statistics.median(times[name]),
            "step_ratio": statistics.median(a / b for a, b in zip(times[name], times[first], strict=True)),
            "memory_gib": memory[name] / GIB,
            "memory_ratio": memory[name] / memory[first],
            "gathered_gib": gathered[name] / GIB,
            "gathered_ratio": gathered[name] / gathered[first],
        }
        for name in names
    }


def main() -> None:
    """Run the benchmark, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="ds_configs/NAME.json and its existing variants")
    parser.add_argument("--stage", choices=("pretrain", "finetune"), default="pretrain")
    parser.add_argument("--micro-batch", type=int, default=2, help="images per rank and forward pass")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=2, help="untimed rounds")
    parser.add_argument("--steps", type=int, default=9, help="timed rounds")
    parser.add_argument("--limit", type=float, default=1800, help="time limit in seconds of one launch")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        run_rank(args.rank_of)

    variants = [args.name, f"{args.name}-zero1", f"{args.name}-offload"]
    names = [name for name in variants if (REPOSITORY / "ds_configs" / f"{name}.json").is_file()]
    memory = {name: start([name], args, 1, 2)["memory"] for name in names}
    together = start(names, args, args.warmup, args.steps)
    rows = summary(names, together, memory)
    print("| engine config | s per step | ratio | GiB per rank | ratio | GiB gathered per step | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in row.values()) + " |")
    if args.out:
        write_result(args.out, args.processes, "cpu", summary=rows, rounds=together["times"])


if __name__ == "__main__":
    main()
