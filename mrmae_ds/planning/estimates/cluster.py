"""A cluster of GPUs, and the time of collectives and copies on it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from mrmae_ds.errors import UserError
from mrmae_ds.planning.estimates.constants import CONSTANTS
from mrmae_ds.planning.estimates.rates import HostRates, device_rates
from mrmae_ds.planning.operator_trace import DeviceRates
from mrmae_ds.profiling.gpus import Gpu
from mrmae_ds.profiling.measured_node import MeasuredNode
from mrmae_ds.units import GIB, GIGA


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes.

    Attributes:
        gpu: type of the GPUs.
        gpus: number of GPUs, one rank each.
        gpus_per_node: number of GPUs of a node.
        network_gbs: bandwidth of a GPU to other nodes, in GB/s per direction.
        sustained: sustained throughput of a GPU, in FLOP/s of the counted operations, in place of the time of each
            operator; None uses that.
        measured: constants measured on a node, in place of estimates.
        node_loader: images/s that the loader of a node delivers; None if unknown.
        loader_bench: file of ``mrmae data bench``; None takes the committed measurements.
    """

    gpu: Gpu
    gpus: int
    gpus_per_node: int
    network_gbs: float
    sustained: float | None = None
    measured: MeasuredNode = field(default_factory=MeasuredNode)
    node_loader: float | None = None
    loader_bench: Path | None = None

    @cached_property
    def rates(self) -> DeviceRates | None:
        """Rates that a GPU reaches; None if unknown."""
        return device_rates(self.gpu, self.measured)

    @cached_property
    def host(self) -> HostRates:
        """Rates of the host thread of a rank."""
        return HostRates.of(self.measured)

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return -(-self.gpus // self.gpus_per_node)

    @property
    def gpus_in_node(self) -> int:
        """Number of GPUs of a node that are used."""
        return min(self.gpus, self.gpus_per_node)

    @property
    def usable_memory(self) -> float:
        """Bytes of a GPU that are available to tensors."""
        return (self.gpu.memory_gib - CONSTANTS.context_gib) * GIB * (1 - CONSTANTS.fragmentation)

    def with_gpus(self, gpus: int) -> Cluster:
        """Return the same cluster with another number of GPUs."""
        return replace(self, gpus=gpus)

    def collective_s(self, size: float, calls: float, reduce: bool = False, in_node: bool = False) -> float:
        """Return the seconds of collectives over all ranks.

        Args:
            size: bytes of the whole tensors.
            calls: number of collectives.
            reduce: True for an all-reduce, which moves the tensors twice; False for a gather or a reduce-scatter.
            in_node: True for collectives within each node.
        """
        ranks, nodes = (self.gpus_in_node, 1) if in_node else (self.gpus, self.nodes)
        if ranks == 1:
            return 0.0
        times = 2 if reduce else 1
        node_gbs = self.measured.node_gb_s or self.gpu.node_gbs * CONSTANTS.link_share
        network_gbs = self.measured.network_gb_s or self.network_gbs * CONSTANTS.link_share
        within = size * (ranks - 1) / ranks / (node_gbs * GIGA) if self.gpus_in_node > 1 else 0.0
        # The links of all GPUs of a node share the traffic to the other nodes.
        between = size * (nodes - 1) / nodes / (self.gpus_in_node * network_gbs * GIGA) if nodes > 1 else 0.0
        call_s = CONSTANTS.call_s if self.measured.collective_us is None else self.measured.collective_us * 1e-6
        return times * max(within, between) + calls * (call_s + CONSTANTS.node_s * nodes)

    def copy_s(self, size: float) -> float:
        """Return the seconds to copy ``size`` bytes from the host's memory to a GPU, or back."""
        slower = [rate for rate in (self.measured.h2d_gb_s, self.measured.d2h_gb_s) if rate]
        return size / (GIGA * (min(slower) if slower else self.gpu.host_gbs * CONSTANTS.link_share))


def check_cluster(gpus: int, gpus_per_node: int) -> None:
    """Raise UserError for numbers that do not give equal nodes."""
    for option, number in {"--gpus": gpus, "--gpus-per-node": gpus_per_node}.items():
        if number < 1:
            raise UserError(f"{option} must be at least 1, got {number}")
    if gpus > gpus_per_node and gpus % gpus_per_node:
        below = gpus // gpus_per_node * gpus_per_node
        raise UserError(
            f"--gpus {gpus} is not a multiple of {gpus_per_node} GPUs per node; use {below} or "
            f"{below + gpus_per_node}, or set --gpus-per-node"
        )
