"""Estimated time of an optimizer step: the GPU or the host that issues its work, exposed transfers, the loader."""

from __future__ import annotations

from dataclasses import dataclass

from mrmae_ds.config.zero import FP32, ZeroSettings
from mrmae_ds.planning.estimates.cluster import Cluster
from mrmae_ds.planning.estimates.constants import CONSTANTS
from mrmae_ds.planning.estimates.traffic import Transfer, offload_transfers, student_transfers, teacher_transfer
from mrmae_ds.planning.operator_trace import MEMORY, DeviceRates
from mrmae_ds.planning.stage import CountedStage, Placements, StageMemory, stage_memory
from mrmae_ds.planning.zero_memory import ZeroMemory
from mrmae_ds.profiling.measured_node import ADAMW, GRADIENTS


@dataclass(frozen=True)
class ComputeTime:
    """Time of the computation of a step, without transfers. GPU and host run at once, and the slower one decides.

    Attributes:
        gpu_s: seconds that the GPU computes a micro-batch.
        first_host_s: seconds that the host issues the first micro-batch of a step, in which ZeRO-3 fetches parameters.
        host_s: seconds that the host issues another micro-batch.
        update_s: seconds for gradients and update, once a step.
        accumulation: micro-batches per step.
        backward_share: share of a micro-batch that is backward.
    """

    gpu_s: float
    first_host_s: float
    host_s: float
    update_s: float
    accumulation: int
    backward_share: float

    @property
    def micro_batches_s(self) -> float:
        """Seconds of all micro-batches of a step."""
        return max(self.gpu_s, self.first_host_s) + (self.accumulation - 1) * max(self.gpu_s, self.host_s)

    @property
    def mean_host_s(self) -> float:
        """Seconds that the host issues a micro-batch, as the mean of a step."""
        return (self.first_host_s + (self.accumulation - 1) * self.host_s) / self.accumulation

    @property
    def waits_for_host(self) -> bool:
        """True if the host needs longer than the GPU."""
        return self.mean_host_s > self.gpu_s

    @property
    def total_s(self) -> float:
        """Seconds of a step."""
        return self.micro_batches_s + self.update_s

    def hiding_s(self, zero: ZeroSettings) -> float:
        """Return the seconds behind which overlapped transfers are hidden; ZeRO-1 reduces in the last backward only."""
        return self.total_s if zero.stage > 1 else self.backward_share * self.micro_batches_s / self.accumulation


@dataclass(frozen=True)
class StepEstimate:
    """A step of a stage on a cluster.

    Attributes:
        memory: memory of a rank.
        cluster: the cluster.
        transfers: transfers of a step.
        compute: time of its computation; None if the GPU's throughput is unknown.
    """

    memory: StageMemory
    cluster: Cluster
    transfers: tuple[Transfer, ...]
    compute: ComputeTime | None

    @property
    def fits(self) -> bool:
        """True if the peak memory fits the GPU."""
        return self.memory.peak.total <= self.cluster.usable_memory

    @property
    def free_memory(self) -> float:
        """Bytes of the GPU's usable memory that are free at the peak."""
        return self.cluster.usable_memory - self.memory.peak.total

    @property
    def waiting_s(self) -> float | None:
        """Seconds of a step in which computation waits for transfers."""
        if self.compute is None:
            return None
        overlapped = sum(transfer.seconds for transfer in self.transfers if transfer.overlapped)
        exposed = sum(transfer.seconds for transfer in self.transfers if not transfer.overlapped)
        return max(overlapped - self.compute.hiding_s(self.memory.zero.zero), 0.0) + exposed

    @property
    def waiting_share(self) -> float | None:
        """Waiting time as a share of computation and waiting."""
        if self.waiting_s is None or not self._unlimited_s:
            return None
        return self.waiting_s / self._unlimited_s

    @property
    def step_s(self) -> float | None:
        """Seconds of an optimizer step."""
        if self._unlimited_s is None or self.cluster.node_loader is None:
            return self._unlimited_s
        return max(self._unlimited_s, self.memory.batch / self.cluster.nodes / self.cluster.node_loader)

    @property
    def _unlimited_s(self) -> float | None:
        """Seconds of an optimizer step if the loader keeps up."""
        waiting = self.waiting_s
        return None if waiting is None or self.compute is None else self.compute.total_s + waiting

    @property
    def images_per_s(self) -> float | None:
        """Throughput of the whole job."""
        return None if self.step_s is None else self.memory.batch / self.step_s

    @property
    def node_demand(self) -> float | None:
        """Images/s that a node trains if its loader keeps up."""
        return None if self._unlimited_s is None else self.memory.batch / self.cluster.nodes / self._unlimited_s

    def hours(self, images: int, epochs: int) -> float | None:
        """Return the hours of ``epochs`` epochs of whole batches, as in training."""
        step = self.step_s
        return None if step is None else images // self.memory.batch * epochs * step / 3600


