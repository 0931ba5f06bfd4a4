"""Copies on a node: one copy whoever asks, in processes that share nothing but the folder."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

from mrmae_ds.data import node_cache as staging
from mrmae_ds.data.beton.sidecar import check_beton, read_sidecar, sidecar_path
from mrmae_ds.data.node_cache import located, stage_beton
from mrmae_ds.errors import UserError
from tests.support.jpegs import stored_jpegs
from tests.support.processes import REPOSITORY, finish, rank_processes
from tests.support.sample_data import write_sample_beton

pytestmark = pytest.mark.timeout(180, method="thread")
_DEADLINE_S = 40

# A process of a node: python -c _RANK BETON FOLDER leader|other BLOCKS_PER_SECOND. With a rate, it copies 64
# kilobytes at a time and says when it begins.
_RANK = """
import sys, time
from mrmae_ds.data import node_cache as staging
from mrmae_ds.errors import UserError

beton, folder, role, rate = sys.argv[1:]
def slowly(file):
    print("copying", flush=True)
    while block := file.read(1 << 16):
        time.sleep(1 / float(rate))
        yield block
if float(rate):
    staging._blocks = slowly
print("ready", flush=True)
try:
    path = staging.stage_beton(
        beton, folder, is_leader=role == "leader", timeout_s=30, start_s=10, announce=lambda text: None
    )
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
def ranks() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are ended with the test."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def _start(ranks: list[subprocess.Popen[str]], beton: Path, folder: Path, role: str, rate: float = 0) -> None:
    command = [sys.executable, "-c", _RANK, str(beton), str(folder), role, str(rate)]
    ranks.append(subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True))


