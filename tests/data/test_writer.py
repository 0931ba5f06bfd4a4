"""What is written: the pictures that were given, whole or not at all, and never a process that hangs."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mrmae_ds.data.beton import check_beton, read_sidecar, sidecar_path
from mrmae_ds.data.verify import describe_beton, verify_beton
from mrmae_ds.data.writer import write_beton
from mrmae_ds.errors import UserError
from mrmae_ds.files import file_sha256

from .jpegs import stored_jpegs
from .samples import Photographs, photograph

pytestmark = pytest.mark.timeout(60, method="thread")
SETTINGS = {"max_side": 64, "quality": 90, "workers": 2, "class_names": ["a", "b"], "name": "t", "source": "tests"}


class Opened:
    """A data set of functions that return a picture, or do something else; labels alternate."""

    def __init__(self, pictures: Sequence[Callable[[], Image.Image]]) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.pictures[index](), index % 2

    def name(self, index: int) -> str:
        return f"picture-{index}"


def _small() -> Image.Image:
    return photograph().resize((48, 56))


def _truncated() -> Image.Image:
    stream = io.BytesIO()
    _small().save(stream, "JPEG")
    return Image.open(io.BytesIO(stream.getvalue()[:-400]))


def test_the_pictures_come_back(photographs: Path) -> None:
    jpegs = stored_jpegs(photographs)
    assert len(jpegs) == len(Photographs()) == check_beton(photographs).num_samples
    for row, (content, label, index) in enumerate(jpegs):
        picture, expected_label = Photographs()[row]
        assert (label, index) == (expected_label, row)
        stored = Image.open(io.BytesIO(content))
        if max(picture.size) > 256:
            ratio = 256 / max(picture.size)
            size = round(picture.width * ratio), round(picture.height * ratio)
            picture = picture.resize(size, Image.Resampling.BICUBIC)
        assert stored.size == picture.size
        difference = np.abs(np.asarray(stored, dtype=float) - np.asarray(picture, dtype=float))
        assert difference.mean() < 4  # JPEG at quality 95, of 255 levels


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "RGBA", "LA", "YCbCr"])
def test_every_mode_is_stored_as_rgb(tmp_path: Path, mode: str) -> None:
    picture = (_small().convert("L") if mode == "LA" else _small()).convert(mode)
    write_beton(Opened([lambda: picture] * 3), tmp_path / "x.beton", **SETTINGS)
    stored = Image.open(io.BytesIO(stored_jpegs(tmp_path / "x.beton")[2][0]))
    assert stored.mode == "RGB"
    difference = np.asarray(stored, dtype=float) - np.asarray(picture.convert("RGB"), dtype=float)
    # Dithered black and white compresses badly; the others differ by JPEG's error.
    assert np.abs(difference).mean() < (40 if mode in "1P" else 8)


def test_the_sidecar_describes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "train.beton"
    info = write_beton(Opened([_small] * 5), path, **SETTINGS)
    assert info == check_beton(path)
    assert (info.num_samples, info.num_classes, info.class_names) == (5, 2, ("a", "b"))
    assert (info.max_side, info.quality, info.name, info.source) == (64, 90, "t", "tests")
    assert (info.size, info.sha256) == (path.stat().st_size, file_sha256(path))
    assert {"ffcv", "numpy", "pillow"} <= set(read_sidecar(path)["versions"])
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["train.beton", "train.beton.json"]
    assert verify_beton(path) == info
    assert "5 pictures, 2 classes (a, b)" in describe_beton(path)


def test_bad_pictures_end_in_one_error_and_leave_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "train.beton"
    before = write_beton(Opened([_small] * 2), path, **SETTINGS)

    def missing() -> Image.Image:
        return Image.open(tmp_path / "nowhere.jpg")

    pictures = [_small] * 80
    pictures[3], pictures[70] = _truncated, missing
    with pytest.raises(UserError) as caught:
        write_beton(Opened(pictures), path, **SETTINGS)
    message = str(caught.value)
    assert "2 of 80" in message
    assert "picture-3: OSError: " in message and "truncated" in message
    assert "picture-70: FileNotFoundError" in message and "nowhere.jpg" in message
    assert verify_beton(path) == before
    assert len(list(tmp_path.iterdir())) == 2


def test_a_label_without_a_class_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"picture-1: ValueError: label 1, but there are 1 classes"):
        write_beton(Opened([_small] * 2), tmp_path / "x.beton", **SETTINGS | {"class_names": ["a"]})
    assert list(tmp_path.iterdir()) == []


def test_bad_pictures_can_be_skipped(tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    info = write_beton(Opened([_small, _truncated, _small, _small]), path, skip_bad=True, **SETTINGS)
    assert info.num_samples == 3
    assert [(label, index) for _, label, index in stored_jpegs(path)] == [(0, 0), (0, 1), (1, 2)]
    (skipped,) = read_sidecar(path)["skipped"]
    assert skipped["name"] == "picture-1" and "truncated" in skipped["reason"]
    verify_beton(path)
    with pytest.raises(UserError, match="2 of 2"):
        write_beton(Opened([_truncated] * 2), path, skip_bad=True, **SETTINGS)


def test_a_killed_worker_is_an_error_and_no_hanging(tmp_path: Path) -> None:
    def killed() -> Image.Image:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    with pytest.raises(RuntimeError, match="exit status -9"):
        write_beton(Opened([_small] * 50 + [killed]), tmp_path / "x.beton", **SETTINGS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change, message",
    [
        ({"max_side": 0}, "max_side"),
        ({"quality": 101}, "quality"),
        ({"workers": 0}, "workers must be at least 1"),
    ],
)
def test_settings_out_of_range_are_errors(tmp_path: Path, change: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_beton(Opened([_small]), tmp_path / "x.beton", **SETTINGS | change)


def test_an_empty_set_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="empty"):
        write_beton(Opened([]), tmp_path / "x.beton", **SETTINGS)


def test_damage_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    write_beton(Opened([_small] * 3), path, **SETTINGS)
    content = bytearray(path.read_bytes())
    place = bytes(content).index(stored_jpegs(path)[1][0]) + 700
    content[place] ^= 0xFF
    path.write_bytes(content)
    check_beton(path)
    with pytest.raises(UserError, match="SHA-256"):
        verify_beton(path)
    path.write_bytes(content[:-1])
    with pytest.raises(UserError, match="cut off"):
        check_beton(path)


def test_undecodable_samples_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "x.beton"
    write_beton(Opened([_small] * 3), path, **SETTINGS)
    content, jpeg = bytearray(path.read_bytes()), stored_jpegs(path)[1][0]
    place = bytes(content).index(stored_jpegs(path)[0][0]) + len(jpeg)
    content[place : place + len(jpeg)] = jpeg[: len(jpeg) // 2] + bytes(len(jpeg) - len(jpeg) // 2)
    path.write_bytes(content)
    sidecar = read_sidecar(path) | {"sha256": file_sha256(path)}
    sidecar_path(path).write_text(json.dumps(sidecar))
    with pytest.raises(UserError, match=r"(?s)1 bad samples.*sample 1: "):
        verify_beton(path)


def test_a_missing_file_names_the_scripts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.beton: no such file; write it with data/folder\.py"):
        check_beton(tmp_path / "train.beton")


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file"),
        ("{", "not JSON"),
        ("[]", "lacks format"),
        ('{"format": 1}', "lacks num_samples"),
    ],
)
def test_a_bad_sidecar_is_an_error(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "train.beton"
    write_beton(Opened([_small] * 2), path, **SETTINGS)
    sidecar_path(path).unlink()
    if content is not None:
        sidecar_path(path).write_text(content)
    with pytest.raises(UserError, match=rf"train\.beton\.json: {message}"):
        check_beton(path)
