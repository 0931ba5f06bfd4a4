"""Compare the planner's time of a step with real steps on the CPU, at the models' full sizes.

    python benchmarks/plan_time.py small base large huge --out FILE.json    # Huge needs 18 GiB of free memory

The model of ``mrmae plan`` is that of a GPU: an operator takes the longest of its FLOPs and its bytes at the rates that
the device reaches. Here the device is one core. Its rates are those of ``mrmae doctor``'s check of single operators, at
Base's shapes whatever the size of the model, and are used as ``--measured`` uses them; nothing is fitted to the steps.
They are measured in the process that runs the steps, between them. The host does not run beside the device, so the
times of host, device and update add up.

Tasks, teachers (random weights) and engine (ZeRO-0, float32) are the real ones; images are noise. All times are CPU
times of one thread, because other load on the machine would stop the clock's; what it takes from caches and memory
remains, and affects rates and steps alike. Exits with status 1 if a ratio is off by more than 15 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plan_memory import check_room
from ranks import report_result, run_ranks
from result_file import write_result

REPOSITORY = Path(__file__).resolve().parents[1]
TOLERANCE = 0.15
MICRO_BATCH = {"small": 8, "base": 8, "large": 8, "huge": 4}
OVERRIDES = ["teachers.clip.precision=fp32"]  # half precision has other kernels on the CPU
IMAGES = 8  # of the measured operators
# Freed memory stays with the process, as with a GPU's caching allocator, so that no page is allocated twice.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_ARENA_MAX": "1"}
WARMUP = 2  # until then, the process still grows: a page that is touched first takes longer than what is written to it


def cpu_time(run: Callable[[], Any], seconds: float = 0.2) -> float:
    """Return the CPU seconds of a call: the median of those within ``seconds``, and at least three."""
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    return statistics.median(times)


def measure_node() -> dict[str, Any]:
    """Measure the planner's constants on one core, as ``mrmae doctor`` does on a node; none depends on the size."""
    import torch
    import torch.nn.functional as F

    from mrmae_ds.doctor.operators import operator_readings
    from mrmae_ds.doctor.reading import collect_constants

    readings = operator_readings(torch.device("cpu"), IMAGES, cpu_time)
    found = collect_constants((reading.constant, reading.value) for reading in readings)
    heads = [torch.randn(IMAGES, 12, 197, 64, requires_grad=True) for _ in range(3)]
    attention_s = cpu_time(lambda: F.scaled_dot_product_attention(*heads).sum().backward())
    moved, convolved = (found["operator_gb_s"][name] for name in ("add", "convolution"))
    return found | {
        "matmul_tflops": found["fp32_tflops"],
        "attention_tflops": 7 * 2 * IMAGES * 12 * 197**2 * 64 / attention_s / 1e12,
        "memory_gb_s": moved,
        "depthwise_gb_s": convolved,
        "op_us": 1e6 * operator_s(),
        "update_param_us": 0.0,  # a core updates and issues at once: in adamw
    }


def operator_s() -> float:
    """Return the seconds to issue an operator: forward and backward of a model with next to no arithmetic."""
    import torch

    from mrmae_ds.models.cvit import CViT
    from mrmae_ds.models.sizes import CViTSpec
    from mrmae_ds.planning.activation_trace import TensorRecorder
    from mrmae_ds.planning.operator_trace import VIEW

    model, image = CViT(CViTSpec((8, 8, 16), (2, 2, 8), 2, patches=(4, 2, 2)), 16, 10), torch.randn(1, 3, 16, 16)

    def run() -> None:
        model(image).sum().backward()

    with TensorRecorder([model]) as recorder:
        run()
    return cpu_time(run) / sum(cost.kind != VIEW for cost in recorder.costs)


def run_rank(job: dict[str, Any]) -> None:
    """Alternate measurements of the constants with real steps; report all of them."""
    from mrmae_ds.distributed.launch import prepare_environment

    launch = prepare_environment()
    import torch

    from mrmae_ds.config.engine import load_engine_config
    from mrmae_ds.config.recipe import load_recipe
    from mrmae_ds.distributed.process_group import choose_device, start_process_group
    from mrmae_ds.doctor.workload import build_random_task, noise_batches
    from mrmae_ds.training.loop import run_step
    from mrmae_ds.training.meter import Meter
    from mrmae_ds.training.schedule import StageSchedule
    from mrmae_ds.training.step_sync import StepSync
    from mrmae_ds.training.tasks.build import build_task_engine

    torch.set_num_threads(1)
    config, device = load_engine_config(Path(job["engine"])), choose_device(launch)
    recipe = load_recipe(REPOSITORY / "ds_configs" / f"{job['name']}.yaml", OVERRIDES)
    start_process_group(device)
    task = build_random_task(recipe, config, "pretrain")
    engine = build_task_engine(task, config, 1, device)
    batches = noise_batches(config.micro_batch, task.image_size, device)
    schedule = StageSchedule(recipe.stage("pretrain"), 0, 1000, 1, config.micro_batch, launch)
    steps, rates = [], []
    for step in range(WARMUP + job["steps"]):
        began = time.process_time()
        run_step(engine, task, batches, schedule, step, Meter(), StepSync())
        steps.append(time.process_time() - began)
        if step >= WARMUP - 1:
            rates.append(measure_node())
    report_result({"steps_s": steps[WARMUP:], "measured": rates})


