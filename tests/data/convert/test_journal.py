"""A conversion that is killed anywhere is continued by the same command, to the bytes of an unbroken one."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mrmae_ds.cli.main import main
from mrmae_ds.data.beton.file_writer import BetonWriter
from mrmae_ds.data.beton.sidecar import read_sidecar
from mrmae_ds.data.convert import writer
from mrmae_ds.data.convert.folder import write_folder
from mrmae_ds.data.convert.journal import journal_path
from mrmae_ds.data.convert.options import Output, WriteOptions
from mrmae_ds.data.convert.shards import ShardOptions, write_shards
from mrmae_ds.errors import UserError
from tests.support.shards import image_bytes, write_tar, write_webdataset

pytestmark = pytest.mark.timeout(120, method="thread")
Content = dict[str, Any]
_TIMES = ("written", "seconds", "cpu_seconds")


@pytest.fixture(autouse=True)
def _save_every_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(writer, "announce_size", lambda *_: None)  # half of the time of a small conversion


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Shards with an image that cannot be read among those of training."""
    folder = write_webdataset(tmp_path / "in")
    write_tar(folder / "train-000002.tar", [("b/0.png", b"no image"), ("b/0.cls", b"1")])
    return folder


def _convert(source: Path, out: Path, **options: Any) -> None:
    write_shards(
        source, Output(out, options=WriteOptions(**{"workers": 1, "max_bad": 1} | options)), "tars", ShardOptions()
    )


def _content(out: Path) -> Content:
    """Return all that is in a folder: bytes, and sidecars without times."""
    files: Content = {path.name: path.read_bytes() for path in out.iterdir()}
    for name in [name for name in files if name.endswith(".json")]:
        files[name] = {key: value for key, value in json.loads(files[name]).items() if key not in _TIMES}
    return files


