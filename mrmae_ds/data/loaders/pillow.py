"""Pillow backend: worker processes, with bicubic antialiased resizing like torchvision's transforms.

Order, boxes, flips and filter are those of the FFCV backend, so that both yield the same part of the same image; they
differ in rounding, at sharp edges, where Pillow clips the filter's overshoot after each of its two passes, and in that
Pillow interpolates chroma before it resizes it. Slower; for machines without FFCV, as
the reference of tests, and for evaluation by the code that published accuracies were measured with.

Shapes: B micro-batch, S image size.
"""

from __future__ import annotations

import multiprocessing.queues
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mrmae_ds.data.beton.file import BetonFile
from mrmae_ds.data.loaders.augment import Augment
from mrmae_ds.data.loaders.base import EPOCH_ENDED, Batch, LoaderRequest, LoaderSettings, to_device
from mrmae_ds.data.loaders.crop import CropSettings, random_boxes, resize_and_corner, sample_keys
from mrmae_ds.data.loaders.worker import become_worker, check_shared_memory, fork_server, worker_died
from mrmae_ds.data.types import BoolArray, ImageArray, IntArray
from mrmae_ds.errors import UserError

Key = tuple[int, int]  # epoch and row
PreparedT = TypeVar("PreparedT")
_AHEAD = 2  # batches in progress of each worker


def check_pillow_memory(request: LoaderRequest, workers: int) -> None:
    """Check that /dev/shm holds the batches in progress, and two in use; raises UserError."""
    images = (_AHEAD * workers + 2) * request.micro_batch
    check_shared_memory("the Pillow reader", images * 3 * request.image_size**2, workers)


class _Samples(Dataset[ImageArray | str]):
    """Data set of the worker processes: (epoch, row) to an image, uint8 [S, S, 3], or an error message."""

    def __init__(self, file: BetonFile, settings: LoaderSettings) -> None:
        self.file, self.request = file, settings.request
        augment = self.request.transform.augment if self.request.transform is not None else None
        self.augment = Augment(augment, self.request.image_size) if augment is not None else None

    def __getitem__(self, key: Key) -> ImageArray | str:
        epoch, row = key
        try:
            source_image = self.file.image(row)
        except UserError as error:
            return str(error)
        if self.request.transform is None:
            return np.asarray(center_crop(source_image, self.request.image_size))
        image = self._random_crop(source_image, epoch, row, self.request.transform.crop)
        if self.augment is not None:
            keys = sample_keys(self.request.seed, epoch, np.array([row]))
            image = self.augment(image, int(keys[0]))
        return np.asarray(image)

    def _random_crop(self, source_image: Image.Image, epoch: int, row: int, crop: CropSettings) -> Image.Image:
        seed, size = self.request.seed, self.request.image_size
        heights, widths = np.array([source_image.height]), np.array([source_image.width])
        boxes = random_boxes(heights, widths, np.array([row]), seed=seed, epoch=epoch, crop=crop)
        top, left, height, width, mirrored = boxes[0].tolist()
        image = source_image.crop((left, top, left + width, top + height))
        image = image.resize((size, size), Image.Resampling.BICUBIC)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Apply MAE's evaluation transform: resize the short side, crop the center square of ``size`` pixels."""
    short = np.array(min(image.size))
    axes = [resize_and_corner(np.array(side), short, size) for side in image.size]
    (width, left), (height, top) = ((int(resized), int(corner)) for resized, corner in axes)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + size, top + size))


class _Batches:
    """Batch sampler of DataLoader: the keys of one epoch's batches, set before each epoch."""

    def __init__(self) -> None:
        self.epoch = 0
        self.rows: Sequence[Sequence[int]] = ()

    def __iter__(self) -> Iterator[list[Key]]:
        return iter([[(self.epoch, row) for row in batch] for batch in self.rows])

    def __len__(self) -> int:
        return len(self.rows)


def stack_images(images: list[ImageArray | str]) -> Tensor | str:
    """Return a batch [B, H, W, 3] of images [H, W, 3], or the first message among them."""
    for image in images:
        if isinstance(image, str):
            return image
    return torch.from_numpy(np.stack(images))


