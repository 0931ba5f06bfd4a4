"""Checks of the node before any process group: driver, imports, device of each rank, limits."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sysconfig
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from mrmae_ds.data.loaders.build import default_num_workers
from mrmae_ds.doctor.context import DoctorContext
from mrmae_ds.doctor.reading import Expected, HardFailure, Reading
from mrmae_ds.records.environment import collect_versions
from mrmae_ds.units import GIB

NVIDIA_SMI = {
    "driver_version": "driver",
    "ecc.mode.current": "ECC",
    "mig.mode.current": "MIG",
    "persistence_mode": "persistence mode",
    "ecc.errors.uncorrected.volatile.total": "uncorrected memory errors",
}
NO_ERRORS = Expected(high=0, source="any uncorrected error since the last reset calls for a reset of the GPU")
SHM = Expected(low=1.0, source="batches of the Pillow reader and NCCL's buffers; containers often get 64 MiB")
MEMLOCK = Expected(low=64.0, source="RDMA and pinned memory; `ulimit -l unlimited` (shown as 1e6)")
CORES = Expected(low=8, source="decoding threads for the images of one GPU, and the rank's own")
SAME_NUMA = Expected(low=1, source="copies to the GPU cross no socket")
UNLIMITED_GIB = 1e6


def check_driver(context: DoctorContext) -> list[Reading]:
    """Read the driver, and the GPU's name, memory and modes."""
    listed = _nvidia_smi("--query-gpu=name", "--format=csv,noheader")
    if not context.on_cuda and listed and os.environ.get("DS_ACCELERATOR") != "cpu":
        raise HardFailure(
            f"nvidia-smi lists {len(listed)} GPUs, but torch {torch.__version__} finds none: {_cuda_error()}. Check "
            "the driver's version and CUDA_VISIBLE_DEVICES, or set DS_ACCELERATOR=cpu"
        )
    context.require_cuda()
    properties = torch.cuda.get_device_properties(context.device)
    known = context.gpu.key if context.gpu else "not in profiling/gpus.py: expectations and MFU are omitted"
    readings = [
        Reading("name", properties.name),
        Reading("known as", known),
        Reading("memory", properties.total_memory / GIB, "GiB"),
        Reading("compute capability", f"{properties.major}.{properties.minor}"),
    ]
    values = _nvidia_smi(
        f"--query-gpu={','.join(NVIDIA_SMI)}", "--format=csv,noheader", f"--id={pci_id(context.device)}"
    )
    if not values:
        return [*readings, Reading("nvidia-smi", "not available")]
    for label, value in zip(NVIDIA_SMI.values(), values[0].split(", "), strict=False):
        number = value.isdecimal() and label.endswith("errors")
        readings.append(Reading(label, int(value), "", NO_ERRORS) if number else Reading(label, value))
    return readings


def check_imports(context: DoctorContext) -> list[Reading]:
    """Read versions, and find the compiler that torch.compile needs."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    missing = [
        *([] if compiler else ["a C compiler"]),
        *([] if headers.is_file() else ["Python.h (package python3-dev)"]),
    ]
    return [
        *(Reading(name, version) for name, version in collect_versions().items()),
        Reading("nvcc", shutil.which("nvcc") or "none: needed for NVMe offload only"),
        Reading("compiler", compiler or "none"),
        Reading("compile.blocks", f"not possible, missing {', '.join(missing)}" if missing else "possible"),
    ]


def check_binding(context: DoctorContext) -> list[Reading]:
    """Check that every rank has a device of its own."""
    launch, host = context.launch, socket.gethostname()
    if context.on_cuda:
        identity, kind = pci_id(context.device), "GPU"
    else:
        identity, kind = str(launch.local_rank), "LOCAL_RANK"
    owners = defaultdict(list)
    for rank, entry in enumerate(context.ranks.gather([host, identity])):
        if entry is None:
            raise HardFailure(f"rank {rank} did not start; check the launcher's output of its node")
        owners[tuple(entry)].append(rank)
    for (node, shared), ranks in owners.items():
        if len(ranks) > 1:
            raise HardFailure(
                f"ranks {', '.join(map(str, ranks))} share {kind} {shared} of {node}: start one rank per GPU, with "
                "LOCAL_RANK from 0 on each node or one GPU bound to each task"
            )
    return [
        Reading("device", f"{context.device} of {host}"),
        Reading(kind, identity),
        Reading("LOCAL_RANK", os.environ.get("LOCAL_RANK", "")),
        Reading("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", "not set")),
    ]


def check_limits(context: DoctorContext) -> list[Reading]:
    """Read limits of the node and of this process."""
    shm, ranks = os.statvfs("/dev/shm"), context.launch.local_size
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    memlock = UNLIMITED_GIB if soft == resource.RLIM_INFINITY else soft / GIB
    readings = [
        Reading("free /dev/shm per rank", shm.f_bavail * shm.f_frsize / GIB / ranks, "GiB", SHM),
        Reading("locked memory", memlock, "GiB", MEMLOCK if context.on_cuda else None),
        Reading("cores per rank", default_num_workers(), "", CORES if context.on_cuda else None, "loader_cores"),
        Reading("open files", resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
    ]
    node = _numa_node(context.device) if context.on_cuda else None
    if node is not None and (cores := _numa_cores(node)):
        inside = len(cores & os.sched_getaffinity(0)) / len(os.sched_getaffinity(0))
        readings.append(Reading("share of cores on the GPU's NUMA node", inside, "", SAME_NUMA))
    return readings


def pci_id(device: torch.device) -> str:
    """Return a GPU's PCI address as the kernel writes it, for example 0000:1b:00.0."""
    found: Any = torch.cuda.get_device_properties(device)
    return f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"


def _nvidia_smi(*arguments: str) -> list[str]:
    """Return the lines that nvidia-smi prints; none if it fails."""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.strip().splitlines()


def _cuda_error() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0]
    return "no visible device"


def _numa_node(device: torch.device) -> int | None:
    path = Path("/sys/bus/pci/devices") / pci_id(device) / "numa_node"
    node = int(path.read_text()) if path.is_file() else -1
    return node if node >= 0 else None


def _numa_cores(node: int) -> set[int]:
    path = Path(f"/sys/devices/system/node/node{node}/cpulist")
    cores: set[int] = set()
    for part in path.read_text().strip().split(",") if path.is_file() else ():
        first, _, last = part.partition("-")
        cores |= set(range(int(first), int(last or first) + 1))
    return cores
