"""Saving a checkpoint: the disk's content at every moment, and saves that fail."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mrmae_ds.errors import CollectiveError
from mrmae_ds.training.checkpoint import folder as store
from mrmae_ds.training.checkpoint import save as module
from mrmae_ds.training.checkpoint.folder import Retention, list_checkpoints
from mrmae_ds.training.checkpoint.manifest import check_contents, check_sizes, read_manifest
from tests.support.engines import FILES, IDENTITY, FakeEngine, save

pytestmark = pytest.mark.usefixtures("alone")
STAGED = ".saving-step_000000010"


def _names(stage_dir: Path) -> list[str]:
    return [path.name for path in list_checkpoints(stage_dir)]


def _everything(stage_dir: Path) -> list[str]:
    return sorted(path.relative_to(stage_dir).as_posix() for path in stage_dir.rglob("*") if path.is_file())


def test_writes_a_complete_manifest(tmp_path: Path) -> None:
    path = save(tmp_path, 12)
    assert list_checkpoints(tmp_path) == [path] == [tmp_path / "checkpoints" / "step_000000012"]
    manifest = read_manifest(path)
    assert (manifest.step, manifest.identity, manifest.results) == (12, IDENTITY, {"top1": 1.5})
    assert manifest.layout.model_dump() == {
        "world_size": 1, "zero_stage": 3, "dtype": "float32", "sub_group_size": 1000,
    }  # fmt: skip
    assert sorted(manifest.files) == sorted([*FILES, "rank_00000.pt"])
    assert check_sizes(path, manifest) == check_contents(path, manifest, manifest.files) == []
    for name, content in FILES.items():
        assert torch.load(path / name, weights_only=True) == {"content": content}
    assert sorted(p.name for p in path.parent.iterdir()) == ["latest", "step_000000012"]


def test_writes_the_pointer_of_deepspeed(tmp_path: Path) -> None:
    save(tmp_path, 12)
    save(tmp_path, 20)
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_000000020"


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (5, 10, 100, 1000):
        save(tmp_path, step)
    assert _names(tmp_path) == ["step_000000100", "step_000001000"]
    save(tmp_path, 2000, retention=Retention(1, (100,)))
    assert _names(tmp_path) == ["step_000000100", "step_000001000", "step_000002000"]


def test_saving_a_step_again_uses_another_tag(tmp_path: Path) -> None:
    first = save(tmp_path, 5)
    before = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    again = save(tmp_path, 5, engine=FakeEngine({"zero_pp_rank_0_mp_rank_00_optim_states.pt": "other"}))
    assert again.name == "step_000000005_r1"
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == before
    assert _names(tmp_path) == ["step_000000005", "step_000000005_r1"]


def test_removes_leftovers_of_a_killed_save(tmp_path: Path) -> None:
    left = tmp_path / "checkpoints" / STAGED / "step_000000010"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"x")
    path = save(tmp_path, 10)
    assert "half" not in read_manifest(path).files
    assert sorted(p.name for p in path.parent.iterdir()) == ["latest", "step_000000010"]


def test_restores_the_writer_of_deepspeed(tmp_path: Path) -> None:
    engine = FakeEngine()
    own = engine.checkpoint_engine = object()
    save(tmp_path, 5, engine=engine)
    assert engine.checkpoint_engine is own


def test_writes_in_the_order_that_keeps_a_checkpoint_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files before the manifest, the manifest and the folder before the name, the name before the pointer."""
    events: list[str] = []
    plain_fsync, plain_rename, plain_replace = os.fsync, Path.rename, os.replace

    def path_of(handle: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{handle}")).name

    monkeypatch.setattr(os, "fsync", lambda handle: (events.append(f"fsync {path_of(handle)}"), plain_fsync(handle)))
    monkeypatch.setattr(Path, "rename", lambda a, b: (events.append(f"rename {b.name}"), plain_rename(a, b))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(f"replace {Path(b).name}"), plain_replace(a, b))[1])
    save(tmp_path, 5)
    events = ["fsync TEMPORARY" if e.startswith(("fsync .manifest", "fsync .latest")) else e for e in events]
    flushed = {f"fsync {name}" for name in [*FILES, "rank_00000.pt"]}
    assert set(events[:3]) == flushed
    assert events[3:] == [
        "fsync TEMPORARY", "replace manifest.json", "fsync step_000000005", "rename step_000000005",
        "fsync checkpoints", "fsync TEMPORARY", "replace latest",
    ]  # fmt: skip


