"""Where a frozen teacher's weights live while a student is trained: around a teacher, which knows nothing of it.

Every placement gives the same targets. What differs is which weights are on the device, and when (``resident_bytes``),
and so the time that a batch takes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from mrmae_ds.config.stages import PlacementConfig
from mrmae_ds.teachers.base import Teacher, TeacherOutput
from mrmae_ds.teachers.placement.units import count_bytes, tensors_of


class PlacedTeacher(ABC):
    """A teacher whose weights are where a recipe wants them.

    Call it as the teacher is called. It owns the weights from then on: :meth:`release` gives all their memory back.

    Attributes:
        teacher: whose ``network`` may lack its weights between calls.
        resident_bytes: of weights in the device's memory now, of this process.
        peak_resident_bytes: the most there were since this was built.
    """

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.resident_bytes = 0
        self.peak_resident_bytes = 0
        self.released = False

    def __call__(self, pixels: Tensor) -> TeacherOutput:
        """See :meth:`Teacher.forward`; every process must call it equally often."""
        if self.released:
            raise RuntimeError("this teacher's weights were released")
        return self._targets(pixels)

    def release(self) -> None:
        """Give the memory of the weights back, wherever they are. What is known about the teacher stays. Never waits
        for other processes; a second call does nothing."""
        self.released = True
        self.teacher.forget_weights()
        self.resident_bytes = 0

    @abstractmethod
    def _targets(self, pixels: Tensor) -> TeacherOutput: ...

    def _count(self, change: int) -> None:
        """So many bytes more on the device."""
        self.resident_bytes += change
        self.peak_resident_bytes = max(self.peak_resident_bytes, self.resident_bytes)


class ResidentTeacher(PlacedTeacher):
    """``device``: all weights on the device, all the time."""

    def __init__(self, teacher: Teacher, device: torch.device) -> None:
        super().__init__(teacher.to(device))
        self._count(count_bytes(tensors_of(teacher)))

    def _targets(self, pixels: Tensor) -> TeacherOutput:
        return self.teacher(pixels)


def place_teacher(name: str, teacher: Teacher, placement: PlacementConfig, device: torch.device) -> PlacedTeacher:
    """Put a teacher, built on the CPU, where the recipe wants it, and note that among the teacher's facts.

    Args:
        name: its key under ``teachers`` in the recipe.
        teacher: whose weights the placement then owns.
        placement: the recipe's. For ``sharded`` a process group must exist, and all processes call this.
        device: of this process.

    Raises:
        UserError: if this machine cannot offload as the recipe wants, or ``step`` or ``stream`` cannot try the teacher.
    """
    teacher.facts["placement"] = str(placement)
    if placement.kind == "device":
        return ResidentTeacher(teacher, device)
    if placement.kind == "sharded":
        from mrmae_ds.teachers.placement.sharded import ShardedTeacher

        return ShardedTeacher(name, teacher, placement, device)
    from mrmae_ds.teachers.placement.offloaded import OffloadedTeacher

    return OffloadedTeacher(name, teacher, device, ahead=1 if placement.kind == "stream" else None)
