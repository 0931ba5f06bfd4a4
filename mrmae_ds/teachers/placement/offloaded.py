"""``step`` and ``stream``: weights stay in host memory and are copied to the device when they are needed.

Only towards the device: the host's copy never changes, so what was used is dropped. On CUDA the host's copy is pinned
and copies run on a stream of their own, beside what computes. Without CUDA a copy is a copy, within the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mrmae_ds.errors import UserError
from mrmae_ds.teachers.base import Teacher, TeacherOutput
from mrmae_ds.teachers.placement.build import PlacedTeacher
from mrmae_ds.teachers.placement.units import lay_out

# Where each tensor begins in its unit's memory: no kernel wants more.
ALIGNMENT = 256


class Bundle:
    """Some of a module's tensors: one piece of host memory, and while they are needed one of the device's.

    The tensors keep their identity (their ``data`` is exchanged). While they are away they are empty, so that a use
    that nobody foresaw fails instead of computing something else.

    Args:
        tensors: on the CPU; they are away when this returns.
        device: where they are needed.
        stream: of the copies; None copies without one.
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
        """Begin to copy the tensors to the device. Call :meth:`wait` before they are used."""
        # Allocated by the stream that computes: what it frees later it may use again at once.
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
        """Let what computes from now on wait for the copy."""
        if self.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(self.arrived)
            self.arrived = None

    def drop(self) -> None:
        """Free the device's memory, after what already uses it."""
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
    """Weights on the device only for a call, or only for as long as their unit runs.

    Args:
        name: the teacher's in the recipe.
        teacher: on the CPU.
        device: of this process.
        ahead: units that are copied while one computes, after which its weights are dropped (``stream``); None copies
            all of them when a call begins, in the order in which they run, and drops them when it ends (``step``).

    Raises:
        UserError: if the teacher cannot be tried on the CPU.
    """

    def __init__(self, name: str, teacher: Teacher, device: torch.device, ahead: int | None) -> None:
        super().__init__(teacher)
        try:
            layout = lay_out(teacher)
        except RuntimeError as error:
            raise UserError(
                f"stages.pretrain.placement.{name}: the teacher does not run on the CPU, where it is tried to see when "
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
        for number, unit in enumerate(layout.units):
            self.handles.append(unit.module.register_forward_pre_hook(partial(self._before, number)))
            self.handles.append(unit.module.register_forward_hook(partial(self._after, number)))

    def _targets(self, pixels: Tensor) -> TeacherOutput:
        try:
            self.position = 0
            self._fetch(self.rest)
            self._fetch_next()
            self.rest.wait()
            return self.teacher(pixels)
        finally:
            for bundle in (self.rest, *self.units):
                self._drop(bundle)

    def _before(self, number: int, *_: Any) -> None:
        self._fetch(self.units[number])
        self.units[number].wait()
        if number in self.order[self.position :]:
            self.position = self.order.index(number, self.position) + 1
        self._fetch_next()

    def _after(self, number: int, *_: Any) -> None:
        if self.ahead is not None and not self.held[number] and number not in self._coming():
            self._drop(self.units[number])

    def _coming(self) -> tuple[int, ...]:
        """The units that run next, as far as they are copied ahead."""
        return self.order[self.position :][: self.ahead]

    def _fetch_next(self) -> None:
        for number in self._coming():
            self._fetch(self.units[number])

    def _fetch(self, bundle: Bundle) -> None:
        if bundle.working is None:
            self._count(bundle.num_bytes)
            bundle.fetch()

    def _drop(self, bundle: Bundle) -> None:
        if bundle.working is not None:
            bundle.drop()
            self._count(-bundle.num_bytes)

    def release(self) -> None:
        """See :class:`PlacedTeacher`."""
        for handle in self.handles:
            handle.remove()
        for bundle in (self.rest, *self.units):
            self._drop(bundle)
        self.rest, self.units, self.handles = Bundle((), self.rest.device, None), [], []
        super().release()
        if self.pinned and hasattr(torch.accelerator, "empty_host_cache"):  # torch would keep the pinned memory
            torch.accelerator.empty_host_cache()
