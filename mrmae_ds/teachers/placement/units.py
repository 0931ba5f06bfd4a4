"""Which parts of a teacher's network can be moved on their own, in which order they run, and what they are used for.

A unit is a module whose weights are needed while it runs: a block of a ViT, a block of a convolutional network's stage,
or another child. Everything else (embeddings, parameters of the network itself, units too small to be worth it) is the
rest, which is needed all through a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mrmae_ds.teachers.base import Teacher

# A unit below this share of the largest is kept with the rest: moving it alone would only make the others wait.
SMALLEST_SHARE = 1 / 8


@dataclass(frozen=True)
class Unit:
    """``module`` and its tensors. ``held``: they are used after it has run too, so they stay until the call ends."""

    module: nn.Module
    tensors: tuple[Tensor, ...]
    held: bool


@dataclass(frozen=True)
class OffloadLayout:
    """A teacher's tensors, each in one place, and the order of a call.

    Attributes:
        units: the parts that are moved on their own.
        order: numbers of units as they run, one that runs twice twice.
        rest: needed all through a call.
        idle: no call needs them.
    """

    units: tuple[Unit, ...]
    order: tuple[int, ...]
    rest: tuple[Tensor, ...]
    idle: tuple[Tensor, ...]


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once, the buffers last."""
    return [*module.parameters(), *module.buffers()]


def count_bytes(tensors: list[Tensor] | tuple[Tensor, ...]) -> int:
    """Bytes of the values of tensors."""
    return sum(tensor.nbytes for tensor in tensors)


def lay_out(teacher: Teacher) -> OffloadLayout:
    """Find a teacher's units by trying it on one image, on the CPU and with all its weights.

    Trying shows what reading the network's code would: which modules run, in which order, and whose weights are used
    elsewhere too (the attention of the last block is read beside that block).
    """
    modules = split(teacher.network)
    tensors = {id(tensor): tensor for tensor in tensors_of(teacher)}
    owners = _owners(modules)
    uses = _watch(teacher, modules, owners)
    largest = max((_bytes(number, owners, tensors) for number in set(uses.order)), default=0)
    worth = [
        number
        for number in dict.fromkeys(uses.order)
        if number not in uses.before and _bytes(number, owners, tensors) >= largest * SMALLEST_SHARE
    ]
    place = {number: position for position, number in enumerate(worth)}
    parts: list[list[Tensor]] = [[] for _ in worth]
    rest, idle = [], []
    for key, tensor in tensors.items():
        if key not in uses.tensors:
            idle.append(tensor)
        elif owners.get(key) in place:
            parts[place[owners[key]]].append(tensor)
        else:
            rest.append(tensor)
    units = [Unit(modules[n], tuple(part), n in uses.after) for n, part in zip(worth, parts, strict=True)]
    return OffloadLayout(tuple(units), tuple(place[n] for n in uses.order if n in place), tuple(rest), tuple(idle))


def split(network: nn.Module) -> list[nn.Module]:
    """A network's children, and instead of those that hold a list of composite modules, that list's; no one twice."""
    found: list[nn.Module] = []
    for child in network.children():
        found += split(child) if any(_is_list(module) for module in child.modules()) else [child]
    return [module for module in dict.fromkeys(found) if tensors_of(module)]


def _is_list(module: nn.Module) -> bool:
    """Whether it holds composite modules; a list of plain layers (an MLP, a stem) is a part of its owner."""
    children = list(module.children())
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return any(_is_composite(child) for child in children)
    # RegNet's stages hold their blocks without a list.
    return len(children) > 1 and len({type(child) for child in children}) == 1 and _is_composite(children[0])


def _is_composite(module: nn.Module) -> bool:
    return sum(bool(list(part.parameters(recurse=False))) for part in module.modules()) > 1


def _owners(modules: list[nn.Module]) -> dict[int, int]:
    """Which unit has a tensor, by the tensor's id; one that several share belongs to none."""
    owners: dict[int, int] = {}
    shared: set[int] = set()
    for number, module in enumerate(modules):
        for tensor in tensors_of(module):
            if owners.setdefault(id(tensor), number) != number:
                shared.add(id(tensor))
    return {key: number for key, number in owners.items() if key not in shared}


def _bytes(number: int, owners: dict[int, int], tensors: dict[int, Tensor]) -> int:
    return sum(tensors[key].nbytes for key, owner in owners.items() if owner == number)


class _Uses(TorchDispatchMode):
    """What a call does: ``order`` of the units, ids of the ``tensors`` that are computed with, and the units of which
    one is used outside their forward, ``before`` it or ``after`` it began."""

    def __init__(self, tensors: set[int], owners: dict[int, int]) -> None:
        super().__init__()
        self.known, self.owners = tensors, owners
        self.order: list[int] = []
        self.running: list[int] = []
        self.tensors: set[int] = set()
        self.before: set[int] = set()
        self.after: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and id(value) in self.known:
                self._use(id(value))
        return func(*args, **(kwargs or {}))

    def _use(self, key: int) -> None:
        self.tensors.add(key)
        owner = self.owners.get(key)
        if owner is not None and owner not in self.running:
            (self.after if owner in self.order else self.before).add(owner)

    @contextmanager
    def following(self, module: nn.Module, number: int) -> Iterator[None]:
        """Know when a unit runs."""

        def enter(*_: Any) -> None:
            self.order.append(number)
            self.running.append(number)

        def leave(*_: Any) -> None:
            self.running.remove(number)

        handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _watch(teacher: Teacher, modules: list[nn.Module], owners: dict[int, int]) -> _Uses:
    uses = _Uses({id(tensor) for tensor in tensors_of(teacher)}, owners)
    with ExitStack() as stack:
        for number, module in enumerate(modules):
            stack.enter_context(uses.following(module, number))
        stack.enter_context(uses)
        teacher(torch.zeros(1, 3, teacher.image_size, teacher.image_size))
    return uses
