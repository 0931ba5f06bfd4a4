"""Batches of COCO images for training and evaluation.

The order is that of the project's other loaders (``data/loaders/sampler.py``), the jitter a function of
(seed, epoch, row): workers, ranks and restarts change nothing. Masks travel from the workers as RLE and are decoded
when their batch is used, because those of one image can take 90 MB.

Shapes: B micro-batch, S side of the square input, n objects of an image, h x w its part of the square.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mrmae_ds.data.convert.images import ImageError, read_rgb, read_upright
from mrmae_ds.data.loaders.base import EpochOrder, LoaderRequest, to_device
from mrmae_ds.data.loaders.pillow import Key, WorkerProcesses
from mrmae_ds.data.types import BoolArray, FloatArray, ImageArray, IntArray
from mrmae_ds.detection.boxes import Size
from mrmae_ds.detection.coco import CocoSplit, ImageEntry
from mrmae_ds.detection.jitter import (
    Jitter,
    JitterSettings,
    boxes_of_masks,
    eval_jitter,
    jitter_image,
    jitter_masks,
    jitter_numbers,
    jitter_of,
)
from mrmae_ds.detection.rle import Rle, mask_api

Target = dict[str, Tensor]


@dataclass(frozen=True)
class DetectionBatch:
    """One micro-batch of one rank.

    Attributes:
        images: uint8 [B, 3, S, S] on the device, zero to the right of and below each image's h x w pixels.
        sizes: h and w of each image in the square.
        entries: of each image, with its original size.
        indices: int64 [B], rows in the index.
        valid: False marks a repeated image that pads an evaluation batch.
        targets: in training, of each image on the device ``boxes`` (float32 [n, 4]: left, top, right, bottom in pixels
            of the square), ``labels`` (int64 [n], 1 to K) and ``masks`` (uint8 [n, h, w]); n may be 0. Empty in
            evaluation.
    """

    images: Tensor
    sizes: tuple[Size, ...]
    entries: tuple[ImageEntry, ...]
    indices: Tensor
    valid: tuple[bool, ...]
    targets: tuple[Target, ...]

    def normalized(self, mean: Tensor, std: Tensor) -> Tensor:
        """Return the model's input: normalized, then zero outside the images.

        Args:
            mean: [1, 3, 1, 1], of pixels in 0 to 1.
            std: [1, 3, 1, 1], of pixels in 0 to 1.

        Returns:
            float32 [B, 3, S, S].
        """
        images = (self.images.float() / 255 - mean) / std
        for image, (height, width) in zip(images, self.sizes, strict=True):
            image[:, height:] = 0
            image[:, :, width:] = 0
        return images


class _Sample(NamedTuple):
    """An image as a worker prepares it; ``masks`` are at its size h x w."""

    image: ImageArray
    boxes: FloatArray
    labels: IntArray
    masks: list[Rle]


class _Prepared(NamedTuple):
    """A batch as it leaves a worker."""

    images: Tensor
    sizes: list[Size]
    objects: list[tuple[FloatArray, IntArray, list[Rle]]]


class DetectionLoader:
    """One rank's batches of a data set; workers are processes, which live until ``close``.

    Args:
        split: the images.
        request: the batches; ``transform`` is not used, and ``samples`` in evaluation alone.
        jitter: of training, with images shuffled and whole global batches only. None is evaluation: in order, every
            image once.
        num_workers: processes; 0 prepares batches in this one.
        device: of the batches.

    Attributes:
        num_samples: images over all ranks.
        batches_per_epoch: micro-batches of this rank in an epoch, the same on every rank.

    Raises:
        UserError: if a training set is smaller than one global batch.
    """

    def __init__(
        self,
        split: CocoSplit,
        request: LoaderRequest,
        jitter: JitterSettings | None,
        num_workers: int,
        device: torch.device,
    ) -> None:
        self._split, self._device = split, device
        self._order = EpochOrder(request, split.num_samples, split.folder, training=jitter is not None)
        self.num_samples = self._order.num_samples
        self.batches_per_epoch = self._order.batches_per_epoch
        samples = _Samples(split, request, jitter)
        collate = _Collate(request, training=jitter is not None)
        self._workers: WorkerProcesses[_Prepared] = WorkerProcesses(samples, collate, num_workers, device)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[DetectionBatch]:
        """Iterate over the batches of an epoch from ``start_batch`` on, without decoding those before it.

        One epoch is open at a time: starting another ends it.

        Args:
            epoch: not negative.
            start_batch: first batch.

        Raises:
            UserError: if there is no such epoch or batch, or an image is damaged or of another size than annotated.
        """
        places, valid = self._order.rows(epoch, start_batch)
        return self._deliver(epoch, self._split.rows[places], valid)

    def _deliver(self, epoch: int, rows: IntArray, valid: BoolArray) -> Iterator[DetectionBatch]:
        for prepared, batch_rows, batch_valid in zip(
            self._workers.epoch(epoch, rows.tolist()), rows, valid, strict=True
        ):
            yield DetectionBatch(
                images=to_device(prepared.images, self._device).permute(0, 3, 1, 2),
                sizes=tuple(prepared.sizes),
                entries=tuple(self._split.index.image(row) for row in batch_rows),
                indices=to_device(torch.from_numpy(batch_rows), self._device),
                valid=tuple(batch_valid.tolist()),
                targets=tuple(
                    _target(boxes, labels, masks, size, self._device)
                    for (boxes, labels, masks), size in zip(prepared.objects, prepared.sizes, strict=False)
                ),
            )

    def close(self) -> None:
        """End the open epoch and the worker processes. The loader can be used again afterwards."""
        self._workers.close()


class _Samples(Dataset[_Sample | str]):
    """Data set of the worker processes: (epoch, row) to a sample, or an error message."""

    def __init__(self, split: CocoSplit, request: LoaderRequest, jitter: JitterSettings | None) -> None:
        self._split, self._seed, self._jitter, self._side = split, request.seed, jitter, request.image_size

    def __getitem__(self, key: Key) -> _Sample | str:
        epoch, row = key
        entry = self._split.index.image(row)
        path = self._split.folder / entry.name
        try:
            image = read_rgb(path)  # gray and CMYK too
        except (OSError, ImageError) as error:
            return f"{path}: not a readable image ({error}); copy or download it again"
        if image.size != (entry.width, entry.height):
            return (
                f"{path} is {image.width} x {image.height} pixels, but {entry.width} x {entry.height} in the "
                f"annotations; {_size_hint(path, image, entry)}"
            )
        if self._jitter is None:
            return _prepare(image, eval_jitter(entry.height, entry.width, self._side))
        numbers = jitter_numbers(self._seed, epoch, row)
        return self._with_objects(image, row, jitter_of(numbers, entry.height, entry.width, self._jitter))

    def _with_objects(self, image: Image.Image, row: int, jitter: Jitter) -> _Sample:
        annotations = self._split.index.annotations(row)
        used = np.flatnonzero(~annotations.crowd & (annotations.boxes[:, 2:] > 0).all(axis=1))
        masks = jitter_masks([annotations.masks[number] for number in used.tolist()], jitter)
        left = masks.any(axis=(1, 2))
        masks, classes = masks[left], annotations.classes[used][left]
        encoded = mask_api.encode(masks.transpose(2, 1, 0)) if len(masks) else []
        return _prepare(image, jitter)._replace(boxes=boxes_of_masks(masks), labels=classes + 1, masks=encoded)


def _size_hint(path: Path, image: Image.Image, entry: ImageEntry) -> str:
    """Return the fix for an image of another size than annotated."""
    if (image.height, image.width) == (entry.width, entry.height):
        if read_upright(path).size == (entry.width, entry.height):
            return (
                "its EXIF orientation, which training ignores, makes them equal: the upright image was annotated, so "
                "write all images upright (mogrify -auto-orient)"
            )
        return "width and height are exchanged: correct them in the annotations, or the image's rotation"
    return "use the images that were annotated, without rotating or resizing them"


def _prepare(image: Image.Image, jitter: Jitter) -> _Sample:
    """Transform an image; without objects."""
    return _Sample(jitter_image(image, jitter), np.zeros((0, 4)), np.zeros(0, dtype=np.int64), [])


class _Collate:
    """Pads images to a square and keeps the objects in lists; returns the first error message, if any."""

    def __init__(self, request: LoaderRequest, *, training: bool) -> None:
        self._side, self._rank, self._training = request.image_size, request.rank, training

    def __call__(self, samples: list[_Sample | str]) -> _Prepared | str:
        images = torch.zeros(len(samples), self._side, self._side, 3, dtype=torch.uint8)
        sizes: list[Size] = []
        objects = []
        for square, sample in zip(images.numpy(), samples, strict=True):
            if isinstance(sample, str):
                return f"rank {self._rank}: {sample}"
            height, width, _ = sample.image.shape
            square[:height, :width] = sample.image
            sizes.append((height, width))
            objects.append((sample.boxes, sample.labels, sample.masks))
        return _Prepared(images, sizes, objects if self._training else [])


def _target(boxes: FloatArray, labels: IntArray, masks: list[Rle], size: Size, device: torch.device) -> Target:
    """Decode the masks of an image and move its objects to the device."""
    decoded = np.zeros((0, *size), dtype=np.uint8)
    if masks:
        decoded = np.ascontiguousarray(mask_api.decode(masks).transpose(2, 0, 1))
    arrays = {"boxes": boxes.astype(np.float32), "labels": labels, "masks": decoded}
    return {name: to_device(torch.from_numpy(array), device) for name, array in arrays.items()}
