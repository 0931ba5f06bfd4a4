"""Memory model of ZeRO stages 0 to 3: parameters, gradients, optimizer states and temporary buffers.

All sizes are in bytes per rank. The rules are those of DeepSpeed 0.19.8, from its source, validated with the memory of
real steps (benchmarks/plan_memory.py). A float32 master is a copy of its parameter even if that is float32 too: to
share them, ZeRO-3 compares a device with a device's name, and these are never equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mrmae_ds.config.zero import BF16, FP32, ZeroSettings
from mrmae_ds.planning.parameters import ParameterCounts
from mrmae_ds.planning.zero3_gathers import GatherTrace, trace_gathers

Items = dict[str, float]
Series = dict[str, npt.NDArray[np.float64]]
ADAM = 2 * FP32
# runtime/engine.py: without ZeRO, gradients are flattened and reduced in buckets of this many elements.
PLAIN_BUCKET = 500_000_000

PARAMETERS, GATHERED, ARRIVING = "parameters", "gathered parameters", "parameters arriving"
MASTERS, STATES = "float32 masters", "optimizer states"
GRADIENTS, BUCKETS, REDUCED = "gradients", "reduce buckets", "gradients being reduced"
COPIES, SECOND = "copies for the update", "hpZ copy of the parameters"


@dataclass(frozen=True)
class ZeroMemory:
    """Memory of a model in a DeepSpeed engine.

    Attributes:
        counts: parameters of the model.
        zero: ZeRO settings.
        world_size: number of ranks.
        accumulation: micro-batches per optimizer step.
        on_cpu: training on the CPU: AdamW is not fused, so it allocates copies, and unwritten pages take no memory.
    """

    counts: ParameterCounts
    zero: ZeroSettings
    world_size: int
    accumulation: int = 1
    on_cpu: bool = False

    @cached_property
    def gathers(self) -> GatherTrace:
        """Gathers of ZeRO-3 in a micro-batch; a single rank without offloading gathers nothing."""
        if self.zero.stage < 3 or (self.world_size == 1 and not self.zero.offload_param):
            return GatherTrace()
        return trace_gathers(self.counts.modules, self.zero)

    @property
    def keeps_gathered(self) -> bool:
        """True if ZeRO-3 keeps parameters from one micro-batch of a step to the next (docs/deepspeed_patches.md)."""
        total = self.counts.total
        fits = total <= self.zero.max_live and 2 * total <= self.zero.max_reuse
        return self.accumulation > 1 and fits and self.zero.offload_param != "nvme"

    @property
    def share(self) -> float:
        """Trainable elements whose optimizer states a rank holds, from ZeRO-1 on."""
        return self.counts.trainable / self.world_size

    @property
    def accumulates_whole(self) -> bool:
        """True for ZeRO-1 with bf16 parameters, which keeps all gradients in float32 (BF16_Optimizer)."""
        return self.zero.stage == 1 and self.zero.bf16

    @property
    def reduces_late(self) -> bool:
        """True if gradients stay unpartitioned until the end of backward."""
        return self.zero.stage == 0 or (self.zero.stage == 1 and not self.zero.overlap and not self.zero.bf16)

    @property
    def reduced_bytes(self) -> float:
        """Bytes of the gradients that a rank reduces in a step; ZeRO-2 and 3 reduce them in every micro-batch."""
        if self.zero.stage == 0:
            return float(FP32 * self.counts.trainable)
        return self._communicated() * (self.accumulation if self.zero.stage > 1 else 1)

    def persistent(self) -> Items:
        """Return the persistent memory of the device."""
        zero, counts = self.zero, self.counts
        whole = float(zero.param_bytes * counts.total)
        if zero.stage == 0:
            return {PARAMETERS: whole, STATES: ADAM * counts.trainable}
        items: Items = {PARAMETERS: whole}
        if zero.stage == 3:
            items[PARAMETERS] = 0.0 if zero.offload_param else whole / self.world_size
            if zero.contiguous:
                items[BUCKETS] = self._buckets()
            if zero.hpz > 1:
                items[SECOND] = zero.travel_bytes(counts.total, counts.low) / zero.hpz
            if not zero.offload_optimizer:
                items[GRADIENTS] = zero.accumulation_bytes * self.share
        elif self.accumulates_whole:
            items[GRADIENTS] = FP32 * counts.trainable
        if not zero.offload_optimizer:
            items |= {MASTERS: FP32 * self.share, STATES: ADAM * self.share}
        return items

    def on_host(self) -> Items:
        """Return the persistent memory of the host, for offloaded states."""
        zero, counts = self.zero, self.counts
        items: Items = {}
        if zero.offload_param == "cpu":
            items[PARAMETERS] = zero.param_bytes * counts.total / self.world_size
        if zero.offload_optimizer:
            # The accumulated gradients, and the float32 gradients that the update reads; below stage 3, the parameters
            # that it writes.
            second = zero.accumulation_bytes if zero.stage == 3 else zero.param_bytes
            items[GRADIENTS] = (FP32 + second) * self.share
            if zero.offload_optimizer == "cpu":
                items |= {MASTERS: FP32 * self.share, STATES: ADAM * self.share}
        return items

    def accumulated(self) -> Items:
        """Return the gradients held between the micro-batches of a step, besides the persistent ones."""
        zero = self.zero
        if self.accumulation == 1 or zero.stage == 3 or self.accumulates_whole or zero.offload_optimizer:
            return {}
        return {GRADIENTS: FP32 * (self.share if zero.stage == 2 else self.counts.trainable)}

    def in_forward(self) -> Items:
        """Return the peak of the gathered parameters, and the buffer of the gather in flight."""
        peak, zero, counts = self.gathers.forward, self.zero, self.counts
        if not peak:
            return {}
        part = min(zero.prefetch_bucket, peak) / counts.total
        arriving = part * zero.travel_bytes(counts.total, counts.low)
        return {GATHERED: zero.param_bytes * peak, ARRIVING: arriving}

    def in_backward(self, completed: npt.NDArray[np.int64]) -> Series:
        """Return the memory besides activations over the operations of backward, [N] each.

        Args:
            completed: elements of the parameter gradients that are complete after each operation, [N].
        """
        zero, trainable = self.zero, self.counts.trainable
        items: Series = {}
        if steps := self.gathers.backward:
            starts, available = (np.array(column) for column in zip(*steps, strict=True))
            current = np.searchsorted(starts, completed, side="right") - 1
            held = np.full(len(completed), self.gathers.forward) if self.keeps_gathered else available[current]
            items[GATHERED] = zero.param_bytes * held.astype(float)
        if zero.stage == 3:
            if not zero.contiguous:  # gradients wait until a bucket is full
                items[BUCKETS] = zero.param_bytes * np.minimum(completed, self._bucket_elements()).astype(float)
            # A full bucket is copied to a flat tensor; gloo, the CPU's backend, reduces a copy of that.
            copies = 2 if self.on_cpu else 1
            full = copies * (completed >= min(zero.reduce_bucket, trainable)).astype(float)
            return items | {REDUCED: full * self._communicated() * min(zero.reduce_bucket / trainable, 1)}
        if self.accumulates_whole:
            return items | {GRADIENTS: BF16 * completed.astype(float)}
        if self.reduces_late:
            # Later micro-batches of a step add to the accumulated gradients.
            return items | ({GRADIENTS: FP32 * completed.astype(float)} if self.accumulation == 1 else {})
        items[BUCKETS] = np.full(len(completed), self._buckets())
        if not zero.offload_optimizer:
            items[GRADIENTS] = np.full(len(completed), zero.param_bytes * self.share)
        if self.on_cpu:
            written = completed.astype(float) / trainable
            items[BUCKETS] = np.minimum(items[BUCKETS], zero.param_bytes * trainable * written)
            items[GRADIENTS] = items[GRADIENTS] * written
        return items

    def in_reduction(self) -> Items:
        """Return the memory of the reduction, if it follows backward."""
        zero, trainable = self.zero, self.counts.trainable
        if not self.reduces_late:
            return {}
        items: Items = {GRADIENTS: FP32 * trainable}
        if zero.stage == 0:
            return items | {REDUCED: FP32 * min(trainable, PLAIN_BUCKET) if self.world_size > 1 else 0}
        # On the CPU, pages of the reduced gradients are allocated as those of the others are freed.
        reduced = 0.0 if self.on_cpu or zero.offload_optimizer else FP32 * self.share
        return items | {REDUCED: reduced, BUCKETS: self._buckets()}

    def in_update(self) -> Items:
        """Return gradients, flat copies of a group of them, and the temporaries of an unfused AdamW."""
        zero, counts = self.zero, self.counts
        if zero.offload_optimizer:
            return {}
        computing = 2 if self.on_cpu else 0
        if zero.stage == 0:
            return {GRADIENTS: FP32 * counts.trainable, COPIES: FP32 * computing * counts.largest}
        group = max(counts.groups) / self.world_size
        if zero.stage == 3:
            return {COPIES: FP32 * (1 + computing) * min(group, zero.sub_group)}
        if self.accumulates_whole:
            return {GRADIENTS: BF16 * counts.trainable, COPIES: FP32 * computing * group}
        flat = 0 if zero.bf16 else 1
        return {GRADIENTS: FP32 * self.share, COPIES: FP32 * (flat + computing) * group}

    def _buckets(self) -> float:
        """Return the size of the reduce buckets, one per communicated dtype."""
        zero, counts = self.zero, self.counts
        types = zero.gradient_types(counts.trainable, counts.trainable_low)
        sizes = 0.0
        for size, elements in types.items():
            length = min(zero.reduce_bucket, elements) if self.on_cpu else zero.reduce_bucket
            sizes += length * (size if zero.stage == 3 else zero.param_bytes)
        return sizes * (2 if zero.overlap and zero.stage in (1, 2) else 1)

    def _bucket_elements(self) -> int:
        """Return the size of the reduce buckets in elements."""
        types = self.zero.gradient_types(self.counts.trainable, self.counts.trainable_low)
        return sum(min(self.zero.reduce_bucket, elements) for elements in types.values())

    def _communicated(self) -> float:
        """Return the communicated size of all gradients."""
        types = self.zero.gradient_types(self.counts.trainable, self.counts.trainable_low)
        return float(sum(size * elements for size, elements in types.items()))
