"""Loader interface: yields uint8 image batches in a deterministic order with deterministic crops.

Shapes: B micro-batch, H = W image size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from mrmae_ds.config.sections import LoaderConfig
from mrmae_ds.data.beton.sidecar import BetonInfo
from mrmae_ds.data.loaders.augment import AugmentSettings
from mrmae_ds.data.loaders.crop import CropSettings
from mrmae_ds.data.loaders.sampler import eval_order, steps_per_epoch, train_order
from mrmae_ds.data.types import BoolArray, IntArray, UIntArray
from mrmae_ds.errors import UserError

Split = Literal["train", "val"]
EPOCH_ENDED = "this epoch has ended: the loader was closed or started another one"


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank, on the loader's device. It stays valid after the next batch is drawn.

    Attributes:
        images: uint8 [B, 3, H, W], a view of channels-last memory; not normalized, because student and teachers
            use different statistics.
        labels: int64 [B].
        indices: int64 [B], the samples' rows in the data set.
        valid: bool [B]; False marks a repeated sample that pads an evaluation batch.
        keys: uint64 [B] of numpy, each sample's key in this epoch (``crop.sample_keys``), for further augmentation.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    valid: Tensor
    keys: UIntArray


BatchT = TypeVar("BatchT", covariant=True)


class Loader(Protocol[BatchT]):
    """One rank's share of a data set.

    Attributes:
        num_samples: number of samples over all ranks.
        batches_per_epoch: micro-batches of this rank in an epoch, the same on every rank.
    """

    num_samples: int
    batches_per_epoch: int

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[BatchT]:
        """Iterate over the batches of an epoch from ``start_batch`` on, without decoding those before it.

        The same (epoch, batch) gives the same pixels in any process. One epoch is open at a time: starting another
        ends it.

        Raises:
            UserError: if there is no such epoch or batch, or an image is damaged.
        """
        ...

    def close(self) -> None:
        """End the open epoch, if any, and its threads. The loader can be used again afterwards."""
        ...


@dataclass(frozen=True)
class TrainTransform:
    """Random transforms of a training image.

    Attributes:
        crop: random resized crop and flip.
        augment: RandAugment or color jitter after them; None is none.
    """

    crop: CropSettings
    augment: AugmentSettings | None = None

    def of_workers(self, config: LoaderConfig) -> TrainTransform:
        """Return what the loader's workers apply: all, or without the augmentation if the device applies it."""
        return replace(self, augment=None) if config.augment_on == "device" else self


@dataclass(frozen=True)
class LoaderRequest:
    """One rank's batches of a data set.

    Attributes:
        split: the data set that is read.
        image_size: H = W, pixels.
        micro_batch: B, samples per batch on this rank.
        seed: of order, crops, flips and augmentation; not negative.
        transform: of training, with samples shuffled and whole global batches only. None is evaluation: in order,
            center crop, every sample once.
        accumulation: micro-batches per optimizer step; 1 in evaluation.
        world_size: number of ranks that share the data set.
        rank: this rank.
        samples: number of samples to evaluate, evenly spaced in the data set; None is all.
    """

    split: Split
    image_size: int
    micro_batch: int
    seed: int = 0
    transform: TrainTransform | None = None
    accumulation: int = 1
    world_size: int = 1
    rank: int = 0
    samples: int | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UserError: if one is out of range.
        """
        for name in ("image_size", "micro_batch", "accumulation", "world_size", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")
        if not 0 <= self.rank < self.world_size:
            raise UserError(f"rank must be in 0..{self.world_size - 1}, not {self.rank}")
        if not 0 <= self.seed < 1 << 63:
            raise UserError(f"seed must be in 0..2**63-1, not {self.seed}")


@dataclass(frozen=True)
class EpochOrder:
    """This rank's samples of a data set in every epoch.

    Attributes:
        request: the batches.
        total: number of samples of the data set.
        path: of the data set, for errors.
        training: shuffled, and whole global batches only; otherwise in order, every sample once.
    """

    request: LoaderRequest
    total: int
    path: Path
    training: bool

    @property
    def num_samples(self) -> int:
        """Number of samples of the data set, or of the part of it that is evaluated."""
        samples = self.request.samples
        return self.total if samples is None or self.training else min(samples, self.total)

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of each rank in an epoch.

        Raises:
            UserError: if a training set is smaller than one global batch.
        """
        request = self.request
        ranks_batch = request.micro_batch * request.world_size
        if not self.training:
            return -(-self.num_samples // ranks_batch)
        return steps_per_epoch(self.total, ranks_batch * request.accumulation) * request.accumulation

    def rows(self, epoch: int, start_batch: int = 0) -> tuple[IntArray, BoolArray]:
        """Return this rank's samples in an epoch from a batch on.

        Args:
            epoch: not negative.
            start_batch: first batch that is returned.

        Returns:
            Rows in the data set, int64 [batches, B], and whether each counts, bool [batches, B].

        Raises:
            UserError: if there is no such epoch or batch.
        """
        if epoch < 0 or not 0 <= start_batch <= self.batches_per_epoch:
            raise UserError(
                f"no batch {start_batch} in epoch {epoch} of {self.path}: an epoch has {self.batches_per_epoch} batches"
            )
        rows, valid = self._rows(epoch)
        return rows[start_batch:], valid[start_batch:]

    def _rows(self, epoch: int) -> tuple[IntArray, BoolArray]:
        request = self.request
        if not self.training:
            places, valid = eval_order(
                self.num_samples, batch=request.micro_batch, world_size=request.world_size, rank=request.rank
            )
            return places * self.total // self.num_samples, valid
        rows = train_order(
            self.total,
            seed=request.seed,
            epoch=epoch,
            micro_batch=request.micro_batch,
            accumulation=request.accumulation,
            world_size=request.world_size,
            rank=request.rank,
        )
        return rows, np.ones(rows.shape, dtype=bool)


@dataclass(frozen=True)
class LoaderSettings:
    """Resolved settings from which every backend is built.

    Attributes:
        info: the data set.
        request: the batches.
        num_workers: decoding threads (ffcv) or processes (pillow).
        device: device of the batches.
    """

    info: BetonInfo
    request: LoaderRequest
    num_workers: int
    device: torch.device

    @property
    def order(self) -> EpochOrder:
        """This rank's samples."""
        request = self.request
        return EpochOrder(request, self.info.num_samples, self.info.path, training=request.transform is not None)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to ``device``; to CUDA without waiting, from pinned memory that torch keeps until then."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class DeviceCopier:
    """Copies batches of images to a CUDA device on a stream of its own, beside what the device computes.

    Args:
        device: the CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def copy(self, host: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """Copy without waiting.

        Args:
            host: in pinned memory, which must not change before the copy has ended.

        Returns:
            The copy, for use on the current stream, and the event that marks the copy's end.
        """
        compute = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            moved = host.to(self._device, non_blocking=True)
            finished = self._stream.record_event()
        compute.wait_stream(self._stream)
        moved.record_stream(compute)
        return moved, finished