def estimate_step(
    stage: CountedStage, zero: ZeroSettings, cluster: Cluster, micro_batch: int, placements: Placements | None = None
) -> StepEstimate:
    """Estimate a step of a stage.

    Args:
        stage: the stage.
        zero: ZeRO settings, not necessarily the engine config's.
        cluster: the cluster.
        micro_batch: with the GPUs, it must divide the stage's batch.
        placements: of the teachers; None uses the recipe's.
    """
    memory = stage_memory(stage, zero, cluster.gpus, micro_batch, placements)
    transfers = [*student_transfers(memory.zero, cluster), *offload_transfers(memory.zero, cluster)]
    compute = _compute(stage, memory.zero, cluster, micro_batch)
    for name, weights in memory.teachers.items():
        share = stage.cost.parts[f"teacher {name}"].total / stage.cost.per_image
        computing = compute.gpu_s * memory.zero.accumulation * share if compute else 0.0
        if transfer := teacher_transfer(name, weights, cluster, memory.zero.accumulation, computing):
            transfers.append(transfer)
    return StepEstimate(memory, cluster, tuple(transfers), compute)


def _compute(stage: CountedStage, memory: ZeroMemory, cluster: Cluster, micro_batch: int) -> ComputeTime | None:
    """Return the time of a step's computation; None if the GPU's throughput is unknown."""
    operators, rates, cost = stage.timeline.operators, cluster.rates, stage.cost
    if cluster.sustained:
        gpu_s = cost.per_image * micro_batch / cluster.sustained
    elif rates:
        gpu_s = float(operators.seconds(micro_batch, rates).sum())
    else:
        return None
    return ComputeTime(
        gpu_s=gpu_s,
        first_host_s=cluster.host.micro_batch_s(len(operators), memory, first=True),
        host_s=cluster.host.micro_batch_s(len(operators), memory, first=False),
        update_s=max(_update_s(memory, rates) if rates else 0.0, cluster.host.step_s(memory)),
        accumulation=memory.accumulation,
        backward_share=sum(part.backward + part.recomputed for part in cost.parts.values()) / cost.per_image,
    )


def _update_s(memory: ZeroMemory, rates: DeviceRates) -> float:
    """Return the seconds in which the device copies, scales and measures gradients, and updates parameters."""
    elements = memory.share if memory.zero.stage else memory.counts.trainable
    moved = CONSTANTS.reduce_accesses * memory.reduced_bytes + FP32 * elements
    seconds = moved / rates.sizes.get(GRADIENTS, rates.sizes[MEMORY])
    if memory.zero.offload_optimizer:
        return seconds
    return seconds + CONSTANTS.update_bytes * elements / rates.sizes.get(ADAMW, rates.sizes[MEMORY])


def largest_fitting(
    stage: CountedStage, zero: ZeroSettings, cluster: Cluster, placements: Placements | None = None
) -> StepEstimate | None:
    """Return the estimate with the largest micro-batch that fits; None if none does."""
    fitting: StepEstimate | None = None
    for size in stage.micro_batches(cluster.gpus):
        step = estimate_step(stage, zero, cluster, size, placements)
        if not step.fits:
            break
        fitting = step
    return fitting
