"""The memory of a stage: of a GPU at the fullest moment of a step, and of a node."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mrmae_ds.planning.activation_trace import Timeline
from mrmae_ds.planning.teacher_memory import Placed
from mrmae_ds.planning.zero_memory import Items, ZeroMemory

SAVED, WORKING, TEACHERS = "activations kept for backward", "working memory", "teachers' weights"


@dataclass(frozen=True)
class Moment:
    """What is on a device at a moment of a step, in bytes, by what it is for."""

    name: str
    items: Items

    @property
    def total(self) -> float:
        """Bytes of all."""
        return sum(self.items.values())


def fullest(engine: ZeroMemory, timeline: Timeline, teachers: Mapping[str, Placed], images: int) -> Moment:
    """The moment of a step at which the most is on the device.

    Args:
        engine: the student in its engine.
        timeline: of a micro-batch.
        teachers: by name; a call of one is the phase ``teacher NAME``.
        num_images: of a micro-batch.
    """
    return max(moments(engine, timeline, teachers, images), key=lambda moment: moment.total)


def moments(engine: ZeroMemory, timeline: Timeline, teachers: Mapping[str, Placed], images: int) -> Iterator[Moment]:
    """The fullest moment of each part of a step; arguments as for :func:`fullest`."""
    idle = {TEACHERS: sum(placed.idle for placed in teachers.values())}
    always = _sum(engine.standing(), idle)
    before = _sum(always, engine.carried())
    for name, placed in teachers.items():
        phase = f"teacher {name}"
        called = _sum(before, {TEACHERS: placed.calling - placed.idle, WORKING: timeline.peak(images, phase)})
        yield Moment(phase, called)
    saved = timeline.saved(images)
    most = timeline.peak(images, "targets", "forward")
    kept = min(saved, most)
    yield Moment("forward", _sum(before, engine.in_forward(), {SAVED: kept, WORKING: most - kept}))
    where = timeline.where("backward")
    living = timeline.living(images)[where]
    beside = engine.in_backward(timeline.gradients[where])
    peak = int((living + sum(beside.values())).argmax())
    kept = min(saved, living[peak])
    there = {name: float(series[peak]) for name, series in beside.items()}
    yield Moment("backward", _sum(before, there, {SAVED: kept, WORKING: float(living[peak]) - kept}))
    if late := engine.in_reduction():
        yield Moment("reduction of gradients", _sum(always, late))
    yield Moment("update", _sum(always, engine.in_update()))


def _sum(*several: Items) -> Items:
    total: Items = {}
    for items in several:
        for name, size in items.items():
            total[name] = total.get(name, 0.0) + size
    return {name: size for name, size in total.items() if size}
