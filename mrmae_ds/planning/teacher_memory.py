"""What a teacher's weights take, on the device and on the host, by where a recipe places them."""

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
class Placed:
    """Bytes of a teacher's weights, of one process.

    Attributes:
        idle: on the device between calls. calling: during one.
        host: in the host's memory, pinned. disk: in files.
        copied: to the device, for one batch. gathered: from other processes, for one batch.
    """

    idle: float
    calling: float
    host: float = 0.0
    disk: float = 0.0
    copied: float = 0.0
    gathered: float = 0.0


@dataclass(frozen=True)
class TeacherWeights:
    """A teacher's weights and the order in which its parts run.

    Attributes:
        total: bytes of all. largest: of the largest unit. rest: of what belongs to no unit.
        layout: see :func:`~mrmae_ds.teachers.placement.offload_units.offload_layout`.
    """

    total: int
    largest: int
    rest: int
    layout: OffloadLayout

    @classmethod
    def of(cls, teacher: Teacher) -> TeacherWeights:
        """Those of a teacher whose tensors are fake ones of the CPU."""
        units = [count_bytes(tensors_of(unit)) for unit in split_units(teacher.network)]
        total = count_bytes(tensors_of(teacher))
        with FakeTensorMode(allow_non_fake_inputs=True):
            layout = offload_layout(teacher)
        return cls(total, max(units, default=0), total - sum(units), layout)

    def placed(self, placement: PlacementConfig, world: int) -> Placed:
        """Where they are under a placement, with so many processes."""
        if placement.kind == "device":
            return Placed(self.total, self.total)
        if placement.kind == "sharded":
            share = self.total / world
            # One unit computes, one is gathered ahead; a process alone gathers nothing.
            moving = self.rest + 2 * self.largest if world > 1 or placement.offload else 0.0
            gathered = float(self.total) if world > 1 else 0.0
            if placement.offload is None:
                return Placed(share, share + moving, gathered=gathered)
            on_host = placement.offload == "cpu"
            host, disk = (share, 0.0) if on_host else (3 * self.largest / world, share)
            return Placed(0.0, moving, host, disk, copied=share, gathered=gathered)
        used = count_bytes(self.layout.rest) + sum(count_bytes(unit.tensors) for unit in self.layout.units)
        calling = used if placement.kind == "step" else self._streaming()
        return Placed(0.0, calling, host=used, copied=used)

    def _streaming(self) -> int:
        """The most there is while one unit runs and the next one is copied; one that is used later stays."""
        sizes = [count_bytes(unit.tensors) for unit in self.layout.units]
        most, stayed, order = 0, set[int](), self.layout.order
        for position, number in enumerate(order):
            here = stayed | {number} | set(order[position + 1 : position + 2])
            most = max(most, sum(sizes[unit] for unit in here))
            if self.layout.units[number].held:
                stayed.add(number)
        return count_bytes(self.layout.rest) + most
