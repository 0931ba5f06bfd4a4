"""Checks of computed values: a step against the CPU's, and engines against each other."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mrmae_ds.data.loaders.base import Batch
from mrmae_ds.doctor import expectations
from mrmae_ds.doctor.context import DoctorContext
from mrmae_ds.doctor.reading import Reading
from mrmae_ds.doctor.tiny_job import prepare_tiny
from mrmae_ds.doctor.workload import task_engine
from mrmae_ds.training.job import PreparedStage
from mrmae_ds.training.loop import run_step
from mrmae_ds.training.meter import Meter
from mrmae_ds.training.step_sync import StepSync
from mrmae_ds.training.tasks.base import Task

STEPS = 8
BUCKET = {"reduce_bucket_size": 100_000, "contiguous_gradients": True}
ZERO1 = {"stage": 1, **BUCKET, "allgather_bucket_size": 100_000}
ZERO3 = {
    "stage": 3,
    **BUCKET,
    "overlap_comm": True,
    "stage3_prefetch_bucket_size": 100_000,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 1_000_000,
    "stage3_max_reuse_distance": 1_000_000,
    "memory_efficient_linear": False,
    "leaf_module": {"classes": ["Block", "ConvBlock"]},
}
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
# The first is the reference of all others.
ENGINES: dict[str, dict[str, Any]] = {
    "ZeRO-0": {"zero_optimization": {"stage": 0}},
    "ZeRO-1": {"zero_optimization": ZERO1},
    "ZeRO-3": {"zero_optimization": ZERO3},
    "ZeRO-1, offload": {"zero_optimization": ZERO1 | OFFLOAD},
    "ZeRO-3, offload": {"zero_optimization": ZERO3 | OFFLOAD},
    "ZeRO-1, autocast": {"zero_optimization": ZERO1, **AUTOCAST},
    "ZeRO-1, bf16": {"zero_optimization": ZERO1, **BF16},
    "ZeRO-3, bf16": {"zero_optimization": ZERO3, **BF16},
}
# Compiling takes minutes on a CPU.
COMPILED: dict[str, dict[str, Any]] = {
    "ZeRO-1, compiled": {"zero_optimization": ZERO1, "compile": {"blocks": True, "teachers": True}},
}


def check_parity(context: DoctorContext) -> list[Reading]:
    """Compare loss and gradients of a float32 step on the device with the CPU's: same weights, same images."""
    context.require_cuda()
    job = prepare_tiny(context, "parity", ENGINES["ZeRO-0"])
    loader = job.train_loader(torch.device("cpu"))
    batch = next(loader.epoch(0))
    loader.close()
    twin = copy.deepcopy(job.task)
    loss, gradients = _loss_and_gradients(job, job.task, batch, torch.device("cpu"))
    with _without_tf32():
        found_loss, found = _loss_and_gradients(job, twin, batch, context.device)
    whole = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    # A gradient that is nearly zero is compared with the whole one's noise.
    worst = max((found[n] - g).norm().item() / max(g.norm().item(), 1e-3 * whole.item()) for n, g in gradients.items())
    return [
        Reading("loss, relative difference", abs(found_loss - loss) / abs(loss), "", expectations.PARITY_LOSS),
        Reading("gradients, largest relative difference", worst, "", expectations.PARITY_GRADIENT),
    ]


def check_engines(context: DoctorContext) -> list[Reading]:
    """Train a few steps with each engine, and compare the losses with those of plain data parallelism."""
    readings: list[Reading] = []
    reference: list[float] = []
    for name, engine in (ENGINES | (COMPILED if context.on_cuda else {})).items():
        try:
            losses = _losses(context, name, engine)
        except Exception as error:  # for example torch.compile without a compiler; on all ranks alike
            readings.append(Reading(f"{name}: failed", f"{type(error).__name__}: {error}".partition("\n")[0]))
            continue
        reference = reference or losses
        difference = max(abs(a - b) / abs(b) if b else float("nan") for a, b in zip(losses, reference, strict=True))
        half = "autocast" in name or "bf16" in name
        expected = expectations.ENGINE_BF16 if half else expectations.ENGINE_FP32
        readings.append(Reading(f"{name}: loss, relative difference", difference, "", expected))
    return readings


def _losses(context: DoctorContext, name: str, engine_config: dict[str, Any]) -> list[float]:
    """Return the losses of the first steps of a new training."""
    job = prepare_tiny(context, name.replace(", ", "-"), engine_config)
    loader, losses = job.train_loader(context.device), []
    with task_engine(job.task, job.engine_config, job.schedule.accumulation, context.device) as engine:
        batches = (batch for epoch in range(STEPS) for batch in loader.epoch(epoch))
        for step in range(STEPS):
            meter = Meter()
            run_step(engine, job.task, batches, job.schedule, step, meter, StepSync())
            losses.append(meter.read(context.launch, job.schedule.micro_batch)[0]["loss"])
    loader.close()
    return losses


def _loss_and_gradients(
    job: PreparedStage, task: Task[Any], batch: Batch, device: torch.device
) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients, on the CPU, of a task's model on a device."""
    task.model.to(device)
    task.to(device)
    tensors: dict[str, Any] = {
        name: value.to(device) for name, value in vars(batch).items() if isinstance(value, Tensor)
    }
    batch = replace(batch, **tensors)
    loss = task.losses(task.model, batch, job.schedule.key(0, 0))["loss"]
    loss.backward()
    task.release()
    gradients = {name: p.grad.cpu() for name, p in task.model.named_parameters() if p.grad is not None}
    return loss.item(), gradients


@contextmanager
def _without_tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
