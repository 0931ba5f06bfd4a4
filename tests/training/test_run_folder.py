from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mrmae_ds.errors import UserError
from mrmae_ds.recipe import Recipe, load_recipe
from mrmae_ds.reporting.records import DataInfo, Results, RunRecord
from mrmae_ds.training.run_folder import (
    ENGINE_FILE,
    RECIPE_FILE,
    Start,
    decide_start,
    differences,
    prepare_folder,
)
from tests.reporting.builders import make_record

TINY = Path(__file__).resolve().parents[2] / "ds_configs" / "tiny.yaml"
SHA = "5ha" * 20


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(TINY)


@pytest.fixture
def folder(tmp_path: Path, recipe: Recipe) -> Path:
    """A stage's folder as a run leaves it that was ended after 40 of 100 steps, with two checkpoints."""
    stage_dir = tmp_path / "tiny" / "pretrain"
    prepare_folder(stage_dir, recipe, "{}\n", fresh=True)
    _record(stage_dir, recipe)
    for step in (20, 40):
        _checkpoint(stage_dir, step, recipe)
    return stage_dir


def _record(stage_dir: Path, recipe: Recipe, status: str = "running", sha256: str = SHA) -> RunRecord:
    record = make_record(
        stage="pretrain",
        status=status,
        seed=recipe.seed,
        recipe_hash=recipe.hash("pretrain"),
        data=DataInfo(dataset="samples", file="train.beton", sha256=sha256, samples=640),
        results=Results(),
    )
    record.write(stage_dir)
    return record


def _checkpoint(stage_dir: Path, step: int, recipe: Recipe, **changes: Any) -> Path:
    checkpoint = stage_dir / "checkpoints" / f"step_{step:09d}"
    checkpoint.mkdir(parents=True)
    shard = checkpoint / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    shard.write_bytes(b"weights")
    manifest = {"step": step, "world_size": 1, "recipe_hash": recipe.hash("pretrain"), "seed": recipe.seed}
    content = {**manifest, "files": {shard.name: 7}, **changes}
    (checkpoint / "manifest.json").write_text(json.dumps(content))
    return checkpoint


def _decide(folder: Path, recipe: Recipe, resume: str = "auto", sha256: str = SHA) -> Start:
    """What is decided; nothing in the folder may change by it."""
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.parent.rglob("*"))
    try:
        return decide_start(folder, recipe, "pretrain", sha256, resume)
    finally:
        assert sorted((path, path.stat().st_mtime_ns) for path in folder.parent.rglob("*")) == before


def _refused(folder: Path, recipe: Recipe, resume: str = "auto", sha256: str = SHA) -> str:
    with pytest.raises(UserError) as caught:
        _decide(folder, recipe, resume, sha256)
    return str(caught.value)


def test_an_empty_or_missing_folder_is_a_fresh_start(tmp_path: Path, recipe: Recipe) -> None:
    assert _decide(tmp_path / "pretrain", recipe) == Start("fresh")
    (tmp_path / "pretrain").mkdir()
    assert _decide(tmp_path / "pretrain", recipe) == Start("fresh")


@pytest.mark.parametrize("status", ["running", "failed", "stopped"])
def test_a_run_that_was_ended_goes_on_from_its_newest_checkpoint(folder: Path, recipe: Recipe, status: str) -> None:
    _record(folder, recipe, status)
    assert _decide(folder, recipe) == Start("resume", folder / "checkpoints" / "step_000000040")


def test_a_finished_run_is_done(folder: Path, recipe: Recipe) -> None:
    _record(folder, recipe, "finished")
    assert _decide(folder, recipe) == Start("done")


def test_a_run_that_ended_before_its_first_checkpoint_starts_anew(tmp_path: Path, recipe: Recipe) -> None:
    prepare_folder(tmp_path / "pretrain", recipe, "{}\n", fresh=True)
    _record(tmp_path / "pretrain", recipe)
    (tmp_path / "pretrain" / "checkpoints" / ".staging" / "step_000000020").mkdir(parents=True)
    assert _decide(tmp_path / "pretrain", recipe) == Start("fresh")


def test_what_changes_no_result_does_not_hinder(folder: Path) -> None:
    overrides = ["name=other", "record.log_every=1", "loader.workers=1", "data.train=elsewhere/train.beton"]
    assert _decide(folder, load_recipe(TINY, overrides)).action == "resume"


def test_another_recipe_is_refused_with_what_changed(folder: Path) -> None:
    other = load_recipe(TINY, ["stages.pretrain.epochs=9", "stages.pretrain.objectives.mimic.loss=cosine", "size=S"])
    message = _refused(folder, other)
    assert str(folder) in message and "another recipe" in message
    assert "stages.pretrain.epochs: 4 -> 9" in message
    assert "stages.pretrain.objectives.mimic.loss: 'l2' -> 'cosine'" in message
    assert "size: 'Tiny' -> 'S'" in message
    assert "batch_size" not in message
    assert "--run" in message and "--resume never" in message


def test_another_recipe_is_refused_even_without_its_file(folder: Path) -> None:
    (folder / RECIPE_FILE).unlink()
    assert "another recipe" in _refused(folder, load_recipe(TINY, ["stages.pretrain.epochs=9"]))