# ---- saves that fail


class Unwritable:
    """A shard that torch cannot write."""

    def __reduce__(self) -> Any:
        raise TypeError("cannot be pickled")


def _fails(tmp_path: Path, engine: FakeEngine, pattern: str) -> None:
    """A failed save after 10 steps changes nothing in the folder."""
    save(tmp_path, 5)
    before = _everything(tmp_path)
    with pytest.raises(
        CollectiveError, match=f"after step 10 was not saved, the earlier ones are as they were: .*{pattern}"
    ):
        save(tmp_path, 10, engine=engine)
    assert _everything(tmp_path) == before and _names(tmp_path) == ["step_000000005"]
    assert not (tmp_path / "checkpoints" / STAGED).exists()


def test_reports_a_shard_that_cannot_be_written(tmp_path: Path) -> None:
    _fails(
        tmp_path, FakeEngine({"a_optim_states.pt": 1, "model_states.pt": Unwritable()}), "model_states.pt: cannot be"
    )


def test_reports_a_missing_shard(tmp_path: Path) -> None:
    _fails(tmp_path, FakeEngine({"model_states.pt": 1}), "0 optimizer shards of 1")


def test_zero_0_has_no_optimizer_files(tmp_path: Path) -> None:
    """At ZeRO stage 0 DeepSpeed writes the optimizer into the model's file."""
    save(tmp_path, 5, engine=FakeEngine({"mp_rank_00_model_states.pt": 1}, zero_stage=0))
    assert _names(tmp_path) == ["step_000000005"]


@pytest.mark.parametrize(("number", "fix"), [(errno.ENOSPC, "free space"), (errno.EDQUOT, "quota"), (errno.EIO, "")])
def test_reports_a_disk_that_fails_in_the_middle_of_a_file(
    number: int, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch replaces the error of a write by its own; the message names the cause."""
    plain = module._HashingFile.write
    writes: list[int] = []

    class FullFile:
        def write(self, data: Any) -> None:
            raise OSError(number, os.strerror(number))

    def write(file: module._HashingFile, data: Any) -> int:
        writes.append(len(data))
        if len(writes) == 8 + 20:
            file.file = FullFile()  # type: ignore[assignment]
        return plain(file, data)

    save(tmp_path, 5)
    monkeypatch.setattr(module._HashingFile, "write", write)
    with pytest.raises(CollectiveError, match=rf"{os.strerror(number)}.*{fix}"):
        save(tmp_path, 10)
    assert len(writes) > 20 and _names(tmp_path) == ["step_000000005"]
    assert not (tmp_path / "checkpoints" / STAGED).exists()


@pytest.mark.parametrize("where", ["rename", "manifest"])
def test_cleans_up_after_a_failed_commit(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    save(tmp_path, 5)
    before = _everything(tmp_path)
    if where == "rename":
        monkeypatch.setattr(Path, "rename", fail)
    else:
        monkeypatch.setattr("mrmae_ds.training.checkpoint.manifest.write_text", fail)
    with pytest.raises(CollectiveError, match="No space left"):
        save(tmp_path, 10)
    monkeypatch.undo()
    assert _everything(tmp_path) == before


def test_reports_a_lost_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is raised by the test, because root may write anywhere."""
    save(tmp_path, 5)
    plain: Callable[..., None] = Path.mkdir

    def mkdir(path: Path, *args: Any, **kwargs: Any) -> None:
        if STAGED in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        plain(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(
        CollectiveError, match=rf"after step 10 was not begun: .*{STAGED}.*Permission denied; make the folder writable"
    ):
        save(tmp_path, 10)
    assert _names(tmp_path) == ["step_000000005"]


def test_warns_of_old_checkpoints_that_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(store, "prune", fail)
    path = save(tmp_path, 5)
    assert _names(tmp_path) == ["step_000000005"]
    assert f"{path} is saved, but" in caplog.text


def test_saves_counters_and_random_states(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    path = save(tmp_path, 7)
    state = torch.load(path / "rank_00000.pt", weights_only=True)
    assert state["step"] == 7 and torch.equal(state["random"]["torch"], expected)
