from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mrmae_ds.config.recipe import Recipe, load_recipe
from mrmae_ds.errors import UserError
from mrmae_ds.records.record import RunRecord
from mrmae_ds.records.sections import DataInfo, Results, TeacherInfo
from mrmae_ds.training.checkpoint.folder import LEFT
from mrmae_ds.training.checkpoint.manifest import RunIdentity
from mrmae_ds.training.checkpoint.run_dir import (
    ENGINE_FILE,
    RECIPE_FILE,
    RunStart,
    decide_start,
    prepare_folder,
)
from tests.support.engines import written
from tests.support.records import make_record

TINY = Path(__file__).resolve().parents[3] / "ds_configs" / "tiny.yaml"
SHA, VAL, TEACHER = "5ha" * 20, "va1" * 20, "7ea" * 20
SHARD = "zero_pp_rank_0_mp_rank_00_optim_states.pt"


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(TINY)


def _identity(recipe: Recipe, **changes: Any) -> RunIdentity:
    """Identity of a pre-training run of this recipe."""
    values = {"train": SHA, "val": VAL, "teachers": {"mae": TEACHER}, "seed": recipe.seed}
    counted = {"recipe_hash": recipe.hash("pretrain"), "recipe": recipe.counted("pretrain")}
    return RunIdentity(**{**values, **counted, **changes})


@pytest.fixture
def folder(tmp_path: Path, recipe: Recipe) -> Path:
    """Folder of a stage that was killed after 40 of 100 steps, with two checkpoints."""
    stage_dir = tmp_path / "tiny" / "pretrain"
    prepare_folder(stage_dir, recipe, "{}\n", fresh=True)
    _record(stage_dir, recipe)
    for step in (20, 40):
        written(stage_dir, step, _identity(recipe))
    return stage_dir


def _record(stage_dir: Path, recipe: Recipe, status: str = "running") -> RunRecord:
    record = make_record(
        stage="pretrain",
        status=status,
        seed=recipe.seed,
        recipe_hash=recipe.hash("pretrain"),
        data=DataInfo(dataset="samples", file="train.beton", sha256=SHA, samples=640),
        teachers={"mae": TeacherInfo(kind="checkpoint", source="runs/mae/pretrain", sha256=TEACHER)},
        results=Results(),
    )
    record.write(stage_dir)
    return record


def _decide(folder: Path, recipe: Recipe, resume: str = "auto", **changes: Any) -> RunStart:
    """Decide, and check that nothing in the folder changes."""
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.parent.rglob("*"))
    try:
        return decide_start(folder, "pretrain", _identity(recipe, **changes), resume)
    finally:
        assert sorted((path, path.stat().st_mtime_ns) for path in folder.parent.rglob("*")) == before


def _refused(folder: Path, recipe: Recipe, resume: str = "auto", **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        _decide(folder, recipe, resume, **changes)
    return str(caught.value)


def _at(folder: Path, *steps: int) -> tuple[Path, ...]:
    return tuple(folder / "checkpoints" / f"step_{step:09d}" for step in steps)


def test_starts_fresh_in_an_empty_or_missing_folder(tmp_path: Path, recipe: Recipe) -> None:
    assert _decide(tmp_path / "pretrain", recipe) == RunStart("fresh")
    (tmp_path / "pretrain").mkdir()
    assert _decide(tmp_path / "pretrain", recipe) == RunStart("fresh")


@pytest.mark.parametrize("status", ["running", "failed", "stopped"])
def test_resumes_an_ended_run_from_its_newest_checkpoint(folder: Path, recipe: Recipe, status: str) -> None:
    _record(folder, recipe, status)
    assert _decide(folder, recipe) == RunStart("resume", _at(folder, 40, 20))


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_refuses_a_file_or_a_folder_of_anything_else(resume: str, tmp_path: Path, recipe: Recipe) -> None:
    """A fresh start would set it aside, and the one after remove it."""
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "tiny" / "pretrain"):
        assert _refused(folder, recipe, resume).startswith(f"{tmp_path / 'file'}: a file, not a folder of runs")
    thesis = tmp_path / "pretrain"
    thesis.mkdir()
    (thesis / "thesis.tex").touch()
    assert _refused(thesis, recipe, resume).startswith(f"{thesis}: not a run, it has thesis.tex in it; name another")


@pytest.mark.parametrize("name", ["run[1]", "run*", "what?"])
def test_rejects_a_folder_that_deepspeed_would_read_as_a_pattern(name: str, tmp_path: Path, recipe: Recipe) -> None:
    assert "pattern" in _refused(tmp_path / name / "pretrain", recipe, "never")
    assert "pattern" in _refused(tmp_path / "run" / "pretrain", recipe, str(tmp_path / name))