def _ends(ranks: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    outputs = [process.communicate(timeout=_DEADLINE_S)[0] for process in ranks]
    return [(process.returncode, output) for process, output in zip(ranks, outputs, strict=True)]


def _reads(process: subprocess.Popen[str], expected: str) -> None:
    """Wait for a line."""
    assert process.stdout is not None
    assert any(line.strip() == expected for line in process.stdout)


def _leader(beton: Path, folder: Path) -> tuple[Path, list[str]]:
    told: list[str] = []
    return stage_beton(beton, folder, is_leader=True, announce=told.append), told


def test_the_copy_is_the_file_with_its_sidecar(beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_DISK", str(tmp_path / "disk"))
    path, told = _leader(beton, Path("$NODE_DISK/mrmae"))
    assert path.is_relative_to(tmp_path / "disk" / "mrmae") and path.name == "train.beton"
    assert path == located(beton, "$NODE_DISK/mrmae") and located(beton, None) == beton
    assert path.read_bytes() == beton.read_bytes()
    assert read_sidecar(path) == read_sidecar(beton)
    assert check_beton(path).sha256 == check_beton(beton).sha256
    assert "copying" in told[0] and str(path) in told[0]
    assert not list((tmp_path / "disk").rglob("*.partial"))


def test_a_copy_is_used_again(beton: Path, tmp_path: Path) -> None:
    path, _ = _leader(beton, tmp_path / "disk")
    made = path.stat()
    again, told = _leader(beton, tmp_path / "disk")
    assert again == path and "staged already" in told[0]
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (made.st_ino, made.st_mtime_ns)
    assert stage_beton(beton, tmp_path / "disk", is_leader=False) == path


@pytest.mark.parametrize("damage", ["changed", "shortened", "no record", "no sidecar", "torn record"])
def test_a_copy_that_is_not_as_it_was_made_is_made_again(beton: Path, tmp_path: Path, damage: str) -> None:
    path, _ = _leader(beton, tmp_path / "disk")
    content = path.read_bytes()
    if damage == "changed":
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif damage == "shortened":
        path.write_bytes(content[:-1])
    elif damage == "no sidecar":
        sidecar_path(path).unlink()
    elif damage == "no record":
        path.with_name("staged.json").unlink()
    else:
        path.with_name("staged.json").write_text("{")
    with pytest.raises(UserError, match="has not begun within"):
        stage_beton(beton, tmp_path / "disk", is_leader=False, start_s=0.3)
    again, told = _leader(beton, tmp_path / "disk")
    assert again == path and "copying" in told[0]
    assert path.read_bytes() == content and sidecar_path(path).is_file()


def test_one_process_of_a_node_copies_and_the_others_wait(
    beton: Path, tmp_path: Path, ranks: list[subprocess.Popen[str]]
) -> None:
    for role in ("other", "other", "leader", "other"):
        _start(ranks, beton, tmp_path / "disk", role, rate=30)
    ends = _ends(ranks)
    assert [status for status, _ in ends] == [0] * 4
    assert len({output.splitlines()[-1] for _, output in ends}) == 1
    assert ["copying" in output for _, output in ends] == [False, False, True, False]
    assert Path(ends[0][1].splitlines()[-1]).read_bytes() == beton.read_bytes()


def test_runs_of_one_node_share_a_copy(beton: Path, tmp_path: Path, ranks: list[subprocess.Popen[str]]) -> None:
    for role in ("leader", "leader", "other", "other"):
        _start(ranks, beton, tmp_path / "disk", role, rate=30)
    ends = _ends(ranks)
    assert [status for status, _ in ends] == [0] * 4
    assert sum("copying" in output for _, output in ends) == 1
    assert Path(ends[0][1].splitlines()[-1]).read_bytes() == beton.read_bytes()


def test_different_sets_of_one_name_do_not_meet(beton: Path, original: Path, tmp_path: Path) -> None:
    other = write_sample_beton(tmp_path / "other", train=20, val=1)[0]
    paths = {_leader(source, tmp_path / "disk")[0] for source in (beton, other)}
    assert len(paths) == 2 and {path.name for path in paths} == {"train.beton"}
    assert {path.read_bytes() for path in paths} == {beton.read_bytes(), other.read_bytes()}


def test_a_killed_leader_is_an_error_and_its_leftovers_go(
    beton: Path, tmp_path: Path, ranks: list[subprocess.Popen[str]]
) -> None:
    _start(ranks, beton, tmp_path / "disk", "leader", rate=1)
    _reads(ranks[0], "copying")
    _start(ranks, beton, tmp_path / "disk", "other")
    _reads(ranks[1], "ready")
    time.sleep(1)  # it looks several times a second
    ranks[0].send_signal(signal.SIGKILL)
    (_, _), (status, output) = _ends(ranks)
    assert status == 2 and "the process that was to copy it ended without finishing" in output
    assert len(list((tmp_path / "disk").rglob("*.partial"))) == 1
    other = write_sample_beton(tmp_path / "other", train=20, val=1)[0]
    _leader(other, tmp_path / "disk")
    assert not list((tmp_path / "disk").rglob("*.partial"))
    path, _ = _leader(beton, tmp_path / "disk")
    assert path.read_bytes() == beton.read_bytes()


def test_what_another_process_is_copying_is_left_alone(
    beton: Path, tmp_path: Path, ranks: list[subprocess.Popen[str]]
) -> None:
    other = write_sample_beton(tmp_path / "other", train=20, val=1)[0]
    _start(ranks, other, tmp_path / "disk", "leader", rate=20)
    _reads(ranks[0], "copying")
    _leader(beton, tmp_path / "disk")
    assert len(list((tmp_path / "disk").rglob("*.partial"))) == 1
    ((status, output),) = _ends(ranks)
    assert status == 0 and Path(output.splitlines()[-1]).read_bytes() == other.read_bytes()


def test_a_file_that_is_not_what_its_sidecar_says_is_an_error_everywhere(
    beton: Path, tmp_path: Path, ranks: list[subprocess.Popen[str]]
) -> None:
    content = beton.read_bytes()
    beton.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for role in ("other", "leader", "other"):
        _start(ranks, beton, tmp_path / "disk", role, rate=30)
    for status, output in _ends(ranks):
        assert status == 2 and f"error: {beton}: has not the SHA-256 in its sidecar" in output
    assert not list((tmp_path / "disk").glob("*/*"))


def test_too_little_space_is_told_before_copying(beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9, beton.stat().st_size - 1))
    with pytest.raises(UserError, match=r"cache_dir .*disk: .* needs \d\.\d MB, \d\.\d MB are free; name"):
        _leader(beton, tmp_path / "disk")
    monkeypatch.undo()
    _leader(beton, tmp_path / "disk")
    other = write_sample_beton(tmp_path / "other", train=20, val=1)[0]
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9, 0))
    with pytest.raises(UserError, match=r"; remove what no run needs of .*/train\.beton \(\d\.\d MB\)"):
        _leader(other, tmp_path / "disk")


