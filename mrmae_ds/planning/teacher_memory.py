"""Memory of a teacher's weights on the device and on the host, by placement."""

from __future__ import annotations

from dataclasses import dataclass

from torch._subclasses.fake_tensor import FakeTensorMode

from mrmae_ds.config.stages import PlacementConfig
from mrmae_ds.teachers import Teacher
from mrmae_ds.teachers.placement.offload_units import (
    OffloadLayout,
    count_bytes,
    offload_layout,
    split_units,
    tensors_of,
)


@dataclass(frozen=True)
class TeacherBytes:
    """Bytes of a teacher's weights per rank.

    Attributes:
        idle: on the device between calls.
        calling: on the device during a call.
        host: in pinned host memory.
        disk: in files.
        copied: from the host to the device, per batch.
        gathered: from other ranks, per batch.
    """

    idle: float
    calling: float
    host: float = 0.0
    disk: float = 0.0
    copied: float = 0.0
    gathered: float = 0.0


@dataclass(frozen=True)
class TeacherWeights:
    """Sizes of a teacher's weights.

    Attributes:
        total: bytes of all weights.
        largest: bytes of the largest offload unit.
        rest: bytes outside the units.
        layout: the offload units in the order in which they run.
    """

    total: int
    largest: int
    rest: int
    layout: OffloadLayout

    @classmethod
    def of(cls, teacher: Teacher) -> TeacherWeights:
        """Measure a teacher whose tensors are fake CPU tensors."""
        units = [count_bytes(tensors_of(unit)) for unit in split_units(teacher.network)]
        total = count_bytes(tensors_of(teacher))
        with FakeTensorMode(allow_non_fake_inputs=True):
            layout = offload_layout(teacher)
        return cls(total, max(units, default=0), total - sum(units), layout)

    def placed(self, placement: PlacementConfig, world_size: int) -> TeacherBytes:
        """Return the bytes under a placement, with this many ranks."""
        if placement.kind == "device":
            return TeacherBytes(self.total, self.total)
        if placement.kind == "sharded":
            share = self.total / world_size
            # One unit computes while the next is gathered; a single rank gathers nothing.
            moving = self.rest + 2 * self.largest if world_size > 1 or placement.offload else 0.0
            gathered = float(self.total) if world_size > 1 else 0.0
            if placement.offload is None:
                return TeacherBytes(share, share + moving, gathered=gathered)
            on_host = placement.offload == "cpu"
            host, disk = (share, 0.0) if on_host else (3 * self.largest / world_size, share)
            return TeacherBytes(0.0, moving, host, disk, copied=share, gathered=gathered)
        used = count_bytes(self.layout.rest) + sum(count_bytes(unit.tensors) for unit in self.layout.units)
        calling = used if placement.kind == "step" else self._streaming()
        return TeacherBytes(0.0, calling, host=used, copied=used)

    def _streaming(self) -> int:
        """Return the peak while one unit runs and the next is copied; units that are used again stay on the device."""
        sizes = [count_bytes(unit.tensors) for unit in self.layout.units]
        peak, kept, order = 0, set[int](), self.layout.order
        for position, number in enumerate(order):
            present = kept | {number} | set(order[position + 1 : position + 2])
            peak = max(peak, sum(sizes[unit] for unit in present))
            if self.layout.units[number].held:
                kept.add(number)
        return count_bytes(self.layout.rest) + peak
