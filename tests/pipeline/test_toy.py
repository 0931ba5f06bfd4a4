"""The tables in miniature: all cells, matching grids and teachers, and the components of each row."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mrmae_ds.config.engine import accumulation_steps, load_engine_config
from mrmae_ds.config.recipe import DataConfig, TeacherConfig
from mrmae_ds.factory import build_pretraining
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.pipeline.config import load_pipeline
from mrmae_ds.pipeline.graph import PipelineJob, build_jobs
from mrmae_ds.tables.ablations import parts_of
from mrmae_ds.tables.paper import TABLE_3, TABLE_6
from mrmae_ds.teachers import Teacher, build_meta_teacher
from mrmae_ds.teachers.options import TeacherOptions
from mrmae_ds.teachers.sources.checkpoint import meta_teacher
from mrmae_ds.training.tasks.pretrain import describe_design
from tests.support.processes import REPOSITORY, environment

ROOT = Path("runs/toy")
SCRIPT = REPOSITORY / "scripts" / "toy_tables.sh"


def _jobs(name: str, seeds: list[int]) -> dict[str, PipelineJob]:
    return {job.key: job for job in build_jobs(load_pipeline(Path(f"pipelines/{name}.yaml")), ROOT, seeds)}


def test_table_6_is_complete() -> None:
    jobs = _jobs("toy6", [0, 1])
    finetuned = [job for job in jobs.values() if job.stage == "finetune" and job.dependencies]
    cells = sorted((job.recipe.method, job.recipe.size, job.recipe.seed) for job in finetuned)
    methods = [row.method for row in TABLE_6.rows]
    assert cells == sorted((m, f"Tiny-{size}", seed) for m in methods for size in TABLE_6.columns for seed in (0, 1))
    for name in ("toy_huge", "toy_mcmae_huge", "toy_mae_huge"):
        for column, size in {"392": 64, "448": 80}.items():
            job = jobs[f"{name}{column}-seed1/finetune"]
            assert job.dependencies == (f"{name}-seed1/pretrain",)
            assert job.recipe.stages.finetune is not None and job.recipe.stages.finetune.image_size == size


@pytest.mark.parametrize("model", ["", "mae_"])
def test_fine_tuning_from_scratch_uses_the_same_recipe(model: str) -> None:
    jobs = _jobs("toy6", [0])
    for size in ("small", "base", "large", "huge"):
        job, pretrained = jobs[f"toy_scratch_{model}{size}/finetune"], jobs[f"toy_{model}{size}/finetune"]
        assert job.dependencies == () and f"toy_scratch_{model}{size}/pretrain" not in jobs
        random, usual = job.recipe.stages.finetune, pretrained.recipe.stages.finetune
        assert random is not None and usual is not None
        assert random == usual.model_copy(update={"init": "scratch"}) and job.recipe.model == pretrained.recipe.model


@pytest.mark.parametrize("method", ["MAE", "MCMAE", "MR-MAE"])
def test_sizes_grow_and_methods_share_the_schedule(method: str) -> None:
    jobs = [job for job in _jobs("toy6", [0]).values() if job.recipe.method == method]
    finetuned = [job for job in jobs if job.stage == "finetune" and job.dependencies]
    counts = []
    for job in finetuned:
        stage = job.recipe.stages.finetune
        assert stage is not None and stage.mixup == stage.cutmix == stage.random_erasing == stage.drop_path == 0
        with torch.device("meta"):
            model = build_encoder(job.recipe.model.spec(), stage.image_size or 48, 60)
        counts.append(sum(p.numel() for p in model.parameters()))
    assert counts == sorted(counts) and counts[3] > 5 * counts[0]
    stages = [job.recipe.stages.pretrain for job in jobs if job.stage == "pretrain"]
    assert {(s.epochs, s.batch_size, s.optimizer.base_lr) for s in stages if s} == {(3, 32, 0.012)}


def _build_teacher(name: str, config: TeacherConfig, data: DataConfig, size: int, grid: tuple[int, int]) -> Teacher:
    """Build a teacher without weights; of DMAE's, a run of toy_mae_base that does not exist yet, from its sizes."""
    if config.kind != "checkpoint":
        return build_meta_teacher(name, config, data, size, grid)
    recipe = _jobs("toy6", [0])["toy_mae_base/pretrain"].recipe
    with torch.device("meta"):
        encoder = build_encoder(recipe.model.spec(), size)
    return meta_teacher(encoder, TeacherOptions.from_config(name, config, data, size, grid))


