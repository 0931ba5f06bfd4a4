"""Cost of a safe checkpoint: saving and resuming, ours and DeepSpeed's own, side by side.

    python benchmarks/checkpoint.py --parameters 60 --processes 2 --out benchmarks/results/checkpoint_cpu.json

A ZeRO-3 engine over this many million parameters (linear layers; only the number of bytes matters), float32, AdamW,
with its optimizer states. In every repeat each way of saving and resuming is timed once, in turn, by the slowest rank:

    deepspeed save            engine.save_checkpoint: no flush to the disk, no checksum, in place
    deepspeed save, flushed   the same, and then each rank flushes its files (fsync), which a save needs to survive
                              a power failure
    save                      ours: write, checksum, flush, commit by a rename, remove an older one
    background: training waits   ours in the background: until training continues
    background: committed     until it is committed, if nothing else is computed meanwhile
    deepspeed resume          engine.load_checkpoint
    resume                    ours: every file read and its checksum compared, then loaded

and the reduction of status flags before every optimizer step (:mod:`mrmae_ds.training.step_sync`), the check of the
gradients included, and the watchdog's heartbeat. Files are read from the page cache, where they have just been written.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ranks import RanksError, machine, report_result, run_ranks
from result_file import write_result

REPOSITORY = Path(__file__).resolve().parents[1]
WIDTH = 1024


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=60, help="millions")
    parser.add_argument("--processes", type=int, help="default: one per GPU, or 2 on the CPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default: the temporary folder's")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--limit", type=float, default=1800, help="seconds")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def build(layers: int) -> Any:
    """Build an engine whose optimizer has states."""
    import deepspeed
    import torch
    from torch import nn

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31 - 1,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "memory_efficient_linear": False,
            "reduce_bucket_size": 10_000_000,
            "stage3_prefetch_bucket_size": 0,
        },
    }
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def step(engine: Any, step_sync: Any = None) -> float:
    """Take an optimizer step; return the seconds spent on the reduction of flags."""
    import torch
    import torch.distributed as dist

    loss = engine(torch.ones(1, WIDTH, device=engine.device)).square().mean()
    engine.backward(loss)
    spent = 0.0
    if step_sync is not None:
        dist.barrier()  # excludes the other rank's lag
        step_sync.micro_batches = [type("Micro", (), {"losses": {"loss": loss.detach()}})]
        began = time.perf_counter()
        step_sync.exchange(engine).read()
        spent = time.perf_counter() - began
    engine.step()
    return spent


def timed(work: Callable[[], Any]) -> float:
    """Return the seconds of the slowest rank."""
    import torch.distributed as dist

    dist.barrier()
    began = time.perf_counter()
    work()
    seconds: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seconds, time.perf_counter() - began)
    return max(seconds)


def flushed_save(engine: Any, folder: Path) -> None:
    """Save with DeepSpeed, each file flushed by the rank that wrote it."""
    import torch.distributed as dist

    engine.save_checkpoint(str(folder), tag="step", save_latest=False)
    for path in (folder / "step").glob(f"*rank_{dist.get_rank()}_*"):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    dist.barrier()


def run_rank(settings: dict[str, Any]) -> None:
    """Run one rank; rank 0 prints the result."""
    from mrmae_ds.distributed.launch import prepare_environment

    launch = prepare_environment()
    from mrmae_ds.distributed.process_group import choose_device, end_process_group, start_process_group
    from mrmae_ds.training.checkpoint.folder import list_checkpoints

    start_process_group(choose_device(launch))
    folder, times = Path(settings["folder"]), {}

    def note(name: str, seconds: float) -> None:
        times.setdefault(name, []).append(seconds)

    for repeat in range(1, settings["repeats"] + 1):
        _save(folder, build(settings["layers"]), note)
        _load(folder, build(settings["layers"]), launch, note)
        engine = _resume(folder, build(settings["layers"]), launch, note)
        if repeat == settings["repeats"]:
            _note_steps(engine, launch, note)
        engine.destroy()
    size = sum(path.stat().st_size for path in list_checkpoints(folder / "foreground")[-1].iterdir())
    if launch.rank == 0:
        report_result({"bytes": size, "times": times})
    end_process_group()
    os._exit(0)


Note = Callable[[str, float], None]


def _save(folder: Path, engine: Any, note: Note) -> None:
    """Time each way of saving once."""
    import torch.distributed as dist

    from mrmae_ds.training.checkpoint.async_saver import AsyncCheckpointer
    from mrmae_ds.training.checkpoint.folder import Retention
    from mrmae_ds.training.checkpoint.manifest import RunIdentity
    from mrmae_ds.training.checkpoint.train_state import TrainState

    step(engine)
    state, plain = TrainState(step=int(engine.global_steps)), folder / "deepspeed"
    identity = RunIdentity(recipe_hash="", seed=0, train="", val="")
    front, back = (
        AsyncCheckpointer(engine, folder / name, identity, Retention(1), 1, name == "background", lambda *_: None)
        for name in ("foreground", "background")
    )
    for name in ("deepspeed save", "deepspeed save, flushed"):
        if dist.get_rank() == 0:
            shutil.rmtree(plain, ignore_errors=True)
        dist.barrier()
        if name == "deepspeed save":
            note(name, timed(lambda: engine.save_checkpoint(str(plain), tag="step", save_latest=False)))
        else:
            note(name, timed(lambda: flushed_save(engine, plain)))
    note("save", timed(lambda: front.save(state, {})))
    began = time.perf_counter()
    note("background: training waits", timed(lambda: back.save(state, {})))
    back.finish()
    note("background: committed", time.perf_counter() - began)
    engine.destroy()


def _load(folder: Path, engine: Any, launch: Any, note: Note) -> None:
    note("deepspeed resume", timed(lambda: engine.load_checkpoint(str(folder / "deepspeed"), tag="step")))
    engine.destroy()


def _resume(folder: Path, engine: Any, launch: Any, note: Note) -> Any:
    from mrmae_ds.training.checkpoint.folder import list_checkpoints
    from mrmae_ds.training.checkpoint.resume import load_checkpoint, verify_start
    from mrmae_ds.training.checkpoint.run_dir import RunStart

    newest = list_checkpoints(folder / "foreground")[-1]

    def resume() -> None:
        start = verify_start(RunStart("resume", (newest,)), folder / "foreground")
        assert start.checkpoint is not None
        load_checkpoint(engine, start.checkpoint, launch, 1)

    note("resume", timed(resume))
    return engine


def _note_steps(engine: Any, launch: Any, note: Note) -> None:
    """Time the work of every step fifty times."""
    from mrmae_ds.distributed.watchdog import Watchdog
    from mrmae_ds.training.step_sync import StepSync

    step_sync = StepSync()
    with Watchdog(launch, 3600) as watchdog:
        for _ in range(50):
            note("reduction of flags before a step", step(engine, step_sync))
            began = time.perf_counter()
            watchdog.heartbeat("a step")
            note("heartbeat", time.perf_counter() - began)


def run(args: argparse.Namespace, accelerator: str, processes: int) -> dict[str, Any]:
    """Start the ranks and wait for them."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        job = Path(folder) / "job.json"
        layers = round(args.parameters * 1e6 / WIDTH**2)
        job.write_text(json.dumps({"folder": folder, "layers": layers, "repeats": args.repeats}))
        try:
            return run_ranks([__file__, "--rank-of", str(job)], processes, accelerator, args.limit)
        except RanksError as error:
            sys.exit(str(error))


