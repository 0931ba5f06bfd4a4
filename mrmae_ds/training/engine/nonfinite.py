"""Losses and gradients that are not finite: seen on the device, and kept from the weights.

DeepSpeed 0.19.8 passes over a step whose gradient norm is not finite without a word, looks only at gradients, and does
not look at all without ZeRO. So the loop looks itself, at losses and gradients, before the step
(:mod:`mrmae_ds.training.step_sync`), and takes none that is bad on any rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import deepspeed
import torch
from torch import Tensor


def any_nonfinite(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """1.0 if a value among the tensors is NaN or infinite, else 0.0; a float32 scalar on ``device``, not waited for.

    Sums of magnitudes are looked at, which overflow float32 for gradients that no step could use either.
    """
    some = [tensor.detach() for tensor in tensors if tensor.numel()]
    if not some:
        return torch.zeros((), device=device)
    norms = torch._foreach_norm(some, ord=1)
    total = torch.stack([norm.float().to(device) for norm in norms]).sum()
    return (~torch.isfinite(total)).float()


def local_gradients(engine: deepspeed.DeepSpeedEngine) -> list[Tensor]:
    """The gradients that this rank's step would use: its partition under ZeRO, all of them without.

    To be called after the backward of a step's last micro-batch; the tensors are the engine's own.
    """
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 0:
        return [p.grad for p in engine.module.parameters() if p.grad is not None]
    if hasattr(optimizer, "fp32_groups_gradients"):  # ZeRO-1 with bf16 parameters and float32 accumulation
        return [gradient for group in optimizer.fp32_groups_gradients for gradient in group]
    if _offloads(optimizer):
        masters = getattr(optimizer, "fp32_partitioned_groups_flat", None) or optimizer.single_partition_of_fp32_groups
        return [master.grad for master in masters if master.grad is not None]
    groups = [group for group in optimizer.averaged_gradients.values() if group is not None]
    return [gradient for group in groups for gradient in (group if isinstance(group, list) else [group])]


def _offloads(optimizer: Any) -> bool:
    return bool(getattr(optimizer, "offload_optimizer", False) or getattr(optimizer, "cpu_offload", False))


def skip_step(engine: deepspeed.DeepSpeedEngine) -> None:
    """Pass the step's last micro-batch without an update: weights and optimizer states stay as they are.

    The engine's counters go on. All ranks must call it, in place of ``engine.step()``.

    Raises:
        RuntimeError: if DeepSpeed took the step all the same.
    """
    if engine.zero_optimization_stage() == 0:
        for parameter in engine.module.parameters():
            parameter.grad = None  # AdamW passes over parameters without a gradient
        engine.step()
        engine.skipped_steps += 1
        return
    optimizer = engine.optimizer
    if _offloads(optimizer):  # the norms of its gradients were taken in the backward
        norms = optimizer.norm_for_param_grads
        norms.update({key: norm * math.nan for key, norm in norms.items()})
    else:
        for gradient in local_gradients(engine):
            gradient.fill_(math.nan)
    # DeepSpeed looks at the norm, finds it is none, and clears everything as after an overflow. With bf16 parameters
    # under ZeRO-1 and 2 it looks only if the engine config asks it to.
    asked = {"check_grad_overflow": True, "compute_grad_norm": True}
    before = {name: getattr(optimizer, name) for name in asked if hasattr(optimizer, name)}
    for name in before:
        setattr(optimizer, name, asked[name])
    engine.step()
    for name, value in before.items():
        setattr(optimizer, name, value)
    if engine.was_step_applied():
        raise RuntimeError("DeepSpeed took a step that was not to be taken; its weights are no longer those of before")
