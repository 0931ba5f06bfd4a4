"""Estimated time of an optimizer step: computation, and transfers that it does not overlap."""

from __future__ import annotations

from dataclasses import dataclass

from mrmae_ds.config.zero import ZeroSettings
from mrmae_ds.planning.estimates.cluster import Cluster
from mrmae_ds.planning.estimates.traffic import Transfer, offload_transfers, student_transfers, teacher_transfer
from mrmae_ds.planning.stage import CountedStage, Placements, StageMemory, stage_memory


@dataclass(frozen=True)
class StepEstimate:
    """A step of a stage on a cluster.

    Attributes:
        memory: memory of a rank.
        cluster: the cluster.
        transfers: transfers of a step.
        compute_s: seconds of the counted operations of a step; None if the GPU's throughput is unknown.
    """

    memory: StageMemory
    cluster: Cluster
    transfers: tuple[Transfer, ...]
    compute_s: float | None

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
        if self.compute_s is None:
            return None
        overlapped = sum(transfer.seconds for transfer in self.transfers if transfer.overlapped)
        exposed = sum(transfer.seconds for transfer in self.transfers if not transfer.overlapped)
        return max(overlapped - self.compute_s, 0.0) + exposed

    @property
    def waiting_share(self) -> float | None:
        """Waiting time as a share of the step."""
        if self.waiting_s is None or not self.step_s:
            return None
        return self.waiting_s / self.step_s

    @property
    def step_s(self) -> float | None:
        """Seconds of an optimizer step if the loader keeps up."""
        waiting = self.waiting_s
        return None if waiting is None or self.compute_s is None else self.compute_s + waiting

    @property
    def images_per_s(self) -> float | None:
        """Throughput of the whole job."""
        step = self.step_s
        return None if step is None else self.memory.batch / step

    @property
    def node_images_per_s(self) -> float | None:
        """Throughput of a node, which its loader must deliver."""
        return None if self.images_per_s is None else self.images_per_s / self.cluster.nodes

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
    accumulation = memory.zero.accumulation
    images, throughput = micro_batch * accumulation, cluster.sustained
    for name, weights in memory.teachers.items():
        compute_s = stage.cost.parts[f"teacher {name}"].total * images / throughput if throughput else 0.0
        if transfer := teacher_transfer(name, weights, cluster, accumulation, compute_s):
            transfers.append(transfer)
    compute = stage.cost.per_image * images / throughput if throughput else None
    return StepEstimate(memory, cluster, tuple(transfers), compute)


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
