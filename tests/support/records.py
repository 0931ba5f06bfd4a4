"""Synthetic records for tests."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from mrmae_ds.records.record import RunRecord
from mrmae_ds.records.sections import (
    DataInfo,
    Design,
    Hardware,
    Init,
    ModelInfo,
    ObjectiveInfo,
    Parameters,
    PretrainSummary,
    Results,
    Schedule,
    StageCost,
    TeacherInfo,
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
    """Return a finished fine-tuning run that ended `day` days after `BEGIN`; `pretrain` None means from scratch."""
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


# What each row of the paper's Table 3 is trained with: losses by (target, tap, tokens), masking, fusion, encoder.
PIXELS, MIMIC, CONFLICT = ("pixels", "decoder", "masked"), ("t", "encoder", "visible"), ("t", "decoder", "masked")
ROWS_OF_TABLE_3: dict[int, tuple[tuple[tuple[str, str, str], ...], str, tuple[str, ...], str]] = {
    1: ((PIXELS,), "random", (), "vit_base"),
    2: ((PIXELS, MIMIC), "random", (), "vit_base"),
    3: ((PIXELS, MIMIC), "sample", (), "vit_base"),
    4: ((PIXELS, MIMIC), "topk", ("block 2", "block 5"), "vit_base"),
    5: ((PIXELS, CONFLICT), "sample", ("block 2",), "vit_base"),
    6: ((MIMIC,), "sample", ("block 2",), "vit_base"),
    7: ((PIXELS, MIMIC), "sample", ("stage 1", "stage 2"), "cvit_base"),
}


def make_pretraining(row: int = 7, sources: dict[str, str] | None = None, **fields: Any) -> PretrainSummary:
    """Return the summary of a pre-training with the objectives of a row of Table 3.

    Args:
        row: number of the row, 1 to 7.
        sources: source of each teacher by name; None uses CLIP where the row needs a teacher.
        fields: further fields of the summary."""
    losses, masking, fusion, arch = ROWS_OF_TABLE_3[row]
    objectives = {
        f"loss{n}": ObjectiveInfo(target=target, tap=tap, tokens=tokens, weight=0.5)  # type: ignore[arg-type]
        for n, (target, tap, tokens) in enumerate(losses)
    }
    named = sources if sources is not None else {"t": "ViT-B-16-quickgelu"} if len(losses) > 1 or row == 6 else {}
    kinds = {name: "clip" if source.startswith("ViT") else "timm" for name, source in named.items()}
    return PretrainSummary(
        **{
            "method": "named by somebody",
            "epochs": 200,
            "dataset": "Fashion-MNIST",
            "recipe_hash": f"hash of row {row}",
            "teachers": {name: TeacherInfo(kind=kinds[name], source=source) for name, source in named.items()},
            "model": ModelInfo(arch=arch, image_size=224),
            "design": Design(keep_ratio=0.25, masking=masking, fusion=fusion, objectives=objectives),
            "spent": StageCost(device="H100", device_hours=30.0, images_per_s=1000.0, operations=2e18),
            **fields,
        }
    )


def make_tuned(name: str, known: PretrainSummary, top1: float = 80.0, **fields: Any) -> tuple[Path, RunRecord]:
    """Return a fine-tuning of `make_pretraining`'s weights, of size Base, with its folder."""
    values = {"size": "Base", "name": name, "init": Init(file="m", pretrain=known), "model": known.model, **fields}
    return Path("runs") / name / "finetune", make_record(top1=top1, **values)