def test_another_seed_is_refused(folder: Path) -> None:
    message = _refused(folder, load_recipe(TINY, ["seed=5"]))
    assert "seed 0, this is seed 5" in message and "--run" in message


def test_other_data_are_refused(folder: Path, recipe: Recipe) -> None:
    message = _refused(folder, recipe, sha256="other")
    assert "other data" in message and "samples" in message and SHA[:12] in message


def test_a_finished_run_of_another_recipe_is_refused_too(folder: Path, recipe: Recipe) -> None:
    _record(folder, recipe, "finished")
    assert "another recipe" in _refused(folder, load_recipe(TINY, ["stages.pretrain.epochs=9"]))


def test_checkpoints_of_which_none_is_whole(folder: Path, recipe: Recipe) -> None:
    for checkpoint in (folder / "checkpoints").iterdir():
        (checkpoint / "manifest.json").unlink()
    message = _refused(folder, recipe)
    assert "no whole checkpoint" in message and "--resume never" in message


def test_a_checkpoint_without_a_manifest_is_passed_over(folder: Path, recipe: Recipe) -> None:
    (folder / "checkpoints" / "step_000000040" / "manifest.json").unlink()
    assert _decide(folder, recipe) == Start("resume", folder / "checkpoints" / "step_000000020")


def test_a_checkpoint_that_is_cut_off_is_passed_over(folder: Path, recipe: Recipe) -> None:
    shard = folder / "checkpoints" / "step_000000040" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    shard.write_bytes(b"wei")
    start = _decide(folder, recipe)
    assert (start.action, start.checkpoint) == ("resume", folder / "checkpoints" / "step_000000020")
    assert len(start.damaged) == 1 and str(shard) in start.damaged[0]


def test_never_starts_anew_whatever_is_there(folder: Path) -> None:
    assert _decide(folder, load_recipe(TINY, ["seed=5", "size=S"]), "never", "other") == Start("fresh")


def test_a_checkpoint_that_is_named(folder: Path, recipe: Recipe) -> None:
    chosen = folder / "checkpoints" / "step_000000020"
    assert _decide(folder, recipe, str(chosen)) == Start("resume", chosen)
    _record(folder, recipe, "finished")
    assert _decide(folder, recipe, str(chosen)) == Start("resume", chosen)


def test_a_named_checkpoint_of_another_recipe_is_refused(folder: Path) -> None:
    chosen = folder / "checkpoints" / "step_000000020"
    message = _refused(folder, load_recipe(TINY, ["stages.pretrain.epochs=9"]), str(chosen))
    assert "another recipe" in message and "stages.pretrain.epochs: 4 -> 9" in message


def test_a_named_checkpoint_of_another_seed_is_refused(folder: Path) -> None:
    chosen = folder / "checkpoints" / "step_000000020"
    assert "seed" in _refused(folder, load_recipe(TINY, ["seed=5"]), str(chosen))


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/step_000000060", ".", "recipe.yaml"])
def test_a_name_that_is_no_checkpoint(folder: Path, recipe: Recipe, name: str) -> None:
    assert "checkpoints/step_N" in _refused(folder, recipe, str(folder / name))


def test_a_damaged_record_is_named(folder: Path, recipe: Recipe) -> None:
    (folder / "record.json").write_text('{"schema_version": 1, "na')
    assert "record.json" in _refused(folder, recipe)


def test_differences_are_leaves() -> None:
    old = {"a": 1, "b": {"c": [1, 2], "d": 2}, "gone": {"x": 1}, "same": None}
    new = {"a": 1, "b": {"c": [1, 3], "d": 2}, "new": {"y": 2}, "same": None}
    assert differences(old, new) == ["b.c: [1, 2] -> [1, 3]", "gone: {'x': 1} -> None", "new: None -> {'y': 2}"]
    assert differences(old, old) == []


def test_a_folder_holds_what_was_resolved(tmp_path: Path, recipe: Recipe) -> None:
    prepare_folder(tmp_path / "a" / "pretrain", recipe, '{"x": 1}\n', fresh=True)
    assert load_recipe(tmp_path / "a" / "pretrain" / RECIPE_FILE) == recipe
    assert (tmp_path / "a" / "pretrain" / ENGINE_FILE).read_text() == '{"x": 1}\n'


def test_starting_anew_sets_the_earlier_folder_aside(folder: Path, recipe: Recipe) -> None:
    for content in ("first", "second", "third"):
        if content != "first":
            prepare_folder(folder, recipe, "{}\n", fresh=True)
        (folder / "mine.txt").write_text(content)
    previous = folder.parent / ".pretrain.previous"
    assert (previous / "mine.txt").read_text() == "second"
    assert (folder / "mine.txt").read_text() == "third"
    assert sorted(path.name for path in folder.parent.iterdir()) == [".pretrain.previous", "pretrain"]
    assert not (folder / "checkpoints").exists()


def test_going_on_keeps_the_folder(folder: Path, recipe: Recipe) -> None:
    prepare_folder(folder, recipe, "new\n", fresh=False)
    assert (folder / ENGINE_FILE).read_text() == "new\n"
    assert (folder / "checkpoints" / "step_000000040").is_dir()
    assert not (folder.parent / ".pretrain.previous").exists()
