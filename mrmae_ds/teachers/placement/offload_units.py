"""Split a teacher into offload units (blocks), in execution order.

A unit is a module whose weights are needed while it runs: a block of a ViT, a block of a convolutional stage, or
another child. All other tensors (embeddings, parameters of the network itself, units too small to be worth a transfer)
form the rest, which is needed during the whole call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mrmae_ds.teachers.base import Teacher

# A unit smaller than this share of the largest stays with the rest: transferring it alone would only delay the others.
SMALLEST_SHARE = 1 / 8


@dataclass(frozen=True)
class OffloadUnit:
    """A module that is transferred on its own.

    Attributes:
        module: the module.
        tensors: its parameters and buffers.
        held: its tensors are also used after it ran, so they stay on the device until the call ends.
    """

    module: nn.Module
    tensors: tuple[Tensor, ...]
    held: bool


@dataclass(frozen=True)
class OffloadLayout:
    """Assignment of each tensor of a teacher to one group, and the execution order of the units.

    Attributes:
        units: modules that are transferred on their own.
        order: indices into ``units`` in execution order; a unit that runs twice is listed twice.
        rest: tensors needed during the whole call.
        idle: tensors that no call uses.
    """

    units: tuple[OffloadUnit, ...]
    order: tuple[int, ...]
    rest: tuple[Tensor, ...]
    idle: tuple[Tensor, ...]


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Return parameters and buffers, each once, buffers last."""
    return [*module.parameters(), *module.buffers()]


def count_bytes(tensors: Sequence[Tensor]) -> int:
    """Return the bytes of the values of tensors."""
    return sum(tensor.nbytes for tensor in tensors)


def offload_layout(teacher: Teacher) -> OffloadLayout:
    """Find a teacher's units by running it on one image, on the CPU with all its weights.

    The run records which modules run, in which order, and whose weights are used outside their module (the attention
    of the last block is computed beside that block).
    """
    modules = split_units(teacher.network)
    tensors = {id(tensor): tensor for tensor in tensors_of(teacher)}
    owners = _owners(modules)
    trace = _trace(teacher, modules, owners)
    largest = max((_bytes(index, owners, tensors) for index in set(trace.order)), default=0)
    chosen = [
        index
        for index in dict.fromkeys(trace.order)
        if index not in trace.before and _bytes(index, owners, tensors) >= largest * SMALLEST_SHARE
    ]
    place = {index: position for position, index in enumerate(chosen)}
    parts: list[list[Tensor]] = [[] for _ in chosen]
    rest, idle = [], []
    for key, tensor in tensors.items():
        owner = owners.get(key)
        if key not in trace.tensors:
            idle.append(tensor)
        elif owner in place:
            parts[place[owner]].append(tensor)
        else:
            rest.append(tensor)
    units = [OffloadUnit(modules[i], tuple(part), i in trace.after) for i, part in zip(chosen, parts, strict=True)]
    return OffloadLayout(tuple(units), tuple(place[i] for i in trace.order if i in place), tuple(rest), tuple(idle))


def split_units(network: nn.Module) -> list[nn.Module]:
    """Return the modules of a network that can be transferred on their own, each once.

    These are its children, where a child that contains a list of composite modules is replaced by the list's items.
    """
    units: list[nn.Module] = []
    for child in network.children():
        units += split_units(child) if any(_is_list(module) for module in child.modules()) else [child]
    return [module for module in dict.fromkeys(units) if tensors_of(module)]


def composite_units(network: nn.Module) -> list[nn.Module]:
    """Return the units of several layers with weights: blocks, and whatever else is more than one layer."""
    return [unit for unit in split_units(network) if _is_composite(unit)]


def _is_list(module: nn.Module) -> bool:
    """Return True for a list of composite modules; a list of plain layers (MLP, stem) is part of its owner."""
    children = list(module.children())
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return any(_is_composite(child) for child in children)
    # RegNet's stages hold their blocks without a list.
    return len(children) > 1 and len({type(child) for child in children}) == 1 and _is_composite(children[0])


def _is_composite(module: nn.Module) -> bool:
    return sum(bool(list(part.parameters(recurse=False))) for part in module.modules()) > 1


def _owners(modules: list[nn.Module]) -> dict[int, int]:
    """Map the id of each tensor to the index of its module; tensors shared by several modules are left out."""
    owners: dict[int, int] = {}
    shared: set[int] = set()
    for index, module in enumerate(modules):
        for tensor in tensors_of(module):
            if owners.setdefault(id(tensor), index) != index:
                shared.add(id(tensor))
    return {key: index for key, index in owners.items() if key not in shared}


def _bytes(index: int, owners: dict[int, int], tensors: dict[int, Tensor]) -> int:
    return sum(tensors[key].nbytes for key, owner in owners.items() if owner == index)


class _UsageTrace(TorchDispatchMode):
    """Record of a call.

    Attributes:
        order: indices of the modules in execution order.
        tensors: ids of the tensors that take part in an operation.
        before: modules with a tensor that is used before their forward.
        after: modules with a tensor that is used outside their forward after it began.
    """

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
    def follow(self, module: nn.Module, index: int) -> Iterator[None]:
        """Record when a module runs."""

        def enter(*_: Any) -> None:
            self.order.append(index)
            self.running.append(index)

        def leave(*_: Any) -> None:
            self.running.remove(index)

        handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _trace(teacher: Teacher, modules: list[nn.Module], owners: dict[int, int]) -> _UsageTrace:
    trace = _UsageTrace({id(tensor) for tensor in tensors_of(teacher)}, owners)
    with ExitStack() as stack:
        for index, module in enumerate(modules):
            stack.enter_context(trace.follow(module, index))
        stack.enter_context(trace)
        teacher(torch.zeros(1, 3, teacher.image_size, teacher.image_size))
    return trace
