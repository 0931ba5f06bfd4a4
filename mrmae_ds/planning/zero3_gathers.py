"""Parameters that ZeRO-3 gathers in a micro-batch, and the number of gathered elements over time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from mrmae_ds.config.zero import ZeroSettings


@dataclass(frozen=True)
class GatheredParam:
    """A parameter.

    Attributes:
        elements: number of elements.
        low: True if it is communicated in bf16.
        trainable: True if it receives a gradient.
    """

    elements: int
    low: bool = False
    trainable: bool = True


@dataclass(frozen=True)
class GatherUnit:
    """A module as ZeRO-3 gathers it.

    Attributes:
        own: parameters gathered for it: its own; of a leaf, all inside it.
        leaf: True if it is gathered whole.
        children: modules that run inside it, in order; empty for a leaf.
        forward_only: True if backward does not reach it.
    """

    own: tuple[GatheredParam, ...] = ()
    leaf: bool = False
    children: tuple[GatherUnit, ...] = ()
    forward_only: bool = False

    def all_parameters(self) -> Iterator[GatheredParam]:
        """Yield its parameters and those of the modules inside it."""
        yield from self.own
        for child in self.children:
            yield from child.all_parameters()


@dataclass(frozen=True)
class GatherTrace:
    """Gathered elements of a micro-batch.

    Attributes:
        gathered: total.
        low: those communicated in bf16.
        calls: number of gathers.
        forward: peak of the gathered elements during forward.
        backward: for each module in the order of backward, the trainable elements whose gradients are complete when it
            starts, and the elements that are gathered while it runs.
    """

    gathered: int = 0
    low: int = 0
    calls: int = 0
    forward: int = 0
    backward: tuple[tuple[int, int], ...] = ()


def trace_gathers(model: GatherUnit, zero: ZeroSettings) -> GatherTrace:
    """Simulate DeepSpeed's ``PartitionedParameterCoordinator`` in a micro-batch after it has recorded the module order.

    Before a module runs, its missing parameters are gathered, then those that are used next, up to the prefetch bucket
    and while less than ``max_live`` elements are gathered. After it has run, its parameters are released, unless they
    are used again within ``max_reuse`` elements, or prefetching has already passed that use. Recomputation gathers
    nothing more: the backward that triggers it has gathered the same parameters.
    """
    return _Coordinator(model, zero).run()


class _Coordinator:
    """State of the coordinator. Parameters are identified by their index; each use of a module is a step."""

    def __init__(self, model: GatherUnit, zero: ZeroSettings) -> None:
        self.zero = zero
        self.parameters: list[GatheredParam] = []
        self.own: list[list[int]] = []  # parameters of each module, in the order of forward
        self.inside: list[list[int]] = []
        self.leaf: list[bool] = []
        self.events: list[tuple[bool, int]] = []  # (True if entered, False if left; module)
        self.forward_only: set[int] = set()
        self._enter(model)
        forward = len(self.events)
        # Backward enters a module before those inside it, in reverse order.
        again = [event for event in reversed(self.events) if event[1] not in self.forward_only]
        self.events += [(not entered, number) for entered, number in again]
        self.forward_steps = sum(entered for entered, _ in self.events[:forward])
        self.order = [number for entered, number in self.events if entered]
        self.queue = deque((p, step) for step, number in enumerate(self.order) for p in self.own[number])
        self.covered_until = [-1] * len(self.parameters)  # last use for which a parameter was gathered or skipped
        self.available: set[int] = set()
        self.gathered = self.low = self.calls = 0

    def run(self) -> GatherTrace:
        """Process all events."""
        step = completed = forward = 0
        backward = []
        for entered, number in self.events:
            if not entered:
                self._release(number, step)
                continue
            self._fetch(number, step)
            available = self._count(self.available)
            if step < self.forward_steps:
                forward = max(forward, available)
            else:
                backward.append((completed, available))
                completed += sum(p.elements for p in map(self.parameters.__getitem__, self.own[number]) if p.trainable)
            step += 1
        return GatherTrace(self.gathered, self.low, self.calls, forward, tuple(backward))

    def _enter(self, module: GatherUnit) -> list[int]:
        number = len(self.own)
        first = len(self.parameters)
        self.parameters += module.own
        inside = list(range(first, len(self.parameters)))
        self.own.append(list(inside))
        self.inside.append(inside)
        self.leaf.append(module.leaf)
        self.events.append((True, number))
        for child in module.children:
            inside += self._enter(child)
        if module.forward_only:
            self.forward_only.update(range(number, len(self.own)))
        self.events.append((False, number))
        return inside

    def _fetch(self, number: int, step: int) -> None:
        self._gather([p for p in self.own[number] if p not in self.available])
        for _ in [p for p in self.own[number] if self.covered_until[p] < step]:
            parameter, use = self.queue.popleft()
            self.covered_until[parameter] = use
        room = min(self.zero.max_live - self._count(self.available), self.zero.prefetch_bucket)
        ahead: list[int] = []
        while self.queue and self._count(ahead) < room:
            # A parameter that is available is skipped; the gathered copy covers this use too.
            parameter, use = self.queue.popleft()
            self.covered_until[parameter] = max(self.covered_until[parameter], use)
            if parameter not in self.available and parameter not in ahead:
                ahead.append(parameter)
        self._gather(ahead)

    def _gather(self, parameters: list[int]) -> None:
        if parameters:
            self.calls += 1
            self.gathered += self._count(parameters)
            self.low += self._count([p for p in parameters if self.parameters[p].low])
            self.available |= set(parameters)

    def _release(self, number: int, step: int) -> None:
        released = {p for p in self.own[number] if self.covered_until[p] <= step}
        distance = 0
        for following in self.order[step:]:
            if distance >= self.zero.max_reuse or not released:
                break
            # For a leaf, DeepSpeed considers all parameters inside the following modules, otherwise only their own.
            used = self.inside[following] if self.leaf[number] else self.own[following]
            released -= set(used)
            distance += self._count(used)
        self.available -= released

    def _count(self, parameters: list[int] | set[int]) -> int:
        return sum(self.parameters[p].elements for p in parameters)
