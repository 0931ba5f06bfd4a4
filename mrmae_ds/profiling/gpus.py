"""Table of GPUs: peak throughput, memory and bandwidth; lookup of a device by name and memory.

Sources: peak throughput is the dense bf16 tensor throughput of the vendor's data sheet (numbers marked "with sparsity"
are halved). Memory is the device's total as torch reports it, which is below the advertised number; its bandwidth, of
reads and writes together, is the data sheet's. Bandwidth between devices is per direction, half of the data sheet's
bidirectional number: between GPUs of a node that of NVLink through switches, or of PCIe where bridges connect pairs
only; to the host that of PCIe.

| data sheet | rows |
|---|---|
| NVIDIA V100 (2020) | v100-16, v100-32 |
| NVIDIA A10 (2021), A10G as Amazon gives it | a10, a10g |
| NVIDIA A100 80GB (2022) and A100 (2020) | a100-* |
| NVIDIA L4 (2023), L40S (2023) | l4, l40s |
| NVIDIA H100 (2024): SXM, PCIe, NVL | h100-* |
| NVIDIA H200 (2024): SXM, NVL | h200, h200-nvl |
| NVIDIA GH200 Grace Hopper (2024) | gh200-96 |
| NVIDIA HGX B200 (2025) | b200 |
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from mrmae_ds.errors import UserError
from mrmae_ds.units import GIB

# A slice of a GPU may have the whole GPU's name; error correction and drivers change the total by a few percent.
MEMORY_TOLERANCE = 0.08
_PCIE_3, _PCIE_4, _PCIE_5 = 16.0, 32.0, 64.0


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        key: name on the command line.
        names: exact names that ``torch.cuda.get_device_name()`` returns.
        memory_gib: total memory as torch reports it, in GiB.
        peak_tflops: peak dense bf16 throughput, in TFLOP/s; None if it has no bf16 units, or is unknown.
        node_gbs: bandwidth to another GPU of its node, in GB/s per direction.
        host_gbs: bandwidth to the host's memory, in GB/s per direction.
        memory_gbs: bandwidth of its memory, in GB/s; None if unknown.
    """

    key: str
    names: tuple[str, ...]
    memory_gib: float
    peak_tflops: float | None
    node_gbs: float
    host_gbs: float
    memory_gbs: float | None = None

    @property
    def memory(self) -> int:
        """Total memory in bytes."""
        return round(self.memory_gib * GIB)


GPUS = (
    Gpu("v100-16", ("Tesla V100-SXM2-16GB",), 15.8, None, 150.0, _PCIE_3, 900.0),
    Gpu("v100-32", ("Tesla V100-SXM2-32GB",), 31.7, None, 150.0, _PCIE_3, 900.0),
    Gpu("a10", ("NVIDIA A10",), 22.0, 125.0, _PCIE_4, _PCIE_4, 600.0),
    Gpu("a10g", ("NVIDIA A10G",), 22.2, 70.0, _PCIE_4, _PCIE_4, 600.0),
    Gpu("a100-40", ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"), 39.4, 312.0, 300.0, _PCIE_4, 1555.0),
    Gpu("a100-40-pcie", ("NVIDIA A100-PCIE-40GB", "A100-PCIE-40GB"), 39.4, 312.0, _PCIE_4, _PCIE_4, 1555.0),
    Gpu("a100-80", ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"), 79.2, 312.0, 300.0, _PCIE_4, 2039.0),
    Gpu("a100-80-pcie", ("NVIDIA A100 80GB PCIe",), 79.2, 312.0, _PCIE_4, _PCIE_4, 1935.0),
    Gpu("l4", ("NVIDIA L4",), 22.0, 121.0, _PCIE_4, _PCIE_4, 300.0),
    Gpu("l40s", ("NVIDIA L40S",), 44.4, 362.05, _PCIE_4, _PCIE_4, 864.0),
    Gpu("h100-80", ("NVIDIA H100 80GB HBM3",), 79.2, 989.5, 450.0, _PCIE_5, 3350.0),
    Gpu("h100-80-pcie", ("NVIDIA H100 PCIe",), 79.1, 756.5, _PCIE_5, _PCIE_5, 2000.0),
    Gpu("h100-94-nvl", ("NVIDIA H100 NVL",), 93.1, 835.5, _PCIE_5, _PCIE_5, 3900.0),
    Gpu("h200", ("NVIDIA H200",), 139.8, 989.5, 450.0, _PCIE_5, 4800.0),
    Gpu("h200-nvl", ("NVIDIA H200 NVL",), 139.8, 835.5, _PCIE_5, _PCIE_5, 4800.0),
    Gpu("gh200-96", ("NVIDIA GH200 480GB",), 94.5, 989.5, 450.0, 450.0, 4000.0),
    Gpu("b200", ("NVIDIA B200",), 178.4, 2250.0, 900.0, _PCIE_5, 8000.0),
)


def match_device(torch_name: str, memory_bytes: int) -> Gpu | None:
    """Return the GPU with exactly this name and about this memory; None for an unknown one, never a similar one.

    Args:
        torch_name: as ``torch.cuda.get_device_name()`` returns it.
        memory_bytes: ``total_memory`` of ``torch.cuda.get_device_properties()``; separates a slice from a whole GPU.
    """
    for gpu in GPUS:
        if torch_name in gpu.names and abs(memory_bytes / gpu.memory - 1) <= MEMORY_TOLERANCE:
            return gpu
    return None


def find_gpu(key: str) -> Gpu:
    """Return the GPU with this command-line name.

    Raises:
        UserError: naming a similar one, and listing all.
    """
    for gpu in GPUS:
        if gpu.key == key:
            return gpu
    keys = [gpu.key for gpu in GPUS]
    close = difflib.get_close_matches(key.lower(), keys, n=1, cutoff=0.8)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise UserError(
        f"--gpu {key}: unknown GPU{hint}; known are {', '.join(keys)}. For another GPU, `mrmae plan` takes --memory "
        "(GiB as torch reports it) and --peak (dense bf16 TFLOP/s of its data sheet) instead, and `mrmae data bench` "
        "--images-per-s"
    )
