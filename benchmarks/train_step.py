"""Measure time and memory of real optimizer steps of full-size models on synthetic images.

    python benchmarks/train_step.py huge448 --stage finetune --processes 2 --micro-batch 1 --lean     # on a CPU
    python benchmarks/train_step.py small base large huge --micro-batch 16 32 64 128 --out FILE.json  # on GPUs

Names are those of ds_configs/NAME.json, including variants (small-zero1), and its recipe: model, teachers, objectives,
optimizer and engine are the real ones, built as in training. Teachers have random weights, which changes neither time
nor memory, and the images are noise generated once, so that no loader is measured. Every combination of name and
micro-batch runs in new processes, one per device (--processes on the CPU). A step is one micro-batch; fine-tuning with
an odd one disables mixup and cutmix, which pair images.

``tflops`` counts forward, backward and teachers, but not the recomputation of activation checkpointing; ``mfu`` is its
share of the device's peak, omitted for devices whose peak is unknown. Memory on the CPU is the resident memory of the
process, including Python and libraries; ``before`` is that before the model was built.
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

from ranks import RanksError, machine, report_result, run_ranks
from result_file import write_result

REPOSITORY = Path(__file__).resolve().parents[1]
GIB = 2**30
# For a machine with little memory: parameters are released after each block, and buffers and sub-groups are small.
LEAN = {
    "stage3_max_live_parameters": 30_000_000,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "reduce_bucket_size": 20_000_000,
    "sub_group_size": 50_000_000,
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="ds_configs/NAME.json and its recipe")
    parser.add_argument("--stage", choices=("pretrain", "finetune"), default="pretrain")
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[1], help="images per rank and forward pass")
    parser.add_argument("--processes", type=int, help="number of ranks; default: one per GPU, or 2 on the CPU")
    parser.add_argument("--warmup", type=int, default=1, help="untimed steps")
    parser.add_argument("--steps", type=int, default=2, help="timed steps; the median is reported")
    parser.add_argument("--lean", action="store_true", help=f"ZeRO-3 settings for little memory: {LEAN}")
    parser.add_argument("--limit", type=float, default=1800, help="time limit in seconds of one combination")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def run_rank(settings: dict[str, Any]) -> None:
    """Run one rank of one combination; rank 0 reports the result."""
    from mrmae_ds.distributed.launch import prepare_environment

    launch = prepare_environment()
    import torch

    from mrmae_ds.config.engine import default_recipe, load_engine_config
    from mrmae_ds.config.recipe import load_recipe
    from mrmae_ds.distributed.process_group import choose_device, end_process_group, start_process_group
    from mrmae_ds.doctor.workload import build_random_task, noise_batches
    from mrmae_ds.profiling.flops import recipe_cost
    from mrmae_ds.training.loop import run_step
    from mrmae_ds.training.meter import Meter
    from mrmae_ds.training.perf_metrics import PerfMeter, device_peak, peak_memory, utilization
    from mrmae_ds.training.schedule import StageSchedule
    from mrmae_ds.training.step_sync import StepSync
    from mrmae_ds.training.tasks.build import build_task_engine

    config = load_engine_config(Path(settings["engine"]))
    unpaired = ["stages.finetune.mixup=0", "stages.finetune.cutmix=0"] if config.micro_batch % 2 else []
    recipe = load_recipe(default_recipe(REPOSITORY / "ds_configs" / f"{settings['name']}.json"), unpaired)
    stage, device = recipe.stage(settings["stage"]), choose_device(launch)
    start_process_group(device)
    before = peak_memory(device)
    torch.manual_seed(0)
    task = build_random_task(recipe, config, settings["stage"])
    parameters = sum(p.numel() for p in task.model.parameters())
    engine = build_task_engine(task, config, 1, device)
    accountant = PerfMeter(engine, device)
    batches = noise_batches(config.micro_batch, task.image_size, device)
    schedule = StageSchedule(stage, 0, 1000, 1, config.micro_batch, launch)
    times = []
    for step in range(settings["warmup"] + settings["steps"]):
        if step == settings["warmup"]:
            accountant.restart()  # at first DeepSpeed learns the order of the modules, and gathers more
        meter, began = Meter(), time.perf_counter()
        run_step(engine, task, batches, schedule, step, meter, StepSync())
        losses, _, bad = meter.read(launch, config.micro_batch)  # waits for the device
        times.append(time.perf_counter() - began)
        if bad:
            raise RuntimeError(f"step {step}: the loss is not finite")
    seconds = statistics.median(times[settings["warmup"] :])
    noted = accountant.interval(settings["steps"])
    if launch.rank == 0:
        (cost,) = recipe_cost(recipe, config.checkpointing, only=settings["stage"])
        model_operations = sum(part.forward + part.backward for part in cost.parts.values())
        speed = config.micro_batch * launch.world_size / seconds
        result = {
            "parameters": parameters,
            "loss": losses["loss"],
            "first_step_s": times[0],
            "step_s": seconds,
            "images_per_s": speed,
            **utilization(speed, model_operations, launch.world_size, device_peak(device)),
            **noted,
            "before_gib": before / GIB if device.type == "cpu" else 0.0,
        }
        report_result(result)
    end_process_group()
    os._exit(0)


def run_combination(args: argparse.Namespace, name: str, micro_batch: int, processes: int) -> dict[str, Any]:
    """Run the ranks of one combination; on failure, return the last line of the error."""
    config = json.loads((REPOSITORY / "ds_configs" / f"{name}.json").read_text())
    config["train_micro_batch_size_per_gpu"] = micro_batch
    if args.lean:
        config["zero_optimization"] |= LEAN
    with tempfile.TemporaryDirectory() as folder:
        engine, job = Path(folder) / "engine.json", Path(folder) / "job.json"
        engine.write_text(json.dumps(config))
        settings = {key: getattr(args, key) for key in ("stage", "warmup", "steps")}
        job.write_text(json.dumps({"name": name, "engine": str(engine), **settings}))
        command = [__file__, name, "--rank-of", str(job)]
        try:
            return dict(run_ranks(command, processes, args.accelerator, args.limit))
        except RanksError as error:
            return {"failed": str(error).splitlines()[-1][-300:]}


def table(rows: list[dict[str, Any]]) -> str:
    """Format as Markdown; a cell that was not measured stays blank."""
    columns = {
        "config": "{}",
        "micro_batch": "{}",
        "step_s": "{:.2f}",
        "images_per_s": "{:,.2f}",
        "tflops": "{:.2f}",
        "mfu": "{:.1%}",
        "peak_memory_gib": "{:.2f}",
        "before_gib": "{:.2f}",
        "gather_gib": "{:.2f}",
        "failed": "{}",
    }
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [form.format(row[key]) if key in row else "" for key, form in columns.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run all combinations in turn, print the table, write the JSON."""
    args = parse()
    if args.rank_of:
        run_rank(json.loads(args.rank_of.read_text()))
    sys.path.insert(0, str(REPOSITORY))
    args.accelerator, processes = machine(args.processes)
    rows = []
    for name in args.names:
        for micro_batch in args.micro_batch:
            result = run_combination(args, name, micro_batch, processes)
            rows.append({"config": name, "stage": args.stage, "micro_batch": micro_batch, **result})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(table(rows))
    if args.out:
        write_result(args.out, processes, args.accelerator, lean=args.lean, rows=rows)
    if any("failed" in row for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
