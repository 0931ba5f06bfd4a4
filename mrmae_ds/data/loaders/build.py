"""The interface that every data backend has: uint8 batches in a reproducible order, with crops that are too.

Shapes: B micro-batch, H = W image size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from mrmae_ds.config.sections import Backend
from mrmae_ds.data.beton.sidecar import BetonInfo, check_beton
from mrmae_ds.data.loaders.augment import Augment, AugmentSettings
from mrmae_ds.data.loaders.crop import CropSettings, UIntArray
from mrmae_ds.data.loaders.sampler import BoolArray, IntArray, eval_order, steps_per_epoch, train_order
from mrmae_ds.errors import UserError

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank, on the reader's device, the caller's to keep.

    Attributes:
        images: uint8 [B, 3, H, W], a view of channels-last memory. Not normalized: student and teachers each
            do that with their own mean and std.
        labels: int64 [B].
        indices: int64 [B], the samples' rows in the data set.
        valid: bool [B]; False marks a repeat that only fills up an evaluation batch.
        keys: uint64 [B] of numpy: each sample's key in this epoch (``crop.sample_keys``), for further augmentation.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    valid: Tensor
    keys: UIntArray


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU, on ``device``; of CUDA by a copy that does not wait.

    The memory that the copy reads is pinned, and kept by torch until the copy is done.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Reader(Protocol):
    """One rank's share of a data set.

    Attributes:
        num_samples: of the whole set, over all ranks.
        batches_per_epoch: micro-batches of this rank in an epoch, the same on every rank.
    """

    num_samples: int
    batches_per_epoch: int

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from ``start_batch`` on; those before it are not decoded.

        The same (epoch, batch) gives the same pixels in any process. One epoch at a time: starting another
        ends it.
        """
        ...

    def close(self) -> None:
        """End the open epoch, if any, and its threads. The reader can be used again afterwards."""
        ...


