"""Reference training: one process, one loop, no DeepSpeed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mrmae_ds.distributed.launch import Launch
from mrmae_ds.training.tasks.base import MicroBatchKey
from tests.training.parity.cases import (
    BETAS,
    DECAY,
    DETECT_WARMUP,
    EPOCHS,
    GLOBAL_BATCH,
    LAYER_DECAY,
    LR,
    MILESTONES,
    MIN_LR,
    STEPS_PER_EPOCH,
    WARMUP,
    WEIGHT_DECAY,
    Case,
    Stage,
    Trace,
)
from tests.training.parity.job import batches, prepare

ALONE = Launch(0, 0, 1, 1)


def run_plain(case: Case, folder: Path) -> Trace:
    """Train the reference of a case: one process, one loop, torch's AdamW; micro-batches one after the other.

    ``bf16`` is the textbook version: a bfloat16 model, float32 master weights, gradients accumulated in float32.
    """
    world_size, accumulation = case.cut
    job = prepare(replace(case, world_size=1, accumulation=1, placement="device", engine={}), folder, ALONE)
    model = job.task.model.train()
    job.task.to(torch.device("cpu"))
    if case.precision == "bf16":
        model.to(torch.bfloat16)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    masters = {name: nn.Parameter(p.detach().float()) for name, p in trained.items()}
    optimizer = torch.optim.AdamW(plain_groups(masters, case.stage), betas=BETAS[case.stage], foreach=False)
    size = GLOBAL_BATCH[case.stage] // (world_size * accumulation)
    student = _in_autocast(model) if case.precision == "autocast" else model
    losses, norms, began = [], [], time.perf_counter()
    for step, batch in enumerate(batches(job)):
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * plain_rate(step, case.stage)
        total = 0.0
        for part in range(world_size * accumulation):
            micro, rank = divmod(part, world_size)
            key = MicroBatchKey(job.schedule.seed, step, micro, rank, world_size, size)
            loss = job.task.losses(student, _cut(batch, part * size, size), key)["loss"] / (world_size * accumulation)
            loss.backward()
            total += loss.item()
            for name, parameter in trained.items():
                assert parameter.grad is not None
                gradient, master = parameter.grad.float(), masters[name]
                master.grad = gradient if master.grad is None else master.grad + gradient
                parameter.grad = None
        norms.append(float(nn.utils.clip_grad_norm_(masters.values(), case.clipping or math.inf)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(masters[name])
            _update_averages(model, step + 1)
    state = {name: tensor.detach().float() for name, tensor in model.state_dict().items()}
    return Trace(losses, norms, state | {n: m.detach() for n, m in masters.items()}, time.perf_counter() - began)


def plain_groups(parameters: dict[str, nn.Parameter], stage: Stage) -> list[dict[str, Any]]:
    """Return a group per parameter: weight decay for matrices and tokens, layer decay in fine-tuning.

    Not decayed are a position embedding in fine-tuning, and the class token beside BEiT's relative positions.
    """
    if stage == "detect":
        return [_detector_group(name, parameter) for name, parameter in parameters.items()]
    groups = []
    undecayed = {"pos_embed"}
    undecayed |= {"encoder.cls_token"} if any("rel_pos_bias" in name for name in parameters) else set()
    for name, parameter in parameters.items():
        decayed = parameter.ndim > 1 and name not in undecayed
        layer = 0
        if name.startswith("blocks3."):
            layer = 1 + int(name.split(".")[1])
        elif name.startswith(("fc_norm", "head")):
            layer = 4  # cvit_tiny has three transformer blocks
        scale = LAYER_DECAY ** (4 - layer) if stage == "finetune" else 1.0
        groups.append({"params": [parameter], "weight_decay": WEIGHT_DECAY if decayed else 0.0, "scale": scale})
    return groups


def _detector_group(name: str, parameter: nn.Parameter) -> dict[str, Any]:
    """Return a group as the authors' detector has it: only positions and the encoder's norms are not decayed."""
    inside = name.removeprefix("backbone.net.")
    decayed = inside == name or not (inside == "pos_embed" or "norm" in inside)
    layer = 4  # of pyramid and heads, and of the position embedding
    if inside.startswith("blocks3."):
        layer = 1 + int(inside.split(".")[1])
    elif inside.startswith(("patch_embed", "blocks")):
        layer = 0
    decay = WEIGHT_DECAY if decayed else 0.0
    return {"params": [parameter], "weight_decay": decay, "scale": LAYER_DECAY ** (4 - layer)}


def plain_rate(step: int, stage: Stage) -> float:
    """Return the learning rate: linear warm-up over half an epoch, then half a cosine to the minimum.

    In detection: linear warm-up from a tenth, then a tenth from each milestone on.
    """
    if stage == "detect":
        if step < DETECT_WARMUP:
            return LR * (0.1 + 0.9 * step / DETECT_WARMUP)
        return LR * 0.1 ** sum(step >= share * EPOCHS[stage] for share in MILESTONES)
    epoch, last = step / STEPS_PER_EPOCH, EPOCHS[stage]
    if epoch < WARMUP:
        return LR * epoch / WARMUP
    return MIN_LR + (LR - MIN_LR) * (1 + math.cos(math.pi * (epoch - WARMUP) / (last - WARMUP))) / 2


def _update_averages(model: nn.Module, steps: int) -> None:
    """Move the averages after this many steps; the decay rises linearly in the first epoch, as in fairseq."""
    start, end = DECAY
    decay = end - (end - start) * max(1 - steps / STEPS_PER_EPOCH, 0)
    state = model.state_dict()
    for name, tensor in state.items():
        if name.startswith("averages."):
            trained = state["encoder." + name.partition(".network.")[2]]
            tensor.copy_(decay * tensor + (1 - decay) * trained)


def _cut(batch: Any, first: int, size: int) -> Any:
    values = {name: getattr(batch, name)[first : first + size] for name in batch.__dataclass_fields__}
    return type(batch)(**values)


def _in_autocast(model: nn.Module) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(*arguments)

    return run
