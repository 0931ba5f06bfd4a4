"""Folder of checkpoints: listing, retention, removal."""

from __future__ import annotations

from pathlib import Path

import pytest

from mrmae_ds.training.checkpoint.folder import (
    Retention,
    checkpoint_folders,
    clear_leftovers,
    list_checkpoints,
    new_tag,
    prune,
    remove,
    set_aside,
    step_of,
)
from tests.support.engines import written


def _names(stage_dir: Path) -> list[str]:
    return [path.name for path in list_checkpoints(stage_dir)]


def test_lists_committed_checkpoints_oldest_first(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path) == []
    for step in (1000, 20, 300):
        written(tmp_path, step)
    folder = tmp_path / "checkpoints"
    staging = folder / ".saving-step_000000400" / "step_000000400"
    staging.mkdir(parents=True)
    (staging / "manifest.json").write_text("{}")
    (folder / "step_000000500").mkdir()  # no manifest: incomplete
    (folder / "step_final").mkdir()
    (folder / "step_final" / "manifest.json").write_text("{}")
    (folder / "latest").write_text("step_000000500")
    assert _names(tmp_path) == ["step_000000020", "step_000000300", "step_000001000"]
    assert [step_of(path) for path in checkpoint_folders(tmp_path)] == [20, 300, 500, 1000]


def test_sorts_repeated_saves_of_a_step_by_number(tmp_path: Path) -> None:
    for name in ("step_000000020_r10", "step_000000020", "step_000000020_r2", "step_000000019"):
        written(tmp_path, 1).rename(tmp_path / "checkpoints" / name)
    assert _names(tmp_path) == ["step_000000019", "step_000000020", "step_000000020_r2", "step_000000020_r10"]


def test_never_reuses_a_tag(tmp_path: Path) -> None:
    assert new_tag(tmp_path, 20) == "step_000000020"
    written(tmp_path, 20)
    assert new_tag(tmp_path, 20) == "step_000000020_r1"
    set_aside([tmp_path / "checkpoints" / "step_000000020"])
    assert new_tag(tmp_path, 20) == "step_000000020_r1"
    (tmp_path / "checkpoints" / "step_000000020_r4").mkdir()
    assert new_tag(tmp_path, 20) == "step_000000020_r5"
    assert new_tag(tmp_path, 2) == "step_000000002"


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [
        (1, (), [70]),
        (2, (), [60, 70]),
        (9, (), [10, 20, 30, 40, 50, 60, 70]),
        (1, (30,), [30, 60, 70]),
        (2, (20, 30), [20, 30, 40, 60, 70]),
    ],
)
def test_keeps_the_newest_and_multiples_for_good(
    keep_last: int, keep_every: tuple[int, ...], kept: list[int], tmp_path: Path
) -> None:
    for step in range(10, 80, 10):
        newest = written(tmp_path, step)
    prune(tmp_path, newest, Retention(keep_last, keep_every))
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == kept


def test_prunes_newer_checkpoints_of_an_abandoned_branch(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        written(tmp_path, step)
    prune(tmp_path, tmp_path / "checkpoints" / "step_000000020", Retention(2, (40,)))
    assert _names(tmp_path) == ["step_000000010", "step_000000020"]


def test_prunes_checkpoints_set_aside_incomplete_ones_and_conversions(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        written(tmp_path, step)
    folder = tmp_path / "checkpoints"
    set_aside([folder / "step_000000010"])
    (folder / "step_000000015").mkdir()
    for name in ("step_000000010", "step_000000020", "step_000000030"):
        (folder / f".universal-{name}").mkdir()
    prune(tmp_path, folder / "step_000000030", Retention(1))
    assert sorted(path.name for path in folder.iterdir()) == [".universal-step_000000030", "step_000000030"]


def test_removes_leftovers_of_killed_processes_only(tmp_path: Path) -> None:
    kept = written(tmp_path, 10)
    folder = tmp_path / "checkpoints"
    (folder / ".saving-step_000000020" / "step_000000020").mkdir(parents=True)
    (folder / ".saving-step_000000020" / "step_000000020" / "half").write_bytes(b"x")
    (folder / ".removing-step_000000005").mkdir()
    (folder / ".latest.abc.tmp").write_text("")
    (tmp_path / ".record.json.abc.tmp").write_text("")
    (folder / ".left-step_000000030").mkdir()
    (folder / "latest").write_text("step_000000010")
    clear_leftovers(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [".left-step_000000030", "latest", kept.name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints"]


def test_lists_no_folder_whose_removal_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = written(tmp_path, 10)
    monkeypatch.setattr("mrmae_ds.training.checkpoint.folder.shutil.rmtree", lambda *_, **__: None)
    remove(checkpoint)
    assert checkpoint_folders(tmp_path) == []
    remove(checkpoint)  # nothing there: nothing to do
