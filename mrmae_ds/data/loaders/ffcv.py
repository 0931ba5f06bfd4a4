"""FFCV backend: batches of a .beton file, decoded by threads of this process."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from queue import Empty

import numpy as np
import torch
from torch import Tensor

from mrmae_ds.data.beton.file import BetonFile
from mrmae_ds.data.loaders._ffcv import import_ffcv, keep_torch_threads
from mrmae_ds.data.loaders.base import EPOCH_ENDED, Batch, DeviceCopier, LoaderSettings, to_device
from mrmae_ds.data.loaders.crop import center_boxes, random_boxes, sample_keys
from mrmae_ds.data.loaders.ffcv_decoder import BoxDecoder, Decoded, build_stock_loader
from mrmae_ds.data.loaders.rand_augment import BatchAugment
from mrmae_ds.data.types import BoolArray, FloatArray, ImageArray, IntArray
from mrmae_ds.errors import UserError

import_ffcv()

from ffcv.loader.epoch_iterator import EpochIterator  # noqa: E402
from numba import config as numba_config  # noqa: E402

_BOXES_AT_ONCE = 2048


class _FixedOrder:
    """Traversal order for FFCV's own loader, which queries it at each epoch."""

    def __init__(self, rows: IntArray) -> None:
        self.rows = rows

    def sample_order(self, epoch: int) -> IntArray:
        """Return the rows, whatever epoch FFCV counts."""
        return self.rows


class FFCVLoader:
    """Loader on top of FFCV's own ``Loader``: its format, threads and ring of buffers; our order and decoder."""

    def __init__(self, settings: LoaderSettings) -> None:
        """Open the file.

        Args:
            settings: data set, batches, threads and device.

        Raises:
            UserError: if the file does not match its sidecar, or there are more threads than cores.
        """
        self.settings = settings
        self.num_samples = settings.order.num_samples
        path, threads = settings.info.path, settings.num_workers
        if threads > numba_config.NUMBA_NUM_THREADS:
            raise UserError(
                f"num_workers is {threads}, but this process has {numba_config.NUMBA_NUM_THREADS} cores "
                "(NUMBA_NUM_THREADS): lower it, or give the job more CPUs"
            )
        file = self._file = BetonFile(settings.info)
        self._labels, self._indices = file.labels, file.indices
        request = settings.request
        policy = request.transform.augment if request.transform is not None else None
        self._augment = BatchAugment(policy, request.image_size, threads) if policy is not None else None
        self._decoder = BoxDecoder(request.image_size, file, threads)
        with keep_torch_threads():
            self._loader = build_stock_loader(path, self._decoder, batch_size=request.micro_batch, threads=threads)
        self.batches_per_epoch = settings.order.batches_per_epoch
        self._open: EpochIterator | None = None
        self._copier = DeviceCopier(settings.device) if settings.device.type == "cuda" else None
        self._decoder.keeps = self._copier is None

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """Iterate over the batches of an epoch; see ``Loader.epoch``."""
        return self._deliver(epoch, *self.settings.order.rows(epoch, start_batch))

    def _deliver(self, epoch: int, rows: IntArray, valid: BoolArray) -> Iterator[Batch]:
        """Start FFCV on ``rows`` [batches, B] and yield its batches."""
        if len(rows) == 0:
            return
        self.close()
        iterator = self._open = self._start(epoch, rows)
        try:
            for batch_rows, batch_valid in zip(rows, valid, strict=True):
                if self._open is not iterator:
                    raise RuntimeError(EPOCH_ENDED)
                (decoded,) = next(iterator)
                images = self._checked(decoded)
                moved, finished = self._copy(images)
                others = (self._labels[batch_rows], self._indices[batch_rows], batch_valid.copy())
                try:
                    keys = sample_keys(self.settings.request.seed, epoch, batch_rows)
                    device = self.settings.device
                    labels, indices, counted = (to_device(torch.from_numpy(array), device) for array in others)
                    yield Batch(moved, labels, indices, counted, keys)
                finally:
                    # The copy reads FFCV's buffer, which is overwritten when the next batch is requested.
                    if finished is not None:
                        finished.synchronize()
        finally:
            if self._open is iterator:
                self.close()

    def _start(self, epoch: int, rows: IntArray) -> EpochIterator:
        """Pass ``rows`` to FFCV's loader and ``epoch`` to the decoder, and start FFCV's thread."""
        request = self.settings.request
        if request.transform is not None:
            self._decoder.augment = partial(self._augment_rows, epoch) if self._augment is not None else None
        self._decoder.boxes = self._boxes(epoch, rows)
        self._decoder.beyond = request.transform is None
        self._decoder.torch_threads = torch.get_num_threads()
        # FFCV refuses a custom order in its constructor, and takes every epoch's length from its first order.
        self._loader.traversal_order = _FixedOrder(rows.reshape(-1))
        self._loader.first_traversal_order = rows.reshape(-1)
        with keep_torch_threads():
            return iter(self._loader)

    def _boxes(self, epoch: int, rows: IntArray) -> Iterator[FloatArray]:
        """Yield the boxes [B, 5] of each batch of ``rows`` [batches, B], computed for many batches at once.

        For a batch alone, numpy's calls would take longer than their arithmetic, while all threads wait.
        """
        request = self.settings.request
        at_once = max(1, _BOXES_AT_ONCE // rows.shape[1])
        for start in range(0, len(rows), at_once):
            part = rows[start : start + at_once]
            samples = part.reshape(-1)
            heights, widths = self._file.table[samples, 2], self._file.table[samples, 3]
            boxes: IntArray | FloatArray
            if request.transform is not None:
                crop = request.transform.crop
                boxes = random_boxes(heights, widths, samples, seed=request.seed, epoch=epoch, crop=crop)
            else:
                boxes = center_boxes(heights, widths, request.image_size)
            yield from boxes.astype(np.float64).reshape(*part.shape, -1)

    def _augment_rows(self, epoch: int, images: ImageArray, rows: IntArray) -> None:
        assert self._augment is not None
        self._augment(images, sample_keys(self.settings.request.seed, epoch, rows))

    def _checked(self, decoded: Decoded) -> ImageArray:
        """Return the images of a batch.

        Raises:
            UserError: if one is damaged.
        """
        if decoded.error is not None:
            raise decoded.error
        assert decoded.images is not None and decoded.failed is not None
        if len(decoded.failed):
            rows = decoded.failed.tolist()
            raise self._file.damaged([f"{row} {self._file.describe_damage(row)}".strip() for row in rows])
        return decoded.images

    def _copy(self, images: ImageArray) -> tuple[Tensor, torch.cuda.Event | None]:
        """Copy a batch [B, H, W, 3], for CUDA from FFCV's pinned ring of buffers, to the device.

        Returns:
            The copy as [B, 3, H, W] and, if it may still be in progress, the event that marks its end.
        """
        if self._copier is None:
            return torch.from_numpy(images).to(self.settings.device).permute(0, 3, 1, 2), None
        moved, finished = self._copier.copy(torch.from_numpy(images))
        return moved.permute(0, 3, 1, 2), finished

    def close(self) -> None:
        """End the open epoch. Otherwise FFCV's thread would wait for its consumer forever."""
        iterator, self._open = self._open, None
        if iterator is None:
            return
        iterator.iter_ixes = iter(())  # nothing more to decode
        iterator.close()
        while iterator.is_alive():
            try:
                iterator.output_queue.get(timeout=0.05)  # makes room, in case the thread waits for it
            except Empty:
                continue
        iterator.memory_allocations = None
