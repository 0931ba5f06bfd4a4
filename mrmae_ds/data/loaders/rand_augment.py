"""RandAugment after the FFCV backend: worker processes change the decoded images in shared memory.

timm's RandAugment needs processes because it uses Pillow images and global generators; FFCV's threads decode. The next
batches are augmented while one is used.

Shapes: B micro-batch, S image size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mrmae_ds.data.loaders.augment import Augment, AugmentSettings
from mrmae_ds.data.loaders.base import (
    EPOCH_ENDED,
    Batch,
    DeviceCopier,
    Loader,
    LoaderRequest,
    LoaderSettings,
    to_device,
)
from mrmae_ds.data.loaders.worker import become_worker, check_shared_memory, fork_server, worker_died
from mrmae_ds.data.types import ImageArray, UIntArray

_AHEAD = 2  # batches in progress while one is used
_CHUNKS = 2  # pieces of a batch per process: small ones balance the load at its end


def check_augment_memory(request: LoaderRequest, processes: int) -> None:
    """Check that /dev/shm holds the batches in progress; raises UserError."""
    images = (_AHEAD + 1) * request.micro_batch
    check_shared_memory("RandAugment", images * 3 * request.image_size**2, processes)


class _Pending(NamedTuple):
    batch: Batch
    slot: int
    work: list[Future[None]]


class RandAugmentLoader:
    """Loader that augments another loader's batches and moves them to the device.

    Args:
        inner: yields batches on the CPU.
        settings: data set, batches and device.
        augment: the policy.
        processes: number of worker processes; they live until ``close``.
    """

    def __init__(
        self, inner: Loader[Batch], settings: LoaderSettings, augment: AugmentSettings, processes: int
    ) -> None:
        self.inner, self.augment, self.processes = inner, augment, processes
        self.device, self.image_size = settings.device, settings.request.image_size
        self.num_samples, self.batches_per_epoch = inner.num_samples, inner.batches_per_epoch
        shape = (_AHEAD + 1, settings.request.micro_batch, self.image_size, self.image_size, 3)
        self._slots = torch.empty(shape, dtype=torch.uint8).share_memory_()
        self._uploader = _Uploader(self._slots[0], self.device) if self.device.type == "cuda" else None
        self._pool: ProcessPoolExecutor | None = None
        self._pending: deque[_Pending] = deque()
        self._current: object = None

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """Iterate over the batches of an epoch; see ``Loader.epoch``.

        Raises:
            UserError: if a worker process dies.
        """
        return self._deliver(self.inner.epoch(epoch, start_batch))

    def _deliver(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        self._drain()
        current = self._current = object()
        pending = self._pending
        free = deque(range(len(self._slots)))
        for batch in batches:
            pending.append(self._submit(batch, free.popleft()))
            if len(pending) > _AHEAD:
                yield self._finish(free, current)
        while pending or self._current is not current:
            yield self._finish(free, current)

    def _submit(self, batch: Batch, slot: int) -> _Pending:
        if self._pool is None:
            self._pool = self._start()
        count = len(batch.keys)
        # By numpy: torch would wake OpenMP's threads, which then spin for longer than the copy takes.
        self._slots.numpy()[slot, :count] = batch.images.permute(0, 2, 3, 1).numpy()
        step = -(-count // (self.processes * _CHUNKS))
        pieces = [range(start, min(start + step, count)) for start in range(0, count, step)]
        work = [self._pool.submit(_augment, slot, piece, batch.keys[piece.start : piece.stop]) for piece in pieces]
        return _Pending(batch, slot, work)

    def _drain(self) -> None:
        """Finish the work of an earlier epoch before its slots are overwritten."""
        self._current = None
        wait([future for pending in self._pending for future in pending.work if not future.cancel()])
        self._pending.clear()

    def _finish(self, free: deque[int], current: object) -> Batch:
        if self._current is not current:
            raise RuntimeError(EPOCH_ENDED)
        batch, slot, work = self._pending.popleft()
        try:
            for future in work:
                future.result()
        except BrokenProcessPool as error:
            raise worker_died(error) from None
        augmented = self._slots.numpy()[slot, : len(batch.keys)]
        images = self._uploader(augmented) if self._uploader else torch.from_numpy(augmented.copy())
        free.append(slot)
        labels, indices, valid = (
            to_device(tensor, self.device) for tensor in (batch.labels, batch.indices, batch.valid)
        )
        return Batch(images.permute(0, 3, 1, 2), labels, indices, valid, batch.keys)

    def _start(self) -> ProcessPoolExecutor:
        # Not forked from here: FFCV's threads run in this process. The server imports once for all workers.
        context = fork_server(__name__)
        prepare = partial(_prepare, self._slots, self.augment, self.image_size)
        return ProcessPoolExecutor(self.processes, mp_context=context, initializer=prepare)

    def close(self) -> None:
        """End the open epoch, its threads and the worker processes."""
        self._drain()
        self.inner.close()
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)


class _Uploader:
    """Copies batches to a CUDA device through one pinned buffer.

    Args:
        like: uint8 [B, S, S, 3], the largest batch.
        device: the CUDA device.
    """

    def __init__(self, like: Tensor, device: torch.device) -> None:
        self._buffer = torch.empty_like(like, pin_memory=True)
        self._copier = DeviceCopier(device)
        self._finished: torch.cuda.Event | None = None

    def __call__(self, images: ImageArray) -> Tensor:
        """Return the copy; ``images`` may be overwritten at once."""
        if self._finished is not None:
            self._finished.synchronize()  # the copy of the batch before, which ended long ago
        self._buffer.numpy()[: len(images)] = images
        moved, self._finished = self._copier.copy(self._buffer[: len(images)])
        return moved


class _Worker(NamedTuple):
    slots: ImageArray
    augment: Augment


_worker: _Worker  # of a worker process


def _prepare(slots: Tensor, settings: AugmentSettings, size: int) -> None:
    global _worker
    become_worker()
    _worker = _Worker(slots.numpy(), Augment(settings, size))


def _augment(slot: int, samples: range, keys: UIntArray) -> None:
    for sample, key in zip(samples, keys.tolist(), strict=True):
        image = _worker.slots[slot, sample]
        image[:] = np.asarray(_worker.augment(Image.fromarray(image), key))
