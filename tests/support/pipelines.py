"""A chain of the demo's recipes, and records of its links as training leaves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mrmae_ds.pipeline.config import load_pipeline
from mrmae_ds.pipeline.graph import PipelineJob, build_jobs
from mrmae_ds.weights.load import MODEL_FILE
from tests.support.records import make_record

# In this order on purpose: the teacher comes last, so that the order of the links is not that of the runs.
CHAIN: dict[str, Any] = {
    "name": "demo",
    "config": "ds_configs/tiny.json",
    "set": {"stages": {"pretrain": {"epochs": 3}}},
    "runs": [
        {},
        {"recipe": "ds_configs/baselines/mcmae_tiny.yaml", "nodes": 3},
        {"recipe": "ds_configs/baselines/mae_tiny.yaml", "stages": ["pretrain", "finetune", "evaluate"]},
        {"recipe": "ds_configs/baselines/scratch_tiny.yaml"},
    ],
}
KEYS = [
    *("mae_tiny/pretrain", "tiny/pretrain", "tiny/finetune", "mcmae_tiny/pretrain", "mcmae_tiny/finetune"),
    *("mae_tiny/finetune", "mae_tiny/evaluate", "scratch_tiny/finetune"),
]


def write_pipeline(folder: Path, **changes: Any) -> Path:
    path = folder / "chain.yaml"
    path.write_text(yaml.safe_dump({**CHAIN, **changes}))
    return path


def make_links(folder: Path, root: Path, seeds: list[int] | None = None, **changes: Any) -> dict[str, PipelineJob]:
    return {link.key: link for link in build_jobs(load_pipeline(write_pipeline(folder, **changes)), root, seeds)}


def record(link: PipelineJob, status: str = "finished", **fields: Any) -> None:
    """Leave a link's record, and its weights once it has finished."""
    recipe = link.recipe
    values = {"name": recipe.name, "seed": recipe.seed, "recipe_hash": recipe.hash(link.stage), "status": status}
    if status == "running":
        values["ended"] = None
    make_record(recipe.method, recipe.size, **{**values, "stage": link.stage, **fields}).write(link.folder)
    if status == "finished":
        (link.folder / MODEL_FILE).write_bytes(b"")
