"""What the processes send each other in an optimizer step, and what goes over the bus to the host."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mrmae_ds.planning.cluster import NODE_MEMORY_GBS, UPDATE_BYTES, Cluster
from mrmae_ds.planning.teacher_memory import Placed
from mrmae_ds.planning.zero_memory import PLAIN_BUCKET, ZeroMemory


@dataclass(frozen=True)
class Flow:
    """Something that travels in an optimizer step.

    Attributes:
        name: in words.
        size: bytes, of the whole tensors. calls: in how many collectives or copies.
        seconds: that it takes.
        hidden: whether it runs beside what computes.
        local: whether it stays in its node, between a GPU and the host.
    """

    name: str
    size: float
    calls: int
    seconds: float
    hidden: bool
    local: bool = False


def student_flows(engine: ZeroMemory, cluster: Cluster) -> list[Flow]:
    """The student's, between processes; none for a process alone.

    Sources, of DeepSpeed 0.19.8: runtime/engine.py (stage 0), runtime/zero/stage_1_and_2.py, whose default reduces
    over all ranks and drops what is others' (twice the bytes of a reduce-scatter), runtime/zero/stage3.py.
    """
    zero, census = engine.zero, engine.census
    if cluster.gpus == 1:
        return []
    reduced = zero.gradient_types(census.trainable, census.trainable_low)
    size = float(sum(each * elements for each, elements in reduced.items()))
    buckets = sum(math.ceil(elements / zero.reduce_bucket) for elements in reduced.values())
    if zero.stage == 0:
        calls = math.ceil(census.trainable / PLAIN_BUCKET)
        size = 4.0 * census.trainable
        return [Flow("gradients, all-reduced", size, calls, cluster.collective_s(size, calls, reduce=True), False)]
    if zero.stage < 3:
        times = engine.accumulation if zero.stage == 2 else 1
        size, calls = size * times, buckets * times
        seconds = cluster.collective_s(size, calls, reduce=True)
        updated = float(zero.param_bytes * census.trainable)
        gathers = math.ceil(census.trainable / zero.allgather_bucket)
        return [
            Flow("gradients, all-reduced", size, calls, seconds, zero.overlap),
            Flow("updated parameters, gathered", updated, gathers, cluster.collective_s(updated, gathers), False),
        ]
    times = engine.accumulation
    size, calls = size * times, buckets * times
    scattered = Flow("gradients, reduce-scattered", size, calls, cluster.collective_s(size, calls), zero.overlap)
    return [*_gathers(engine, cluster), scattered]


def _gathers(engine: ZeroMemory, cluster: Cluster) -> list[Flow]:
    """The parameters that ZeRO-3 gathers; with hpZ, after forward from the node's own copy."""
    zero, census, moving = engine.zero, engine.census, engine.gathering
    times = engine.accumulation
    total = zero.travel_bytes(moving.gathered, moving.low) * times
    if zero.hpz == 1:
        calls = moving.calls * times
        return [Flow("parameters, gathered", total, calls, cluster.collective_s(total, calls), zero.overlap)]
    first = zero.travel_bytes(census.total, census.low) * times
    calls = moving.calls * times // 2
    again, rest = total - first, moving.calls * times - calls
    return [
        Flow("parameters, gathered in forward", first, calls, cluster.collective_s(first, calls), zero.overlap),
        Flow(
            "parameters, gathered again in a node", again, rest, cluster.collective_s(again, rest, in_node=True), True
        ),
    ]


def offload_flows(engine: ZeroMemory, cluster: Cluster) -> list[Flow]:
    """What offloading sends over the bus, and the update on the host's processors."""
    zero, times = engine.zero, engine.accumulation
    flows = []
    if zero.offload_param:
        part = engine.census.total * zero.param_bytes / engine.world
        uses = engine.gathering.gathered / engine.census.total
        size = part * uses * times
        flows.append(Flow("parameters, from the host", size, 0, cluster.copy_s(size), True, local=True))
    if zero.offload_optimizer:
        size = zero.accumulation_bytes * engine.share * times + zero.param_bytes * engine.share
        name = "gradients and updated parameters, to and from the host"
        flows.append(Flow(name, size, 0, cluster.copy_s(size), False, local=True))
        moved = UPDATE_BYTES * engine.share
        seconds = moved * cluster.in_node / (NODE_MEMORY_GBS * 1e9)
        flows.append(Flow("update by the host's processors", moved, 0, seconds, False, local=True))
    return flows


def teacher_flow(name: str, placed: Placed, cluster: Cluster, batches: int, computing_s: float) -> Flow | None:
    """What a teacher's weights send in a step; it runs beside the teacher's own computing and no longer than that.

    Args:
        name: of the teacher. placed: its weights.
        batches: micro-batches of a step. computing_s: that the teacher computes in a step.
    """
    copied, gathered = placed.copied * batches, placed.gathered * batches
    if not copied + gathered:
        return None
    seconds = cluster.copy_s(copied) + cluster.collective_s(gathered, 0)
    words = "gathered" if gathered else "copied to the device"
    return Flow(
        f"teacher {name}, {words}", copied + gathered, 0, max(seconds - computing_s, 0.0), False, local=not gathered
    )