def test_a_disk_that_fills_up_is_an_error_and_leaves_nothing(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object) -> Iterator[bytes]:
        yield b"some"
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(staging, "_blocks", full)
    with pytest.raises(UserError, match=r"the disk is full \(No space left on device\); .*train\.beton needs"):
        _leader(beton, tmp_path / "disk")
    assert not list((tmp_path / "disk").glob("*/*"))
    (note,) = (tmp_path / "disk").glob("*.failed")
    assert "the disk is full" in json.loads(note.read_text())["message"]
    began = time.monotonic()
    with pytest.raises(UserError, match=r"has not begun within 0\.5 s"):  # the note is of an earlier attempt
        stage_beton(beton, tmp_path / "disk", is_leader=False, start_s=0.5)
    assert time.monotonic() - began < 10


def test_waiting_ends(beton: Path, tmp_path: Path, ranks: list[subprocess.Popen[str]]) -> None:
    _start(ranks, beton, tmp_path / "disk", "leader", rate=1)
    _reads(ranks[0], "copying")
    with pytest.raises(UserError, match=r"train\.beton: is not there after 0\.5 s"):
        stage_beton(beton, tmp_path / "disk", is_leader=False, timeout_s=0.5)
    with pytest.raises(UserError, match=r"\.lock: another process has been copying for more than 0\.5 s"):
        stage_beton(beton, tmp_path / "disk", is_leader=True, timeout_s=0.5)


def test_a_folder_that_cannot_be_used_is_an_error(beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"cache_dir .*/file/disk: cannot be written to \(Not a directory\)"):
        _leader(beton, tmp_path / "file" / "disk")
    monkeypatch.delenv("NO_SUCH_DISK", raising=False)
    with pytest.raises(UserError, match=r"cache_dir \$NO_SUCH_DISK/x: a variable in it is not set here"):
        _leader(beton, Path("$NO_SUCH_DISK/x"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=r"disk: cannot be written to \(Permission denied\); name a folder of your own"):
        _leader(beton, tmp_path / "disk")


def test_training_reads_the_staged_copy(original: Path, tmp_path: Path) -> None:
    """A copy that is there already, its images blanked without a trace: two processes must stumble over it."""
    path, _ = _leader(original, tmp_path / "disk")
    made = path.stat()
    content = bytearray(path.read_bytes())
    for jpeg, _, _ in stored_jpegs(path):
        place = content.index(jpeg)
        content[place : place + len(jpeg)] = bytes(len(jpeg))
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(made.st_atime_ns, made.st_mtime_ns))
    recipe = ("--ds_config", "ds_configs/tiny.json", "--recipe", "ds_configs/baselines/scratch_tiny.yaml")
    data = (f"data.train={original}", f"data.val={original.with_name('val.beton')}")
    cache_dir = f"loader.cache_dir={tmp_path / 'disk'}"
    command = (*recipe, "--stage", "finetune", "--run", tmp_path / "run", *data, cache_dir)
    results = finish(rank_processes(2, *command, "stages.finetune.batch_size=32"), 100)
    statuses = [result.status for result in results]  # of who stumbles 2, of who ends because another one has 1
    assert 2 in statuses and set(statuses) <= {1, 2}, results[0].stderr
    assert any(f"error: {path}: damaged JPEG in sample" in result.stderr for result in results)
    assert f"{original}: staged already, {path}" in results[0].stdout
    assert located(original.with_name("val.beton"), tmp_path / "disk").is_file()
