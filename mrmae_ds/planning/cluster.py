"""The machines that a plan is for, and how long a collective takes on them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mrmae_ds.errors import UserError
from mrmae_ds.profiling.gpus import GIB, Gpu

GIGA = 1e9
# What of a data sheet's bandwidth a collective reaches.
LINK_SHARE = 0.7
# What a collective takes beside its bytes: for itself, and for each node that its ring passes.
CALL_S, NODE_S = 20e-6, 5e-6
# Gone before the first tensor: the CUDA context, communication buffers, libraries.
CONTEXT_GIB = 2.0
# What the allocator's blocks waste, and kernels' workspaces take, as a share of the whole.
FRAGMENTS = 0.05
# CPU AdamW reads and writes 28 bytes an element (gradient, master, two states); a node's memory moves so much for it.
UPDATE_BYTES, NODE_MEMORY_GBS = 28, 150.0


@dataclass(frozen=True)
class Cluster:
    """Accelerators in nodes.

    Attributes:
        gpu: each of them.
        gpus: how many. per_node: how many in a node.
        network_gbs: of each to other nodes, in GB/s one way.
        sustained: operations a second of each that count, the whole job's time taken together; None is unknown.
    """

    gpu: Gpu
    gpus: int
    per_node: int
    network_gbs: float
    sustained: float | None

    @property
    def nodes(self) -> int:
        """How many nodes."""
        return -(-self.gpus // self.per_node)

    @property
    def in_node(self) -> int:
        """Accelerators of a node that are used."""
        return min(self.gpus, self.per_node)

    @property
    def usable(self) -> float:
        """Bytes of an accelerator that tensors can have."""
        return (self.gpu.memory_gib - CONTEXT_GIB) * GIB * (1 - FRAGMENTS)

    def of(self, gpus: int) -> Cluster:
        """The same with another number of accelerators."""
        return replace(self, gpus=gpus)

    def collective_s(self, size: float, calls: float, reduce: bool = False, in_node: bool = False) -> float:
        """Seconds of collectives over all processes.

        Args:
            size: bytes of the whole tensors. calls: how many collectives they take.
            reduce: an all-reduce, which moves everything twice; else a gather or a reduce-scatter.
            in_node: only within each node.
        """
        ranks, nodes = (self.in_node, 1) if in_node else (self.gpus, self.nodes)
        if ranks == 1:
            return 0.0
        times = 2 if reduce else 1
        within = size * (ranks - 1) / ranks / (self.gpu.node_gbs * GIGA) if self.in_node > 1 else 0.0
        # Each node's links to the others carry what the others have, together.
        between = size * (nodes - 1) / nodes / (self.in_node * self.network_gbs * GIGA) if nodes > 1 else 0.0
        return times * max(within, between) / LINK_SHARE + calls * (CALL_S + NODE_S * nodes)

    def copy_s(self, size: float) -> float:
        """Seconds to copy so many bytes between an accelerator and its host's memory."""
        return size / (self.gpu.host_gbs * GIGA * LINK_SHARE)


def check_cluster(gpus: int, per_node: int) -> None:
    """Raises UserError for numbers that make no cluster of equal nodes."""
    for option, number in {"--gpus": gpus, "--gpus-per-node": per_node}.items():
        if number < 1:
            raise UserError(f"{option} must be at least 1, got {number}")
    if gpus > per_node and gpus % per_node:
        below = gpus // per_node * per_node
        raise UserError(
            f"--gpus {gpus} are no whole number of nodes of {per_node}; take {below} or {below + per_node}, or say "
            "--gpus-per-node"
        )