class WorkerProcesses(Generic[PreparedT]):
    """Processes that prepare the batches of one epoch at a time; they live until ``close``.

    Args:
        samples: data set of the keys (epoch, row) to samples, or to error messages: an exception loses its type on the
            way out of a process.
        collate: function of a batch's samples to the batch, or to an error message.
        num_workers: processes; 0 prepares batches in this one.
        device: device that the batches are copied to.
    """

    def __init__(
        self,
        samples: Dataset[Any],
        collate: Callable[[list[Any]], PreparedT | str],
        num_workers: int,
        device: torch.device,
    ) -> None:
        self._samples, self._collate, self._num_workers, self._device = samples, collate, num_workers, device
        self._batches = _Batches()
        self._loader: DataLoader | None = None
        self._current: object = None

    def epoch(self, epoch: int, rows: Sequence[Sequence[int]]) -> Iterator[PreparedT]:
        """Iterate over batches; starting another epoch ends this one.

        Args:
            epoch: first part of the keys.
            rows: second part, by batch.

        Raises:
            UserError: with a batch's error message, or if a process ended.
        """
        if len(rows) == 0:
            return
        if self._loader is None:
            self._loader = self._open()
        self._batches.epoch, self._batches.rows = epoch, rows
        current = self._current = object()
        try:
            for prepared in self._loader:
                if self._current is not current:
                    raise RuntimeError(EPOCH_ENDED)
                if isinstance(prepared, str):
                    raise UserError(prepared)
                yield prepared
        except RuntimeError as error:
            if str(error).startswith("DataLoader worker"):
                raise worker_died(error) from None
            raise

    def _open(self) -> DataLoader:
        workers: dict[str, Any] = {}
        if self._num_workers:
            # This process has threads by now, of torch and of gloo or NCCL and CUDA, so that a fork of it may hang or
            # lose registered memory. The server has none, and imports once for all workers.
            context = fork_server(type(self._samples).__module__)
            workers = {
                "prefetch_factor": _AHEAD,
                "persistent_workers": True,
                "multiprocessing_context": context,
                "worker_init_fn": _begin,
            }
        return DataLoader(
            self._samples,
            batch_sampler=self._batches,
            num_workers=self._num_workers,
            collate_fn=self._collate,
            pin_memory=self._device.type == "cuda",
            **workers,
        )

    def close(self) -> None:
        """End the open epoch and the processes. Another epoch starts them again."""
        self._current = self._loader = None


class PillowLoader:
    """Loader whose ``num_workers`` are processes, which live until ``close``."""

    def __init__(self, settings: LoaderSettings) -> None:
        """Open the file.

        Args:
            settings: data set, batches, processes and device.

        Raises:
            UserError: if the file does not match its sidecar.
        """
        self.settings = settings
        self.num_samples = settings.order.num_samples
        self.batches_per_epoch = settings.order.batches_per_epoch
        self._file = BetonFile(settings.info)
        samples = _Samples(self._file, settings)
        self._workers: WorkerProcesses[Tensor] = WorkerProcesses(
            samples, stack_images, settings.num_workers, settings.device
        )

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """Iterate over the batches of an epoch; see ``Loader.epoch``."""
        return self._deliver(epoch, *self.settings.order.rows(epoch, start_batch))

    def _deliver(self, epoch: int, rows: IntArray, valid: BoolArray) -> Iterator[Batch]:
        device = self.settings.device
        for images, batch_rows, batch_valid in zip(self._workers.epoch(epoch, rows.tolist()), rows, valid, strict=True):
            others = (self._file.labels[batch_rows], self._file.indices[batch_rows], batch_valid.copy())
            labels, indices, counted = (to_device(torch.from_numpy(array), device) for array in others)
            moved = to_device(images, device)
            keys = sample_keys(self.settings.request.seed, epoch, batch_rows)
            yield Batch(moved.permute(0, 3, 1, 2), labels, indices, counted, keys)

    def close(self) -> None:
        """End the open epoch and the worker processes."""
        self._workers.close()


def _begin(_worker: int) -> None:
    become_worker()
    # A batch for which /dev/shm has no room would be dropped, and the training would wait for it.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end)  # type: ignore[attr-defined]


def _end(error: Exception, batch: object) -> None:
    os._exit(1)
