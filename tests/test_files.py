"""Atomic replacement of files: no reader sees a partial file, a failed writer leaves the old one; shared failures."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mrmae_ds.errors import UserError
from mrmae_ds.files import failing_once, file_sha256, flush_folder, replacing, write_text


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_is_written_as_utf8_into_a_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    write_text(path, "\u00e9\n")
    assert path.read_bytes() == b"\xc3\xa9\n"
    write_text(path, "second")
    assert path.read_bytes() == b"second" and _names(path.parent) == ["a.txt"]


def test_readers_see_the_old_file_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with path.open() as reader:
        with replacing(path) as temporary:
            temporary.write_text("new")
            assert path.read_text() == "old" and temporary.parent == tmp_path
        assert reader.read() == "old"  # the name changed, not the file
    assert path.read_text() == "new" and _names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("old", ["old", None])
def test_an_error_leaves_the_old_file_and_no_other(old: str | None, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    if old is not None:
        path.write_text(old)
    with pytest.raises(RuntimeError, match="disk"), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("disk")
    assert _names(tmp_path) == (["a.txt"] if old else []) and (old is None or path.read_text() == old)


def test_content_is_on_the_disk_before_the_name_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append("replace"), replace(old, new)))
    write_text(tmp_path / "a.txt", "x")
    assert events == ["fsync", "replace"]
    flush_folder(tmp_path)
    assert events == ["fsync", "replace", "fsync"]


def test_mode_is_that_of_the_old_file_or_of_a_plain_open(tmp_path: Path) -> None:
    old, plain = tmp_path / "old", tmp_path / "plain"
    old.touch()
    old.chmod(0o640)
    plain.touch()
    for path in (old, tmp_path / "new"):
        write_text(path, "x")
    assert old.stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "new").stat().st_mode == plain.stat().st_mode


def test_leftovers_of_ended_processes_of_this_machine_are_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = socket.gethostname()
    leftover = f".[a].txt.{here}.{ended.pid}.x.tmp"
    kept = [
        f".[a].txt.{here}.{os.getpid()}.x.tmp",  # of a process that may still write it
        f".[a].txt.other-{here}.{ended.pid}.x.tmp",  # another machine has other processes
        f".b.txt.{here}.{ended.pid}.x.tmp",
        f".[a].txt.{here}.note.tmp",
    ]
    for name in (leftover, *kept):
        (tmp_path / name).touch()
    write_text(tmp_path / "[a].txt", "x")
    assert _names(tmp_path) == sorted([*kept, "[a].txt"])


def test_a_failure_is_raised_for_those_that_had_begun(tmp_path: Path) -> None:
    record, before = tmp_path / "x.failed", time.time()
    with pytest.raises(UserError, match="faulty"), failing_once(record, before):
        raise UserError("x: faulty")
    with pytest.raises(UserError, match="x: faulty"), failing_once(record, before):
        pytest.fail("done again")
    done = False
    with failing_once(record, time.time() + 1):
        done = True
    assert done and not record.exists()


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_checksum_is_that_of_the_whole_content(size: int, tmp_path: Path) -> None:
    content = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    (tmp_path / "a").write_bytes(content)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("folder", ["/proc/x", "file/below", "n" * 300])
def test_a_folder_that_cannot_be_made_is_named(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system calls a folder below /proc missing, which reads as if an input were."""
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(UserError, match=f"^{folder}: cannot be made"):
        write_text(Path(folder) / "table.md", "")


def test_an_error_names_the_file_and_not_the_temporary_one() -> None:
    with pytest.raises(OSError) as failure:
        write_text(Path("/proc/a.txt"), "x")  # where root cannot write either
    assert failure.value.filename == "/proc/a.txt"
