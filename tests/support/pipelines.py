"""A pipeline of the demo's recipes, and run records for its jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mrmae_ds.pipeline.config import load_pipeline
from mrmae_ds.pipeline.graph import PipelineJob, build_jobs
from mrmae_ds.weights.paths import MODEL_FILE
from tests.support.records import make_record

# The teacher comes after its student on purpose, so that the order of the jobs is not that of the runs.
PIPELINE: dict[str, Any] = {
    "name": "demo",
    "config": "ds_configs/tiny.json",
    "set": {"stages": {"pretrain": {"epochs": 3}}},
    "runs": [
        {},
        {"recipe": "ds_configs/baselines/mae_tiny.yaml", "stages": ["pretrain", "finetune", "evaluate"]},
        {"recipe": "ds_configs/baselines/mcmae_tiny.yaml", "nodes": 3},
        {"recipe": "ds_configs/baselines/scratch_tiny.yaml"},
    ],
}
KEYS = [
    *("mae_tiny/pretrain", "tiny/pretrain", "tiny/finetune", "mae_tiny/finetune", "mae_tiny/evaluate"),
    *("mcmae_tiny/pretrain", "mcmae_tiny/finetune", "scratch_tiny/finetune"),
]


def write_pipeline(folder: Path, **changes: Any) -> Path:
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump({**PIPELINE, **changes}))
    return path


def make_jobs(folder: Path, root: Path, seeds: list[int] | None = None, **changes: Any) -> dict[str, PipelineJob]:
    return {job.key: job for job in build_jobs(load_pipeline(write_pipeline(folder, **changes)), root, seeds)}


def write_record(job: PipelineJob, status: str = "finished", **fields: Any) -> None:
    """Write a job's run record, and its weights if it has finished."""
    recipe = job.recipe
    values = {"name": recipe.name, "seed": recipe.seed, "recipe_hash": recipe.hash(job.stage), "status": status}
    if status == "running":
        values["ended"] = None
    make_record(recipe.method, recipe.size, **{**values, "stage": job.stage, **fields}).write(job.stage_dir)
    if status == "finished":
        (job.stage_dir / MODEL_FILE).write_bytes(b"")
