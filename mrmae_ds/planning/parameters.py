"""Parameter counts of a model: by group, by communicated dtype and by gather unit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from mrmae_ds.config.zero import ZeroSettings
from mrmae_ds.models.moving_average import MovingAverage
from mrmae_ds.planning.zero3_gathers import GatheredParam, GatherUnit


@dataclass(frozen=True)
class ParameterCounts:
    """Number of elements of a model's parameters.

    Attributes:
        modules: the modules as ZeRO-3 gathers them.
        tensors: number of parameter tensors.
        trainable: trainable elements.
        frozen: frozen elements.
        low: elements communicated in bf16.
        trainable_low: trainable elements communicated in bf16.
        encoder: elements of the encoder, with its head in fine-tuning.
        largest: elements of the largest parameter.
        groups: trainable elements of each optimizer group.
    """

    modules: GatherUnit
    tensors: int
    trainable: int
    frozen: int
    low: int
    trainable_low: int
    encoder: int
    largest: int
    groups: tuple[int, ...]

    @property
    def total(self) -> int:
        """Number of all elements."""
        return self.trainable + self.frozen


def count_parameters(model: nn.Module, zero: ZeroSettings, groups: Iterable[int]) -> ParameterCounts:
    """Count a model's parameters.

    Args:
        model: on any device, also fake or meta.
        zero: determines the gather units and the modules whose parameters are communicated in bf16.
        groups: elements of each optimizer group.
    """
    low = {id(p) for module in model.modules() if zero.travels_low(module) for p in module.parameters(recurse=False)}
    parameters = list(model.parameters())
    trainable = [p for p in parameters if p.requires_grad]
    encoder = getattr(model, "encoder", model)
    return ParameterCounts(
        modules=_gather_unit(model, zero, low),
        tensors=len(parameters),
        low=sum(p.numel() for p in parameters if id(p) in low),
        trainable=sum(p.numel() for p in trainable),
        frozen=sum(p.numel() for p in parameters if not p.requires_grad),
        trainable_low=sum(p.numel() for p in trainable if id(p) in low),
        encoder=sum(p.numel() for p in encoder.parameters()),
        largest=max(p.numel() for p in parameters),
        groups=tuple(groups),
    )


def _gather_unit(module: nn.Module, zero: ZeroSettings, low: set[int]) -> GatherUnit:
    """Convert a module and those inside it. The models of this project run them in the order of registration."""
    leaf = zero.is_leaf(module)
    own = tuple(GatheredParam(p.numel(), id(p) in low, p.requires_grad) for p in module.parameters(recurse=leaf))
    children = () if leaf else tuple(_gather_unit(child, zero, low) for child in _called(module))
    return GatherUnit(own, leaf, children, forward_only=isinstance(module, MovingAverage))


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the children with parameters; containers, whose forward is not called, are replaced by their children."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            yield from _called(child)
        elif next(child.parameters(), None) is not None:
            yield child
