"""Means of losses and speeds between two logged lines."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mrmae_ds.distributed.launch import Launch
from mrmae_ds.distributed.process_group import sum_over_ranks


@dataclass
class Meter:
    """Sums losses on the device and transfers them only when read, so that no step waits for the host.

    Attributes:
        sums: sum of each loss over the finite micro-batches, float32 scalars on the device.
        nonfinite: number of micro-batches whose loss was not finite; None before the first.
        batches: micro-batches of this rank.
        data_wait_s: seconds spent waiting for images.
        since: start of the interval on the performance counter.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    nonfinite: Tensor | None = None
    batches: int = 0
    data_wait_s: float = 0.0
    since: float = field(default_factory=time.perf_counter)

    def add(self, losses: dict[str, Tensor]) -> None:
        """Add one micro-batch's losses, each a scalar."""
        finite = torch.isfinite(losses["loss"].detach())
        for name, value in losses.items():
            safe = torch.where(finite, value.detach().float(), 0.0)
            self.sums[name] = self.sums[name] + safe if name in self.sums else safe
        bad = (~finite).float()
        self.nonfinite = bad if self.nonfinite is None else self.nonfinite + bad
        self.batches += 1

    def read(self, launch: Launch, micro_batch: int) -> tuple[dict[str, float], dict[str, float], int]:
        """Reduce over all ranks and restart. All ranks must call it.

        Args:
            launch: this rank among the others.
            micro_batch: images per micro-batch.

        Returns:
            Means over the finite micro-batches of all ranks; the speeds ``images_per_s`` of the job and ``data_wait``,
            the share of this rank's time spent waiting for images; the number of micro-batches that were not finite.
        """
        assert self.nonfinite is not None
        packed = sum_over_ranks(torch.stack([*self.sums.values(), self.nonfinite])).tolist()
        *totals, bad = packed
        everything = self.batches * launch.world_size
        elapsed = time.perf_counter() - self.since
        good = everything - bad
        means = {name: total / good if good else float("nan") for name, total in zip(self.sums, totals, strict=True)}
        speeds = {"images_per_s": everything * micro_batch / elapsed, "data_wait": self.data_wait_s / elapsed}
        self.restart()
        return means, speeds, int(bad)

    def restart(self) -> None:
        """Reset all counts and the clock."""
        self.sums, self.nonfinite, self.batches, self.data_wait_s = {}, None, 0, 0.0
        self.since = time.perf_counter()

    def state(self) -> dict[str, Any]:
        """Return the counts so far, on the CPU, for a checkpoint within an interval."""
        return {
            "sums": {name: value.cpu() for name, value in self.sums.items()},
            "nonfinite": None if self.nonfinite is None else self.nonfinite.cpu(),
            "batches": self.batches,
            "waited": self.data_wait_s,
            "elapsed": time.perf_counter() - self.since,
        }

    @classmethod
    def restored(cls, states: list[dict[str, Any]], launch: Launch, micro_batch: int, device: torch.device) -> Meter:
        """Restore this rank's meter from those of all ranks that wrote the checkpoint.

        On as many ranks as wrote it, each gets its own back, bit by bit. On another number, rank 0 gets the sum of all,
        and the others start at zero.

        Args:
            states: :meth:`state` of each rank that wrote the checkpoint, by rank, with its ``micro_batch``.
            launch: this rank among the others.
            micro_batch: images per micro-batch of this job.
            device: device of this rank.
        """
        first, scale = states[0], states[0]["micro_batch"] / micro_batch
        same = len(states) == launch.world_size and scale == 1
        own = states[launch.rank if same else 0]
        meter = cls(since=time.perf_counter() - first["elapsed"], data_wait_s=own["waited"])
        if first["nonfinite"] is None:
            return meter
        mine = [own] if same else states if launch.rank == 0 else []
        zero = torch.zeros((), device=device)
        meter.sums = {name: sum((s["sums"][name].to(device) * scale for s in mine), zero) for name in first["sums"]}
        meter.nonfinite = sum((s["nonfinite"].to(device) * scale for s in mine), zero)
        meter.batches = round(first["batches"] * len(states) * scale) // launch.world_size
        return meter
