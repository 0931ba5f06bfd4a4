"""The tables in miniature: every cell, with grids and teachers that fit, and the parts that each row has."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mrmae_ds.config.engine import accumulation_steps, load_engine_config
from mrmae_ds.factory import build_pretraining
from mrmae_ds.pipeline.config import load_pipeline
from mrmae_ds.pipeline.graph import PipelineJob, build_jobs
from mrmae_ds.profiling.meta_teachers import outline_teacher
from mrmae_ds.tables.ablations import parts_of
from mrmae_ds.tables.paper import TABLE_3, TABLE_6
from mrmae_ds.training.run_logger import describe_design
from mrmae_ds.weights.load import build_encoder
from tests.support.processes import REPOSITORY, environment

ROOT = Path("runs/toy")
SCRIPT = REPOSITORY / "scripts" / "toy_tables.sh"


def _links(name: str, seeds: list[int]) -> dict[str, PipelineJob]:
    return {link.key: link for link in build_jobs(load_pipeline(Path(f"slurm/{name}.yaml")), ROOT, seeds)}


def test_every_cell_of_table_6_has_its_miniature() -> None:
    links = _links("toy6", [0, 1])
    tuned = [link for link in links.values() if link.stage == "finetune" and link.needs]
    cells = sorted((link.recipe.method, link.recipe.size, link.recipe.seed) for link in tuned)
    methods = [row.method for row in TABLE_6.rows]
    assert cells == sorted((m, f"Tiny-{size}", seed) for m in methods for size in TABLE_6.columns for seed in (0, 1))
    for name in ("toy_huge", "toy_mcmae_huge", "toy_mae_huge"):
        for column, size in {"392": 64, "448": 80}.items():
            link = links[f"{name}{column}-seed1/finetune"]
            assert link.needs == (f"{name}-seed1/pretrain",)
            assert link.recipe.stages.finetune is not None and link.recipe.stages.finetune.image_size == size


@pytest.mark.parametrize("model", ["", "mae_"])
def test_what_starts_from_random_weights_is_fine_tuned_alike(model: str) -> None:
    links = _links("toy6", [0])
    for size in ("small", "base", "large", "huge"):
        link, pretrained = links[f"toy_scratch_{model}{size}/finetune"], links[f"toy_{model}{size}/finetune"]
        assert link.needs == () and f"toy_scratch_{model}{size}/pretrain" not in links
        random, usual = link.recipe.stages.finetune, pretrained.recipe.stages.finetune
        assert random is not None and usual is not None
        assert random == usual.model_copy(update={"init": "scratch"}) and link.recipe.model == pretrained.recipe.model


@pytest.mark.parametrize("method", ["MAE", "MCMAE", "MR-MAE"])
def test_columns_grow_and_methods_are_told_apart_by_what_they_learn_alone(method: str) -> None:
    links = [link for link in _links("toy6", [0]).values() if link.recipe.method == method]
    tuned = [link for link in links if link.stage == "finetune" and link.needs]
    counts = []
    for link in tuned:
        stage = link.recipe.stages.finetune
        assert stage is not None and stage.mixup == stage.cutmix == stage.random_erasing == stage.drop_path == 0
        with torch.device("meta"):
            model = build_encoder(link.recipe.model.spec(), stage.image_size or 48, 60)
        counts.append(sum(p.numel() for p in model.parameters()))
    assert counts == sorted(counts) and counts[3] > 5 * counts[0]
    stages = [link.recipe.stages.pretrain for link in links if link.stage == "pretrain"]
    assert {(s.epochs, s.batch_size, s.optimizer.base_lr) for s in stages if s} == {(3, 32, 0.012)}


@pytest.mark.parametrize("name", ["toy6", "toy3"])
def test_every_pretraining_can_be_built_and_its_batch_divides(name: str) -> None:
    for link in _links(name, [0]).values():
        config, stage = load_engine_config(link.config), link.recipe.stage(link.stage)
        assert accumulation_steps(config, stage.batch_size, 1, "") == 1  # type: ignore[union-attr]
        if link.stage == "pretrain":
            pretrain = link.recipe.stages.pretrain
            assert pretrain is not None
            with torch.device("meta"):
                model, teachers = build_pretraining(link.recipe, pretrain, outline_teacher)
            assert model.encoder.grid == (6, 6) and {teacher.grid for teacher in teachers.values()} <= {(6, 6)}
            assert bool(teachers) == (link.recipe.method not in ("MAE", "MCMAE"))


def test_every_row_of_table_3_has_its_miniature() -> None:
    rows: list[dict[str, str]] = []
    for link in _links("toy3", [0]).values():
        stage = link.recipe.stages.pretrain
        if link.stage == "pretrain" and stage is not None:
            convolutional = link.recipe.model.arch.startswith("cvit")
            known: Any = SimpleNamespace(
                design=describe_design(link.recipe, stage), model=SimpleNamespace(convolutional=convolutional)
            )
            rows.append(parts_of(known) or {})
    assert sorted(map(str, rows)) == sorted(str(row.labels) for row in TABLE_3.rows)


def test_rows_1_and_7_are_trained_once_for_both_tables() -> None:
    six, three = _links("toy6", [0, 1]), _links("toy3", [0, 1])
    shared = {key for key in three if key in six}
    runs = ("toy_base", "toy_mae_base", "toy_base-seed1", "toy_mae_base-seed1")
    assert shared == {f"{run}/{stage}" for run in runs for stage in ("pretrain", "finetune")}
    for key in shared:
        assert six[key].recipe.hash(six[key].stage) == three[key].recipe.hash(three[key].stage)


def test_the_script_says_how_it_is_used() -> None:
    done = subprocess.run([SCRIPT], capture_output=True, text=True, env=environment(), timeout=60, check=False)
    assert done.returncode == 2 and "scripts/toy_tables.sh IMAGES TEACHER" in done.stderr
