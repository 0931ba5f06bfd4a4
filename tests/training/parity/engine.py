"""Train with one engine after another in one process group.

``python -m tests.training.parity.engine FOLDER`` is one rank.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch

from mrmae_ds.distributed.launch import Launch, prepare_environment
from mrmae_ds.distributed.process_group import choose_device, end_process_group, start_process_group
from mrmae_ds.training.callbacks.base import Callback, TrainContext
from mrmae_ds.training.checkpoint.train_state import TrainState
from mrmae_ds.training.engine.build import gather_state
from mrmae_ds.training.loop import train
from mrmae_ds.training.step_sync import StepStatus, StepSync
from mrmae_ds.training.tasks.build import build_task_engine
from tests.support.processes import finish, rank_processes
from tests.training.parity.cases import Case, Trace
from tests.training.parity.job import prepare


class _Recorder(Callback):
    """Callback that keeps the logged metrics."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_step_skipped(self, context: TrainContext, status: StepStatus) -> None:
        raise AssertionError(f"step {context.state.step} was skipped: {status}")

    def on_log(self, context: TrainContext, values: dict[str, float]) -> None:
        self.losses.append(values["loss"])
        if "grad_norm" in values:
            self.norms.append(values["grad_norm"])


def run_engine(case: Case, folder: Path, launch: Launch) -> Trace:
    """Train the case's engine in this process group; all ranks must call it. Rank 0 returns the weights."""
    job, device = prepare(case, folder, launch), torch.device("cpu")
    task, schedule = job.task, job.schedule
    engine = build_task_engine(task, job.engine_config, schedule.accumulation, device)
    loader, recorder, began = job.train_loader(device), _Recorder(), time.perf_counter()
    train(TrainContext(engine, task, loader, schedule, TrainState(), StepSync(), 1, [recorder]))
    loader.close()
    seconds = time.perf_counter() - began
    weights = gather_state(engine)
    task.release()
    engine.destroy()
    return Trace(recorder.losses, recorder.norms, weights, seconds)


def run_cases(cases: Iterable[Case], folder: Path, limit_s: float) -> dict[str, Trace]:
    """Train all cases, starting the ranks once per world size; return traces by name.

    Raises:
        RuntimeError, TimeoutError: with the output, if a rank failed or exceeded the limit.
    """
    by_size: dict[int, list[Case]] = {}
    for case in cases:
        by_size.setdefault(case.world_size, []).append(case)
    for size, group in by_size.items():
        (folder / f"cases-{size}.json").write_text(json.dumps([asdict(case) for case in group]))
        ended = finish(rank_processes(size, folder, program=("-m", "tests.training.parity.engine")), limit_s)
        if any(process.status for process in ended):
            raise RuntimeError("\n".join(process.stdout[-2000:] + process.stderr[-4000:] for process in ended))
    return {
        case.name: Trace(**torch.load(folder / f"{case.name}.trace")) for group in by_size.values() for case in group
    }


def main(folder: Path) -> None:
    """Run one rank: every case of FOLDER/cases-W.json in order, each trace written to FOLDER by rank 0."""
    launch = prepare_environment()
    torch.set_num_threads(1)
    start_process_group(choose_device(launch))
    for content in json.loads((folder / f"cases-{launch.world_size}.json").read_text()):
        case = Case(**content)
        trace = run_engine(case, folder, launch)
        if launch.rank == 0:
            torch.save(asdict(trace), folder / f"{case.name}.trace")
            print(f"{case.name}: {trace.seconds:.2f} s", flush=True)
    end_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
