"""Base class of placed teachers, and the placement that keeps all weights on the device.

Every placement computes the same targets. Placements differ in which weights are on the device at which time
(``resident_bytes``), and hence in the time per batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from mrmae_ds.models.compiled import compile_each
from mrmae_ds.models.masking import VisibleSet
from mrmae_ds.teachers.base import Teacher, TeacherOutput
from mrmae_ds.teachers.placement.offload_units import composite_units, count_bytes, tensors_of


class PlacedTeacher(ABC):
    """A teacher whose weights are managed by a placement.

    It is called like the teacher itself and owns the weights: :meth:`release` frees all their memory.

    Attributes:
        teacher: the teacher; its ``network`` may have empty weights between calls.
        resident_bytes: bytes of weights in this rank's device memory now.
        peak_resident_bytes: maximum of ``resident_bytes`` since construction.
        released: True after :meth:`release`.
    """

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.resident_bytes = 0
        self.peak_resident_bytes = 0
        self.released = False

    def __call__(self, pixels: Tensor, visible: VisibleSet | None = None) -> TeacherOutput:
        """Compute the targets of images, as :meth:`Teacher.forward` does; all ranks must call it equally often.

        Args:
            pixels: decoded, not normalized images in [0, 1], float [B, 3, H, W].
            visible: the student's visible set, for a teacher that sees it.

        Raises:
            RuntimeError: after :meth:`release`.
        """
        if self.released:
            raise RuntimeError("this teacher's weights were released")
        return self._targets(pixels, visible)

    def release(self) -> None:
        """Free the memory of the weights, wherever they are; the teacher's attributes stay.

        It never waits for other ranks, and a second call does nothing.
        """
        self.released = True
        self.teacher.free_weights()
        self.resident_bytes = 0

    @abstractmethod
    def _targets(self, pixels: Tensor, visible: VisibleSet | None) -> TeacherOutput: ...

    def _count(self, change: int) -> None:
        """Add ``change`` bytes to those resident on the device."""
        self.resident_bytes += change
        self.peak_resident_bytes = max(self.peak_resident_bytes, self.resident_bytes)


class ResidentTeacher(PlacedTeacher):
    """``device``: all weights stay on the device.

    Args:
        teacher: the teacher.
        device: of this rank.
        compiled: compile each block with torch.
    """

    def __init__(self, teacher: Teacher, device: torch.device, compiled: bool = False) -> None:
        super().__init__(teacher.to(device))
        if compiled:
            compile_each(composite_units(teacher.network))
        self._count(count_bytes(tensors_of(teacher)))

    def _targets(self, pixels: Tensor, visible: VisibleSet | None) -> TeacherOutput:
        return self.teacher(pixels, visible)