def test_resumes_a_run_whose_record_is_lost(folder: Path, recipe: Recipe) -> None:
    (folder / "record.json").unlink()
    assert _decide(folder, recipe) == RunStart("resume", _at(folder, 40, 20))
    assert "seed: 0 -> 5" in _refused(folder, recipe, seed=5)


def test_has_nothing_to_do_for_a_finished_run(folder: Path, recipe: Recipe) -> None:
    _record(folder, recipe, "finished")
    assert _decide(folder, recipe) == RunStart("done")


def test_starts_fresh_after_a_run_without_a_checkpoint(tmp_path: Path, recipe: Recipe) -> None:
    prepare_folder(tmp_path / "pretrain", recipe, "{}\n", fresh=True)
    _record(tmp_path / "pretrain", recipe)
    (tmp_path / "pretrain" / "checkpoints" / ".saving-step_000000020").mkdir(parents=True)
    assert _decide(tmp_path / "pretrain", recipe) == RunStart("fresh")


def test_resumes_after_changes_that_affect_no_result(folder: Path) -> None:
    overrides = ["name=other", "logging.every_steps=1", "loader.num_workers=1", "data.train=elsewhere/train.beton"]
    assert _decide(folder, load_recipe(TINY, overrides)).action == "resume"


def test_rejects_another_recipe_naming_the_changes(folder: Path) -> None:
    other = load_recipe(TINY, ["stages.pretrain.epochs=9", "stages.pretrain.objectives.mimic.loss=cosine", "size=S"])
    message = _refused(folder, other)
    assert str(folder) in message and "of another run" in message
    assert "stages.pretrain.epochs: 4 -> 9" in message
    assert "stages.pretrain.objectives.mimic.loss: 'l2' -> 'cosine'" in message
    assert "size: 'Tiny' -> 'S'" in message
    assert "batch_size" not in message
    assert "--run" in message and "--resume never" in message


@pytest.mark.parametrize("text", [None, "", "name: [", "name: tiny"])
def test_rejects_another_recipe_even_if_its_file_is_unreadable(folder: Path, text: str | None) -> None:
    (folder / RECIPE_FILE).unlink()
    if text is not None:
        (folder / RECIPE_FILE).write_text(text)
    message = _refused(folder, load_recipe(TINY, ["stages.pretrain.epochs=9"]))
    assert "recipe: " in message and " -> " in message


def test_rejects_another_seed(folder: Path) -> None:
    message = _refused(folder, load_recipe(TINY, ["seed=5"]))
    assert "seed: 0 -> 5" in message and "--run" in message


def test_names_all_differences_at_once(folder: Path, recipe: Recipe) -> None:
    other = load_recipe(TINY, ["stages.pretrain.epochs=9"])
    for left_out in ("nothing", "record.json"):  # by the record, and by the checkpoint alone
        (folder / left_out).unlink(missing_ok=True)
        message = _refused(folder, other, seed=5, train="0" * 64, teachers={"mae": "1" * 64})
        assert "stages.pretrain.epochs: 4 -> 9; seed: 0 -> 5; " in message
        assert f"data.train: sha256 {SHA[:12]} -> sha256 000000000000" in message
        assert f"teachers.mae: sha256 {TEACHER[:12]} -> sha256 111111111111" in message


def test_rejects_another_validation_set_by_the_checkpoint(folder: Path, recipe: Recipe) -> None:
    assert f"data.val: sha256 {VAL[:12]} -> sha256 222222222222" in _refused(folder, recipe, val="2" * 64)


def test_rejects_a_finished_run_of_another_recipe(folder: Path, recipe: Recipe) -> None:
    _record(folder, recipe, "finished")
    assert "of another run" in _refused(folder, load_recipe(TINY, ["stages.pretrain.epochs=9"]))


def test_rejects_checkpoints_of_which_none_is_complete(folder: Path, recipe: Recipe) -> None:
    for checkpoint in (folder / "checkpoints").iterdir():
        (checkpoint / "manifest.json").unlink()
    message = _refused(folder, recipe)
    assert "no complete checkpoint" in message and "--resume never" in message
    (folder / "record.json").unlink()
    assert "no complete checkpoint" in _refused(folder, recipe)
    assert _decide(folder, recipe, "never") == RunStart("fresh")


def test_ignores_checkpoints_that_were_set_aside(folder: Path, recipe: Recipe) -> None:
    for checkpoint in _at(folder, 20, 40):
        checkpoint.rename(checkpoint.with_name(LEFT + checkpoint.name))
    assert _decide(folder, recipe) == RunStart("fresh")


