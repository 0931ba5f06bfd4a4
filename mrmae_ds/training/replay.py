"""Repetition of a skipped step: ``mrmae replay CAPTURE``.

One process computes the micro-batches of all ranks in turn, as plain modules without DeepSpeed: captured weights, the
same images with the same crops, the same masks and random draws, forward and backward. Non-finite values are traced to
the first module that produced them from finite inputs.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mrmae_ds.distributed.launch import Launch
from mrmae_ds.errors import UserError
from mrmae_ds.records.record import RECIPE_FILE
from mrmae_ds.training.callbacks.nonfinite_capture import Capture, read_capture
from mrmae_ds.training.engine.kernels import apply_kernel_settings
from mrmae_ds.training.job import PreparedStage, TrainArgs, prepare_stage
from mrmae_ds.units import first_few
from mrmae_ds.weights.formats import read_safetensors
from mrmae_ds.weights.paths import MODEL_FILE


@dataclass(frozen=True)
class ReplayResult:
    """A repeated micro-batch.

    Attributes:
        rank: rank that held it.
        index: number of the micro-batch in the step.
        captured: losses by name, when it was captured.
        replayed: losses by name, now.
        gradients: names of the parameters whose gradient is not finite.
        origin: first module that produced a non-finite value from finite inputs; empty if there is none.
    """

    rank: int
    index: int
    captured: dict[str, float]
    replayed: dict[str, float]
    gradients: tuple[str, ...]
    origin: str

    @property
    def finite(self) -> bool:
        """True if loss and gradients are finite."""
        return math.isfinite(self.replayed["loss"]) and not self.gradients


def replay(path: Path, device: torch.device) -> tuple[Capture, list[ReplayResult]]:
    """Repeat a captured step.

    Args:
        path: the capture's folder, in the run's.
        device: device to compute on.

    Returns:
        The capture and its micro-batches, repeated.

    Raises:
        UserError: if it is not a capture, or recipe, images or teachers have changed since.
    """
    folder, capture = read_capture(path)
    with _job(folder, capture) as job:
        if job.identity.recipe_hash != capture.recipe_hash or job.schedule.seed != capture.seed:
            raise UserError(f"{folder}: of recipe {capture.recipe_hash}, seed {capture.seed}; the run's folder now "
                            f"holds recipe {job.identity.recipe_hash}, seed {job.schedule.seed}")  # fmt: skip
        apply_kernel_settings(job.engine_config.kernels, device)
        model = job.task.model
        model.load_state_dict(read_safetensors(folder / MODEL_FILE)[0])
        model.to(device, job.engine_config.model_dtype).train()
        job.task.to(device)
        try:
            parts = [part for rank in range(capture.world_size) for part in _rank(job, capture, rank, device)]
        finally:
            job.task.release()
    return capture, parts


@contextmanager
def _job(folder: Path, capture: Capture) -> Iterator[PreparedStage]:
    """Prepare the stage as the captured job did, with its teachers on the device."""
    stage_dir = folder.parent.parent
    overrides = ("stages.pretrain.placement=device",) if capture.stage == "pretrain" else ()
    launch = Launch(0, 0, capture.world_size, capture.world_size)
    with tempfile.TemporaryDirectory() as temporary:
        engine = Path(temporary) / "engine.json"
        engine.write_text(json.dumps(capture.engine))
        options = TrainArgs(
            ds_config=engine,
            stage=capture.stage,
            recipe=stage_dir / RECIPE_FILE,
            run=stage_dir.parent,
            overrides=overrides,
            dry_run=True,
        )
        yield prepare_stage(options, launch)


def _rank(job: PreparedStage, capture: Capture, rank: int, device: torch.device) -> Iterator[ReplayResult]:
    job = replace(
        job, schedule=replace(job.schedule, launch=Launch(rank, rank, capture.world_size, capture.world_size))
    )
    reader = job.train_loader(device)
    epoch, within = divmod(capture.step, job.schedule.steps_per_epoch)
    batches = reader.epoch(epoch, within * capture.accumulation)
    model = job.task.model
    try:
        for index, record in enumerate(capture.ranks[rank]):
            batch = next(batches)
            if batch.indices.tolist() != record.indices:
                raise UserError(f"{job.train_data.path}: the order of its samples differs from that of the capture")
            engine, origin = _Autocast(model, job, device), _Origin(model)
            model.zero_grad(set_to_none=True)
            with origin:
                losses = job.task.losses(engine, batch, job.schedule.key(capture.step, index))
                losses["loss"].backward()
            yield ReplayResult(
                rank=rank,
                index=index,
                captured={name: float(text) for name, text in record.losses.items()},
                replayed={name: value.item() for name, value in losses.items()},
                gradients=tuple(
                    name
                    for name, parameter in model.named_parameters()
                    if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
                ),
                origin=origin.name,
            )
    finally:
        reader.close()


class _Autocast(nn.Module):
    """A model in the engine config's precision, as the engine runs it."""

    def __init__(self, model: nn.Module, job: PreparedStage, device: torch.device) -> None:
        super().__init__()
        self.model, self.config, self.device = model, job.engine_config, device

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Run the model."""
        with self.config.autocast(self.device):
            return self.model(*inputs, **named)


class _Origin:
    """Context that finds the first module whose output is not finite; ``name`` is its name."""

    def __init__(self, model: nn.Module) -> None:
        self.name = ""
        self._modules = [(name, module) for name, module in model.named_modules() if name]
        self._handles: list[Any] = []

    def __enter__(self) -> _Origin:
        for name, module in self._modules:
            self._handles.append(module.register_forward_hook(self._look(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _look(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not self.name and _bad(output):
                broken = [key for key, parameter in module.named_parameters() if _bad(parameter)]
                cause = f" (weights: {', '.join(broken[:3])})" if broken else " (input)" if _bad(inputs) else ""
                self.name = name + cause

        return hook


def _bad(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point() and not bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        return any(map(_bad, value.values()))
    return isinstance(value, list | tuple) and any(map(_bad, value))


def describe(capture: Capture, parts: list[ReplayResult]) -> str:
    """Return the report of a repetition: a line per micro-batch, and whether the failure was reproduced."""
    what = "a loss" if capture.bad_loss else "a gradient"
    lines = [f"step {capture.step + 1} of {capture.stage}, skipped because {what} was not finite:"]
    for part in parts:
        losses = ", ".join(f"{name} {_loss_text(part, name)}" for name in part.replayed)
        origin = "" if part.finite else _origin_text(part)
        lines.append(f"  rank {part.rank}, micro-batch {part.index}: {losses}{origin}")
    bad_then = {(p.rank, p.index) for p in parts if not math.isfinite(p.captured["loss"])}
    bad_now = {(p.rank, p.index) for p in parts if not math.isfinite(p.replayed["loss"])}
    again = bad_then == bad_now if capture.bad_loss else any(part.gradients for part in parts)
    lines.append(
        "reproduced"
        if again
        else "not reproduced: weights, images and random state do not explain the failure; suspect the hardware or "
        "other processes on the device"
    )
    return "\n".join(lines)


def _loss_text(part: ReplayResult, name: str) -> str:
    then, now = part.captured[name], part.replayed[name]
    same = then == now or (math.isnan(then) and math.isnan(now)) or math.isclose(then, now, rel_tol=1e-5)
    return f"{now:.6g}" if same else f"{now:.6g} (captured: {then:.6g})"


def _origin_text(part: ReplayResult) -> str:
    count = len(part.gradients)
    named = first_few(part.gradients, 3)
    gradients = f"; {count} gradients not finite: {named}" if count else ""
    return f"\n    first not finite: {part.origin or 'none of the modules, so the loss or the backward'}{gradients}"
