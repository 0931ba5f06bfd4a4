"""Throughput of a loader on this machine, and the CPU time that it takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import psutil  # DeepSpeed's dependency

from mrmae_ds.data.loaders.base import Batch, Loader

WARM_UP_S = 2.0  # after the first batch: workers start, and the first images come from the disk


@dataclass(frozen=True)
class Throughput:
    """Measured throughput.

    Attributes:
        images_per_s: with all workers.
        cpu_s_per_1000: CPU seconds of this process and its workers per 1,000 images.
    """

    images_per_s: float
    cpu_s_per_1000: float

    @property
    def per_core(self) -> float:
        """Images/s of a core that does nothing else."""
        return 1000 / self.cpu_s_per_1000


def measure_throughput(loader: Loader[Batch], seconds: float) -> Throughput:
    """Read images for some seconds after a warm-up, epoch after epoch, and close the loader.

    Args:
        loader: of a data set that has at least one batch.
        seconds: duration.
    """
    batches = _batch_sizes(loader)
    next(batches)
    _read(batches, WARM_UP_S)
    cpu, began = _cpu_seconds(), time.perf_counter()
    images = _read(batches, seconds)
    spent, cpu = time.perf_counter() - began, _cpu_seconds() - cpu
    loader.close()
    return Throughput(images / spent, 1000 * cpu / images)


def _batch_sizes(loader: Loader[Any]) -> Iterator[int]:
    for epoch in count():
        for batch in loader.epoch(epoch):
            yield len(batch.labels)


def _read(batches: Iterator[int], seconds: float) -> int:
    """Read batches until some seconds have passed; return the number of images."""
    end, images = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        images += next(batches)
    return images


def _cpu_seconds() -> float:
    """Return the CPU time of this process and its workers."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(each.user + each.system for each in times)
