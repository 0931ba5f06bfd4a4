"""Offloaded teachers (``step`` and ``stream``): weights stay in host memory and are copied to the device on demand.

Copies go only from host to device: the host copy never changes, so used weights are simply dropped. On CUDA the host
copy is pinned, and copies run on their own stream, concurrently with computation. Without CUDA a copy stays within host
memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mrmae_ds.errors import UserError
from mrmae_ds.models.masking import VisibleSet
from mrmae_ds.teachers.base import Teacher, TeacherOutput
from mrmae_ds.teachers.placement.base import PlacedTeacher
from mrmae_ds.teachers.placement.offload_units import offload_layout

# Alignment in bytes of each tensor in its unit's memory; no kernel needs more.
ALIGNMENT = 256


class Bundle:
    """A group of tensors in one buffer of host memory, and in one of device memory while they are needed.

    The tensors keep their identity (their ``data`` is exchanged). While they are offloaded they are empty, so that an
    unforeseen use raises instead of computing something else.

    Args:
        tensors: tensors on the CPU; they are offloaded when the constructor returns.
        device: device that they are copied to.
        stream: CUDA stream of the copies; None copies synchronously.

    Attributes:
        num_bytes: size of the buffer.
        master: the host buffer, uint8 [num_bytes].
        working: the device buffer, or None while the tensors are offloaded.
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self.tensors, self.device, self.stream = list(tensors), device, stream
        self.layouts: list[tuple[int, torch.dtype, torch.Size, tuple[int, ...]]] = []
        self.num_bytes = 0
        for tensor in self.tensors:
            strides = torch.empty_like(tensor, device="meta").stride()
            self.layouts.append((self.num_bytes, tensor.dtype, tensor.shape, strides))
            self.num_bytes += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self.master = torch.empty(self.num_bytes, dtype=torch.uint8, pin_memory=stream is not None)
        for tensor, view in zip(self.tensors, self._views(self.master), strict=True):
            view.copy_(tensor.data)
        self.working: Tensor | None = None
        self.arrived: torch.cuda.Event | None = None
        self.drop()

    def fetch(self) -> None:
        """Start copying the tensors to the device; call :meth:`wait` before using them."""
        # Allocated on the compute stream, which can reuse the memory as soon as it frees it.
        self.working = torch.empty(self.num_bytes, dtype=torch.uint8, device=self.device)
        if self.stream is None:
            self.working.copy_(self.master)
        else:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                self.working.copy_(self.master, non_blocking=True)
                self.arrived = self.stream.record_event()
        for tensor, view in zip(self.tensors, self._views(self.working), strict=True):
            tensor.data = view

    def wait(self) -> None:
        """Make the compute stream wait for the copy."""
        if self.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(self.arrived)
            self.arrived = None

    def drop(self) -> None:
        """Free the device buffer once pending work no longer uses it."""
        self.wait()
        for tensor in self.tensors:
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=self.device)
        self.working = None

    def _views(self, memory: Tensor) -> list[Tensor]:
        return [
            memory[start : start + shape.numel() * dtype.itemsize].view(dtype).as_strided(shape, strides)
            for start, dtype, shape, strides in self.layouts
        ]


class OffloadedTeacher(PlacedTeacher):
    """A teacher whose weights are on the device only during a call, or only while their unit runs.

    Args:
        name: key under ``teachers`` in the recipe.
        teacher: the teacher, on the CPU.
        device: device of this rank.
        ahead: number of units to prefetch while one computes; each unit is dropped after it ran (``stream``). None
            copies all units at the start of a call, in execution order, and drops them at its end (``step``).

    Raises:
        UserError: if the teacher does not run on the CPU.
    """

    def __init__(self, name: str, teacher: Teacher, device: torch.device, ahead: int | None) -> None:
        super().__init__(teacher)
        try:
            layout = offload_layout(teacher)
        except RuntimeError as error:
            raise UserError(
                f"stages.pretrain.placement.{name}: the teacher does not run on the CPU, which is needed to trace when "
                f"it uses which weights ({' '.join(str(error).split())}); use device or sharded, or "
                f"teachers.{name}.precision: fp32"
            ) from None
        self.pinned = device.type == "cuda"
        stream = torch.cuda.Stream(device) if self.pinned else None
        self.ahead, self.order, self.held = ahead, layout.order, [unit.held for unit in layout.units]
        for tensor in layout.idle:
            tensor.data = tensor.data.new_empty(0)
        self.rest = Bundle(layout.rest, device, stream)
        self.units = [Bundle(unit.tensors, device, stream) for unit in layout.units]
        self.position = 0
        self.handles = []
        for index, unit in enumerate(layout.units):
            self.handles.append(unit.module.register_forward_pre_hook(partial(self._before, index)))
            self.handles.append(unit.module.register_forward_hook(partial(self._after, index)))

    def _targets(self, pixels: Tensor, visible: VisibleSet | None) -> TeacherOutput:
        try:
            self.position = 0
            self._fetch(self.rest)
            self._fetch_next()
            self.rest.wait()
            return self.teacher(pixels, visible)
        finally:
            for bundle in (self.rest, *self.units):
                self._drop(bundle)

    def _before(self, index: int, *_: Any) -> None:
        self._fetch(self.units[index])
        self.units[index].wait()
        if index in self.order[self.position :]:
            self.position = self.order.index(index, self.position) + 1
        self._fetch_next()

    def _after(self, index: int, *_: Any) -> None:
        if self.ahead is not None and not self.held[index] and index not in self._upcoming():
            self._drop(self.units[index])

    def _upcoming(self) -> tuple[int, ...]:
        """Return the indices of the next units to prefetch."""
        return self.order[self.position :][: self.ahead]

    def _fetch_next(self) -> None:
        for index in self._upcoming():
            self._fetch(self.units[index])

    def _fetch(self, bundle: Bundle) -> None:
        if bundle.working is None:
            self._count(bundle.num_bytes)
            bundle.fetch()

    def _drop(self, bundle: Bundle) -> None:
        if bundle.working is not None:
            bundle.drop()
            self._count(-bundle.num_bytes)

    def release(self) -> None:
        """Free the memory of the weights on host and device; the teacher's attributes stay."""
        for handle in self.handles:
            handle.remove()
        for bundle in (self.rest, *self.units):
            self._drop(bundle)
        self.rest, self.units, self.handles = Bundle((), self.rest.device, None), [], []
        super().release()
        if self.pinned and hasattr(torch.accelerator, "empty_host_cache"):  # torch caches pinned memory
            torch.accelerator.empty_host_cache()
