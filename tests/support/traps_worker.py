"""Measurements of traps of ZeRO-3 on two ranks: stale gradients, ranks that skip modules, evaluation of shares."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn

from mrmae_ds.config.engine import load_engine_config
from mrmae_ds.distributed.launch import Launch
from mrmae_ds.training.engine.build import build_engine
from mrmae_ds.training.evaluation.base import EvalContext
from mrmae_ds.training.param_groups import adamw
from mrmae_ds.training.tasks.build import build_task_engine
from tests.training.parity.cases import Case, write_engine
from tests.training.parity.gathers import gathered
from tests.training.parity.job import batches, prepare

LINEAR = F.linear  # before any engine
CPU = torch.device("cpu")
RATE = 0.1
GATHERS: dict[str, tuple[dict[str, Any], int]] = {
    "huge": ({}, 1),
    "autocast": ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, 1),
    "accumulation": ({}, 2),
    "released": ({"zero_optimization": {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}}, 1),
}


class Branches(nn.Module):
    """Two layers, one of which can be omitted."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor, both: bool) -> torch.Tensor:
        return (self.always(x) + (self.sometimes(x) if both else 0)).square().sum()


def stale_gradients(zero: int, watched: bool, folder: Path, rank: int) -> str | float:
    """Train a step with both branches, then one that omits a branch, whose weight gets no gradient.

    With both betas 0, Adam moves a weight by the learning rate whatever its gradient, and not at all if that is 0.

    Args:
        zero: ZeRO stage.
        watched: True calls the engine's own backward, which watches for parameters without a gradient; False
            calls DeepSpeed's.
        folder: for the engine config.
        rank: of this process.

    Returns:
        The distance that the omitted branch's weight moved in the second step, or the message of the error.
    """
    import deepspeed

    config = load_engine_config(write_engine(folder / f"branches-{rank}.json", zero))
    model = Branches()
    for weight in model.parameters():
        nn.init.constant_(weight, 0.5)
    groups = [{"params": list(model.parameters()), "lr_scale": 1.0, "weight_decay": 0.0, "lr": RATE}]
    engine = build_engine(model, groups, adamw((0.0, 0.0)), config, 1, CPU)
    backward = engine.backward if watched else deepspeed.DeepSpeedEngine.backward.__get__(engine)
    seen = []
    try:
        for both in (True, False):
            backward(engine(torch.ones(1, 4), both))
            engine.step()
            with deepspeed.zero.GatheredParameters([p for p in model.parameters() if hasattr(p, "ds_id")]):
                seen.append(model.sometimes.weight[0, 0].item())
    except RuntimeError as error:
        return str(error)
    finally:
        engine.destroy()
    return seen[0] - seen[1]


def accumulate(folder: Path, rank: int, branch_in: int | str) -> dict[str, list[Any]]:
    """Accumulate four micro-batches per step under ZeRO-3.

    Args:
        folder: for the engine config.
        rank: of this process.
        branch_in: micro-batch of the fourth of six steps which alone runs the branch; ``none`` for no such branch.

    Returns:
        By micro-batch: ``hooks``, a layer's number of hooks during the fourth step's backward, and ``losses`` of the
        last three steps.
    """
    import deepspeed

    config = load_engine_config(write_engine(folder / f"accumulate-{rank}.json", zero=3))
    model = Branches()
    for weight in model.parameters():
        nn.init.constant_(weight, 0.5)
    groups = [{"params": list(model.parameters()), "lr_scale": 1.0, "weight_decay": 0.0, "lr": 0.0}]
    engine = build_engine(model, groups, adamw((0.0, 0.0)), config, 4, CPU)
    hooks, losses = [], []
    for step in range(6):
        for micro_batch in range(4):
            loss = engine(torch.full((1, 4), 1.0 + micro_batch), step == 3 and micro_batch == branch_in)
            if step == 3:
                hooks.append(len(model.always._forward_pre_hooks) + len(model.always._forward_hooks))
            if step >= 3:
                losses.append(loss.item())
            deepspeed.DeepSpeedEngine.backward(engine, loss)
            engine.step()
    engine.destroy()
    return {"hooks": hooks, "losses": losses}


def modules_in_order(folder: Path, launch: Launch) -> list[str]:
    """Return the modules that three micro-batches of fine-tuning run, with nearly every path dropped."""
    job = prepare(Case("finetune", 3, True, 1, 2), folder, launch)
    for module in job.task.model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.9
    engine = _engine(job)
    called: list[str] = []
    for name, module in engine.module.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    for step, batch in zip(range(3), batches(job), strict=False):
        engine.backward(job.task.losses(engine, batch, job.schedule.key(step, 0))["loss"])
        engine.step()
    engine.destroy()
    return called


def evaluation(folder: Path, launch: Launch) -> dict[str, float | int]:
    """Evaluate nine images in batches of four on two ranks, as fine-tuning does."""
    job = prepare(Case("finetune", 3, True, 1, 2), folder, launch)
    engine = _engine(job)
    evaluator = job.task.build_evaluator(
        EvalContext(job.recipe, job.engine_config, launch, CPU, job.val_data, lambda activity: None)
    )
    results = evaluator.run(engine)
    evaluator.loader.close()
    engine.destroy()
    return results


def _engine(job: Any) -> Any:
    return build_task_engine(job.task, job.engine_config, job.schedule.accumulation, CPU)


def measure(rank: int, world_size: int, folder: Path) -> None:
    """Run one rank and write FOLDER/rankN.json."""
    launch = Launch(rank, rank, world_size, world_size)
    found = {
        "unwatched": {zero: stale_gradients(zero, False, folder, rank) for zero in (1, 2, 3)},
        "watched": {zero: stale_gradients(zero, True, folder, rank) for zero in (1, 3)},
        "modules": modules_in_order(folder, launch),
        "evaluation": evaluation(folder, launch),
        "linear": F.linear is LINEAR,
        "accumulated": {branch_in: accumulate(folder, rank, branch_in) for branch_in in ("none", 1, 2)},
        "gathers": {
            name: [asdict(step) for step in gathered(changes, accumulation, folder, rank)]
            for name, (changes, accumulation) in GATHERS.items()
        },
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
