"""A model's parameters as the engine sees them: how many, in which order they run, which travel in bf16."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from mrmae_ds.config.zero import ZeroSettings
from mrmae_ds.models.pretrain import PretrainModel
from mrmae_ds.planning.zero3_gathers import GatheredParam, GatherUnit


@dataclass(frozen=True)
class ParameterCounts:
    """Elements of a model's parameters.

    Attributes:
        modules: as ZeRO-3 sees them.
        trainable, frozen: of all parameters.
        low: of all, those that travel in bf16.
        trainable_low: of the trainable ones, those that travel in bf16.
        encoder: of the encoder, with its head in fine-tuning.
        largest: of the largest parameter.
        groups: trainable elements of each of the optimizer's groups.
    """

    modules: GatherUnit
    trainable: int
    frozen: int
    low: int
    trainable_low: int
    encoder: int
    largest: int
    groups: tuple[int, ...]

    @property
    def total(self) -> int:
        """All elements."""
        return self.trainable + self.frozen


def parameter_counts(model: nn.GatherUnit, zero: ZeroSettings, groups: Iterable[int]) -> ParameterCounts:
    """Count a model's parameters.

    Args:
        model: whose values do not matter.
        zero: says what a unit is, and which modules' parameters travel in bf16.
        groups: elements of each of the optimizer's groups.
    """
    low = {id(p) for module in model.modules() if zero.travels_low(module) for p in module.parameters(recurse=False)}
    parameters = list(model.parameters())
    trainable = [p for p in parameters if p.requires_grad]
    encoder = model.encoder if isinstance(model, PretrainModel) else model
    return ParameterCounts(
        modules=_see(model, zero, low),
        low=sum(p.numel() for p in parameters if id(p) in low),
        trainable=sum(p.numel() for p in trainable),
        frozen=sum(p.numel() for p in parameters if not p.requires_grad),
        trainable_low=sum(p.numel() for p in trainable if id(p) in low),
        encoder=sum(p.numel() for p in encoder.parameters()),
        largest=max(p.numel() for p in parameters),
        groups=tuple(groups),
    )


def _see(module: nn.GatherUnit, zero: ZeroSettings, low: set[int]) -> GatherUnit:
    """A module and those that run inside it; the models here run them in the order in which they hold them."""
    leaf = zero.is_leaf(module)
    own = tuple(GatheredParam(p.numel(), id(p) in low, p.requires_grad) for p in module.parameters(recurse=leaf))
    return GatherUnit(own, leaf, () if leaf else tuple(_see(child, zero, low) for child in _called(module)))


def _called(module: nn.GatherUnit) -> Iterator[nn.GatherUnit]:
    """The children with parameters; of those that only hold modules, which nobody calls, what they hold."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            yield from _called(child)
        elif next(child.parameters(), None) is not None:
            yield child
