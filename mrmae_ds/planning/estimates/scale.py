"""Scaling of a stage to other numbers of GPUs, and the bottleneck of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mrmae_ds.config.zero import ZeroSettings
from mrmae_ds.planning.estimates.cluster import Cluster
from mrmae_ds.planning.estimates.constants import CONSTANTS
from mrmae_ds.planning.estimates.step import StepEstimate, largest_fitting
from mrmae_ds.planning.stage import CountedStage

GPU_COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)


def scaling(stage: CountedStage, zero: ZeroSettings, cluster: Cluster) -> Iterator[tuple[int, StepEstimate | None]]:
    """Yield numbers of GPUs, with the estimate at the largest micro-batch that fits; None if none does."""
    for gpus in GPU_COUNTS:
        if gpus <= cluster.gpus_per_node or gpus % cluster.gpus_per_node == 0:
            settings = zero if zero.hpz == 1 or gpus % zero.hpz == 0 else replace(zero, hpz=1)
            yield gpus, largest_fitting(stage, settings, cluster.with_gpus(gpus))


def reason_for_none(stage: CountedStage, gpus: int) -> str:
    """Return the reason why no micro-batch is possible on this many GPUs."""
    batch = stage.config.batch_size
    each, remainder = divmod(batch, gpus)
    if each < 1:
        return f"batch {batch:,}: less than one image per GPU"
    if remainder:
        return f"batch {batch:,} is not a multiple of {gpus}; nearest: {batch // gpus * gpus:,}"
    if not stage.micro_batches(gpus):
        return f"batch {batch:,}: {each} per GPU, but mixup pairs images"
    return "memory"


def bottleneck(step: StepEstimate) -> str:
    """Return the component that limits a job: loader, launches by the host, network, transfers of the host, compute."""
    needed, delivered = step.node_demand, step.cluster.node_loader
    if delivered is not None and needed and needed > delivered:
        return f"loader ({needed / delivered:.1f} times its rate)"
    compute = step.compute
    limit = "launches" if compute is not None and compute.waits_for_host else "compute"
    share = step.waiting_share or 0.0
    if share > CONSTANTS.threshold:
        kind = "host" if max(step.transfers, key=lambda transfer: transfer.seconds).local else "network"
        return f"{kind if share > 0.5 else f'{limit}; {kind}'} {share:.0%}"
    return limit
