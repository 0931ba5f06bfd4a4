"""What DeepSpeed keeps of parameters, gradients and optimizer states, and the copies that it makes of them in a step.

Everything is in bytes, of one process. The rules are those of DeepSpeed 0.19.8, read in its source and compared with
the memory of real steps (benchmarks/plan_memory.py). A float32 master is a copy of its parameter even where that is
float32 too: to share them, ZeRO-3 compares a device with a device's name, and these are never equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mrmae_ds.config.zero import BF16, FP32, ZeroSettings
from mrmae_ds.planning.parameters import ParameterCounts
from mrmae_ds.planning.zero3_gathers import Gathering, follow

Items = dict[str, float]
Series = dict[str, npt.NDArray[np.float64]]
ADAM = 2 * FP32
# runtime/engine.py: without ZeRO, gradients are flattened and reduced so many elements at a time.
PLAIN_BUCKET = 500_000_000

PARAMETERS, GATHERED, ARRIVING = "parameters", "gathered parameters", "parameters arriving"
MASTERS, STATES = "float32 masters", "optimizer states"
GRADIENTS, BUCKETS, REDUCED = "gradients", "reduce buckets", "gradients being reduced"
COPIES, SECOND = "copies for the update", "hpZ copy of the parameters"


@dataclass(frozen=True)
class ZeroMemory:
    """A model in an engine.

    Attributes:
        census: of the model. zero: the settings.
        world: processes.
        accumulation: micro-batches an optimizer step.
        on_cpu: AdamW is not fused, so it computes with copies, and a page that nobody has written does not exist.
    """

    census: ParameterCounts
    zero: ZeroSettings
    world: int
    accumulation: int = 1
    on_cpu: bool = False

    @cached_property
    def gathering(self) -> Gathering:
        """What ZeRO-3 gathers in a micro-batch; a process alone uses what it has on the device."""
        if self.zero.stage < 3 or (self.world == 1 and not self.zero.offload_param):
            return Gathering()
        return follow(self.census.modules, self.zero)

    @property
    def share(self) -> float:
        """Trainable elements whose states a process keeps, from ZeRO-1 on."""
        return self.census.trainable / self.world

    @property
    def accumulates_whole(self) -> bool:
        """ZeRO-1 with bf16 parameters keeps float32 gradients of all of them (BF16_Optimizer)."""
        return self.zero.stage == 1 and self.zero.bf16

    @property
    def reduces_late(self) -> bool:
        """Whether gradients stay whole until backward has ended."""
        return self.zero.stage == 0 or (self.zero.stage == 1 and not self.zero.overlap and not self.zero.bf16)

    def standing(self) -> Items:
        """On the device all the time."""
        zero, census = self.zero, self.census
        whole = float(zero.param_bytes * census.total)
        if zero.stage == 0:
            return {PARAMETERS: whole, STATES: ADAM * census.trainable}
        items: Items = {PARAMETERS: whole}
        if zero.stage == 3:
            items[PARAMETERS] = 0.0 if zero.offload_param else whole / self.world
            items[BUCKETS] = self._buckets()
            if zero.hpz > 1:
                items[SECOND] = zero.travel_bytes(census.total, census.low) / zero.hpz
            if not zero.offload_optimizer:
                items[GRADIENTS] = zero.accumulation_bytes * self.share
        elif self.accumulates_whole:
            items[GRADIENTS] = FP32 * census.trainable
        if not zero.offload_optimizer:
            items |= {MASTERS: FP32 * self.share, STATES: ADAM * self.share}
        return items

    def on_host(self) -> Items:
        """In the host's memory all the time, where something is offloaded."""
        zero, census = self.zero, self.census
        items: Items = {}
        if zero.offload_param == "cpu":
            items[PARAMETERS] = zero.param_bytes * census.total / self.world
        if zero.offload_optimizer:
            # The accumulated gradients, and those in float32 that the update reads; below stage 3 the parameters that
            # it writes.
            second = zero.accumulation_bytes if zero.stage == 3 else zero.param_bytes
            items[GRADIENTS] = (FP32 + second) * self.share
            if zero.offload_optimizer == "cpu":
                items |= {MASTERS: FP32 * self.share, STATES: ADAM * self.share}
        return items

    def carried(self) -> Items:
        """Gradients on the device between the micro-batches of a step, beside the standing ones."""
        zero = self.zero
        if self.accumulation == 1 or zero.stage == 3 or self.accumulates_whole or zero.offload_optimizer:
            return {}
        return {GRADIENTS: FP32 * (self.share if zero.stage == 2 else self.census.trainable)}

    def in_forward(self) -> Items:
        """Gathered parameters, and the buffer in which those to come arrive."""
        most, zero, census = self.gathering.forward, self.zero, self.census
        if not most:
            return {}
        part = min(zero.prefetch_bucket, most) / census.total
        arriving = part * zero.travel_bytes(census.total, census.low)
        return {GATHERED: zero.param_bytes * most, ARRIVING: arriving}

    def in_backward(self, finished: npt.NDArray[np.int64]) -> Series:
        """What there is beside activations, over the operations of backward.

        Args:
            finished: elements of parameter gradients that are finished after each operation.
        """
        zero, trainable = self.zero, self.census.trainable
        items: Series = {}
        if came := self.gathering.backward:
            at, there = (np.array(column) for column in zip(*came, strict=True))
            items[GATHERED] = zero.param_bytes * there[np.searchsorted(at, finished, side="right") - 1].astype(float)
        if zero.stage == 3:
            # A full bucket is copied into one piece; gloo, which the CPU communicates by, reduces a copy of that.
            copies = 2 if self.on_cpu else 1
            full = copies * (finished >= min(zero.reduce_bucket, trainable)).astype(float)
            return items | {REDUCED: full * self._travelling() * min(zero.reduce_bucket / trainable, 1)}
        if self.accumulates_whole:
            return items | {GRADIENTS: BF16 * finished.astype(float)}
        if self.reduces_late:
            # Later micro-batches of a step add to what is carried.
            return items | ({GRADIENTS: FP32 * finished.astype(float)} if self.accumulation == 1 else {})
        items[BUCKETS] = np.full(len(finished), self._buckets())
        if not zero.offload_optimizer:
            items[GRADIENTS] = np.full(len(finished), zero.param_bytes * self.share)
        if self.on_cpu:
            written = finished.astype(float) / trainable
            items[BUCKETS] = np.minimum(items[BUCKETS], zero.param_bytes * trainable * written)
            items[GRADIENTS] = items[GRADIENTS] * written
        return items

    def in_reduction(self) -> Items:
        """When backward has ended and gradients are reduced only then."""
        zero, trainable = self.zero, self.census.trainable
        if not self.reduces_late:
            return {}
        items: Items = {GRADIENTS: FP32 * trainable}
        if zero.stage == 0:
            return items | {REDUCED: FP32 * min(trainable, PLAIN_BUCKET) if self.world > 1 else 0}
        # On the CPU the pages of the reduced ones come as the others go.
        reduced = 0.0 if self.on_cpu or zero.offload_optimizer else FP32 * self.share
        return items | {REDUCED: reduced, BUCKETS: self._buckets()}

    def in_update(self) -> Items:
        """Gradients, flat copies of a group of them, and what an AdamW that is not fused computes with."""
        zero, census = self.zero, self.census
        if zero.offload_optimizer:
            return {}
        computing = 2 if self.on_cpu else 0
        if zero.stage == 0:
            return {GRADIENTS: FP32 * census.trainable, COPIES: FP32 * computing * census.largest}
        group = max(census.groups) / self.world
        if zero.stage == 3:
            return {COPIES: FP32 * (1 + computing) * min(group, zero.sub_group)}
        if self.accumulates_whole:
            return {GRADIENTS: BF16 * census.trainable, COPIES: FP32 * computing * group}
        flat = 0 if zero.bf16 else 1
        return {GRADIENTS: FP32 * self.share, COPIES: FP32 * (flat + computing) * group}

    def _buckets(self) -> float:
        """The buffers in which gradients are put together, one for each type that they travel in."""
        zero, census = self.zero, self.census
        types = zero.gradient_types(census.trainable, census.trainable_low)
        sizes = 0.0
        for size, elements in types.items():
            length = min(zero.reduce_bucket, elements) if self.on_cpu else zero.reduce_bucket
            sizes += length * (size if zero.stage == 3 else zero.param_bytes)
        return sizes * (2 if zero.overlap and zero.stage in (1, 2) else 1)

    def _travelling(self) -> float:
        """All gradients on their way."""
        types = self.zero.gradient_types(self.census.trainable, self.census.trainable_low)
        return float(sum(size * elements for size, elements in types.items()))
