from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mrmae_ds.errors import UserError
from mrmae_ds.training.checkpoint import (
    Manifest,
    list_checkpoints,
    load_checkpoint,
    read_manifest,
    save_checkpoint,
)

FILES = {"zero_pp_rank_0_mp_rank_00_optim_states.pt": b"optimizer", "mp_rank_00_model_states.pt": b"model"}


class FakeEngine:
    """Writes the files of a checkpoint as DeepSpeed does, and remembers what it was told to load."""

    def __init__(self, files: dict[str, bytes] | None = None, loads: bool = True, zero_stage: int = 3) -> None:
        self.files, self.loads, self.zero_stage = FILES if files is None else files, loads, zero_stage
        self.asked: list[tuple[str, str]] = []

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        assert save_latest is False
        (Path(folder) / tag).mkdir()
        for name, content in self.files.items():
            (Path(folder) / tag / name).write_bytes(content)

    def zero_optimization_stage(self) -> int:
        return self.zero_stage

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str | None, dict[str, Any]]:
        self.asked.append((folder, tag))
        return (f"{folder}/{tag}" if self.loads else None), {}


def _save(stage_dir: Path, step: int, keep: int = 2, engine: FakeEngine | None = None) -> None:
    save_checkpoint(engine or FakeEngine(), stage_dir, step, "abc", 3, keep)


def _names(stage_dir: Path) -> list[str]:
    return [path.name for path in list_checkpoints(stage_dir)]


