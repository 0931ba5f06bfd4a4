"""What a step takes, for the logs: memory, traffic, operations and how much of the device's peak they are.

Nothing here waits for the device in a step: sizes and counts are known on the host, and memory is asked for where a
line is logged.
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
    """Memory and traffic of a running stage. On every rank, because the memory logged is the fullest device's.

    Args:
        engine: whose gathers are counted. device: of this process.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, device: torch.device) -> None:
        self.device = device
        self._gathers = GatherCounter()
        self._gathers.install(engine)
        self._seen = 0

    def interval(self, steps: int) -> dict[str, float]:
        """Numbers to log after ``steps`` steps since the last call. All ranks must call it.

        ``peak_memory_gib`` is the most that a process has had on its device so far (resident on the CPU), the maximum
        over processes; ``gather_gib`` what was gathered in a step, parameters under ZeRO-3 above all (0 for a process
        alone).
        """
        memory = torch.tensor(peak_memory(self.device), dtype=torch.float64, device=self.device)
        dist.all_reduce(memory, dist.ReduceOp.MAX)
        gathered, self._seen = self._gathers.bytes - self._seen, self._gathers.bytes
        return {"peak_memory_gib": memory.item() / GIB, "gather_gib": gathered / steps / GIB}

    def restart(self) -> None:
        """Forget what was gathered since the last interval: by an evaluation, say, or a save."""
        self._seen = self._gathers.bytes

    def close(self) -> None:
        """Stop counting."""
        self._gathers.close()


def peak_memory(device: torch.device) -> int:
    """The most that this process has had so far, in bytes: allocated on the device, or resident on the CPU."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.get_device_module(device.type).max_memory_allocated(device)


def device_peak(device: torch.device) -> float | None:
    """Dense bf16 operations a second of a device, in TFLOP/s; None if it is not in the table of known ones."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    gpu = match_device(torch.cuda.get_device_name(device), properties.total_memory)
    return gpu.peak_tflops if gpu else None


def utilization(
    images_per_s: float, model_operations: int, world_size: int, peak_tflops: float | None
) -> dict[str, float]:
    """What the job's speed is in operations.

    Args:
        images_per_s: of the whole job.
        model_operations: for one image, without what checkpointing computes once more.
        world_size: devices.
        peak_tflops: of one device; None is unknown.

    Returns:
        ``tflops``, of one device, and ``mfu``, the model FLOPs utilization (Chowdhery et al. 2022, appendix B): their
        share of the peak. The second is left out where the peak is unknown: a share of a guess is worse than none.
    """
    tflops = images_per_s * model_operations / world_size / TERA
    return {"tflops": tflops} | ({"mfu": tflops / peak_tflops} if peak_tflops else {})
