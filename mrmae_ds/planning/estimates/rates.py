"""Rates of a GPU and of the host that issues its work: measured ones, or shares of the data sheet."""

from __future__ import annotations

from dataclasses import dataclass

from mrmae_ds.planning.estimates.constants import CONSTANTS
from mrmae_ds.planning.operator_trace import ATTENTION, CONVOLUTION, KINDS, MATMUL, MATMUL_FP32, DeviceRates
from mrmae_ds.planning.zero_memory import ZeroMemory
from mrmae_ds.profiling.gpus import Gpu
from mrmae_ds.profiling.measured_node import MeasuredNode
from mrmae_ds.units import GIGA, TERA

_MICRO = 1e-6


def device_rates(gpu: Gpu, measured: MeasuredNode) -> DeviceRates | None:
    """Return the rates that a GPU reaches; None if neither its peak nor a measurement is known.

    Args:
        gpu: the GPU; without a known memory bandwidth, it has as much for its peak as an H100.
        measured: on a node with this GPU.
    """
    peak = gpu.peak_tflops
    memory = gpu.memory_gbs or (peak and peak * CONSTANTS.gbs_per_tflops)
    matmul = measured.matmul_tflops or (peak and peak * CONSTANTS.matmul_share)
    attention = measured.attention_tflops or (peak and peak * CONSTANTS.attention_share)
    moving = measured.memory_gb_s or (memory and memory * CONSTANTS.memory_share)
    convolution = measured.depthwise_gb_s or (memory and memory * CONSTANTS.convolution_share)
    if not (matmul and attention and moving and convolution):
        return None
    wide = measured.fp32_tflops
    if wide is None:
        wide = peak * CONSTANTS.fp32_share if peak else matmul * CONSTANTS.fp32_share / CONSTANTS.matmul_share
    # Patch embeddings are convolutions with as many operations as a product.
    flops = {MATMUL: matmul * TERA, MATMUL_FP32: wide * TERA, ATTENTION: attention * TERA, CONVOLUTION: matmul * TERA}
    sizes = dict.fromkeys(KINDS, moving * GIGA) | {CONVOLUTION: convolution * GIGA}
    sizes |= {name: rate * GIGA for name, rate in measured.operator_gb_s.items()}
    kernel_s = CONSTANTS.kernel_s if measured.kernel_us is None else measured.kernel_us * _MICRO
    return DeviceRates(flops, sizes, kernel_s)


@dataclass(frozen=True)
class HostRates:
    """Time of one rank's host thread, which issues all work of its GPU.

    Attributes:
        operator_s: seconds to issue an eager operator, forward or backward.
        zero1_s: seconds that ZeRO-1 and 2 add per parameter tensor and micro-batch.
        zero3_first_s: seconds that ZeRO-3 adds per parameter tensor to a micro-batch that fetches and releases it.
        zero3_s: seconds that ZeRO-3 adds per parameter tensor to a micro-batch that finds it gathered.
        update_s: seconds per parameter tensor and optimizer step: agreement of ranks, gradient norm, optimizer.
    """

    operator_s: float
    zero1_s: float
    zero3_first_s: float
    zero3_s: float
    update_s: float

    @classmethod
    def of(cls, measured: MeasuredNode) -> HostRates:
        """Return the measured rates, and the constants in place of those that are missing."""

        def seconds(microseconds: float | None, constant: float) -> float:
            return constant if microseconds is None else microseconds * _MICRO

        return cls(
            operator_s=seconds(measured.op_us, CONSTANTS.op_s),
            zero1_s=seconds(measured.zero1_param_us, CONSTANTS.zero1_param_s),
            zero3_first_s=seconds(measured.zero3_first_param_us, CONSTANTS.zero3_first_param_s),
            zero3_s=seconds(measured.zero3_param_us, CONSTANTS.zero3_param_s),
            update_s=seconds(measured.update_param_us, CONSTANTS.update_param_s),
        )

    def micro_batch_s(self, operators: int, memory: ZeroMemory, first: bool) -> float:
        """Return the seconds to issue a micro-batch of this many operators, the first of a step or another."""
        fetches = first or not memory.keeps_gathered
        zero3_s = self.zero3_first_s if fetches else self.zero3_s
        each = {0: 0.0, 3: zero3_s}.get(memory.zero.stage, self.zero1_s)
        return operators * self.operator_s + memory.counts.tensors * each

    def step_s(self, memory: ZeroMemory) -> float:
        """Return the seconds that a step adds once, after its last micro-batch."""
        return memory.counts.tensors * self.update_s
