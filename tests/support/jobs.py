"""Small inputs of the training loop: stages, schedules, images, and fake engines and loaders of plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mrmae_ds.config.optimizers import OptimizerConfig
from mrmae_ds.config.stages import FinetuneConfig, PretrainConfig, StageConfig
from mrmae_ds.data.loaders.base import Batch
from mrmae_ds.distributed.launch import Launch
from mrmae_ds.training.callbacks.base import TrainContext
from mrmae_ds.training.checkpoint.train_state import TrainState
from mrmae_ds.training.schedule import StageSchedule
from mrmae_ds.training.step_sync import StepSync

ALONE = Launch(0, 0, 1, 1)


def optimizer_config(**changes: Any) -> OptimizerConfig:
    return OptimizerConfig(**{"lr": 0.5, "warmup_epochs": 1, "betas": (0.9, 0.95), **changes})


def pretrain_config(**changes: Any) -> PretrainConfig:
    pixels = {"target": "pixels", "tap": "decoder", "tokens": "masked", "normalize": "standardize", "weight": 0.5}
    values = {"epochs": 3, "batch_size": 8, "optimizer": optimizer_config(), "crop_scale": (0.5, 1.0)}
    return PretrainConfig(**{**values, "objectives": {"pixels": pixels}, **changes})


def finetune_config(**changes: Any) -> FinetuneConfig:
    values = {"epochs": 3, "batch_size": 8, "optimizer": optimizer_config(), "crop_scale": (0.5, 1.0)}
    return FinetuneConfig(**{**values, "layer_decay": 0.65, **changes})


def make_schedule(stage: StageConfig | None = None, launch: Launch = ALONE, **changes: Any) -> StageSchedule:
    """Return a schedule of three epochs of five steps, each of two micro-batches of four images."""
    values = {"seed": 3, "steps_per_epoch": 5, "accumulation": 2, "micro_batch": 4, **changes}
    return StageSchedule(stage=stage or finetune_config(), launch=launch, **values)


def make_batch(size: int, side: int = 32, classes: int = 10, seed: int = 0, valid: list[bool] | None = None) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        images=torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator),
        labels=torch.randint(0, classes, (size,), generator=generator),
        indices=torch.arange(size),
        valid=torch.tensor(valid if valid is not None else [True] * size),
        keys=np.arange(size, dtype=np.uint64),
    )


class FakeLoader:
    """Loader of the same batches in every epoch; records the requested start positions."""

    def __init__(self, batches: list[Batch], num_samples: int | None = None) -> None:
        self.batches = batches
        self.num_samples = sum(len(batch.labels) for batch in batches) if num_samples is None else num_samples
        self.batches_per_epoch = len(batches)
        self.asked: list[tuple[int, int]] = []
        self.given: list[tuple[int, int]] = []

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        self.asked.append((epoch, start_batch))
        for number in range(start_batch, len(self.batches)):
            self.given.append((epoch, number))
            yield self.batches[number]

    def close(self) -> None:
        pass


class FakeEngine:
    """Stand-in for an engine without ZeRO: accumulates gradients and updates at every step, whatever their values."""

    def __init__(self, module: nn.Module, accumulation: int) -> None:
        self.module, self.accumulation = module, accumulation
        self.optimizer = torch.optim.SGD([{"params": list(module.parameters()), "lr_scale": 0.5}], lr=0.0)
        self.micros, self.skipped_steps, self.training = 0, 0, False
        self.modes: list[bool] = []
        self.rates: list[float] = []
        self.norm: float | None = None
        self.applied = True

    def __call__(self, images: Tensor) -> Tensor:
        return self.module(images)

    def train(self) -> None:
        self._set(True)

    def eval(self) -> None:
        self._set(False)

    def _set(self, training: bool) -> None:
        self.training = training
        self.modes.append(training)
        self.module.train(training)

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()

    def step(self) -> None:
        self.micros += 1
        if self.micros % self.accumulation:
            return
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        if gradients:
            self.norm = float(torch.cat([g.flatten() for g in gradients]).norm())
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        self.optimizer.zero_grad()

    def was_step_applied(self) -> bool:
        return self.applied

    def zero_optimization_stage(self) -> int:
        return 0

    def get_global_grad_norm(self) -> float | None:
        return self.norm


def make_context(**changes: Any) -> TrainContext:
    """A training of a linear layer in a :class:`FakeEngine`, before its first step."""
    schedule = make_schedule()
    values: dict[str, Any] = {
        "engine": FakeEngine(nn.Linear(3, 1), schedule.accumulation),
        "task": None,
        "loader": FakeLoader([]),
        "schedule": schedule,
        "state": TrainState(),
        "step_sync": StepSync(),
        "log_every": 4,
    }
    return TrainContext(**values | changes)
