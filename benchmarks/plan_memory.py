"""Compare the planner's memory with the measured peak of real optimizer steps.

    python benchmarks/plan_memory.py                                     # small to large, on the CPU
    python benchmarks/plan_memory.py huge-pretrain --out FILE.json       # 18 GiB of free memory
    python benchmarks/plan_memory.py --gpu small-pretrain base-pretrain  # on GPUs

Each configuration runs in fresh processes: model, teachers (with random weights), objectives, optimizer and engine are
the real ones at their real sizes; the images are noise. On the CPU everything is float32, because half precision uses
other kernels there.

On the CPU, the measurement is the peak resident memory of the process (VmHWM, reset before each phase of a step), which
includes tensors, temporaries of kernels, and Python. The resident memory after imports and three steps of a toy engine
is subtracted, so that libraries, compiled kernels and DeepSpeed itself are not counted. Blocks of 64 KiB and more are
allocated by mmap (MALLOC_MMAP_THRESHOLD_), so that freed memory leaves the resident set. On a GPU the measurement is
``torch.cuda.max_memory_allocated``. The prediction is that of ``mrmae plan`` without its allowances for context and
fragmentation. Exits with status 1 if a ratio is off by more than 10 %.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ranks import report_result, run_ranks
from result_file import write_result

REPOSITORY = Path(__file__).resolve().parents[1]
MIB, GIB = 2**20, 2**30
STEPS = 3  # DeepSpeed prefetches from the third step on
TOLERANCE = 0.10


@dataclass(frozen=True)
class Configuration:
    """A comparison: ds_configs/CONFIG.json with some values replaced, and the recipe of SIZE.

    ``changes`` are merged into the JSON's sections; ``overrides`` are the recipe's.
    """

    config: str
    size: str
    stage: str
    micro_batch: int
    ranks: int = 1
    accumulation: int = 1
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()


CONV = {"activation_checkpointing": {"conv_stages": "all"}}
# Small sub-groups per update, so that 16 GiB are enough.
LARGE = {
    "activation_checkpointing": {"conv_stages": "all", "transformer": "all"},
    "zero_optimization": {"sub_group_size": 50_000_000},
}
MIDDLE = ("stages.detect.image_size=512",)
DETECTOR = (*MIDDLE, "model.arch=cvit_small")
OBJECTS = 64  # of an image: enough for as many drawn boxes with an object as there may be
# With and without checkpointing and partitioning, one rank and two, fine-tuning and pre-training.
CONFIGURATIONS = {
    "small-pretrain": Configuration("small", "small", "pretrain", 8, ranks=2, changes=CONV),
    "base-pretrain": Configuration("base", "base", "pretrain", 8, changes=CONV),
    "base-finetune": Configuration(
        "base-zero1", "base", "finetune", 4, accumulation=2, changes={"zero_optimization": {"overlap_comm": False}}
    ),
    "large-pretrain": Configuration("large", "large", "pretrain", 4, changes=LARGE),
    "huge-pretrain": Configuration("huge", "huge", "pretrain", 2, changes=LARGE),
    "small-detect": Configuration("detection/mr_mae_base", "detection/mr_mae_base", "detect", 2, overrides=DETECTOR),
    "base-detect": Configuration("detection/mr_mae_base", "detection/mr_mae_base", "detect", 1, overrides=MIDDLE),
}
DEFAULT = [name for name in CONFIGURATIONS if not name.startswith("huge")]
CLASSES = {"detect": 80}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{', '.join(CONFIGURATIONS)}; default: all except huge"
    )
    parser.add_argument("--gpu", action="store_true", help="on GPUs, with the engine config's precision")
    parser.add_argument("--limit", type=float, default=1800, help="time limit in seconds of one configuration")
    parser.add_argument("--out", type=Path, help="JSON file; its rows of other configurations are kept")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.names = args.names or DEFAULT
    if unknown := [name for name in args.names if name not in CONFIGURATIONS]:
        parser.error(f"no configuration {', '.join(unknown)}; there are {', '.join(CONFIGURATIONS)}")
    return args


class Memory:
    """Memory of this process, resident or allocated on its GPU; ``peak`` since the last ``reset``."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.baseline = 0

    def reset(self) -> None:
        """Reset the peak."""
        if self.device.type == "cpu":
            Path("/proc/self/clear_refs").write_text("5")
        else:
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """Return the bytes above the baseline."""
        if self.device.type == "cpu":
            return self._status("VmHWM") - self.baseline
        import torch

        return torch.cuda.max_memory_allocated(self.device)

    def start(self) -> None:
        """Set the baseline to the current memory."""
        gc.collect()
        if self.device.type == "cpu":
            self.baseline = self._status("VmRSS")

    def _status(self, key: str) -> int:
        found = re.search(rf"^{key}:\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)
        assert found is not None
        return int(found[1]) * 1024


def steps(task: Any, engine: Any, batches: Any, settings: Configuration, rank: int, memory: Memory) -> dict[str, int]:
    """Run steps and return the peak of each phase, in bytes."""
    from mrmae_ds.training.engine.build import set_lr
    from mrmae_ds.training.tasks.base import MicroBatchKey

    most: dict[str, int] = {}

    def note(part: str) -> None:
        most[part] = max(most.get(part, 0), memory.peak())
        memory.reset()

    memory.reset()
    for step in range(STEPS):
        set_lr(engine, 1e-4)
        for micro in range(settings.accumulation):
            key = MicroBatchKey(0, step, micro, rank, settings.ranks, settings.micro_batch)
            losses = task.losses(engine, next(batches), key)
            note("forward")
            engine.backward(losses["loss"])
            note("backward")
            engine.step()
            note("update")
    return most


def batches_of(stage: str, count: int, size: int, device: Any) -> Any:
    """Yield the same synthetic batch forever: noise, in detection with rectangles as objects."""
    import torch

    from mrmae_ds.detection.loader import DetectionBatch
    from mrmae_ds.doctor.workload import noise_batches

    batches = noise_batches(count, size, device)
    if stage != "detect":
        yield from batches
    noise = next(batches)
    corners = torch.randint(0, size // 2, (count, OBJECTS, 2), device=device)
    boxes = torch.cat([corners, corners + torch.randint(16, size // 2, corners.shape, device=device)], dim=2).float()
    masks = torch.ones(OBJECTS, size, size, dtype=torch.uint8, device=device)
    labels = torch.arange(OBJECTS, device=device) + 1
    targets = tuple({"boxes": of_image, "labels": labels, "masks": masks} for of_image in boxes)
    while True:
        yield DetectionBatch(noise.images, ((size, size),) * count, (), noise.indices, (True,) * count, targets)


def toy(config: Any, device: Any) -> None:
    """Run three steps of a small model in the same kind of engine, so that all code of a step is loaded."""
    import torch

    from mrmae_ds.models.cvit import CViT
    from mrmae_ds.models.encoders import init_classifier
    from mrmae_ds.models.sizes import CViTSpec
    from mrmae_ds.training.engine.build import build_engine
    from mrmae_ds.training.param_groups import adamw, finetune_groups

    model = CViT(CViTSpec((16, 16, 32), (1, 1, 1), 2, patches=(4, 2, 2)), 32, 10)
    init_classifier(model)
    engine = build_engine(model, finetune_groups(model, 0.05, 0.9), adamw((0.9, 0.95)), config, 1, device)
    for _ in range(3):
        engine.backward(engine(torch.randn(2, 3, 32, 32, device=device)).float().sum())
        engine.step()
    engine.destroy()


def run_rank(job: dict[str, Any]) -> None:
    """Run one rank; rank 0 reports the result."""
    from mrmae_ds.distributed.launch import prepare_environment

    launch = prepare_environment()
    import torch

    from mrmae_ds.config.engine import load_engine_config
    from mrmae_ds.config.recipe import load_recipe
    from mrmae_ds.distributed.process_group import choose_device, end_process_group, start_process_group
    from mrmae_ds.doctor.workload import build_random_task
    from mrmae_ds.imagenet import IMAGENET_CLASSES
    from mrmae_ds.training.tasks.build import build_task_engine

    settings = Configuration(**job["settings"])
    config = load_engine_config(Path(job["engine"]))
    recipe = load_recipe(REPOSITORY / "ds_configs" / f"{settings.size}.yaml", list(settings.overrides))
    device = choose_device(launch)
    start_process_group(device)
    toy(config, device)
    memory = Memory(device)
    memory.start()
    torch.manual_seed(0)
    task = build_random_task(recipe, config, settings.stage, CLASSES.get(settings.stage, IMAGENET_CLASSES))
    engine = build_task_engine(task, config, settings.accumulation, device)
    batches = batches_of(settings.stage, settings.micro_batch, task.image_size, device)
    most = steps(task, engine, batches, settings, launch.rank, memory)
    if launch.rank == 0:
        report_result(most)
    end_process_group()
    os._exit(0)


def engine_json(settings: Configuration, on_cpu: bool) -> dict[str, Any]:
    """Return the engine config of a comparison."""
    config = json.loads((REPOSITORY / "ds_configs" / f"{settings.config}.json").read_text())
    config["train_micro_batch_size_per_gpu"] = settings.micro_batch
    for section, values in settings.changes.items():
        config[section] = config.get(section, {}) | values
    if on_cpu:
        config.pop("torch_autocast", None)
    return config


def predict(settings: Configuration, engine_file: Path, on_cpu: bool) -> dict[str, float]:
    """Return the planner's peak bytes of the phases that are measured."""
    from mrmae_ds.config.engine import load_engine_config
    from mrmae_ds.config.recipe import load_recipe
    from mrmae_ds.imagenet import IMAGENET_CLASSES
    from mrmae_ds.planning.cost_report import stage_costs
    from mrmae_ds.planning.fake_step import build_meta_task
    from mrmae_ds.planning.peak_memory import phase_peaks
    from mrmae_ds.planning.stage import count_stage
    from mrmae_ds.planning.zero_memory import ZeroMemory

    config = load_engine_config(engine_file)
    recipe = load_recipe(REPOSITORY / "ds_configs" / f"{settings.size}.yaml", list(settings.overrides))
    (cost,) = (cost for cost in stage_costs(recipe, config.checkpointing) if cost.stage == settings.stage)
    task = build_meta_task(recipe, cost.stage, config, CLASSES.get(settings.stage, IMAGENET_CLASSES))
    stage = count_stage(task, config, cost, on_cpu=on_cpu)
    engine = ZeroMemory(stage.count_parameters(config.zero), config.zero, settings.ranks, settings.accumulation, on_cpu)
    teachers = {n: weights.placed(task.placements[n], settings.ranks) for n, weights in stage.teachers.items()}
    peaks: dict[str, float] = {}
    for phase in phase_peaks(engine, stage.timeline, teachers, settings.micro_batch):
        # Measurements include teacher calls in forward, and the gradient reduction in backward.
        name = {"gradient reduction": "backward"}.get(phase.name, phase.name)
        name = "forward" if name.startswith("teacher ") else name
        peaks[name] = max(peaks.get(name, 0.0), phase.total)
    return peaks


def measure(settings: Configuration, engine_file: Path, folder: Path, on_cpu: bool, limit: float) -> dict[str, int]:
    """Run the ranks of a configuration and return rank 0's measurement.

    Raises:
        RanksError: with the end of rank 0's output, if it ended without a result or took too long.
    """
    job = folder / "job.json"
    job.write_text(json.dumps({"settings": asdict(settings), "engine": str(engine_file)}))
    blocks = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    accelerator, command = "cpu" if on_cpu else "cuda", [__file__, "--rank-of", str(job)]
    result: dict[str, int] = run_ranks(command, settings.ranks, accelerator, limit, **blocks)
    return result


def check_room(size: float) -> None:
    """Raise RuntimeError unless enough memory is free: otherwise the kernel would kill a process."""
    import psutil

    available = psutil.virtual_memory().available
    if available < 1.15 * size + GIB:
        raise RuntimeError(f"needs about {(1.15 * size + GIB) / GIB:.0f} GiB, {available / GIB:.0f} are free")


def compare(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure and predict one configuration: MiB of each phase of a step, and the ratio of the peaks."""
    settings, on_cpu = CONFIGURATIONS[name], not args.gpu
    with tempfile.TemporaryDirectory() as folder:
        engine_file = Path(folder) / "engine.json"
        engine_file.write_text(json.dumps(engine_json(settings, on_cpu)))
        predicted = predict(settings, engine_file, on_cpu)
        if on_cpu:
            check_room(settings.ranks * max(predicted.values()))
        measured = measure(settings, engine_file, Path(folder), on_cpu, args.limit)
    return {
        "name": name,
        "device": "cpu" if on_cpu else "cuda",
        **asdict(settings),
        "measured_mib": {part: round(size / MIB, 1) for part, size in measured.items()},
        "predicted_mib": {part: round(predicted[part] / MIB, 1) for part in measured},
        "ratio": round(max(predicted.values()) / max(measured.values()), 3),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Format as Markdown: predicted / measured MiB of each phase, and the ratio of the peaks."""
    parts = ("forward", "backward", "update")
    lines = [
        "| configuration | processes x micro-batch | " + " | ".join(f"{part}, MiB" for part in parts) + " | ratio |",
        "|---" * (len(parts) + 3) + "|",
    ]
    for row in rows:
        cells = [f"{row['predicted_mib'][part]:,.0f} / {row['measured_mib'][part]:,.0f}" for part in parts]
        lines.append(
            f"| {row['name']} | {row['ranks']} x {row['micro_batch']} | {' | '.join(cells)} | {row['ratio']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Compare the configurations in turn, print the table, write the JSON."""
    args = parse()
    sys.path.insert(0, str(REPOSITORY))
    if args.rank_of:
        run_rank(json.loads(args.rank_of.read_text()))

    rows = []
    for name in args.names:
        rows.append(compare(name, args))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print("predicted / measured; the ratio is of the peaks\n\n" + table(rows))
    if args.out:
        there = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
        kept = [row for row in there if row["name"] not in args.names or row["device"] != rows[0]["device"]]
        write_result(args.out, 1, "cuda" if args.gpu else "cpu", rows=[*kept, *rows])
    if any(abs(row["ratio"] - 1) > TOLERANCE for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
