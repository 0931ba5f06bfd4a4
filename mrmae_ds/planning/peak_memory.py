"""Peak memory of a rank's device over the phases of a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mrmae_ds.planning.activation_trace import Timeline
from mrmae_ds.planning.teacher_memory import TeacherBytes
from mrmae_ds.planning.zero_memory import Items, ZeroMemory

SAVED, WORKING, TEACHERS = "activations saved for backward", "temporaries", "teacher weights"


@dataclass(frozen=True)
class PhasePeak:
    """Device memory at the peak of a phase.

    Attributes:
        name: name of the phase.
        items: bytes by component.
    """

    name: str
    items: Items

    @property
    def total(self) -> float:
        """Bytes of all components."""
        return sum(self.items.values())


def step_peak(memory: ZeroMemory, timeline: Timeline, teachers: Mapping[str, TeacherBytes], images: int) -> PhasePeak:
    """Return the phase with the highest peak of a step.

    Args:
        memory: the student in its engine.
        timeline: activations of a micro-batch.
        teachers: weights by name; the call of a teacher is the phase ``teacher NAME``.
        images: micro-batch size.
    """
    return max(phase_peaks(memory, timeline, teachers, images), key=lambda phase: phase.total)


def phase_peaks(
    memory: ZeroMemory, timeline: Timeline, teachers: Mapping[str, TeacherBytes], images: int
) -> Iterator[PhasePeak]:
    """Yield the peak of each phase of a step; arguments as for :func:`step_peak`."""
    idle = {TEACHERS: sum(weights.idle for weights in teachers.values())}
    always = _sum(memory.persistent(), idle)
    before = _sum(always, memory.accumulated())
    for name, weights in teachers.items():
        phase = f"teacher {name}"
        extra = {TEACHERS: weights.calling - weights.idle, WORKING: timeline.peak(images, phase)}
        yield PhasePeak(phase, _sum(before, extra))
    saved = timeline.saved(images)
    peak = timeline.peak(images, "targets", "forward")
    kept = min(saved, peak)
    yield PhasePeak("forward", _sum(before, memory.in_forward(), {SAVED: kept, WORKING: peak - kept}))
    backward = timeline.in_phases("backward")
    live = timeline.live_bytes(images)[backward]
    series = memory.in_backward(timeline.gradients[backward])
    at = int((live + sum(series.values())).argmax())
    kept = min(saved, live[at])
    items = {name: float(values[at]) for name, values in series.items()}
    yield PhasePeak("backward", _sum(before, items, {SAVED: kept, WORKING: float(live[at]) - kept}))
    if reduction := memory.in_reduction():
        yield PhasePeak("gradient reduction", _sum(always, reduction))
    yield PhasePeak("update", _sum(always, memory.in_update()))


def _sum(*several: Items) -> Items:
    total: Items = {}
    for items in several:
        for name, size in items.items():
            total[name] = total.get(name, 0.0) + size
    return {name: size for name, size in total.items() if size}