def table(result: dict[str, Any]) -> str:
    """Return Markdown: the median and range of each, and the ratio to DeepSpeed's own."""
    own = {"save": "deepspeed save", "background: training waits": "deepspeed save", "resume": "deepspeed resume"}
    lines = ["| | median s | minimum | maximum | relative to DeepSpeed's |", "|---|---|---|---|---|"]
    medians = {name: statistics.median(values) for name, values in result["times"].items()}
    for name, values in result["times"].items():
        share = f"{medians[name] / medians[own[name]]:.2f}" if name in own else ""
        form = "{:.3f}" if medians[name] >= 0.05 else "{:.6f}"
        cells = [form.format(value) for value in (medians[name], min(values), max(values))]
        lines.append(f"| {name} | {' | '.join(cells)} | {share} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write the JSON."""
    args = parse()
    if args.rank_of:
        run_rank(json.loads(args.rank_of.read_text()))
    sys.path.insert(0, str(REPOSITORY))
    accelerator, processes = machine(args.processes)
    result = run(args, accelerator, processes)
    print(f"{args.parameters:g} M parameters, {processes} processes, a checkpoint of {result['bytes'] / 1e6:,.0f} MB")
    print(table(result))
    if args.out:
        write_result(args.out, processes, accelerator, parameters=args.parameters * 1e6, **result)


if __name__ == "__main__":
    main()
