"""Per-step performance metrics: peak memory, communication volume, FLOPs and MFU.

Nothing here waits for the device within a step: sizes and counts are known on the host, and memory is read where a line
is logged.
"""

from __future__ import annotations

import resource

import deepspeed
import torch
import torch.distributed as dist

from mrmae_ds.profiling.gpus import match_device
from mrmae_ds.training.engine.comm_volume import GatherCounter
from mrmae_ds.units import GIB, TERA


class PerfMeter:
    """Memory and communication of a running stage. Used on every rank: the memory logged is the fullest device's.

    Args:
        engine: its gathers are counted.
        device: device of this rank.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, device: torch.device) -> None:
        self.device = device
        self._gathers = GatherCounter()
        self._gathers.install(engine)
        self._counted = 0

    def interval(self, steps: int) -> dict[str, float]:
        """Return the values to log. All ranks must call it.

        Args:
            steps: optimizer steps since the last call.

        Returns:
            ``peak_memory_gib``, the highest memory of any rank so far, allocated on its device or resident on the CPU;
            ``gather_gib``, the volume gathered per step, above all parameters under ZeRO-3 (0 for a single rank).
        """
        memory = torch.tensor(peak_memory(self.device), dtype=torch.float64, device=self.device)
        dist.all_reduce(memory, dist.ReduceOp.MAX)
        gathered, self._counted = self._gathers.bytes - self._counted, self._gathers.bytes
        return {"peak_memory_gib": memory.item() / GIB, "gather_gib": gathered / steps / GIB}

    def restart(self) -> None:
        """Discard what was gathered since the last interval, for example by an evaluation or a save."""
        self._counted = self._gathers.bytes

    def close(self) -> None:
        """Stop counting."""
        self._gathers.close()


def peak_memory(device: torch.device) -> int:
    """Return this process's peak memory so far in bytes: allocated on the device, or resident on the CPU."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.get_device_module(device.type).max_memory_allocated(device)


def device_peak(device: torch.device) -> float | None:
    """Return the dense bf16 peak of a device in TFLOP/s; None if it is not in the table of known devices."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    gpu = match_device(torch.cuda.get_device_name(device), properties.total_memory)
    return gpu.peak_tflops if gpu else None


def utilization(
    images_per_s: float, model_operations: int, world_size: int, peak_tflops: float | None
) -> dict[str, float]:
    """Convert the job's throughput to operations.

    Args:
        images_per_s: throughput of the job.
        model_operations: operations for one image, without what activation checkpointing recomputes.
        world_size: number of devices.
        peak_tflops: peak of one device; None if unknown.

    Returns:
        ``tflops``, of one device, and ``mfu``, the model FLOPs utilization (Chowdhery et al. 2022, appendix B): their
        share of the peak. The second is left out where the peak is unknown: a share of a guess is worse than none.
    """
    tflops = images_per_s * model_operations / world_size / TERA
    return {"tflops": tflops} | ({"mfu": tflops / peak_tflops} if peak_tflops else {})