def _killed(work: Callable[[], None], call: int) -> bool:
    """Run a function in a process that kills itself before a system call that changes the disk; True if it did."""
    child = os.fork()
    if child == 0:
        left, pid = [call], os.getpid()

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                if os.getpid() == pid:
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(pid, signal.SIGKILL)
                return function(*args, **kwargs)

            return run

        for name in ("fsync", "replace", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.timeout(400, method="thread")  # some 35 conversions, which are killed and continued
def test_killed_before_every_change_of_the_disk(source: Path, tmp_path: Path) -> None:
    _convert(source, tmp_path / "unbroken")
    expected = _content(tmp_path / "unbroken")
    assert sorted(expected) == [
        "train.beton", "train.beton.json", "train.beton.skipped.csv", "val.beton", "val.beton.json"
    ]  # fmt: skip
    call, out = 0, tmp_path / "out"
    while _killed(lambda: _convert(source, out), call):
        _convert(source, out)
        assert _content(out) == expected, f"killed before call {call}"
        shutil.rmtree(out)
        call += 1
    assert call > 30 and _content(out) == expected


def test_what_is_done_is_not_converted_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out, rows = tmp_path / "out", []
    convert = writer._Converter._convert

    def recorded(self: Any, row: int) -> Any:
        rows.append(row)
        return convert(self, row)

    monkeypatch.setattr(writer._Converter, "_convert", recorded)
    monkeypatch.setattr(writer, "map_in_order", lambda function, count, **_: (x for x in map(function, range(count))))
    assert _killed(lambda: _convert(source, out), 9)
    caplog.set_level("INFO")
    _convert(source, out, workers=2, timeout_s=9)  # which change no image
    assert "train.beton: continuing after 4 samples" in caplog.text
    assert rows == [4, 5, 6, 0, 1]
    assert _killed(lambda: _convert(source, out), 24)
    rows.clear()
    _convert(source, out)
    assert "train.beton: is complete already" in caplog.text and rows == [0, 1]


def test_each_sidecar_is_written_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, write_text = [], writer.write_text

    def recorded(path: Path, text: str) -> None:
        written.append(path.name)
        write_text(path, text)

    monkeypatch.setattr(writer, "write_text", recorded)
    _convert(source, tmp_path / "out")
    assert written == ["train.beton.json", "val.beton.json"]


@pytest.mark.parametrize("torn", ["journal", "partial", "garbage", "journal gone", "partial gone"])
def test_torn_files(torn: str, source: Path, tmp_path: Path) -> None:
    _convert(source, tmp_path / "unbroken")
    expected = _content(tmp_path / "unbroken")
    out = tmp_path / "out"
    assert _killed(lambda: _convert(source, out), 9)
    journal, partial = journal_path(out / "train.beton"), out / ".train.beton.partial"
    saved = journal.read_bytes(), partial.read_bytes()
    for cut in (1, 2, 30, 200) if torn in ("journal", "partial") else (0,):
        out.mkdir(exist_ok=True)
        journal.write_bytes(saved[0][:-cut] if torn == "journal" else saved[0])
        partial.write_bytes(saved[1][:-cut] if torn == "partial" else saved[1])
        if torn == "garbage":
            partial.write_bytes(saved[1] + b"x" * 5000)
            journal.write_bytes(saved[0] + b'{"images": [[1')
        elif torn.endswith("gone"):
            (journal if torn.startswith("journal") else partial).unlink()
        _convert(source, out)
        assert _content(out) == expected
        shutil.rmtree(out)


def test_a_torn_line_does_not_spoil_the_next(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    assert _killed(lambda: _convert(source, out), 9)
    journal = journal_path(out / "train.beton")
    journal.write_bytes(journal.read_bytes()[:-30])
    assert _killed(lambda: _convert(source, out), 4)  # after two more samples
    caplog.set_level("INFO")
    _convert(source, out)
    assert "train.beton: continuing after 5 samples" in caplog.text


@pytest.mark.parametrize("call", [9, 24])
def test_other_options_and_sources_start_over_and_say_so(
    call: int, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"

    def changed(what: str, **options: Any) -> None:
        """Convert what has changed since an interruption, and compare it with a conversion that had none."""
        caplog.clear()
        _convert(source, out, **options)
        assert f"train.beton: an interrupted conversion had other {what}; starting over" in caplog.text
        _convert(source, tmp_path / "unbroken", **options)
        assert _content(out) == _content(tmp_path / "unbroken")

    assert _killed(lambda: _convert(source, out), call)
    changed("quality", quality=50)
    assert _killed(lambda: _convert(source, out), call)
    write_tar(source / "train-000003.tar", [])
    shutil.copy(source / "train-000002.tar", source / "train-000003.tar")
    changed("source, places of images", max_bad=5)
    assert _killed(lambda: _convert(source, out, max_bad=5), call)
    content = bytearray((source / "train-000000.tar").read_bytes())
    place = content.index(b"IDAT") + 4
    content[place : place + 9] = bytes(9)
    (source / "train-000000.tar").write_bytes(content)  # the same size and members
    changed("images", max_bad=5)


def test_a_folder_continues_and_an_interruption_keeps_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(8):
        path = tmp_path / "in" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(number))
    options = WriteOptions(workers=1)
    write_folder(tmp_path / "in", Output(tmp_path / "unbroken", options=options), val_fraction=0.25)
    out = tmp_path / "out"

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    command = ["data", "write", str(tmp_path / "in"), "--out", str(out), "--workers", "1", "--val-fraction", "0.25"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(writer, "_check_classes", interrupted)
        main(command)
    assert caught.value.code == 130 and "interrupted; the same command continues" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == [".train.beton.journal", ".train.beton.partial"]
    assert main(command) == 0
    assert "train.beton: continuing after 6 samples" in capsys.readouterr().err
    assert _content(out) == _content(tmp_path / "unbroken")


@pytest.mark.parametrize("failing", ["append", "sync"])
def test_a_full_disk_keeps_its_part(
    failing: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _convert(source, tmp_path / "unbroken")
    out, calls = tmp_path / "out", iter([False] * 3 + [True])
    whole = getattr(BetonWriter, failing)

    def full(*args: Any) -> Any:
        if next(calls):
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(*args)

    with monkeypatch.context() as patch:
        patch.setattr(BetonWriter, failing, full)
        with pytest.raises(UserError, match=r"the disk is full .*, \.train\.beton\.partial is kept, to continue;"):
            _convert(source, out)
    caplog.set_level("INFO")
    _convert(source, out)
    assert "continuing after 3 samples" in caplog.text
    assert _content(out) == _content(tmp_path / "unbroken")


def test_a_higher_limit_of_unreadable_images_continues(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        _convert(source, tmp_path / "out", max_bad=0)
    caplog.set_level("INFO")
    _convert(source, tmp_path / "out")
    assert "train.beton: continuing after 6 samples" in caplog.text
    _convert(source, tmp_path / "unbroken")
    assert _content(tmp_path / "out") == _content(tmp_path / "unbroken")


def test_one_conversion_at_a_time(source: Path, tmp_path: Path) -> None:
    out, (reader, writing) = tmp_path / "out", os.pipe()
    child = os.fork()
    if child == 0:

        def wait(*_: Any) -> None:
            os.write(writing, b"x")
            signal.pause()

        writer._check_classes = wait
        _convert(source, out)
    try:
        os.read(reader, 1)
        with pytest.raises(UserError, match=r"train\.beton: another conversion writes it"):
            _convert(source, out)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    _convert(source, out)
    assert read_sidecar(out / "train.beton")["num_samples"] == 6
