"""What ZeRO-3 gathers in a micro-batch, and how much is gathered when."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from mrmae_ds.config.zero import ZeroSettings


@dataclass(frozen=True)
class GatheredParam:
    """Elements of a parameter, whether they travel in bf16, and whether they are trained."""

    elements: int
    low: bool = False
    trainable: bool = True


@dataclass(frozen=True)
class GatherUnit:
    """A module as ZeRO-3 sees it.

    Attributes:
        own: the parameters that it gathers: its own, of a leaf all inside it.
        leaf: whether it is gathered whole.
        children: the modules that run inside it, in order; none of a leaf.
    """

    own: tuple[GatheredParam, ...] = ()
    leaf: bool = False
    children: tuple[GatherUnit, ...] = ()

    def every(self) -> Iterator[GatheredParam]:
        """Its parameters and those inside it."""
        yield from self.own
        for child in self.children:
            yield from child.every()


@dataclass(frozen=True)
class Gathering:
    """What is gathered in a micro-batch, in elements.

    Attributes:
        gathered: in all. low: those of them that travel in bf16.
        calls: how many times something is gathered.
        forward: the most that is there in forward.
        backward: for each module as backward comes to it, trainable elements whose gradients are finished by then, and
            elements that are there while it runs.
    """

    gathered: int = 0
    low: int = 0
    calls: int = 0
    forward: int = 0
    backward: tuple[tuple[int, int], ...] = ()


def follow(model: GatherUnit, zero: ZeroSettings) -> Gathering:
    """Follow a micro-batch through DeepSpeed's ``PartitionedParameterCoordinator``, once it knows the order of modules.

    Before a module runs, what it needs is gathered if it is not there, and then what comes next, up to the prefetch
    bucket, as long as less than ``max_live`` is there. After it has run its parameters are released, unless they are
    used again before ``max_reuse`` elements have been used, or gathering ahead has passed that use already.
    Recomputation gathers nothing more: the backward that wants it has gathered what it needs.
    """
    return _Coordinator(model, zero).run()


class _Coordinator:
    """Parameters are told apart by their number; a use of a module is a step."""

    def __init__(self, model: GatherUnit, zero: ZeroSettings) -> None:
        self.zero = zero
        self.parameters: list[GatheredParam] = []
        self.own: list[list[int]] = []  # of each module, in the order in which forward enters them
        self.inside: list[list[int]] = []
        self.leaf: list[bool] = []
        self.events: list[tuple[bool, int]] = []  # a module is entered or left
        self._enter(model)
        forward = len(self.events)
        # Backward enters a module before those inside it, the last first.
        self.events += [(not entered, number) for entered, number in reversed(self.events)]
        self.forward_steps = sum(entered for entered, _ in self.events[:forward])
        self.order = [number for entered, number in self.events if entered]
        self.queue = deque((p, step) for step, number in enumerate(self.order) for p in self.own[number])
        self.looked_after = [-1] * len(self.parameters)  # the last use that something was gathered or passed over for
        self.there: set[int] = set()
        self.gathered = self.low = self.calls = 0

    def run(self) -> Gathering:
        """All events in turn."""
        step = finished = forward = 0
        backward = []
        for entered, number in self.events:
            if not entered:
                self._release(number, step)
                continue
            self._fetch(number, step)
            available = self._count(self.there)
            if step < self.forward_steps:
                forward = max(forward, available)
            else:
                backward.append((finished, available))
                finished += sum(p.elements for p in map(self.parameters.__getitem__, self.own[number]) if p.trainable)
            step += 1
        return Gathering(self.gathered, self.low, self.calls, forward, tuple(backward))

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
        self.events.append((False, number))
        return inside

    def _fetch(self, number: int, step: int) -> None:
        self._gather([p for p in self.own[number] if p not in self.there])
        for _ in [p for p in self.own[number] if self.looked_after[p] < step]:
            passed, use = self.queue.popleft()
            self.looked_after[passed] = use
        room = min(self.zero.max_live - self._count(self.there), self.zero.prefetch_bucket)
        ahead: list[int] = []
        while self.queue and self._count(ahead) < room:
            # What is there already is passed over, and that use is looked after by it.
            passed, use = self.queue.popleft()
            self.looked_after[passed] = max(self.looked_after[passed], use)
            if passed not in self.there and passed not in ahead:
                ahead.append(passed)
        self._gather(ahead)

    def _gather(self, several: list[int]) -> None:
        if several:
            self.calls += 1
            self.gathered += self._count(several)
            self.low += self._count([p for p in several if self.parameters[p].low])
            self.there |= set(several)

    def _release(self, number: int, step: int) -> None:
        released = {p for p in self.own[number] if self.looked_after[p] <= step}
        passed = 0
        for coming in self.order[step:]:
            if passed >= self.zero.max_reuse or not released:
                break
            # A leaf looks into the modules that come, others at their own parameters alone.
            used = self.inside[coming] if self.leaf[number] else self.own[coming]
            released -= set(used)
            passed += self._count(used)
        self.there -= released

    def _count(self, several: list[int] | set[int]) -> int:
        return sum(self.parameters[p].elements for p in several)