@pytest.mark.usefixtures("alone")
class TestSaving:
    def test_a_saved_checkpoint_says_what_it_is(self, tmp_path: Path) -> None:
        _save(tmp_path, 12)
        (path,) = list_checkpoints(tmp_path)
        assert path == tmp_path / "checkpoints" / "step_000000012"
        sizes = {name: len(content) for name, content in FILES.items()}
        assert read_manifest(path) == Manifest(step=12, world_size=1, recipe_hash="abc", seed=3, files=sizes)
        assert sorted(p.name for p in path.parent.iterdir()) == ["step_000000012"]

    def test_the_newest_are_kept(self, tmp_path: Path) -> None:
        for step in (5, 10, 100, 1000):
            _save(tmp_path, step)
        assert _names(tmp_path) == ["step_000000100", "step_000001000"]
        _save(tmp_path, 2000, keep=1)
        assert _names(tmp_path) == ["step_000002000"]

    def test_the_same_step_again_replaces_it(self, tmp_path: Path) -> None:
        _save(tmp_path, 5)
        _save(tmp_path, 5, engine=FakeEngine({**FILES, "mp_rank_00_model_states.pt": b"other model"}))
        (path,) = list_checkpoints(tmp_path)
        assert read_manifest(path).files["mp_rank_00_model_states.pt"] == len(b"other model")

    def test_what_was_just_written_is_kept_after_going_back_to_an_older_one(self, tmp_path: Path) -> None:
        _written(tmp_path, 40)
        _save(tmp_path, 30, keep=1)
        assert _names(tmp_path) == ["step_000000030"]

    def test_what_an_ended_save_left_is_cleared(self, tmp_path: Path) -> None:
        left = tmp_path / "checkpoints" / ".staging" / "step_000000005"
        left.mkdir(parents=True)
        (left / "half").write_bytes(b"x")
        _save(tmp_path, 5)
        assert "half" not in read_manifest(list_checkpoints(tmp_path)[0]).files

    @pytest.mark.parametrize("files", [{**FILES, "empty.pt": b""}, {}])
    def test_a_checkpoint_that_was_not_written_is_not_committed(self, tmp_path: Path, files: dict[str, bytes]) -> None:
        _save(tmp_path, 5)
        with pytest.raises(RuntimeError, match="step_000000010"):
            _save(tmp_path, 10, engine=FakeEngine(files))
        assert _names(tmp_path) == ["step_000000005"]

    def test_zero_0_has_no_shards(self, tmp_path: Path) -> None:
        """DeepSpeed writes the optimiser into the model's file then."""
        _save(tmp_path, 5, engine=FakeEngine({"mp_rank_00_model_states.pt": b"model and optimizer"}, zero_stage=0))
        assert _names(tmp_path) == ["step_000000005"]
        with pytest.raises(RuntimeError, match="step_000000010"):
            _save(tmp_path, 10, engine=FakeEngine({}, zero_stage=0))

    def test_each_rank_writes_a_shard(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mrmae_ds.training.checkpoint.dist.get_world_size", lambda: 3)
        shards = {f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt": b"o" for rank in range(3)}
        _save(tmp_path, 5, engine=FakeEngine(shards))
        assert read_manifest(list_checkpoints(tmp_path)[0]).world_size == 3
        shards.popitem()
        with pytest.raises(RuntimeError, match="2 optimiser shards of 3"):
            _save(tmp_path, 10, engine=FakeEngine(shards))

    def test_one_shard_of_two_is_not_enough(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mrmae_ds.training.checkpoint.dist.get_world_size", lambda: 2)
        with pytest.raises(RuntimeError, match="1 optimiser shards of 2"):
            _save(tmp_path, 5)


@pytest.mark.usefixtures("alone")
class TestLoading:
    def test_the_engine_gets_the_folder_and_the_step_comes_back(self, tmp_path: Path) -> None:
        _save(tmp_path, 12)
        engine = FakeEngine()
        assert load_checkpoint(engine, tmp_path / "checkpoints" / "step_000000012") == 12
        assert engine.asked == [(str(tmp_path / "checkpoints"), "step_000000012")]

    def test_another_number_of_processes(self, tmp_path: Path) -> None:
        checkpoint = _written(tmp_path, world_size=4)
        engine = FakeEngine()
        with pytest.raises(UserError, match=r"written by 4 processes, 1 are running; start 4"):
            load_checkpoint(engine, checkpoint)
        assert engine.asked == []

    def test_a_damaged_one_is_not_given_to_the_engine(self, tmp_path: Path) -> None:
        checkpoint = _written(tmp_path)
        (checkpoint / "mp_rank_00_model_states.pt").write_bytes(b"mod")
        engine = FakeEngine()
        with pytest.raises(UserError, match="3 bytes instead of 5"):
            load_checkpoint(engine, checkpoint)
        assert engine.asked == []

    def test_an_engine_that_loads_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="loaded nothing"):
            load_checkpoint(FakeEngine(loads=False), _written(tmp_path))


def _written(stage_dir: Path, step: int = 5, **changes: Any) -> Path:
    """A checkpoint on the disk, without having been saved here."""
    checkpoint = stage_dir / "checkpoints" / f"step_{step:09d}"
    checkpoint.mkdir(parents=True)
    for name, content in FILES.items():
        (checkpoint / name).write_bytes(content)
    manifest = {"step": step, "world_size": 1, "recipe_hash": "abc", "seed": 0}
    sizes = {name: len(content) for name, content in FILES.items()}
    (checkpoint / "manifest.json").write_text(json.dumps({**manifest, "files": sizes, **changes}))
    return checkpoint


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    checkpoint = _written(tmp_path)
    (checkpoint / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(UserError, match=r"mp_rank_00_model_states\.pt: None bytes instead of 5.*--resume DIR"):
        read_manifest(checkpoint)


@pytest.mark.parametrize("content", [b"", b"mode", b"model+"])
def test_a_file_of_another_size_is_named(tmp_path: Path, content: bytes) -> None:
    checkpoint = _written(tmp_path)
    (checkpoint / "mp_rank_00_model_states.pt").write_bytes(content)
    with pytest.raises(UserError, match=rf"mp_rank_00_model_states\.pt: {len(content)} bytes instead of 5"):
        read_manifest(checkpoint)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"step": 1}', '{"step": 1, "more": 2}', "\x00", "3", '"text"', "null"]
)
def test_a_manifest_that_is_none(tmp_path: Path, text: str) -> None:
    checkpoint = _written(tmp_path)
    (checkpoint / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json: no readable checkpoint manifest"):
        read_manifest(checkpoint)


def test_a_manifest_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest\.json: .*checkpoints/step_N"):
        read_manifest(tmp_path / "nowhere")


def test_only_committed_checkpoints_are_listed_oldest_first(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path) == []
    for step in (1000, 20, 300):
        _written(tmp_path, step)
    folder = tmp_path / "checkpoints"
    (folder / ".staging" / "step_000000400").mkdir(parents=True)
    (folder / ".staging" / "step_000000400" / "manifest.json").write_text("{}")
    (folder / "step_000000500").mkdir()  # no manifest: not committed
    (folder / "step_final").mkdir()
    (folder / "step_final" / "manifest.json").write_text("{}")
    (folder / "latest").write_text("step_000000500")
    assert _names(tmp_path) == ["step_000000020", "step_000000300", "step_000001000"]
