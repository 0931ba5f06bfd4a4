"""Check of single operators as a training step issues them: float32 products, and the traffic of the others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from mrmae_ds.doctor.context import DoctorContext
from mrmae_ds.doctor.kernels import KERNEL, MAPS, PRODUCTS, seconds
from mrmae_ds.doctor.reading import Reading
from mrmae_ds.planning.estimates.constants import CONSTANTS
from mrmae_ds.profiling.measured_node import ADAMW, GRADIENTS
from mrmae_ds.training.param_groups import adamw
from mrmae_ds.units import GIGA, TERA

HEADS = 12
LAYERS = 32  # matrices of products and optimizer: more than caches hold, as in a step
aten = torch.ops.aten


def check_operators(context: DoctorContext) -> list[Reading]:
    """Measure float32 products, and each operator without products, at Base's shapes."""
    images = 128 if context.on_cuda else 8
    return operator_readings(context.device, images, time_is_left=lambda: context.time_is_left(0.15))


def operator_readings(
    device: torch.device,
    images: int,
    measure: Callable[..., float] = seconds,
    time_is_left: Callable[[], bool] = lambda: True,
) -> list[Reading]:
    """Measure operators at Base's shapes.

    Args:
        device: in bfloat16 on a GPU, in float32 on the CPU.
        images: images of a micro-batch.
        measure: returns the seconds of a call.
        time_is_left: asked before each operator; those after False are listed as not run.
    """
    products = _products(device, images)
    flops = LAYERS * 3 * 2 * images * 49 * PRODUCTS["Base"][1] * PRODUCTS["Base"][2]
    speed = flops / measure(products) / TERA
    readings = [Reading("float32 products, forward and gradients", speed, "TFLOP/s", constant="fp32_tflops")]
    others = [*_elementwise(device, images), *_convolution(device, images), _reduction(device), _update(device)]
    for name, run, moved in others:
        if not time_is_left():
            readings.append(Reading(f"{name}: not run", "no time left"))
            continue
        constant = f"operator_gb_s.{name}"
        readings.append(Reading(name, moved / measure(run) / GIGA, "GB/s", constant=constant))
    return readings


def _products(device: torch.device, images: int) -> Callable[[], object]:
    """Return the products of layers: the output of each, and the gradients of its input and weight."""
    _, inputs, outputs = PRODUCTS["Base"]
    x, y = (torch.randn(images * 49, width, device=device) for width in (inputs, outputs))
    weights, bias = torch.randn(LAYERS, outputs, inputs, device=device), torch.randn(outputs, device=device)
    return lambda: [(torch.addmm(bias, x, w.t()), y @ w, y.t() @ x) for w in weights]


def _elementwise(device: torch.device, images: int) -> list[tuple[str, Callable[[], Any], int]]:
    """Return operators with their names and the bytes of their inputs and outputs."""
    _, width, wide = PRODUCTS["Base"]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x, hidden = (torch.randn(images * 196, each, device=device, dtype=dtype) for each in (width, wide))
    norm, other = x.float(), torch.randn_like(x)
    weight, bias = torch.ones(width, device=device), torch.zeros(width, device=device)
    _, mean, rstd = aten.native_layer_norm(norm, [width], weight, bias, 1e-6)
    mask = [True, True, True]
    by_head = x.view(-1, HEADS, width // HEADS).transpose(0, 1)
    rows = torch.arange(x.shape[0], device=device)
    halves = x.chunk(2)
    return [
        ("gelu", lambda: aten.gelu(hidden), 2 * hidden.nbytes),
        ("gelu_backward", lambda: aten.gelu_backward(hidden, hidden), 3 * hidden.nbytes),
        ("native_layer_norm", lambda: aten.native_layer_norm(norm, [width], weight, bias, 1e-6), 2 * norm.nbytes),
        (
            "native_layer_norm_backward",
            lambda: aten.native_layer_norm_backward(norm, norm, [width], mean, rstd, weight, bias, mask),
            3 * norm.nbytes,
        ),
        ("add", lambda: x + other, 3 * x.nbytes),
        ("sum", lambda: hidden.sum(0), hidden.nbytes),
        ("clone", lambda: by_head.clone(memory_format=torch.contiguous_format), 2 * x.nbytes),
        ("stack", lambda: torch.stack(halves), 2 * x.nbytes),
        ("index", lambda: x[rows], 2 * x.nbytes),
    ]


def _convolution(device: torch.device, images: int) -> list[tuple[str, Callable[[], Any], int]]:
    """Return Base's depthwise convolutions, and their gradients, in the layout of training."""
    forward, backward, size = [], [], 0
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for _, channels, side in MAPS.values():
        maps = torch.randn(images, channels, side, side, device=device, dtype=dtype)
        x = maps.to(memory_format=torch.channels_last)
        weight, bias = torch.randn(channels, 1, KERNEL, KERNEL, device=device, dtype=dtype), maps[0, :, 0, 0].clone()
        options = ([1, 1], [KERNEL // 2] * 2, [1, 1], False, [0, 0], channels)
        forward.append(partial(aten.convolution, x, weight, bias, *options))
        backward.append(partial(aten.convolution_backward, x, x, weight, [channels], *options, [True, True, True]))
        size += x.nbytes
    return [
        ("convolution", lambda: [run() for run in forward], 2 * size),
        ("convolution_backward", lambda: [run() for run in backward], 3 * size),
    ]


def _reduction(device: torch.device) -> tuple[str, Callable[[], Any], int]:
    """Return the work of a rank on gradients besides their transfer: a flat copy, scaling, copies back, norms."""
    _, width, wide = PRODUCTS["Base"]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    gradients = [torch.randn(wide, width, device=device, dtype=dtype) for _ in range(LAYERS)]

    def run() -> None:
        flat = _flatten_dense_tensors(gradients).mul_(0.5)
        for gradient, reduced in zip(gradients, _unflatten_dense_tensors(flat, gradients), strict=True):
            gradient.copy_(reduced)
            torch.linalg.vector_norm(gradient)

    return GRADIENTS, run, (int(CONSTANTS.reduce_accesses) + 1) * sum(gradient.nbytes for gradient in gradients)


def _update(device: torch.device) -> tuple[str, Callable[[], Any], int]:
    """Return a step of AdamW."""
    _, width, wide = PRODUCTS["Base"]
    parameters = [nn.Parameter(torch.randn(wide, width, device=device)) for _ in range(LAYERS)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = adamw((0.9, 0.95))([{"params": parameters}], device.type == "cuda")
    return ADAMW, optimizer.step, int(CONSTANTS.update_bytes) * sum(parameter.numel() for parameter in parameters)
