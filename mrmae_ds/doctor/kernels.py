"""Checks of single kernels: launches, memory and link bandwidth, matrix products, depthwise convolutions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from mrmae_ds.doctor import expectations
from mrmae_ds.doctor.context import DoctorContext
from mrmae_ds.doctor.reading import Reading
from mrmae_ds.units import GIGA, TERA

# Rows, inputs and outputs: the MLPs' first products on visible tokens, 49 of Base at 128 images and 64 of Huge at 64.
PRODUCTS = {"8192 cubed": (8192, 8192, 8192), "Base": (49 * 128, 768, 3072), "Huge": (64 * 64, 1280, 5120)}
# Images, channels and side of the maps of Base's two convolution stages.
MAPS = {"stage 1": (128, 256, 56), "stage 2": (128, 384, 28)}
KERNEL = 5
COPIED = 1 << 32  # bytes; a quarter of it between host and device


def seconds(run: Callable[[], object], times: int = 10) -> float:
    """Return the seconds of a call, the device included, as the mean of ``times`` calls after one."""
    run()
    return float(Timer("run()", globals={"run": run}).timeit(times).mean)


def check_launch(context: DoctorContext) -> list[Reading]:
    """Measure the time to launch a kernel and to issue an operator."""
    one, readings = torch.zeros(1, device=context.device), []
    if context.on_cuda:
        empty = seconds(lambda: torch.cuda._sleep(0), 10_000) * 1e6
        readings.append(Reading("empty kernel", empty, "us", expectations.launch(context.gpu), "launch_us"))
        readings.append(Reading("shortest kernel in a full queue", _queued_kernel(one), "us", None, "kernel_us"))
    operator = seconds(lambda: one.add_(1), 1000) * 1e6
    return [*readings, Reading("add_ of one element", operator, "us", expectations.operator(context.gpu))]


def _queued_kernel(one: Tensor, count: int = 500) -> float:
    """Return the GPU's time per kernel in us, of kernels that the host issued while the GPU was busy."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(20_000_000)  # about 10 ms
    start.record()
    for _ in range(count):
        one.add_(1)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / count * 1e3


def check_bandwidth(context: DoctorContext) -> list[Reading]:
    """Measure copies within the device's memory, and between it and pinned host memory."""
    size = COPIED if context.on_cuda else COPIED >> 6
    source = torch.zeros(size, dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    copy = 2 * size / seconds(lambda: target.copy_(source)) / GIGA
    readings = [Reading("copy in memory", copy, "GB/s", expectations.memory(context.gpu), "memory_gb_s")]
    if not context.on_cuda:
        return readings
    size = COPIED >> 2
    host, device = torch.zeros(size, dtype=torch.uint8, pin_memory=True), target[:size]
    up = size / seconds(lambda: device.copy_(host, non_blocking=True)) / GIGA
    down = size / seconds(lambda: host.copy_(device, non_blocking=True)) / GIGA
    link = expectations.host_link(context.gpu)
    readings.append(Reading("pinned host to device", up, "GB/s", link, "h2d_gb_s"))
    return [*readings, Reading("device to pinned host", down, "GB/s", link, "d2h_gb_s")]


def check_products(context: DoctorContext) -> list[Reading]:
    """Measure bf16 matrix products; the constant is that of Base."""
    readings, shrink = [], 1 if context.on_cuda else 16
    for name, (rows, inputs, outputs) in PRODUCTS.items():
        rows, inputs, outputs = rows // shrink, max(inputs // shrink, 64), max(outputs // shrink, 64)
        a = torch.ones(rows, inputs, dtype=torch.bfloat16, device=context.device)
        b = torch.ones(inputs, outputs, dtype=torch.bfloat16, device=context.device)
        tflops = 2 * rows * inputs * outputs / seconds(lambda a=a, b=b: a @ b) / TERA  # type: ignore[misc]
        expected = expectations.product(context.gpu, large=name == "8192 cubed")
        constant = "matmul_tflops" if name == "Base" else None
        readings.append(Reading(f"{name}, {rows} x {inputs} x {outputs}", tflops, "TFLOP/s", expected, constant))
    return readings


def check_convolution(context: DoctorContext) -> list[Reading]:
    """Measure depthwise convolutions with cuDNN's search for the fastest algorithm off and on."""
    context.require_cuda()
    readings, before, dtype = [], torch.backends.cudnn.benchmark, torch.bfloat16
    try:
        for search in (False, True):
            torch.backends.cudnn.benchmark = search
            for name, (images, channels, side) in MAPS.items():
                shape = (images, channels, side, side)
                x = torch.zeros(shape, dtype=dtype, device=context.device).to(memory_format=torch.channels_last)
                layer = nn.Conv2d(channels, channels, KERNEL, padding=2, groups=channels)
                forward, both = _time_layer(layer.to(context.device, dtype), x)
                label = f"{name}, benchmark {'on' if search else 'off'}"
                speed = 2 * x.nbytes / forward / GIGA
                constant = "depthwise_gb_s" if name == "stage 1" and not search else None
                share = expectations.depthwise(context.gpu)
                readings.append(Reading(f"{label}: forward", speed, "GB/s", share, constant))
                readings.append(Reading(f"{label}: forward and backward", both * 1e3, "ms"))
    finally:
        torch.backends.cudnn.benchmark = before
    return readings


def _time_layer(layer: nn.Module, x: Tensor) -> tuple[float, float]:
    """Return the seconds of forward, and of forward and backward."""
    x.requires_grad_()

    def both() -> None:
        layer(x).sum().backward()

    with torch.no_grad():
        forward = seconds(lambda: layer(x))
    return forward, seconds(both)
