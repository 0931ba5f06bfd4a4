"""Non-finite losses and gradients: detected on the device, and kept from the weights.

DeepSpeed 0.19.8 skips a step whose gradient norm is not finite without a message, checks only gradients, and checks
nothing without ZeRO. So the loop itself checks losses and gradients before the step
(:mod:`mrmae_ds.training.step_sync`), and skips every step that is not finite on any rank. Where DeepSpeed checks the
norm, the device makes it NaN in a step to skip: the host learns of it by DeepSpeed's own wait for the norm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import deepspeed
import torch
from torch import Tensor


def any_nonfinite(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Return 1.0 if a value of the tensors is NaN or infinite, else 0.0: a float32 scalar on ``device``.

    The host does not wait. Sums of magnitudes are checked, which overflow float32 only for gradients that no step could
    use either.
    """
    some = [tensor.detach() for tensor in tensors if tensor.numel()]
    if not some:
        return torch.zeros((), device=device)
    norms = torch._foreach_norm(some, ord=1)
    total = torch.stack([norm.float() for norm in norms]).sum()
    return (~torch.isfinite(total)).float()


def local_gradients(engine: deepspeed.DeepSpeedEngine) -> list[Tensor]:
    """Return the gradients that this rank's step would use, on the device: its partition under ZeRO, all without ZeRO.

    Of offloaded gradients, whose copies to the host may be in flight, the norms are returned.

    Call it after the backward pass of a step's last micro-batch; the tensors are the engine's own.
    """
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 0:
        return [p.grad for p in engine.module.parameters() if p.grad is not None]
    if hasattr(optimizer, "fp32_groups_gradients"):  # ZeRO-1 with bf16 parameters and float32 accumulation
        return [gradient for group in optimizer.fp32_groups_gradients for gradient in group]
    if _offloads(optimizer):  # the norms were taken in the backward
        return list(optimizer.norm_for_param_grads.values())
    groups = [group for group in optimizer.averaged_gradients.values() if group is not None]
    return [gradient for group in groups for gradient in (group if isinstance(group, list) else [group])]


def _offloads(optimizer: Any) -> bool:
    return bool(getattr(optimizer, "offload_optimizer", False) or getattr(optimizer, "cpu_offload", False))


def checks_norm(engine: deepspeed.DeepSpeedEngine) -> bool:
    """Return True if DeepSpeed skips a step whose gradient norm is not finite."""
    if engine.zero_optimization_stage() == 0:
        return False
    optimizer = engine.optimizer
    if not getattr(optimizer, "compute_grad_norm", True):
        return False
    # With bf16 parameters under ZeRO-1 and 2 the engine config says whether the norm is checked.
    return getattr(optimizer, "check_grad_overflow", True) or optimizer.dtype != torch.bfloat16


def spoil_norm(engine: deepspeed.DeepSpeedEngine, bad: Tensor) -> None:
    """Make the gradient norm NaN if ``bad``, a bool scalar on the device, is true; the host does not wait."""
    for tensor in local_gradients(engine):
        if tensor.numel() and not getattr(tensor, "_zero_padding", False):  # padding does not count in the norm
            tensor[(0,) * tensor.dim()].masked_fill_(bad, math.nan)
            return


def skip_step(engine: deepspeed.DeepSpeedEngine) -> None:
    """End the step's last micro-batch without an update: weights and optimizer states stay as they are.

    The engine's counters advance. All ranks must call it, in place of ``engine.step()``.

    Raises:
        RuntimeError: if DeepSpeed took the step nevertheless.
    """
    if engine.zero_optimization_stage() == 0:
        for parameter in engine.module.parameters():
            parameter.grad = None  # AdamW skips parameters without a gradient
        engine.step()
        engine.skipped_steps += 1
        return
    optimizer = engine.optimizer
    spoil_norm(engine, torch.ones((), dtype=torch.bool, device=engine.device))
    # DeepSpeed checks the norm, finds it NaN, and clears everything as after an overflow. With bf16 parameters under
    # ZeRO-1 and 2 it checks only if the engine config says so.
    required = {"check_grad_overflow": True, "compute_grad_norm": True}
    before = {name: getattr(optimizer, name) for name in required if hasattr(optimizer, name)}
    for name in before:
        setattr(optimizer, name, required[name])
    engine.step()
    for name, value in before.items():
        setattr(optimizer, name, value)
    check_skipped(engine)


def check_skipped(engine: deepspeed.DeepSpeedEngine) -> None:
    """Check that DeepSpeed did not take a step that is not finite.

    Raises:
        RuntimeError: if it did.
    """
    if engine.was_step_applied():
        raise RuntimeError("DeepSpeed took a step that had to be skipped; the weights have changed")