@pytest.mark.parametrize("name", ["toy6", "toy3", "toy1"])
def test_every_pretraining_can_be_built_and_its_batch_size_divides(name: str) -> None:
    for job in _jobs(name, [0]).values():
        config, stage = load_engine_config(job.config), job.recipe.stage(job.stage)
        assert accumulation_steps(config, stage.batch_size, 1, "") == 1  # type: ignore[union-attr]
        if job.stage == "pretrain":
            pretrain = job.recipe.stages.pretrain
            assert pretrain is not None
            with torch.device("meta"):
                model, teachers = build_pretraining(job.recipe, pretrain, _build_teacher)
            assert model.encoder.grid == (6, 6) and {teacher.grid for teacher in teachers.values()} <= {(6, 6)}
            assert bool(teachers) == (job.recipe.method not in ("MAE", "MCMAE", "MaskFeat", "SimMIM (ViT)", "data2vec"))


def test_table_3_is_complete() -> None:
    rows: list[dict[str, str]] = []
    for job in _jobs("toy3", [0]).values():
        stage = job.recipe.stages.pretrain
        if job.stage == "pretrain" and stage is not None:
            convolutional = job.recipe.model.arch.startswith("cvit")
            known: Any = SimpleNamespace(
                design=describe_design(job.recipe, stage), model=SimpleNamespace(convolutional=convolutional)
            )
            rows.append(parts_of(known) or {})
    assert sorted(map(str, rows)) == sorted(str(row.labels) for row in TABLE_3.rows)


def test_rows_1_and_7_are_trained_once_for_both_tables() -> None:
    six, three = _jobs("toy6", [0, 1]), _jobs("toy3", [0, 1])
    shared = {key for key in three if key in six}
    runs = ("toy_base", "toy_mae_base", "toy_base-seed1", "toy_mae_base-seed1")
    assert shared == {f"{run}/{stage}" for run in runs for stage in ("pretrain", "finetune")}
    for key in shared:
        assert six[key].recipe.hash(six[key].stage) == three[key].recipe.hash(three[key].stage)


def test_table_1_shares_runs_with_table_6_and_has_all_methods_that_are_computed() -> None:
    six, one = _jobs("toy6", [0, 1]), _jobs("toy1", [0, 1])
    methods = {job.recipe.method for job in one.values()}
    others = {"MILAN", "DMAE", "MaskAlign", "MaskFeat", "MVP", "FD", "SimMIM (ViT)", "data2vec"}
    assert methods == {"MAE", "MCMAE", "MR-MAE"} | others
    assert one["toy_dmae_base-seed1/pretrain"].dependencies == ("toy_mae_base-seed1/pretrain",)
    shared = one.keys() & six.keys()
    assert {one[key].recipe.method for key in shared} == {"MAE", "MCMAE", "MR-MAE"}
    assert all(one[key].recipe.hash(one[key].stage) == six[key].recipe.hash(six[key].stage) for key in shared)
    pretrain = [job.recipe.stages.pretrain for job in one.values()]
    assert {(s.epochs, s.batch_size, s.optimizer.base_lr) for s in pretrain if s} == {(3, 32, 0.012)}


def test_script_prints_its_usage() -> None:
    result = subprocess.run([SCRIPT], capture_output=True, text=True, env=environment(), timeout=60, check=False)
    assert result.returncode == 2 and "scripts/toy_tables.sh IMAGES TEACHER" in result.stderr
