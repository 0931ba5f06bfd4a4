"""Made-up records for the tests of this folder."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from mrmae_ds.reporting.records import (
    DataInfo,
    Hardware,
    Init,
    Parameters,
    PretrainSummary,
    Results,
    RunRecord,
    Schedule,
)

BEGIN = datetime(2025, 1, 1, tzinfo=timezone.utc)


def make_record(
    method: str = "MR-MAE",
    size: str = "Tiny",
    top1: float | None = 80.0,
    *,
    seed: int = 0,
    day: int = 1,
    pretrain: float | None = 20,
    dataset: str = "Fashion-MNIST",
    classes: int = 10,
    samples: int = 60_000,
    eval_samples: int = 10_000,
    **fields: Any,
) -> RunRecord:
    """Return a finished fine-tuning run that ended `day` days after `BEGIN`; `pretrain` None means from
    scratch."""
    known = PretrainSummary(method=method, epochs=pretrain, dataset=dataset, recipe_hash="feed")
    return RunRecord(
        **{
            "name": f"{method}-{size}",
            "method": method,
            "size": size,
            "stage": "finetune",
            "status": "finished",
            "started": BEGIN,
            "ended": BEGIN + timedelta(days=day),
            "seed": seed,
            "recipe_hash": f"{method}-{size}-hash",
            "hardware": Hardware(device="CPU", count=2, world_size=1),
            "parameters": Parameters(total=30, trainable=20, encoder=10),
            "data": DataInfo(dataset=dataset, file="train.beton", sha256="ab", samples=samples, classes=classes),
            "schedule": Schedule(epochs=10, global_batch=64, steps=100, steps_done=100),
            "init": None if pretrain is None else Init(file="model.safetensors", pretrain=known),
            "results": Results(top1=top1, eval_samples=eval_samples),
            **fields,
        }
    )


def make_run(folder: str, *arguments: Any, **fields: Any) -> tuple[Path, RunRecord]:
    """Return `make_record`'s record with a folder that need not exist."""
    return Path("runs") / folder / "finetune", make_record(*arguments, **fields)
