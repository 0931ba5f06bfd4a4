"""Check of the attention backends at the shapes of this project: time, error and determinism."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mrmae_ds.doctor import expectations
from mrmae_ds.doctor.context import DoctorContext
from mrmae_ds.doctor.kernels import seconds
from mrmae_ds.doctor.reading import Reading
from mrmae_ds.units import TERA

# Heads, tokens and head width.
SHAPES = {
    "encoder Base-224": (12, 49, 64),
    "encoder Huge-224": (16, 64, 80),
    "encoder Huge-448": (16, 256, 80),
    "decoder 224": (16, 196, 32),
    "decoder Huge-448": (16, 1024, 32),
    "fine-tuning Huge-448": (16, 1024, 80),
    "CLIP B/16": (12, 197, 64),
    "CLIP L/14": (16, 257, 64),
    "CLIP g/14": (16, 257, 88),
}
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
BATCH = 32  # images in timing; the float32 comparison takes fewer, because it holds the whole attention
COMPARED = 4


def check_attention(context: DoctorContext) -> list[Reading]:
    """Measure every fused backend of bf16 attention, and torch's choice, at every shape."""
    readings: list[Reading] = []
    batch = BATCH if context.on_cuda else 1
    for name, (heads, tokens, width) in SHAPES.items():
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(3, batch, heads, tokens, width, generator=generator).to(context.device)
        exact = _run(inputs[:, :COMPARED], SDPBackend.MATH)
        times = {}
        for backend, kind in BACKENDS.items():
            half = inputs.bfloat16()
            try:
                first, second = _run(half[:, :COMPARED], kind), _run(half[:, :COMPARED], kind)
                times[backend] = seconds(lambda half=half, kind=kind: _run(half, kind))  # type: ignore[misc]
            except RuntimeError:  # torch: no available kernel
                continue
            error = max((a - b).abs().max().item() for a, b in zip(first, exact, strict=True))
            equal = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            readings += [
                Reading(f"{name}, {backend}: forward and backward", times[backend] * 1e3, "ms"),
                Reading(f"{name}, {backend}: largest error", error, "", expectations.ATTENTION_ERROR),
                Reading(f"{name}, {backend}: repeated bit by bit", float(equal)),
            ]
        readings.append(Reading(f"{name}: fastest", min(times, key=times.__getitem__) if times else "none"))
        if name == "CLIP L/14" and times:
            # Two products forward, five backward.
            operations = 7 * 2 * batch * heads * tokens * tokens * width
            speed = operations / min(times.values()) / TERA
            readings.append(Reading(f"{name}: speed", speed, "TFLOP/s", constant="attention_tflops"))
    return readings


def _run(inputs: Tensor, backend: SDPBackend) -> list[Tensor]:
    """Return output and gradients of an attention on (query, key, value), float32."""
    query, key, value = (part.detach().requires_grad_() for part in inputs)
    with sdpa_kernel(backend):
        output = F.scaled_dot_product_attention(query, key, value)
        output.sum().backward()
    grads = [part.grad for part in (query, key, value)]
    return [output.detach().float(), *(grad.float() for grad in grads if grad is not None)]
