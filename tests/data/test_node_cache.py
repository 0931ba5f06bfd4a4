"""Copies on a node: one copy for all processes, which share nothing but the folder."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

from mrmae_ds.data import node_cache
from mrmae_ds.data.beton.sidecar import check_beton, read_sidecar, sidecar_path
from mrmae_ds.data.node_cache import cache_all, cache_beton, cached_path
from mrmae_ds.errors import UserError
from tests.support.jpegs import stored_jpegs
from tests.support.processes import REPOSITORY
from tests.support.ranks import start as start_training
from tests.support.sample_data import write_sample_beton

pytestmark = pytest.mark.timeout(280, method="thread")
_DEADLINE_S = 120

# A process of a node: python -c _RANK BETON FOLDER GATE. It prints when it waits for another process, and when it
# copies; after the first block it waits for the file GATE.
_RANK = """
import sys, time
from pathlib import Path
from mrmae_ds.data import node_cache
from mrmae_ds.errors import UserError

beton, folder, gate = sys.argv[1:]
blocks = node_cache._blocks
def gated(file):
    yield file.read(1 << 16)
    print("copying", flush=True)
    while not Path(gate).exists():
        time.sleep(0.05)
    yield from blocks(file)
def report(text, *_):
    if "waiting for another process" in text:
        print("waiting", flush=True)
node_cache._blocks, node_cache.logger.info = gated, report
try:
    path = node_cache.cache_beton(beton, folder, timeout_s=100)
except UserError as error:
    print("error:", error, flush=True)
    sys.exit(2)
print(path, flush=True)
"""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .beton of 150 images."""
    return write_sample_beton(tmp_path_factory.mktemp("original"), train=150, val=1)[0]


@pytest.fixture
def beton(original: Path, tmp_path: Path) -> Path:
    """The same in a folder of its own."""
    path = tmp_path / "shared" / "train.beton"
    path.parent.mkdir()
    shutil.copy(original, path)
    shutil.copy(sidecar_path(original), sidecar_path(path))
    return path


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """File for which copies wait."""
    return tmp_path / "gate"


@pytest.fixture
def ranks() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are ended with the test."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def _start(ranks: list[subprocess.Popen[str]], beton: Path, folder: Path, gate: Path) -> None:
    command = [sys.executable, "-c", _RANK, str(beton), str(folder), str(gate)]
    ranks.append(subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True))