def predict(name: str, engine: Path, node: dict[str, Any]) -> dict[str, float]:
    """Return the planner's seconds of a step: device, host and update."""
    from mrmae_ds.config.engine import load_engine_config
    from mrmae_ds.config.recipe import load_recipe
    from mrmae_ds.imagenet import IMAGENET_CLASSES
    from mrmae_ds.planning.estimates.cluster import Cluster
    from mrmae_ds.planning.estimates.step import estimate_step
    from mrmae_ds.planning.fake_step import build_meta_task
    from mrmae_ds.planning.stage import count_stage
    from mrmae_ds.profiling.flops import recipe_cost
    from mrmae_ds.profiling.gpus import Gpu
    from mrmae_ds.profiling.measured_node import MeasuredNode

    config = load_engine_config(engine)
    recipe = load_recipe(REPOSITORY / "ds_configs" / f"{name}.yaml", OVERRIDES)
    (cost,) = recipe_cost(recipe, config.checkpointing, IMAGENET_CLASSES, only="pretrain")
    stage = count_stage(build_meta_task(recipe, "pretrain", config, IMAGENET_CLASSES), config, cost, on_cpu=True)
    cluster = Cluster(Gpu("one core", (), 20.0, None, 1.0, 1.0), 1, 1, 1.0, measured=MeasuredNode(**node))
    compute = estimate_step(stage, config.zero, cluster, config.micro_batch).compute
    assert compute is not None
    return {"device": compute.gpu_s, "host": compute.first_host_s, "update": compute.update_s}


def middle(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of each constant over the rounds."""
    return {
        key: middle([each[key] for each in rounds])
        if isinstance(value, dict)
        else statistics.median(each[key] for each in rounds)
        for key, value in rounds[0].items()
    }


def compare(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure and predict the steps of one size."""
    micro_batch = MICRO_BATCH[name]
    with tempfile.TemporaryDirectory() as folder:
        engine, job = Path(folder) / "engine.json", Path(folder) / "job.json"
        content = {"gradient_clipping": 0.0, "zero_optimization": {"stage": 0}}
        engine.write_text(json.dumps({"train_micro_batch_size_per_gpu": micro_batch, **content}))
        job.write_text(json.dumps({"name": name, "engine": str(engine), "steps": args.steps}))
        check_room({"large": 8, "huge": 15}.get(name, 4) * 2**30)
        found = run_ranks([__file__, "--rank-of", str(job)], 1, "cpu", args.limit, OMP_NUM_THREADS="1", **KEEP_MEMORY)
        node = middle(found["measured"])
        predicted = predict(name, engine, node)
    measured = statistics.median(found["steps_s"])
    return {
        "name": name,
        "micro_batch": micro_batch,
        "measured_s": measured,
        "predicted_s": sum(predicted.values()),
        "ratio": sum(predicted.values()) / measured,
        "parts_s": predicted,
        "measured": node,
        "rounds": found,
    }


def main() -> None:
    """Compare the sizes in turn, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["small", "base", "large"], help=", ".join(MICRO_BATCH))
    parser.add_argument("--steps", type=int, default=3, help="steps after the first")
    parser.add_argument("--limit", type=float, default=1800, help="time limit in seconds of one size")
    parser.add_argument("--out", type=Path, help="JSON file; its rows of other sizes are kept")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(REPOSITORY))
    if args.rank_of:
        run_rank(json.loads(args.rank_of.read_text()))
        return
    rows = []
    for name in args.names:
        rows.append(compare(name, args))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print("| size | micro-batch | predicted, s | measured, s | ratio |\n|---|---|---|---|---|")
    for row in rows:
        numbers = f"{row['predicted_s']:.2f} | {row['measured_s']:.2f} | {row['ratio']:.2f}"
        print(f"| {row['name']} | {row['micro_batch']} | {numbers} |")
    if args.out:
        there = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
        write_result(args.out, 1, "cpu", rows=[*(row for row in there if row["name"] not in args.names), *rows])
    if any(abs(row["ratio"] - 1) > TOLERANCE for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