def test_passes_over_a_checkpoint_without_a_manifest(folder: Path, recipe: Recipe) -> None:
    (folder / "checkpoints" / "step_000000040" / "manifest.json").unlink()
    start = _decide(folder, recipe)
    assert (start.action, start.candidates, len(start.damaged)) == ("resume", _at(folder, 20), 1)


def test_passes_over_a_truncated_checkpoint(folder: Path, recipe: Recipe) -> None:
    shard = folder / "checkpoints" / "step_000000040" / SHARD
    shard.write_bytes(b"opt")
    start = _decide(folder, recipe)
    assert (start.action, start.candidates) == ("resume", _at(folder, 20))
    assert len(start.damaged) == 1 and str(shard) in start.damaged[0]


def test_never_starts_fresh_whatever_exists(folder: Path) -> None:
    assert _decide(folder, load_recipe(TINY, ["seed=5", "size=S"]), "never", train="other") == RunStart("fresh")


def test_resumes_from_a_named_checkpoint(folder: Path, recipe: Recipe) -> None:
    chosen = folder / "checkpoints" / "step_000000020"
    assert _decide(folder, recipe, str(chosen)) == RunStart("resume", (chosen,), named=True)
    _record(folder, recipe, "finished")
    assert _decide(folder, recipe, str(chosen)) == RunStart("resume", (chosen,), named=True)


def test_rejects_a_truncated_named_checkpoint(folder: Path, recipe: Recipe) -> None:
    (chosen,) = _at(folder, 40)
    (chosen / SHARD).write_bytes(b"opt")
    message = _refused(folder, recipe, str(chosen))
    assert "3 bytes instead of 9" in message and "--resume DIR" in message


def test_rejects_a_named_checkpoint_of_another_recipe(folder: Path) -> None:
    chosen = folder / "checkpoints" / "step_000000020"
    message = _refused(folder, load_recipe(TINY, ["stages.pretrain.epochs=9"]), str(chosen))
    assert "of another run" in message and "stages.pretrain.epochs: 4 -> 9" in message


def test_rejects_a_named_checkpoint_of_another_seed(folder: Path) -> None:
    chosen = folder / "checkpoints" / "step_000000020"
    assert "seed" in _refused(folder, load_recipe(TINY, ["seed=5"]), str(chosen))


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/step_000000060", ".", "recipe.yaml"])
def test_rejects_a_folder_that_is_no_checkpoint(folder: Path, recipe: Recipe, name: str) -> None:
    assert "checkpoints/step_N" in _refused(folder, recipe, str(folder / name))


def test_names_a_damaged_record(folder: Path, recipe: Recipe) -> None:
    (folder / "record.json").write_text('{"schema_version": 1, "na')
    assert "record.json" in _refused(folder, recipe)


def test_writes_the_resolved_configuration(tmp_path: Path, recipe: Recipe) -> None:
    prepare_folder(tmp_path / "a" / "pretrain", recipe, '{"x": 1}\n', fresh=True)
    assert load_recipe(tmp_path / "a" / "pretrain" / RECIPE_FILE) == recipe
    assert (tmp_path / "a" / "pretrain" / ENGINE_FILE).read_text() == '{"x": 1}\n'


def test_a_fresh_start_sets_the_earlier_folder_aside(folder: Path, recipe: Recipe) -> None:
    for content in ("first", "second", "third"):
        if content != "first":
            prepare_folder(folder, recipe, "{}\n", fresh=True)
        (folder / "mine.txt").write_text(content)
    previous = folder.parent / ".pretrain.previous"
    assert (previous / "mine.txt").read_text() == "second"
    assert (folder / "mine.txt").read_text() == "third"
    assert sorted(path.name for path in folder.parent.iterdir()) == [".pretrain.previous", "pretrain"]
    assert not (folder / "checkpoints").exists()


def test_resuming_clears_half_written_files(folder: Path, recipe: Recipe) -> None:
    """Also if no save follows, which would clear them too."""
    left = [folder / ".record.json.x.tmp", folder / "checkpoints" / ".latest.x.tmp"]
    for path in left:
        path.write_text("")
    prepare_folder(folder, recipe, "new\n", fresh=False)
    assert not any(path.exists() for path in left)


def test_resuming_keeps_the_folder(folder: Path, recipe: Recipe) -> None:
    prepare_folder(folder, recipe, "new\n", fresh=False)
    assert (folder / ENGINE_FILE).read_text() == "new\n"
    assert (folder / "checkpoints" / "step_000000040").is_dir()
    assert not (folder.parent / ".pretrain.previous").exists()