def _results(ranks: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Wait for the processes; return status and output of each."""
    outputs = [process.communicate(timeout=_DEADLINE_S)[0] for process in ranks]
    return [(process.returncode, output) for process, output in zip(ranks, outputs, strict=True)]


def _next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def _rename(beton: Path, name: str) -> Path:
    """Give a file and its sidecar another name beside it, as links."""
    path = beton.with_name(name)
    path.symlink_to(beton)
    sidecar_path(path).symlink_to(sidecar_path(beton))
    return path


def _partial_files(folder: Path) -> list[Path]:
    return list(folder.rglob("*.tmp"))


def test_copy_equals_the_file_and_its_sidecar(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NODE_DISK", str(tmp_path / "disk"))
    with caplog.at_level(logging.INFO, "mrmae_ds"):
        path = cache_beton(beton, Path("$NODE_DISK/mrmae"))
    assert path.is_relative_to(tmp_path / "disk" / "mrmae") and path.name == "train.beton"
    assert path == cached_path(beton, "$NODE_DISK/mrmae") and cached_path(beton, None) == beton
    assert path.read_bytes() == beton.read_bytes()
    assert read_sidecar(path) == read_sidecar(beton)
    assert check_beton(path).sha256 == check_beton(beton).sha256
    (message,) = caplog.messages
    assert "copying" in message and str(path) in message
    assert not _partial_files(tmp_path / "disk")


def test_copy_is_reused(beton: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = cache_beton(beton, tmp_path / "disk")
    before = path.stat()
    caplog.clear()  # the level may be INFO already, set by an earlier test's command
    with caplog.at_level(logging.INFO, "mrmae_ds"):
        assert cache_beton(beton, tmp_path / "disk") == path
    assert caplog.messages == []
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("damage", ["changed", "shortened", "no record", "no sidecar", "torn record"])
def test_altered_copy_is_made_again(beton: Path, tmp_path: Path, damage: str) -> None:
    path = cache_beton(beton, tmp_path / "disk")
    content = path.read_bytes()
    if damage == "changed":
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif damage == "shortened":
        path.write_bytes(content[:-1])
    elif damage == "no sidecar":
        sidecar_path(path).unlink()
    elif damage == "no record":
        path.with_name("copied.json").unlink()
    else:
        path.with_name("copied.json").write_text("{")
    assert cache_beton(beton, tmp_path / "disk") == path
    assert path.read_bytes() == content and sidecar_path(path).is_file() and path.with_name("copied.json").is_file()


def test_one_process_copies_and_the_others_wait(
    beton: Path, tmp_path: Path, gate: Path, ranks: list[subprocess.Popen[str]]
) -> None:
    for _ in range(4):
        _start(ranks, beton, tmp_path / "disk", gate)
    assert sorted(map(_next_line, ranks)) == ["copying", *["waiting"] * 3]
    gate.touch()
    results = _results(ranks)
    assert [status for status, _ in results] == [0] * 4
    (path,) = {output.strip() for _, output in results}  # nothing else was printed
    assert Path(path).read_bytes() == beton.read_bytes()


def test_different_files_of_one_name_have_different_copies(beton: Path, tmp_path: Path) -> None:
    other = write_sample_beton(tmp_path / "other", train=20, val=1)[0]
    paths = {cache_beton(source, tmp_path / "disk") for source in (beton, other)}
    assert len(paths) == 2 and {path.name for path in paths} == {"train.beton"}
    assert {path.read_bytes() for path in paths} == {beton.read_bytes(), other.read_bytes()}


def test_files_of_one_content_share_a_copy_under_any_name(beton: Path, tmp_path: Path) -> None:
    val = _rename(beton, "val.beton")
    cache_all([beton, val], tmp_path / "disk")
    path, other = (cached_path(source, tmp_path / "disk") for source in (beton, val))
    assert path == other and path.read_bytes() == beton.read_bytes()
    made = path.stat().st_ino
    for source in (val, beton, _rename(beton, "renamed.beton")):
        assert cache_beton(source, tmp_path / "disk") == path
    assert path.stat().st_ino == made and len(list((tmp_path / "disk").glob("*/*.beton"))) == 1
    sidecar_path(path).unlink()
    assert cache_beton(val, tmp_path / "disk") == cached_path(beton, tmp_path / "disk")
    assert len(list((tmp_path / "disk").glob("*/*.beton"))) == 1


def test_jobs_that_know_a_file_under_two_names_share_a_copy(
    beton: Path, tmp_path: Path, gate: Path, ranks: list[subprocess.Popen[str]]
) -> None:
    for source, expected in ((beton, "copying"), (_rename(beton, "images.beton"), "waiting")):
        _start(ranks, source, tmp_path / "disk", gate)
        assert _next_line(ranks[-1]) == expected
    gate.touch()
    (status, path), (other_status, other) = _results(ranks)
    assert status == other_status == 0 and path == other
    assert Path(path.strip()).read_bytes() == beton.read_bytes()


def test_a_damaged_source_fails_no_job_that_has_an_intact_one(
    beton: Path, tmp_path: Path, gate: Path, ranks: list[subprocess.Popen[str]]
) -> None:
    damaged = beton.with_name("damaged.beton")
    damaged.write_bytes(bytes(beton.stat().st_size))
    shutil.copy(sidecar_path(beton), sidecar_path(damaged))
    for source, expected in ((damaged, "copying"), (beton, "waiting")):
        _start(ranks, source, tmp_path / "disk", gate)
        assert _next_line(ranks[-1]) == expected
    gate.touch()
    (failed, message), (status, output) = _results(ranks)
    assert failed == 2 and message.startswith(f"error: {damaged}: its SHA-256 differs")
    assert status == 0 and Path(output.splitlines()[-1]).read_bytes() == beton.read_bytes()


def test_another_process_takes_over_from_a_killed_one(
    beton: Path, tmp_path: Path, gate: Path, ranks: list[subprocess.Popen[str]]
) -> None:
    for expected in ("copying", "waiting"):
        _start(ranks, beton, tmp_path / "disk", gate)
        assert _next_line(ranks[-1]) == expected
    assert len(_partial_files(tmp_path / "disk")) == 1
    ranks[0].send_signal(signal.SIGKILL)
    ranks[0].wait()
    gate.touch()
    _, (status, output) = _results(ranks)
    assert status == 0 and Path(output.splitlines()[-1]).read_bytes() == beton.read_bytes()
    assert not _partial_files(tmp_path / "disk")


def test_leftovers_of_a_killed_process_are_removed(
    beton: Path, tmp_path: Path, gate: Path, ranks: list[subprocess.Popen[str]]
) -> None:
    _start(ranks, beton, tmp_path / "disk", gate)
    assert _next_line(ranks[0]) == "copying"
    ranks[0].send_signal(signal.SIGKILL)
    _results(ranks)
    assert len(_partial_files(tmp_path / "disk")) == 1
    other = write_sample_beton(tmp_path / "other", train=20, val=1)[0]
    cache_beton(other, tmp_path / "disk")
    assert not _partial_files(tmp_path / "disk")
    assert cache_beton(beton, tmp_path / "disk").read_bytes() == beton.read_bytes()


def test_copy_in_progress_is_left_alone(
    beton: Path, tmp_path: Path, gate: Path, ranks: list[subprocess.Popen[str]]
) -> None:
    other = write_sample_beton(tmp_path / "other", train=20, val=1)[0]
    _start(ranks, other, tmp_path / "disk", gate)
    assert _next_line(ranks[0]) == "copying"
    cache_beton(beton, tmp_path / "disk")
    assert len(_partial_files(tmp_path / "disk")) == 1
    gate.touch()
    ((status, output),) = _results(ranks)
    assert status == 0 and Path(output.splitlines()[-1]).read_bytes() == other.read_bytes()


def test_file_that_differs_from_its_sidecar_is_an_error_in_all_processes(
    beton: Path, tmp_path: Path, gate: Path, ranks: list[subprocess.Popen[str]]
) -> None:
    content = beton.read_bytes()
    beton.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for expected in ("copying", "waiting", "waiting"):
        _start(ranks, beton, tmp_path / "disk", gate)
        assert _next_line(ranks[-1]) == expected
    gate.touch()
    for status, output in _results(ranks):
        (message,) = output.splitlines()  # nobody copied again
        assert status == 2 and message.startswith(f"error: {beton}: its SHA-256 differs from its sidecar's")
    assert not list((tmp_path / "disk").glob("*/*"))


def test_too_little_space_is_an_error_before_copying(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9, beton.stat().st_size - 1))
    with pytest.raises(UserError, match=r"cache_dir .*disk: .* needs \d\.\d MB, \d\.\d MB are free; name"):
        cache_beton(beton, tmp_path / "disk")
    monkeypatch.undo()
    cache_beton(beton, tmp_path / "disk")
    other = write_sample_beton(tmp_path / "other", train=20, val=1)[0]
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9, 0))
    with pytest.raises(UserError, match=r"; remove what no run needs of .*/train\.beton \(\d\.\d MB\)"):
        cache_beton(other, tmp_path / "disk")


def test_full_disk_is_an_error_and_leaves_nothing(beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object) -> Iterator[bytes]:
        yield b"some"
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(node_cache, "_blocks", full)
    with pytest.raises(UserError, match=r"the disk is full \(No space left on device\); .*train\.beton needs"):
        cache_beton(beton, tmp_path / "disk")
    assert not list((tmp_path / "disk").glob("*/*"))
    (failure,) = (tmp_path / "disk").glob("*.failed")
    assert "the disk is full" in json.loads(failure.read_text())["message"]
    monkeypatch.undo()
    assert cache_beton(beton, tmp_path / "disk").is_file()  # an earlier failure does not count
    assert not failure.exists()


def test_waiting_for_another_copy_ends_with_an_error(
    beton: Path, tmp_path: Path, gate: Path, ranks: list[subprocess.Popen[str]], caplog: pytest.LogCaptureFixture
) -> None:
    _start(ranks, beton, tmp_path / "disk", gate)
    assert _next_line(ranks[0]) == "copying"
    error = pytest.raises(UserError, match=r"\.lock: another process has been copying for more than 0\.5 s")
    with caplog.at_level("INFO"), error:
        cache_beton(beton, tmp_path / "disk", timeout_s=0.5)
    assert ".lock: waiting for another process to copy, at most" in caplog.text


def test_unusable_folder_is_an_error(beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"cache_dir .*/file/disk: cannot be written to \(Not a directory\)"):
        cache_beton(beton, tmp_path / "file" / "disk")
    monkeypatch.delenv("NO_SUCH_DISK", raising=False)
    with pytest.raises(UserError, match=r"cache_dir \$NO_SUCH_DISK/x: a variable in it is not set here"):
        cache_beton(beton, Path("$NO_SUCH_DISK/x"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=r"disk: cannot be written to \(Permission denied\); name a folder of your own"):
        cache_beton(beton, tmp_path / "disk")


def test_training_reads_the_copy(original: Path, tmp_path: Path) -> None:
    """Blank the images of an existing copy without a trace: both ranks must fail on it."""
    path = cache_beton(original, tmp_path / "disk")
    before = path.stat()
    content = bytearray(path.read_bytes())
    for jpeg, _, _ in stored_jpegs(path):
        place = content.index(jpeg)
        content[place : place + len(jpeg)] = bytes(len(jpeg))
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    recipe = ("--ds_config", "ds_configs/tiny.json", "--recipe", "ds_configs/baselines/scratch_tiny.yaml")
    data = (f"data.train={original}", f"data.val={original.with_name('val.beton')}")
    cache_dir = f"loader.cache_dir={tmp_path / 'disk'}"
    command = (*recipe, "--stage", "finetune", "--run", tmp_path / "run", *data, cache_dir)
    training = start_training(2, [*command, "stages.finetune.batch_size=32"], tmp_path / "logs")
    statuses = training.wait()  # 2 of the first to fail, 1 of a rank that ends because of it
    assert 2 in statuses and set(statuses) <= {1, 2}, training.text()
    assert f"error: {path}: damaged image in sample" in training.text()
    assert cached_path(original.with_name("val.beton"), tmp_path / "disk").is_file()
