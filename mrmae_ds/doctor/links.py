"""Checks of collectives within a node and between nodes."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mrmae_ds.distributed.process_group import start_process_group
from mrmae_ds.doctor import expectations
from mrmae_ds.doctor.context import DoctorContext
from mrmae_ds.doctor.reading import Expected, NotApplicable, Reading
from mrmae_ds.units import GIGA

SIZES = {"1 KB": 1 << 10, "1 MB": 1 << 20, "256 MB": 1 << 28, "1 GB": 1 << 30}
ON_CPU = ("1 KB", "1 MB")
LARGE = "256 MB"
NETWORK_GBS = 50.0  # of an adapter of 400 Gb/s
TRANSPORT = re.compile(r"via (\S+)")


def check_start(context: DoctorContext) -> list[Reading]:
    """Start the process group, which opens NCCL's connections, and find the transports that NCCL chose."""
    context.folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("NCCL_DEBUG", "INFO")
    os.environ.setdefault("NCCL_DEBUG_FILE", str(context.folder / "nccl-%h-%p.log"))
    began = time.perf_counter()
    start_process_group(context.device, report_after_s=60.0, limit_s=600.0)
    readings = [Reading("time", time.perf_counter() - began, "s"), Reading("backend", dist.get_backend())]
    if transports := nccl_transports():
        sockets = float("NET/Socket" in " ".join(transports))
        readings.append(Reading("NCCL uses sockets", sockets, "", expectations.SOCKETS))
        readings.append(Reading("transports", ", ".join(sorted(transports))))
    return readings


def check_node_links(context: DoctorContext) -> list[Reading]:
    """Measure collectives of the ranks of each node, all nodes at once."""
    size = context.launch.local_size
    if size == 1:
        raise NotApplicable("needs two ranks on a node")
    groups = [list(range(first, first + size)) for first in range(0, context.launch.world_size, size)]
    link = expectations.node_link(context.gpu)
    return _measure(context, groups, "within a node", link, "node_gb_s")


def check_network(context: DoctorContext) -> list[Reading]:
    """Measure collectives of the first two nodes, then of all."""
    size, world = context.launch.local_size, context.launch.world_size
    if world == size:
        raise NotApplicable("needs two nodes")
    readings, link = [], expectations.network(NETWORK_GBS) if context.gpu else None
    if world > 2 * size:
        readings += _measure(context, [list(range(2 * size))], "on two nodes", link, None)
    readings += _measure(context, [list(range(world))], "on all nodes", link, "network_gb_s")
    return readings


def nccl_transports() -> set[str]:
    """Return the transports in this process's NCCL log; none without one."""
    pattern = os.environ.get("NCCL_DEBUG_FILE", "")
    files = Path(pattern).parent.glob(f"nccl-*-{os.getpid()}.log") if pattern else ()
    return {match for path in files for match in TRANSPORT.findall(path.read_text(errors="replace"))}


def _measure(
    context: DoctorContext, groups: Sequence[Sequence[int]], label: str, link: Expected | None, constant: str | None
) -> list[Reading]:
    """Measure all collectives in this rank's group; a rank outside takes no part in the numbers."""
    readings: list[Reading] = []
    own: dist.ProcessGroup | None = None
    members = 0
    for ranks in groups:  # every rank creates every group
        group = dist.new_group(list(ranks))
        if isinstance(group, dist.ProcessGroup) and context.launch.rank in ranks:
            own, members = group, len(ranks)
    for name, size in SIZES.items():
        if own is None or not (context.on_cuda or name in ON_CPU):
            continue
        for kind, (run, factor) in _collectives(own, members, size // 4, context.device).items():
            seconds = _time(context, run)
            bus = factor * size / seconds / GIGA
            large = kind == "all-reduce" and name == LARGE
            expected, kept = (link, constant) if large else (None, None)
            readings.append(Reading(f"{kind} {name} {label}", bus, "GB/s", expected, kept))
            if name == "1 KB" and kind == "all-reduce":
                small = "collective_us" if constant == "node_gb_s" else None
                readings.append(Reading(f"{kind} {name} {label}: time", seconds * 1e6, "us", None, small))
    return readings


def _collectives(
    group: dist.ProcessGroup, members: int, numel: int, device: torch.device
) -> dict[str, tuple[Callable[[], object], float]]:
    """Return collectives on ``numel`` float32 values, and the factor of the bus bandwidth as nccl-tests define it."""
    numel = max(numel // members, 1) * members
    whole, part = torch.zeros(numel, device=device), torch.zeros(numel // members, device=device)
    share = (members - 1) / members

    def reduce_scatter(output: Tensor = part, values: Tensor = whole) -> object:
        return dist.reduce_scatter_tensor(output, values, group=group)

    return {
        "all-reduce": (lambda: dist.all_reduce(whole, group=group), 2 * share),
        "all-gather": (lambda: dist.all_gather_into_tensor(whole, part, group=group), share),
        "reduce-scatter": (reduce_scatter, share),
    }


def _time(context: DoctorContext, run: Callable[[], object], warm_up: int = 3, times: int = 10) -> float:
    """Return the seconds of a collective."""
    for _ in range(warm_up):
        run()
    context.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        run()
    context.synchronize()
    return (time.perf_counter() - began) / times
