from __future__ import annotations

from pathlib import Path

import pytest

from mrmae_ds.config.recipe import load_recipe
from mrmae_ds.config.run_names import run_and_stage

HUGE, TINY, SEPARATE = (Path(f"ds_configs/{name}.yaml") for name in ("huge392", "tiny", "ablations/table4_separate"))


@pytest.mark.parametrize(
    ("source", "short"),
    [
        ("runs/huge/pretrain", "huge/pretrain"),
        ("/elsewhere/of/huge-seed12/pretrain", "huge/pretrain"),
        ("demo/tiny/finetune", "tiny/finetune"),
        ("pretrain", "pretrain"),
        ("scratch", "scratch"),
        ("weights/released.pth", "weights/released.pth"),
        ("runs/huge-seedling/pretrain", "huge-seedling/pretrain"),
    ],
)
def test_a_stage_is_named_without_its_folder_and_seed(source: str, short: str) -> None:
    assert run_and_stage(source) == short


@pytest.mark.parametrize(
    ("path", "stage", "key", "same", "other"),
    [
        (HUGE, "finetune", "stages.finetune.init", "r/huge-seed1/pretrain", "runs/base/pretrain"),
        (TINY, "pretrain", "teachers.mae.source", "r/mae_tiny-seed1/pretrain", "runs/tiny/pretrain"),
        (
            SEPARATE, "evaluate", "stages.evaluate.members",
            "[r/table4_dino-seed1/finetune, r/table4_clip-seed1/finetune]",
            "[runs/table4_clip/finetune, runs/table4_dino/finetune]",
        ),
    ],
)  # fmt: skip
def test_runs_that_start_from_other_seeds_share_a_hash(path: Path, stage: str, key: str, same: str, other: str) -> None:
    recipe = load_recipe(path)
    seeded, different = (load_recipe(path, [f"{key}={value}", "seed=1"]) for value in (same, other))
    assert recipe.hash(stage) == seeded.hash(stage) and recipe.hash() == seeded.hash()  # type: ignore[arg-type]
    assert recipe.hash(stage) != different.hash(stage)  # type: ignore[arg-type]
