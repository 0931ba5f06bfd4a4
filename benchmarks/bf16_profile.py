"""Compare the losses of pre-training in the engine config's precisions: float32, torch_autocast, and bf16.

    python data/folder.py TREE --out FOLDER --max-side 64 --num-train-images 3200 --num-val-images 100
    python benchmarks/bf16_profile.py FOLDER --seeds 0 1 2 3 --out FILE.json

MR-MAE of CViT-Tiny (ds_configs/tiny.yaml, three epochs) on real images under ZeRO-1, on the CPU, with a frozen teacher
of random weights. ``bf16`` keeps parameters in bfloat16, casts nothing per block, and accumulates gradients in float32.
Equal seeds have equal weights, batches and masks in all precisions, so that runs differ by rounding alone; unequal
seeds are the noise. The final loss is the mean over the last fifty steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from result_file import write_result

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "torch_autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    "bf16": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
}
EPOCHS, LAST, INTERVAL = 3, 50, 10


def write_teacher(folder: Path) -> None:
    """Write a plain ViT of random weights as a run's model file."""
    import torch

    from mrmae_ds.config.recipe import load_recipe
    from mrmae_ds.factory import build_pretraining
    from mrmae_ds.weights.model_file import encoder_metadata, save_weights
    from mrmae_ds.weights.paths import MODEL_FILE

    recipe = load_recipe(REPOSITORY / "ds_configs/baselines/mae_tiny.yaml")
    assert recipe.stages.pretrain is not None
    torch.manual_seed(11)
    model, _ = build_pretraining(recipe, recipe.stages.pretrain)
    folder.mkdir()
    metadata = {"kind": "pretrain", **encoder_metadata(model.encoder), "mean": [0.5] * 3, "std": [0.5] * 3}
    save_weights(folder / MODEL_FILE, model.state_dict(), metadata)


def train(args: argparse.Namespace, folder: Path, launch: Any, precision: str, seed: int) -> list[float]:
    """Train from scratch; return the loss of each step."""
    import torch

    from mrmae_ds.training.job import TrainArgs, prepare_stage
    from mrmae_ds.training.loop import run_step
    from mrmae_ds.training.meter import Meter
    from mrmae_ds.training.step_sync import StepSync
    from mrmae_ds.training.tasks.build import build_task_engine

    engine_file = folder / f"{precision}.json"
    shared = {"train_micro_batch_size_per_gpu": 16, "gradient_clipping": 0.0, "zero_optimization": {"stage": 1}}
    engine_file.write_text(json.dumps(shared | PRECISIONS[precision]))
    overrides = (
        f"seed={seed}",
        f"data.train={args.data / 'train.beton'}",
        f"data.val={args.data / 'val.beton'}",
        f"teachers.mae.source={folder / 'teacher'}",
        f"stages.pretrain.epochs={EPOCHS}",
        "loader.num_workers=1",
    )
    recipe = REPOSITORY / "ds_configs/tiny.yaml"
    job = prepare_stage(
        TrainArgs(engine_file, "pretrain", recipe, folder / "run", overrides=overrides, dry_run=True), launch
    )
    engine = build_task_engine(job.task, job.engine_config, job.schedule.accumulation, torch.device("cpu"))
    loader, losses = job.train_loader(torch.device("cpu")), []
    batches = itertools.chain.from_iterable(loader.epoch(epoch) for epoch in range(job.schedule.epochs))
    for step in range(min(args.steps, job.schedule.total_steps)):
        meter = Meter()
        status = run_step(engine, job.task, batches, job.schedule, step, meter, StepSync())
        assert status.finite
        losses.append(meter.read(launch, job.schedule.micro_batch)[0]["loss"])
    loader.close()
    job.task.release()
    engine.destroy()
    return losses


def summary(losses: dict[str, dict[int, list[float]]]) -> list[dict[str, Any]]:
    """Return, by precision, the final losses, their spread over seeds, and their difference from autocast's."""
    final = {name: [statistics.mean(run[-LAST:]) for run in runs.values()] for name, runs in losses.items()}
    rows = []
    for name, values in final.items():
        apart = [a - b for a, b in zip(values, final["torch_autocast"], strict=True)]
        steps = zip(losses[name].values(), losses["torch_autocast"].values(), strict=True)
        largest = max(abs(a - b) / b for run, other in steps for a, b in zip(run, other, strict=True))
        rows.append(
            {
                "precision": name,
                "final": statistics.mean(values),
                "seeds_std": statistics.stdev(values),
                "difference": statistics.mean(apart),
                "largest_difference": max(map(abs, apart)),
                "largest_of_a_step": largest,
            }
        )
    return rows


def means(losses: dict[str, dict[int, list[float]]]) -> dict[str, dict[int, list[float]]]:
    """Return the mean losses of every ten steps."""
    return {
        name: {
            seed: [round(statistics.mean(run[i : i + INTERVAL]), 5) for i in range(0, len(run), INTERVAL)]
            for seed, run in runs.items()
        }
        for name, runs in losses.items()
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Format as Markdown."""
    lines = [
        "| precision | final loss | std over seeds | mean difference from autocast | largest | of a step, relative |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (
            f"{row['final']:.5f} | {row['seeds_std']:.5f} | {row['difference']:+.5f} | {row['largest_difference']:.5f}"
        )
        lines.append(f"| {row['precision']} | {cells} | {row['largest_of_a_step']:.1e} |")
    return "\n".join(lines)


def main() -> None:
    """Train every seed in every precision, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train.beton and val.beton, of 3,200 images for 300 steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    from mrmae_ds.distributed.launch import prepare_environment
    from mrmae_ds.distributed.process_group import choose_device, end_process_group, start_process_group

    launch = prepare_environment()
    start_process_group(choose_device(launch))
    losses: dict[str, dict[int, list[float]]] = {name: {} for name in PRECISIONS}
    with tempfile.TemporaryDirectory() as temporary:
        write_teacher(Path(temporary) / "teacher")
        for seed in args.seeds:
            for name, runs in losses.items():
                runs[seed] = train(args, Path(temporary), launch, name, seed)
                print(f"seed {seed}, {name}: {statistics.mean(runs[seed][-LAST:]):.5f}", file=sys.stderr, flush=True)
            if args.out and len(losses["bf16"]) > 1:  # at every seed: the runs take long
                write_result(args.out, 1, "cpu", rows=summary(losses), means_of_ten_steps=means(losses))
    print(table(summary(losses)), flush=True)
    end_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()
