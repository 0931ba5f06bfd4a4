"""Communication volume per step: inter-GPU collectives and host-device (PCIe) transfers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mrmae_ds.planning.estimates.cluster import Cluster
from mrmae_ds.planning.estimates.constants import CONSTANTS
from mrmae_ds.planning.teacher_memory import TeacherBytes
from mrmae_ds.planning.zero_memory import PLAIN_BUCKET, ZeroMemory


@dataclass(frozen=True)
class Transfer:
    """A transfer of an optimizer step.

    Attributes:
        name: description.
        size: bytes of the whole tensors.
        calls: number of collectives.
        seconds: duration.
        overlapped: True if it overlaps computation.
        local: True if it stays in its node, between a GPU and the host.
    """

    name: str
    size: float
    calls: int
    seconds: float
    overlapped: bool
    local: bool = False


def student_transfers(memory: ZeroMemory, cluster: Cluster) -> list[Transfer]:
    """Return the student's transfers between ranks; none for a single rank.

    Sources in DeepSpeed 0.19.8: runtime/engine.py (stage 0); runtime/zero/stage_1_and_2.py, which by default reduces
    over all ranks and drops the others' partitions (twice the bytes of a reduce-scatter); runtime/zero/stage3.py.
    """
    zero, counts = memory.zero, memory.counts
    if cluster.gpus == 1:
        return []
    reduced = zero.gradient_types(counts.trainable, counts.trainable_low)
    size = float(sum(each * elements for each, elements in reduced.items()))
    buckets = sum(math.ceil(elements / zero.reduce_bucket) for elements in reduced.values())
    if zero.stage == 0:
        calls = math.ceil(counts.trainable / PLAIN_BUCKET)
        size = 4.0 * counts.trainable
        return [Transfer("all-reduce of gradients", size, calls, cluster.collective_s(size, calls, reduce=True), False)]
    if zero.stage < 3:
        times = memory.accumulation if zero.stage == 2 else 1
        size, calls = size * times, buckets * times
        seconds = cluster.collective_s(size, calls, reduce=True)
        updated = float(zero.param_bytes * counts.trainable)
        gathers = math.ceil(counts.trainable / zero.allgather_bucket)
        return [
            Transfer("all-reduce of gradients", size, calls, seconds, zero.overlap),
            Transfer("gather of updated parameters", updated, gathers, cluster.collective_s(updated, gathers), False),
        ]
    times = memory.accumulation
    size, calls = size * times, buckets * times
    scatter = Transfer("reduce-scatter of gradients", size, calls, cluster.collective_s(size, calls), zero.overlap)
    return [*_gathers(memory, cluster), scatter]


def _gathers(memory: ZeroMemory, cluster: Cluster) -> list[Transfer]:
    """Return the gathers of ZeRO-3; with hpZ, those after forward read the node's own copy."""
    zero, counts, gathers = memory.zero, memory.counts, memory.gathers
    times = 1 if memory.keeps_gathered else memory.accumulation
    total = zero.travel_bytes(gathers.gathered, gathers.low) * times
    if zero.hpz == 1:
        calls = gathers.calls * times
        return [Transfer("gather of parameters", total, calls, cluster.collective_s(total, calls), zero.overlap)]
    first = zero.travel_bytes(counts.total, counts.low) * times
    calls = gathers.calls * times // 2
    again, rest = total - first, gathers.calls * times - calls
    in_node_s = cluster.collective_s(again, rest, in_node=True)
    return [
        Transfer("gather of parameters in forward", first, calls, cluster.collective_s(first, calls), zero.overlap),
        Transfer("gather of parameters within nodes (hpZ)", again, rest, in_node_s, True),
    ]


def offload_transfers(memory: ZeroMemory, cluster: Cluster) -> list[Transfer]:
    """Return the host-device transfers of offloading, and the update on the host."""
    zero, times = memory.zero, memory.accumulation
    transfers = []
    if zero.offload_param:
        part = memory.counts.total * zero.param_bytes / memory.world_size
        uses = memory.gathers.gathered / memory.counts.total
        size = part * uses * (1 if memory.keeps_gathered else times)
        transfers.append(Transfer("parameters from the host", size, 0, cluster.copy_s(size), True, local=True))
    if zero.offload_optimizer:
        size = zero.accumulation_bytes * memory.share * times + zero.param_bytes * memory.share
        name = "gradients to the host and updated parameters back"
        transfers.append(Transfer(name, size, 0, cluster.copy_s(size), False, local=True))
        moved = CONSTANTS.update_bytes * memory.share
        seconds = moved * cluster.gpus_in_node / (CONSTANTS.node_memory_gbs * 1e9)
        transfers.append(Transfer("optimizer update on the host", moved, 0, seconds, False, local=True))
    return transfers


def teacher_transfer(
    name: str, weights: TeacherBytes, cluster: Cluster, micro_batches: int, compute_s: float
) -> Transfer | None:
    """Return the transfer of a teacher's weights; it overlaps the teacher's own computation.

    Args:
        name: name of the teacher.
        weights: its weights.
        cluster: the cluster.
        micro_batches: micro-batches of a step.
        compute_s: seconds that the teacher computes in a step.

    Returns:
        None if the weights stay on the device.
    """
    copied, gathered = weights.copied * micro_batches, weights.gathered * micro_batches
    if not copied + gathered:
        return None
    seconds = cluster.copy_s(copied) + cluster.collective_s(gathered, 0)
    kind = "gather of" if gathered else "copy of"
    exposed = max(seconds - compute_s, 0.0)
    return Transfer(f"{kind} teacher {name}", copied + gathered, 0, exposed, False, local=not gathered)
