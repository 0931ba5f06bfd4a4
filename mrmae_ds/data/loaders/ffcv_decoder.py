"""FFCV image decoder that crops, resizes and mirrors by given boxes, without random state.

The work on an image is compiled in ``jpeg_kernel``. FFCV does not compile the rest (``build_stock_loader``), a few
lines of Python per batch.

Shapes: B samples in a batch, S output size, N samples in the file, T threads.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mrmae_ds.data.beton.file import BetonFile
from mrmae_ds.data.loaders._ffcv import import_ffcv
from mrmae_ds.data.types import FloatArray, ImageArray, IntArray

import_ffcv()

import numba  # noqa: E402
from ffcv.fields.rgb_image import SimpleRGBImageDecoder  # noqa: E402
from ffcv.loader import Loader  # noqa: E402
from ffcv.pipeline.allocation_query import AllocationQuery  # noqa: E402
from ffcv.pipeline.compiler import Compiler  # noqa: E402
from ffcv.pipeline.state import State  # noqa: E402

from mrmae_ds.data.loaders import augment_kernel, jpeg_kernel  # noqa: E402

logger = logging.getLogger(__name__)


_COMPILED = {jpeg_kernel.decode: "the JPEG decoder", augment_kernel.augment: "RandAugment and color jitter"}


class CompilationNotice(numba.core.event.Listener):
    """Log that a kernel is compiled. Numba announces it only if it finds no compiled version on disk."""

    def on_start(self, event: Any) -> None:
        """Log the start."""
        name = _COMPILED.get(event.data["dispatcher"])
        if name is not None:
            logger.info("compiling %s, once per installation and CPU type; about half a minute", name)

    def on_end(self, event: Any) -> None:
        """Log nothing."""


numba.core.event.register("numba:compile", CompilationNotice())


@dataclass(frozen=True)
class Decoded:
    """One batch, in FFCV's ring of buffers unless ``BoxDecoder.keeps``: to be copied before the next one is requested.

    Attributes:
        images: uint8 [B, S, S, 3].
        failed: rows of the file whose JPEG is damaged, int64; their pixels are undefined.
        error: any other failure. An exception in FFCV's thread would leave its consumer waiting forever.
    """

    images: ImageArray | None
    failed: IntArray | None
    error: Exception | None = None


class BoxDecoder(SimpleRGBImageDecoder):
    """Decoder for an ``RGBImageField`` of JPEGs and raw images, with square output.

    Args:
        size: S, pixels.
        file: the data set.
        threads: T.

    Attributes:
        boxes: boxes [B, 5] (``crop``) of each batch in turn, set before each epoch.
        augment: function that changes images [B, S, S, 3] of rows [B], set before each epoch; None changes nothing.
        beyond: True crops after resizing (``jpeg_kernel.decode``).
        keeps: True gives each batch memory of its own, instead of FFCV's ring, which must be copied from.
        torch_threads: torch's number of threads in FFCV's thread.
    """

    def __init__(self, size: int, file: BetonFile, threads: int) -> None:
        super().__init__()
        self.size = size
        self.table, self.checksums, self.fields = file.table, file.checksums, file.names
        self.boxes: Iterator[FloatArray] = iter(())
        self.augment: Callable[[ImageArray, IntArray], None] | None = None
        self.beyond = False
        self.keeps = False
        self.torch_threads = torch.get_num_threads()
        self._scratch = jpeg_kernel.make_scratch(file.table, size, threads)
        # Not at the interpreter's exit, where FFCV's thread may still be using them.
        weakref.finalize(self, jpeg_kernel.free_scratch, self._scratch).atexit = False

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        """Return the output's shape and the memory of one sample to FFCV."""
        shape, dtype = (self.size, self.size, 3), np.dtype("u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable[..., Decoded]:
        """Return the function that FFCV calls on each batch."""

        def decode(rows: IntArray, images: ImageArray, _metadata: Any, storage: tuple[Any, ...]) -> Decoded:
            try:
                return self._decode_batch(rows, images, storage[0])
            except Exception as error:
                return Decoded(None, None, error)

        return decode

    def _decode_batch(self, rows: IntArray, images: ImageArray, file: ImageArray) -> Decoded:
        if torch.get_num_threads() != self.torch_threads:
            torch.set_num_threads(self.torch_threads)
        status = np.zeros(len(rows), dtype=np.int32)
        images = np.empty_like(images) if self.keeps else images
        jpeg_kernel.decode(
            file.view(np.ndarray), self.table, self.checksums, rows, next(self.boxes), self.beyond, images,
            self._scratch, status,
        )  # fmt: skip
        if self.augment is not None:
            self.augment(images, rows)
        return Decoded(images, rows[status != 0])


def damaged_rows(file: BetonFile, rows: IntArray) -> IntArray:
    """Find damaged JPEGs by decoding them as training does.

    Unlike Pillow, this decoder treats the JPEG library's warnings (a stretch of bad data) as errors.

    Args:
        file: the data set.
        rows: samples to decode, int64.

    Returns:
        The samples whose JPEG is damaged, int64.
    """
    boxes = np.zeros((len(rows), 5))
    boxes[:, 2:4] = file.table[rows, 2:4]
    images = np.empty((len(rows), 8, 8, 3), dtype=np.uint8)
    status = np.zeros(len(rows), dtype=np.int32)
    threads = numba.config.NUMBA_NUM_THREADS
    numba.set_num_threads(threads)
    scratch = jpeg_kernel.make_scratch(file.table[rows], 8, threads)
    try:
        jpeg_kernel.decode(file.content, file.table, file.checksums, rows, boxes, False, images, scratch, status)
    finally:
        jpeg_kernel.free_scratch(scratch)
    return rows[status != 0]


def build_stock_loader(path: Path, decoder: BoxDecoder, *, batch_size: int, threads: int) -> Loader:
    """Build FFCV's ``Loader`` of the images alone, without compilation: ``decoder`` has a compiled function."""
    enabled = Compiler.is_enabled
    Compiler.set_enabled(False)
    try:
        pipelines = {**dict.fromkeys(decoder.fields), "image": [decoder]}
        return Loader(str(path), batch_size=batch_size, num_workers=threads, os_cache=True, pipelines=pipelines)
    finally:
        Compiler.set_enabled(enabled)
