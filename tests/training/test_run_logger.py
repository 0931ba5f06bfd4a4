"""Rank 0's record of a stage for the tables: model, FLOPs and throughput."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mrmae_ds.config.engine import load_engine_config
from mrmae_ds.config.recipe import load_recipe
from mrmae_ds.errors import UserError
from mrmae_ds.records.sections import ObjectiveInfo, Operations
from mrmae_ds.tables.ablations import parts_of
from mrmae_ds.tables.paper import TABLE_3
from mrmae_ds.training.run_logger import count_operations, describe_run
from mrmae_ds.training.tasks.build import build_task
from mrmae_ds.training.tasks.pretrain import PretrainTask, describe_design
from tests.support.jobs import ALONE

MCMAE = Path("ds_configs/baselines/mcmae_tiny.yaml")


def _job(recipe: Path, stage: str, config: str = "ds_configs/tiny.json", classes: int = 10) -> Any:
    loaded, engine_config = load_recipe(recipe), load_engine_config(Path(config))
    return SimpleNamespace(
        recipe=loaded,
        engine_config=engine_config,
        train_data=SimpleNamespace(num_classes=classes),
        stage_dir=Path("runs/x") / stage,
        task=build_task(loaded, stage, engine_config, classes),  # type: ignore[arg-type]
    )


def test_a_fine_tunings_operations_are_the_matrix_products_of_its_model() -> None:
    """A plain ViT of width C, L + 1 tokens: by hand, forward and (twice that, but for the images) backward."""
    job = _job(Path("ds_configs/baselines/mae_tiny.yaml"), "finetune", "ds_configs/tiny.json", classes=7)
    width, depth, tokens, patch = 96, 4, 64, 4
    block = 2 * (tokens + 1) * (12 * width**2) + 4 * (tokens + 1) ** 2 * width
    embed = 2 * tokens * 3 * patch**2 * width
    forward = depth * block + embed + 2 * width * 7
    counted = count_operations(job)
    assert counted is not None and counted.forward == forward
    # No gradient of the images; every block is computed once more but for its last product.
    backward = 2 * forward - embed
    assert counted.training - counted.recomputed == forward + backward
    assert 0 < counted.recomputed < forward


def test_a_pretraining_has_no_classifier() -> None:
    counted = count_operations(_job(MCMAE, "pretrain"))
    assert counted is not None and counted.forward is None and counted.training > 0


def test_uncountable_stage_is_reported_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    class Uncountable(PretrainTask):
        def count_operations(self, *_: Any) -> Operations:
            raise UserError("teachers.mae.source: nowhere")

    job = _job(MCMAE, "pretrain")
    job.task.__class__ = Uncountable
    assert count_operations(job) is None
    assert "runs/x/pretrain: operations are not counted: teachers.mae.source: nowhere" in caplog.text


@pytest.mark.parametrize("row", range(1, 8))
def test_the_design_of_a_recipe_is_its_row_of_table_3(row: int) -> None:
    (path,) = Path("ds_configs/ablations").glob(f"table3_{row}_*.yaml")
    recipe = load_recipe(path)
    assert recipe.stages.pretrain is not None
    design = describe_design(recipe, recipe.stages.pretrain)
    known = SimpleNamespace(design=design, model=SimpleNamespace(convolutional=recipe.model.arch == "cvit_base"))
    assert parts_of(known) == TABLE_3.rows[row - 1].labels  # type: ignore[arg-type]
    assert design.keep_ratio == 0.25
    if row == 4:
        assert design.fusion == ("block 2", "block 5", "block 8") and design.masking == "sample"
        mimic = ObjectiveInfo(target="clip", tap="encoder", tokens="visible", weight=0.5, loss="l2")
        assert design.objectives["mimic"] == mimic


def test_slurm_job_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(MCMAE)
    assert describe_run(recipe, "pretrain", ALONE, "cpu")["slurm_job"] is None
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert describe_run(recipe, "pretrain", ALONE, "cpu")["slurm_job"] == "4711"
