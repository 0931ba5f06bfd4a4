"""Hooks into torch and the training loop that fill a report. Only for a process on the stand-in."""

from __future__ import annotations

import os
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tests.support.fake_gpu.compute import ComputeOnHost
from tests.support.fake_gpu.report import Counters, Report, place_of_wait

if TYPE_CHECKING:
    from mrmae_ds.config.engine import EngineConfig
    from mrmae_ds.config.recipe import Recipe
    from mrmae_ds.training.tasks.base import Task

WAIT = "called a synchronizing CUDA operation"  # torch's words in its synchronization debug mode


def watch(out: Path | None, kernels: Path | None, timing: bool) -> None:
    """Prepare torch for the stand-in, and print and write a report when the process ends through ``os._exit``.

    Args:
        out: JSON file of the report.
        kernels: file of the last step's kernels.
        timing: measure CPU time; waits are not looked for, because that takes longer than most steps.
    """
    adapt_torch()
    report, counters = Report(), Counters()
    if timing:
        accept_every_step()
    else:
        _watch_waits(report)
        mode = ComputeOnHost()
        mode.__enter__()  # until the process ends
        report.not_computed = mode.not_computed
    _watch_steps(report, counters, kernels, timing)
    leave = os._exit

    def end(status: int) -> None:
        report.races += counters.read()["races"]
        print(f"\n{report.text()}", flush=True)
        sys.stderr.flush()
        if out and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            report.write(out.with_stem(f"{out.stem}-{os.environ['RANK']}"))
        elif out:
            report.write(out)
        leave(status)

    os._exit = end  # type: ignore[assignment]


def adapt_torch() -> None:
    """Switch off what the stand-in does not have. Call it before DeepSpeed is imported."""
    # Importing the compiler takes longer than a run, and DeepSpeed compiles functions when it is imported.
    torch.compile = lambda function=None, **options: function or (lambda given: given)  # type: ignore[assignment]
    # cuDNN's kernels come from inside that library, which asks the driver itself.
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    shown = torch.Tensor.__repr__

    def show(tensor: torch.Tensor, **options: Any) -> str:
        # DeepSpeed formats all parameters into a message that nobody reads: each value would be a wait.
        return f"<{tuple(tensor.shape)} {tensor.dtype} {tensor.device}>" if tensor.is_cuda else shown(tensor, **options)

    torch.Tensor.__repr__ = show  # type: ignore[method-assign]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from deepspeed.accelerator import get_accelerator

        get_accelerator()._communication_backend_name = "gloo"


def build_empty_task(recipe: Recipe, config: EngineConfig) -> Task[Any]:
    """Build the pre-training of a recipe on the CPU, with whatever its memory holds for weights."""
    from mrmae_ds.doctor.workload import build_random_task

    with torch.device("meta"):
        task = build_random_task(recipe, config, "pretrain")
    for module in (task.model, *task.teachers.values()):
        module.to_empty(device="cpu")
    return task


def _watch_waits(report: Report) -> None:
    def note() -> None:
        if report.waits is not None:
            report.waits[place_of_wait()] += 1

    def show(message: Warning | str, *arguments: Any, **options: Any) -> None:
        if WAIT in str(message):
            note()

    warnings.simplefilter("always")
    warnings.showwarning = show
    torch.cuda.set_sync_debug_mode("warn")
    wait = torch.cuda.Event.synchronize

    def synchronize(event: torch.cuda.Event) -> None:
        note()  # torch's own mode does not count waits for an event
        wait(event)

    torch.cuda.Event.synchronize = synchronize  # type: ignore[method-assign]


def _watch_steps(report: Report, counters: Counters, kernels: Path | None, timing: bool) -> None:
    from mrmae_ds.training import loop, run

    run_step = loop.run_step

    def watched(engine: Any, task: Any, batches: Any, schedule: Any, *arguments: Any) -> Any:
        report.races += counters.read()["races"]
        counters.reset()
        report.facts = {"accumulation": schedule.accumulation, "groups": len(engine.optimizer.param_groups)}
        # The first step is not counted: it allocates, and DeepSpeed learns the order of the modules.
        counted = report.steps > 0
        report.waits = report.in_step if counted else None
        if not timing:
            warnings.simplefilter("always")  # libraries change the filters
        began = time.process_time()
        status = run_step(engine, task, batches, schedule, *arguments)
        seconds = time.process_time() - began
        report.waits = report.between
        report.steps += 1
        if counted:
            report.counts.append(counters.read())
            report.seconds.append(seconds)
            if kernels:
                counters.write_kernels(kernels)
        return status

    loop.run_step = run.run_step = watched


def accept_every_step() -> None:
    """Apply every step: values are what memory held, and some are not finite."""
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    from mrmae_ds.training.step_sync import Exchange, StepStatus

    Exchange.read = lambda exchange: StepStatus()  # type: ignore[method-assign]
    for module in (stage3, stage_1_and_2):
        if hasattr(module, "is_invalid_grad_norm"):
            module.is_invalid_grad_norm = lambda norm: False
