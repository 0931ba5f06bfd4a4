"""Conversion to .beton: content, atomic writing, unreadable images, dead and stuck workers."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mrmae_ds.data.beton.sidecar import check_beton, read_sidecar
from mrmae_ds.data.convert.options import WriteOptions, parse_max_bad
from mrmae_ds.data.convert.verify import describe_beton, verify_beton
from mrmae_ds.data.convert.writer import write_beton
from mrmae_ds.errors import UserError
from mrmae_ds.files import file_sha256
from tests.support.jpegs import stored_jpegs
from tests.support.processes import REPOSITORY
from tests.support.sample_data import Photographs, photograph

pytestmark = pytest.mark.timeout(240, method="thread")
OPTIONS = WriteOptions(max_side=64, workers=2, max_bad=0)
ABOUT = {"class_names": ["a", "b"], "name": "t", "source": "tests"}


class FunctionDataset:
    """Data set of functions that return an image or fail; labels alternate."""

    def __init__(self, images: Sequence[Callable[[], Image.Image]]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[index](), index % 2

    def name(self, index: int) -> str:
        return f"image-{index}"


def _small() -> Image.Image:
    return photograph().resize((48, 56))


def _truncated() -> Image.Image:
    stream = io.BytesIO()
    _small().save(stream, "JPEG")
    return Image.open(io.BytesIO(stream.getvalue()[:-400]))


def test_images_are_stored_with_labels_and_rows(photographs: Path) -> None:
    jpegs = stored_jpegs(photographs)
    assert len(jpegs) == len(Photographs()) == check_beton(photographs).num_samples
    for row, (content, label, index) in enumerate(jpegs):
        image, expected_label = Photographs()[row]
        assert (label, index) == (expected_label, row)
        stored = Image.open(io.BytesIO(content))
        if max(image.size) > 256:
            ratio = 256 / max(image.size)
            size = round(image.width * ratio), round(image.height * ratio)
            image = image.resize(size, Image.Resampling.BICUBIC)
        assert stored.size == image.size
        difference = np.abs(np.asarray(stored, dtype=float) - np.asarray(image, dtype=float))
        assert difference.mean() < 4  # JPEG at quality 95, of 255 levels


def test_written_file_is_described_by_its_sidecar(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "train.beton"
    info = write_beton(FunctionDataset([_small] * 5), path, OPTIONS, **ABOUT)
    assert info == check_beton(path)
    assert (info.num_samples, info.num_classes, info.class_names) == (5, 2, ("a", "b"))
    assert (info.max_side, info.quality, info.name, info.source) == (64, 90, "t", "tests")
    assert (info.size, info.sha256) == (path.stat().st_size, file_sha256(path))
    assert {"numpy", "pillow", "libjpeg-turbo"} <= set(read_sidecar(path)["versions"])
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["train.beton", "train.beton.json"]
    assert verify_beton(path) == info
    assert "5 images, 2 classes (a, b)" in describe_beton(path)


def test_bytes_do_not_depend_on_workers(tmp_path: Path) -> None:
    for workers in (1, 3):
        write_beton(Photographs(), tmp_path / f"{workers}.beton", replace(OPTIONS, workers=workers), **ABOUT)
    assert (tmp_path / "1.beton").read_bytes() == (tmp_path / "3.beton").read_bytes()


@pytest.mark.ffcv
def test_no_image_crosses_a_page_border(tmp_path: Path) -> None:
    """FFCV reads whole pages and finds a page by the start of an image."""
    from ffcv import reader as ffcv_reader

    path = tmp_path / "x.beton"
    write_beton(FunctionDataset([photograph] * 30), path, WriteOptions(quality=100, workers=1), **ABOUT)
    content = path.read_bytes()
    page = int.from_bytes(content[4:8], "little")
    place, pages = 0, set()
    for jpeg, _, _ in stored_jpegs(path):
        place = content.index(jpeg, place + 1)
        assert place // page == (place + len(jpeg) - 1) // page
        pages.add(place // page)
    assert len(pages) > 1 and ffcv_reader.Reader(str(path)).num_samples == 30


def _missing() -> Image.Image:
    return Image.open("/nowhere.jpg")


def test_too_many_unreadable_images_are_one_error_and_keep_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "train.beton"
    before = write_beton(FunctionDataset([_small] * 2), path, OPTIONS, **ABOUT)
    images = [_small] * 80
    images[3], images[70] = _truncated, _missing
    for max_bad in (0, 1, 0.0125):
        with pytest.raises(UserError) as caught:
            write_beton(FunctionDataset(images), path, replace(OPTIONS, max_bad=max_bad), **ABOUT)
        message = str(caught.value)
        assert f"2 of 80 images cannot be read, more than the {max_bad and 1} that --max-bad allows" in message
        assert "image-3: OSError: " in message and "truncated" in message
        assert "image-70: FileNotFoundError" in message and "nowhere.jpg" in message
        assert verify_beton(path) == before
        assert sorted(entry.name for entry in tmp_path.iterdir()) == [
            "train.beton", "train.beton.json", "train.beton.skipped.csv"
        ]  # fmt: skip


@pytest.mark.parametrize("max_bad", [2, 0.0126])
def test_unreadable_images_within_the_limit_are_left_out(tmp_path: Path, max_bad: int | float) -> None:
    path = tmp_path / "x.beton"
    images = [_small] * 80
    images[3], images[70] = _truncated, _missing
    info = write_beton(FunctionDataset(images), path, replace(OPTIONS, max_bad=max_bad), **ABOUT)
    assert info.num_samples == 78
    expected = [row % 2 for row in range(80) if row not in (3, 70)]
    assert [(label, index) for _, label, index in stored_jpegs(path)] == list(zip(expected, range(78), strict=True))
    skipped = read_sidecar(path)["skipped"]
    assert [(entry["row"], entry["name"]) for entry in skipped] == [(3, "image-3"), (70, "image-70")]
    assert read_sidecar(path)["class_counts"] == [39, 39]
    assert "left out  2 that cannot be read, listed in x.beton.skipped.csv" in describe_beton(path)
    verify_beton(path)
    write_beton(FunctionDataset([_small] * 2), path, OPTIONS, **ABOUT)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["x.beton", "x.beton.json"]


def test_reading_stops_far_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mrmae_ds.data.convert.writer._ENOUGH", 50)
    with pytest.raises(UserError, match=r"51 of 4,000 images cannot be read \(stopped after 51\)") as caught:
        write_beton(FunctionDataset([_truncated] * 4000), tmp_path / "x.beton", OPTIONS, **ABOUT)
    assert str(caught.value).endswith("and 31 more")
    assert len((tmp_path / "x.beton.skipped.csv").read_text().splitlines()) == 52


def test_class_without_readable_images_is_an_error(tmp_path: Path) -> None:
    images = [_small, _truncated] * 3 + [_small]
    with pytest.raises(UserError, match=r"no image of the class b can be read \(image-1: OSError"):
        write_beton(FunctionDataset(images), tmp_path / "x.beton", replace(OPTIONS, max_bad=10), **ABOUT)

    class Labeled(FunctionDataset):
        """Data set whose third class is empty, as its labels show."""

        def label(self, index: int) -> int:
            return index % 2

    images[3] = _small
    about = ABOUT | {"class_names": ["a", "b", "c"]}
    write_beton(Labeled(images), tmp_path / "x.beton", replace(OPTIONS, max_bad=10), **about)
    with pytest.raises(UserError, match="no image of the class c"):
        write_beton(FunctionDataset(images), tmp_path / "x.beton", replace(OPTIONS, max_bad=10), **about)


def test_label_without_a_class_is_an_error_at_any_limit(tmp_path: Path) -> None:
    options = replace(OPTIONS, max_bad=1.0)
    with pytest.raises(UserError, match=r"image-1: its label is 1, but there must be 1 class, labels from 0"):
        write_beton(FunctionDataset([_small] * 2), tmp_path / "x.beton", options, **ABOUT | {"class_names": ["a"]})
    assert list(tmp_path.iterdir()) == []


def test_killed_worker_is_an_error_naming_the_image(tmp_path: Path) -> None:
    before = set(multiprocessing.active_children())

    def killed() -> Image.Image:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    with pytest.raises(UserError, match=r"image-50: the process that read it ended with exit status -9.*--workers"):
        write_beton(FunctionDataset([_small] * 50 + [killed] + [_small] * 50), tmp_path / "x.beton", OPTIONS, **ABOUT)
    assert list(tmp_path.iterdir()) == [] and set(multiprocessing.active_children()) <= before


def test_stuck_worker_is_an_error_naming_the_image(tmp_path: Path) -> None:
    before = set(multiprocessing.active_children())

    def stuck() -> Image.Image:
        time.sleep(100)
        raise AssertionError

    options = replace(OPTIONS, timeout_s=3)  # within which a loaded machine reads the other images
    with pytest.raises(UserError, match=r"image-20: not read within 3 s \(--timeout\)"):
        write_beton(FunctionDataset([_small] * 20 + [stuck] + [_small] * 5), tmp_path / "x.beton", options, **ABOUT)
    assert list(tmp_path.iterdir()) == [] and set(multiprocessing.active_children()) <= before


def test_full_disk_leaves_no_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_beton(FunctionDataset([_small] * 2), tmp_path / "x.beton", OPTIONS, **ABOUT)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mrmae_ds.data.beton.file_writer.BetonWriter.append", full)
    with pytest.raises(UserError, match=r"x\.beton: the disk is full \(No space left on device\), no partial file"):
        write_beton(FunctionDataset([_small] * 5), tmp_path / "x.beton", OPTIONS, **ABOUT)
    assert verify_beton(tmp_path / "x.beton") == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["x.beton", "x.beton.json"]


def test_unwritable_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"file: cannot be made \(File exists\); name another folder"):
        write_beton(FunctionDataset([_small]), tmp_path / "file" / "x.beton", OPTIONS, **ABOUT)


_INTERRUPTED = """
import signal, sys, time
from pathlib import Path
from tests.support.sample_data import photograph
from mrmae_ds.cli.data import _stoppable
from mrmae_ds.data.convert import writer
from mrmae_ds.data.convert.writer import write_beton

