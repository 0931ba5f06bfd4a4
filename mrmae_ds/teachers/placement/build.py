"""Place a teacher's weights as the recipe says."""

from __future__ import annotations

import torch

from mrmae_ds.config.stages import PlacementConfig
from mrmae_ds.teachers.base import Teacher
from mrmae_ds.teachers.placement.base import PlacedTeacher, ResidentTeacher
from mrmae_ds.teachers.placement.offloaded import OffloadedTeacher


def place_teacher(
    name: str, teacher: Teacher, placement: PlacementConfig, device: torch.device, compiled: bool = False
) -> PlacedTeacher:
    """Place a teacher that was built on the CPU, and record the placement in its ``details``.

    Args:
        name: key under ``teachers`` in the recipe.
        teacher: the teacher; the placement owns its weights afterwards.
        placement: the recipe's placement. ``sharded`` requires a process group and that all ranks call this function.
        device: device of this rank.
        compiled: compile each block with torch; only for ``device``.

    Raises:
        UserError: if this machine does not support the requested offloading, or if ``step`` or ``stream`` cannot run
            the teacher on the CPU.
    """
    teacher.details["placement"] = str(placement)
    if placement.kind == "device":
        return ResidentTeacher(teacher, device, compiled)
    if placement.kind == "sharded":
        # Imported late: it imports DeepSpeed, which is slow and not needed for any other placement.
        from mrmae_ds.teachers.placement.sharded import ShardedTeacher

        return ShardedTeacher(name, teacher, placement, device)
    return OffloadedTeacher(name, teacher, device, ahead=1 if placement.kind == "stream" else None)