@dataclass(frozen=True)
class ReaderSettings:
    """What a backend is built from; ``build_reader`` says what each value means and has checked them."""

    info: BetonInfo
    train: bool
    image_size: int
    micro_batch: int
    accumulation: int
    world_size: int
    rank: int
    seed: int
    crop: CropSettings | None
    num_workers: int
    device: torch.device
    augment: AugmentSettings | None = None
    samples: int | None = None

    @property
    def num_samples(self) -> int:
        """Of the set, or of the part of it that is evaluated."""
        return self.info.num_samples if self.samples is None else min(self.samples, self.info.num_samples)

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of each rank in an epoch. Raises UserError if training has not one global batch."""
        if self.train:
            global_batch = self.micro_batch * self.accumulation * self.world_size
            return steps_per_epoch(self.info.num_samples, global_batch) * self.accumulation
        return -(-self.num_samples // (self.micro_batch * self.world_size))

    def rows(self, epoch: int, start_batch: int = 0) -> tuple[IntArray, BoolArray]:
        """This rank's samples in an epoch from a batch on, and whether they count: int64 and bool [batches, B].

        Raises UserError for an epoch or a batch that does not exist.
        """
        if epoch < 0 or not 0 <= start_batch <= self.batches_per_epoch:
            raise UserError(
                f"no batch {start_batch} in epoch {epoch} of {self.info.path}: an epoch has "
                f"{self.batches_per_epoch} batches"
            )
        rows, valid = self._order(epoch)
        return rows[start_batch:], valid[start_batch:]

    def _order(self, epoch: int) -> tuple[IntArray, BoolArray]:
        if not self.train:
            places, valid = eval_order(
                self.num_samples, batch=self.micro_batch, world_size=self.world_size, rank=self.rank
            )
            return places * self.info.num_samples // self.num_samples, valid
        rows = train_order(
            self.info.num_samples,
            seed=self.seed,
            epoch=epoch,
            micro_batch=self.micro_batch,
            accumulation=self.accumulation,
            world_size=self.world_size,
            rank=self.rank,
        )
        return rows, np.ones(rows.shape, dtype=bool)


def default_num_workers() -> int:
    """Decoding threads for one rank: this rank's share of the cores that it may use.

    The cores are the process's affinity, and no more than ``SLURM_CPUS_PER_TASK``. They are shared by the
    ranks that a launcher started inside this task (``LOCAL_WORLD_SIZE``, or DeepSpeed's ``LOCAL_SIZE``);
    where Slurm started every rank as a task of its own, its CPUs are the rank's own.
    """
    cores = len(os.sched_getaffinity(0))
    environment = os.environ
    if environment.get("SLURM_CPUS_PER_TASK"):
        cores = min(cores, int(environment["SLURM_CPUS_PER_TASK"]))
        if environment.get("SLURM_NTASKS", "") == environment.get("WORLD_SIZE"):
            return max(1, cores)
    return max(1, cores // int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or 1))


def check_backend(backend: Backend = "ffcv") -> None:
    """See that a backend can be used here. Raises UserError if it is unknown or not installed."""
    if backend not in get_args(Backend):
        raise UserError(f"unknown data backend {backend!r}; there are: {', '.join(get_args(Backend))}")
    if backend == "ffcv":
        # Imported late: a machine that only plans or reports needs no ffcv.
        from mrmae_ds.data.loaders._ffcv import import_ffcv

        import_ffcv()


def build_reader(
    path: str | Path,
    *,
    train: bool,
    image_size: int,
    micro_batch: int,
    accumulation: int,
    world_size: int,
    rank: int,
    seed: int,
    crop: CropSettings | None,
    num_workers: int | None = None,
    device: torch.device = _CPU,
    backend: Backend = "ffcv",
    augment: AugmentSettings | None = None,
    samples: int | None = None,
) -> Reader:
    """Open a data set for one rank.

    Args:
        path: the .beton, with its sidecar.
        train: shuffled, randomly cut and mirrored, whole global batches only; else in order, center cut,
            every sample once.
        image_size: pixels, both sides.
        micro_batch: samples a batch on this rank. accumulation: micro-batches an optimizer step (training).
        world_size, rank: how the set is shared.
        seed: of order, crops and flips; not negative.
        crop: needed for training, not used for evaluation.
        num_workers: decoding threads (of "pillow", processes); None: ``default_num_workers()``.
        device: where the batches are delivered.
        backend: "ffcv", or "pillow": the same boxes and filter, slower; see ``pillow_reader``.
        augment: RandAugment of the training images, after crop and flip. With "ffcv" half of the workers
            decode and the rest are processes that augment.
        samples: evaluate so many, evenly spaced in the set; None: all.

    Raises UserError for a missing or cut-off file, one smaller than a global batch, and values that make no
    sense.
    """
    _check_numbers(
        image_size=image_size,
        micro_batch=micro_batch,
        accumulation=accumulation,
        world_size=world_size,
        num_workers=1 if num_workers is None else num_workers,
        samples=1 if samples is None else samples,
        rank=rank,
        seed=seed,
    )
    if train and crop is None:
        raise UserError("training needs crop settings: pass crop=CropSettings(scale=(low, high))")
    check_backend(backend)
    settings = ReaderSettings(
        info=check_beton(path),
        train=train,
        image_size=image_size,
        micro_batch=micro_batch,
        accumulation=accumulation,
        world_size=world_size,
        rank=rank,
        seed=seed,
        crop=_checked(crop) if crop is not None else None,
        num_workers=num_workers or default_num_workers(),
        device=torch.device(device),
        augment=augment if train else None,
        samples=None if train else samples,
    )
    return _open(settings, backend)


def _check_numbers(*, rank: int, world_size: int, seed: int, **positive: int) -> None:
    """Raises UserError for the first number that makes no sense."""
    for name, value in {**positive, "world_size": world_size}.items():
        if value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    if not 0 <= rank < world_size:
        raise UserError(f"rank must be in 0..{world_size - 1}, not {rank}")
    if not 0 <= seed < 1 << 63:
        raise UserError(f"seed must be in 0..2**63-1, not {seed}")


def _open(settings: ReaderSettings, backend: Backend) -> Reader:
    """The reader of checked settings."""
    if settings.augment is not None:
        Augment(settings.augment, settings.image_size)  # an error in the policy shows here, not in a worker
    if backend == "pillow":
        from mrmae_ds.data.loaders.pillow import PillowReader

        return PillowReader(settings)
    from mrmae_ds.data.loaders.ffcv import FFCVReader

    if settings.augment is None:
        return FFCVReader(settings)
    from mrmae_ds.data.loaders.rand_augment import AugmentReader

    threads = max(1, settings.num_workers // 2)
    inner = FFCVReader(replace(settings, num_workers=threads, device=_CPU))
    return AugmentReader(inner, settings, processes=max(1, settings.num_workers - threads))


def _checked(crop: CropSettings) -> CropSettings:
    """``crop`` itself. Raises UserError if its bounds cannot be drawn from."""
    if not 0 < crop.scale[0] <= crop.scale[1] <= 1:
        raise UserError(f"crop scale must be 0 < low <= high <= 1, not {crop.scale}")
    if not 0 < crop.ratio[0] <= crop.ratio[1]:
        raise UserError(f"crop ratio must be 0 < low <= high, not {crop.ratio}")
    if not 0 <= crop.flip <= 1:
        raise UserError(f"flip must be a probability, not {crop.flip}")
    return crop