class Slow:
    def __len__(self): return 1000
    def __getitem__(self, row):
        (Path(sys.argv[1]) / f"at-{row}").touch()
        time.sleep(0.05 if row < 40 else 3)
        return photograph(), 0

writer.announce_size = lambda *_: None  # reads images of its own, from anywhere
# Where the tests run in the background of a script, Python finds Ctrl-C ignored and leaves it so.
signal.signal(signal.SIGINT, signal.default_int_handler)
with _stoppable():
    write_beton(Slow(), Path(sys.argv[1]) / "x.beton", class_names=["a"], name="t", source="tests")
"""


@pytest.mark.parametrize(
    "number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_workers_end_with_the_writer(tmp_path: Path, number: int, status: int) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", _INTERRUPTED, str(tmp_path)], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True
    )
    try:
        _wait_for(lambda: (tmp_path / "at-40").exists())
        workers = _children(writer.pid)
        assert workers
        writer.send_signal(number)
        _, errors = writer.communicate(timeout=60)
    finally:
        writer.kill()
    assert writer.returncode == status, errors
    _wait_for(lambda: not any(_alive(pid) for pid in workers))
    left = [entry.name for entry in tmp_path.iterdir() if not entry.name.startswith("at-")]
    if number != signal.SIGKILL:
        assert left == [] and "Traceback" not in errors
        said = {signal.SIGINT: "interrupted; ", signal.SIGTERM: "stopped by SIGTERM; "}[signal.Signals(number)]
        assert said + "the same command continues" in errors
        return
    assert sorted(left) == [".x.beton.journal", ".x.beton.partial"]
    write_beton(FunctionDataset([_small] * 2), tmp_path / "x.beton", OPTIONS, **ABOUT)
    assert not any((tmp_path / name).exists() for name in left)


def _wait_for(condition: Callable[[], bool]) -> None:
    """Wait up to 100 s."""
    deadline = time.monotonic() + 100
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.05)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    "change, message",
    [
        ({"max_side": 0}, "--max-side must be 1 to 8192 pixels, not 0"),
        ({"quality": 101}, "--quality must be 1 to 100, not 101"),
        ({"workers": 0}, "--workers must be at least 1, not 0"),
        ({"max_bad": -1}, "--max-bad must be a number (10) or a share (0.01 or 1%), not -1"),
        ({"max_bad": 1.5}, "--max-bad must be a number (10) or a share (0.01 or 1%), not 1.5"),
        ({"max_pixels": 0}, "--max-pixels must be at least 1, not 0"),
        ({"timeout_s": 0}, "--timeout must be more than 0 seconds, not 0"),
        ({"background": "whitish"}, "--background must be a color (white, #808080), not 'whitish'"),
    ],
)
def test_errors_name_the_option_that_is_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        WriteOptions(**change)
    assert str(error.value) == message


def test_max_bad_shares_are_rounded_up() -> None:
    texts = {"0": 0, "25": 25, "1%": 1, "0.01": 1, "0.5%": 1, "2%": 2, "1.0": 100, "0.0": 0}
    assert {text: WriteOptions(max_bad=parse_max_bad(text)).bad_limit(100) for text in texts} == texts
    assert WriteOptions(max_bad=0.01).bad_limit(1_281_167) == 12_812


def test_empty_data_set_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="empty"):
        write_beton(FunctionDataset([]), tmp_path / "x.beton", OPTIONS, **ABOUT)
