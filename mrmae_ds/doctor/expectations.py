"""Ranges in which the doctor expects its numbers, scaled to the GPU. None of them was measured by this project.

A range is a share of the vendor's data sheet (:mod:`mrmae_ds.profiling.gpus`), or a number that is usual on current
servers; the share is assumed. An unknown GPU has no expectations.
"""

from __future__ import annotations

from mrmae_ds.doctor.reading import Expected
from mrmae_ds.profiling.gpus import Gpu

ATTENTION_ERROR = Expected(high=2e-2, source="bf16 has 8 significant bits; largest difference to float32")
PARITY_LOSS = Expected(high=1e-5, source="relative; float32 without TF32", hard=True)
PARITY_GRADIENT = Expected(high=1e-4, source="relative to the gradient's norm; float32 without TF32", hard=True)
ENGINE_FP32 = Expected(high=1e-4, source="relative; 1e-6 on the CPU, where the order of sums is fixed")
ENGINE_BF16 = Expected(high=2e-2, source="relative; bf16 has 8 significant bits")
EQUAL = Expected(low=0, high=0, source="the same kernels on the same numbers, bit by bit")
RESUME = Expected(high=1e-3, source="relative; 0 with deterministic kernels")
WAITS = Expected(high=1, source="DeepSpeed's check of the gradient norm; counted by tests/doctor/test_stand_in.py")
MEMORY = Expected(low=0.9, high=1.1, source="mrmae plan")
LOADER_MARGIN = 1.3
SOCKETS = Expected(high=0, source="NCCL over TCP sockets is ten times slower than over InfiniBand")


def launch(gpu: Gpu | None) -> Expected | None:
    """Return the range of a kernel launch in us."""
    return Expected(high=4.0, source="2 to 3 us are usual on current servers") if gpu else None


def operator(gpu: Gpu | None) -> Expected | None:
    """Return the range of an eager operator in us."""
    return Expected(high=9.0, source="4 to 7 us are usual on current servers") if gpu else None


def memory(gpu: Gpu | None) -> Expected | None:
    """Return the range of a copy within the device's memory in GB/s, reads and writes added."""
    return _share(gpu.memory_gbs if gpu else None, 0.83)


def host_link(gpu: Gpu | None) -> Expected | None:
    """Return the range of pinned copies between host and device in GB/s."""
    return _share(gpu.host_gbs if gpu else None, 0.75)


def product(gpu: Gpu | None, large: bool) -> Expected | None:
    """Return the range of bf16 matrix products in TFLOP/s."""
    return _share(gpu.peak_tflops if gpu else None, 0.65 if large else 0.4)


def depthwise(gpu: Gpu | None) -> Expected | None:
    """Return the range of a depthwise convolution's traffic in GB/s."""
    return _share(gpu.memory_gbs if gpu else None, 0.4)


def node_link(gpu: Gpu | None) -> Expected | None:
    """Return the range of the bus bandwidth of a large all-reduce within a node in GB/s."""
    return _share(gpu.node_gbs if gpu else None, 0.73)


def network(gbs: float) -> Expected:
    """Return the range of the bus bandwidth of a large all-reduce between nodes in GB/s per GPU."""
    return Expected(low=0.8 * gbs, source=f"80 % of {gbs:g} GB/s, one 400 Gb/s adapter per GPU")


def _share(peak: float | None, share: float) -> Expected | None:
    return None if peak is None else Expected(low=share * peak, source=f"{share:.0%} of the data sheet's {peak:g}")
