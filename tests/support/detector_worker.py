"""Training of a small detector under ZeRO on two ranks, some of which have no objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mrmae_ds.config.engine import load_engine_config
from mrmae_ds.detection.detector import Detector
from mrmae_ds.training.engine.build import build_engine, gather_state
from mrmae_ds.training.param_groups import adamw
from tests.support.detectors import random_batch, small_detector
from tests.training.parity.cases import write_engine

STEPS, RATE, DECAY, BETAS = 4, 1e-3, 0.1, (0.9, 0.999)
# Objects of each rank in each step.
CASES = {"one": ((2, 3), (1, 2), (0, 3), (0, 1)), "both": ((2, 3), (0, 0), (0, 0), (1, 2))}


def loss_of(model: Any, case: str, step: int, rank: int) -> Tensor:
    """Return the loss of a rank's image."""
    batch = random_batch((CASES[case][step][rank],), seed=2 * step + rank)
    return model(*batch, seeds=[2 * step + rank])["loss"]


def train_alone(case: str) -> tuple[list[float], dict[str, Tensor]]:
    """Train in this process by torch's AdamW on the mean of both ranks' losses; return losses and weights."""
    model = small_detector()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=BETAS, weight_decay=DECAY)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        halves = [loss_of(model, case, step, rank) / 2 for rank in range(2)]
        for half in halves:
            half.backward()  # each by itself, because a sum over both images rounds otherwise
        optimizer.step()
        losses.append(sum(half.item() for half in halves))
    return losses, model.state_dict()


def train(model: Detector, case: str, zero: int, folder: Path, rank: int) -> tuple[list[float], dict[str, Tensor]]:
    """Train under ZeRO; return the mean losses of the ranks, and on rank 0 the weights."""
    config = load_engine_config(write_engine(folder / f"engine-{rank}.json", zero))
    groups = [{"params": list(model.parameters()), "lr_scale": 1.0, "weight_decay": DECAY, "lr": RATE}]
    engine = build_engine(model, groups, adamw(BETAS), config, 1, torch.device("cpu"))
    losses = []
    for step in range(STEPS):
        loss = loss_of(engine, case, step, rank)
        engine.backward(loss)
        engine.step()
        mean = loss.detach() / 2
        dist.all_reduce(mean)
        losses.append(mean.item())
    state = gather_state(engine)
    engine.destroy()
    return losses, state


def measure(rank: int, world_size: int, folder: Path) -> None:
    """Run one rank; rank 0 writes FOLDER/CASE-ZERO.pt."""
    for case in CASES:
        for zero in (2, 3):
            found = train(small_detector(), case, zero, folder, rank)
            if rank == 0:
                torch.save(found, folder / f"{case}-{zero}.pt")
