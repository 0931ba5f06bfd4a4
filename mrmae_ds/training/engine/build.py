"""Building the DeepSpeed engine of a model, in one place and one order.

    1. build the full model on the CPU, from the same seed on every rank (not under zero.Init: every size fits)
    2. load weights, freeze, build parameter groups by name
    3. set torch's kernels, before anything is computed on the device
    4. mark what ZeRO-3 gathers whole, set activation checkpointing
    5. compile blocks, if the engine config says so
    6. deepspeed.initialize, which broadcasts rank 0's parameters and partitions them
    7. check in every backward pass that every trainable parameter gets a gradient

Steps 1 and 2 belong to the task (:mod:`mrmae_ds.training.tasks`), the others to :func:`build_engine`. Model files hold
no distributed code.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils.z3_leaf_module import set_z3_leaf_module
from timm.models import beit
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.optim import Optimizer

from mrmae_ds.config.engine import EngineConfig
from mrmae_ds.errors import UserError
from mrmae_ds.models.compiled import compile_each
from mrmae_ds.models.layers import ConvBlock
from mrmae_ds.models.pretrain import set_checkpointing
from mrmae_ds.profiling.step_ranges import mark_reduction
from mrmae_ds.training.checkpoint.train_state import persistent_buffers
from mrmae_ds.training.engine.deepspeed_patches import apply_patches
from mrmae_ds.training.engine.kernels import apply_kernel_settings
from mrmae_ds.training.engine.missing_gradients import watch_gradients

MakeOptimizer = Callable[[list[dict[str, Any]], bool], Optimizer]


def build_engine(
    model: nn.Module,
    groups: list[dict[str, Any]],
    make_optimizer: MakeOptimizer,
    config: EngineConfig,
    accumulation: int,
    device: torch.device,
) -> deepspeed.DeepSpeedEngine:
    """Wrap a model for training.

    Args:
        model: on the CPU, weights loaded, frozen parameters marked.
        groups: every trainable parameter once, each group with ``lr_scale``.
        make_optimizer: function of the groups and of whether to use a fused implementation.
        config: the engine config.
        accumulation: micro-batches per step.
        device: of this rank.

    Raises:
        ValueError: if the groups are not exactly the trainable parameters.
        UserError: if the engine config names leaf modules that the model does not have.
    """
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    grouped = [id(p) for group in groups for p in group["params"]]
    if len(grouped) != len(set(grouped)) or set(grouped) != trainable:
        raise ValueError(f"{len(grouped)} parameters in groups, {len(trainable)} trainable ones in the model")
    check_leaf_modules(model, config)
    mark_leaf_modules(model, config)
    apply_kernel_settings(config.kernels, device)
    set_checkpointing(model, config.checkpointing)
    if config.compile_blocks:
        compile_blocks(model)
    # The learning rate is written before every step (set_lr). torch's AdamW needs no compiler, DeepSpeed's does; the
    # fused one is also the faster one on the CPU, where the states may be offloaded to.
    fused = device.type == "cuda" or config.offloads_optimizer
    optimizer = make_optimizer(groups, fused)
    apply_patches()
    settings = config.for_deepspeed(accumulation)
    # The bf16 optimizer prints the memory before and after each parameter group; log messages are not caught here.
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    watch_gradients(engine)
    mark_reduction(engine)
    return engine


def check_leaf_modules(model: nn.Module, config: EngineConfig) -> None:
    """Check that ``leaf_module.classes`` names classes of the model; DeepSpeed ignores a misspelled one.

    ``Block`` and ``ConvBlock`` may be missing: the same engine config runs a plain ViT, which has no ``ConvBlock``.

    Raises:
        UserError: naming the model's block classes.
    """
    blocks = {kind.__name__ for kind in (Block, ConvBlock)}
    classes = {type(module).__name__ for module in model.modules()} | blocks
    unknown = [name for name in config.leaf_module_classes if name.rpartition(".")[2] not in classes]
    if unknown:
        raise UserError(
            f"{config.path}: zero_optimization.leaf_module.classes: the model has no {', '.join(unknown)}; its blocks "
            f"are {', '.join(sorted(blocks))}"
        )


def mark_leaf_modules(model: nn.Module, config: EngineConfig) -> None:
    """Mark modules of classes derived from leaf classes, too; DeepSpeed marks those of exactly these classes."""
    for module in model.modules():
        if config.zero.is_leaf(module):
            set_z3_leaf_module(module, True)


def compile_blocks(model: nn.Module) -> None:
    """Compile every transformer and convolution block with torch, at its first call.

    Only blocks: DeepSpeed's hooks on a full model break the graph at every layer, those of a leaf block lie outside it.
    """
    compile_each([module for module in model.modules() if isinstance(module, Block | beit.Block | ConvBlock)])


def set_lr(engine: deepspeed.DeepSpeedEngine, lr: float) -> None:
    """Set each parameter group's learning rate to ``lr`` times its ``lr_scale``."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def gather_state(engine: deepspeed.DeepSpeedEngine) -> dict[str, Tensor]:
    """Return the full float32 model state on rank 0's CPU, an empty dictionary elsewhere. All ranks must call it.

    Gathers one module at a time, so that no GPU ever holds the full model.
    """
    keep = dist.get_rank() == 0
    state: dict[str, Tensor] = {}
    masters = _fp32_masters(engine)
    for prefix, module in engine.module.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        partitioned = [p for p in own.values() if hasattr(p, "ds_id")]
        with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
            for name, parameter in own.items():
                full = masters(parameter)
                if keep:
                    state[f"{prefix}.{name}" if prefix else name] = full.detach().float().cpu().clone()
    if keep:
        buffers = persistent_buffers(engine.module)
        state.update({name: buffer.detach().cpu().clone() for name, buffer in buffers.items()})
    return state


def _fp32_masters(engine: deepspeed.DeepSpeedEngine) -> Any:
    """Return a function that reads a parameter at full precision: its fp32 master if the model is bf16."""
    if engine.bfloat16_enabled() and engine.zero_optimization_stage() > 0:
        from deepspeed.utils import safe_get_full_fp32_param

        def master(parameter: Tensor) -> Tensor:
            full = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            return parameter if full is None else full

        return master
    return lambda parameter: parameter
