"""Exact copies across splits and classes: counted, named, and compared by content where checksums collide."""

from __future__ import annotations

import io
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import ExifTags, Image

from mrmae_ds.cli.main import main
from mrmae_ds.data.beton import copies as module
from mrmae_ds.data.beton.copies import count_val_copies, find_copies
from mrmae_ds.data.beton.file import BetonFile
from mrmae_ds.data.beton.sidecar import check_beton, read_sidecar, sidecar_path
from mrmae_ds.data.convert.folder import write_folder
from mrmae_ds.data.convert.jpegs import find_jpegtran
from mrmae_ds.data.convert.options import Jpegs, Output, WriteOptions
from tests.support.sample_data import photograph

pytestmark = pytest.mark.timeout(120, method="thread")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Eight different training images and four of validation, in two classes."""
    for number in range(12):
        part, label = ("train", "val")[number >= 8], ("ant", "bee")[number % 2]
        folder = tmp_path / "in" / part / label
        folder.mkdir(parents=True, exist_ok=True)
        photograph().crop((9 * number, 0, 9 * number + 30, 20)).save(folder / f"{number:02}.png")
    return tmp_path / "in"


def _write(tree: Path, **options: Any) -> tuple[Path, Path]:
    out = tree.parent / "out"
    write_folder(tree, Output(out, options=WriteOptions(workers=1, **options)))
    return out / "train.beton", out / "val.beton"


def _pixels(path: Path) -> list[bytes]:
    """Return the decoded pixels of every stored image, by Pillow."""
    file = BetonFile(check_beton(path))
    return [np.asarray(Image.open(io.BytesIO(file.jpeg(row)))).tobytes() for row in range(len(file.labels))]


def test_a_clean_set_has_no_copies(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, val = _write(tree)
    counts = [read_sidecar(val)["copies"][key] for key in ("repeated", "across_classes", "of_train")]
    assert counts == [0, 0, 0] and len(set(_pixels(train) + _pixels(val))) == 12
    assert main(["data", "info", str(val)]) == 0
    assert "\n  copies" not in capsys.readouterr().out


def test_copies_are_counted_and_named(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(tree / "train" / "ant" / "02.png", tree / "val" / "ant" / "again.png")
    # The same pixels in another file format.
    Image.open(tree / "train" / "bee" / "03.png").save(tree / "val" / "ant" / "other.bmp")
    shutil.copy(tree / "train" / "bee" / "05.png", tree / "train" / "ant" / "05.png")
    shutil.copy(tree / "train" / "bee" / "05.png", tree / "train" / "bee" / "twice.png")
    assert main(["data", "write", str(tree), "--out", str(tree.parent / "out"), "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    train, val = (tree.parent / "out" / f"{part}.beton" for part in ("train", "val"))
    assert "copies    2 of 6 images are exact copies of training images" in printed
    assert f"{tree}/val/ant/again.png = {tree}/train/ant/02.png" in printed
    assert f"{tree}/val/ant/other.bmp = {tree}/train/bee/03.png" in printed
    assert "copies    2 of 10 images are exact copies of an image of another class" in printed
    pixels = _pixels(train)
    assert sum(image in pixels for image in _pixels(val)) == 2  # a second path: the decoded pixels
    for command in ("info", "verify"):
        assert main(["data", command, str(val)]) == 0
        assert "2 of 6 images are exact copies of training images" in capsys.readouterr().out
    assert main(["data", "verify", str(train)]) == 0
    assert "sample 9 (bee) = sample 3 (ant)" in capsys.readouterr().out


def _jpeg(**options: object) -> Callable[[Image.Image, Path], object]:
    return lambda image, path: image.save(path.with_suffix(".jpg"), "JPEG", quality=85, **options)


def _with_comment(image: Image.Image, path: Path) -> None:
    """Save a JPEG with the same data and one more segment."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    content = stream.getvalue()
    path.with_suffix(".jpg").write_bytes(content[:2] + b"\xff\xfe\x00\x07hello" + content[2:])


def _rotated(image: Image.Image, path: Path) -> None:
    """Save a lossless file whose EXIF record turns it upright."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(path.with_suffix(".png"), exif=exif)


def _saved(suffix: str, mode: str = "RGB", **options: object) -> Callable[[Image.Image, Path], object]:
    return lambda image, path: image.convert(mode).save(path.with_suffix(suffix), **options)


TWINS = {
    "bmp": (_saved(".png"), _saved(".bmp")),
    "tiff": (_saved(".png"), _saved(".tif", compression="tiff_lzw")),
    "ppm": (_saved(".png"), _saved(".ppm")),
    "lossless webp": (_saved(".png"), _saved(".webp", lossless=True)),
    "opaque alpha": (_saved(".png"), _saved(".png", "RGBA")),
    "rotated": (_saved(".png"), _rotated),
    "metadata": (_jpeg(), _jpeg(dpi=(300, 300), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0")),
    "comment": (_jpeg(), _with_comment),
    "jpeg as png": (_jpeg(), lambda image, path: _decoded_jpeg(image).save(path.with_suffix(".png"))),
}


def _decoded_jpeg(image: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return Image.open(stream).convert("RGB")


@pytest.mark.parametrize(
    "twin, side", [(twin, side) for twin in TWINS for side in (40, 700) if (twin, side) != ("rotated", 700)]
)
def test_equal_pixels_are_copies_in_any_file_format(tree: Path, twin: str, side: int) -> None:
    """Larger images are reduced; one that is turned afterwards is rounded otherwise (docs/data.md)."""
    image = photograph().resize((side, side - 9))
    one, other = TWINS[twin]
    one(image, tree / "train" / "ant" / "x")
    other(image, tree / "val" / "bee" / "y")
    brighter = image.point(lambda value: min(255, value + 6))  # a near twin
    other(brighter, tree / "val" / "bee" / "z")
    for jpegs in get_args(Jpegs):
        if jpegs == "encode" or find_jpegtran():
            train, val = map(check_beton, _write(tree, jpegs=jpegs))
            found = find_copies(BetonFile(val), BetonFile(train)).of_train
            assert found == [(4, 4)] and count_val_copies(train, val) == 1, jpegs


def test_copies_within_a_class(tree: Path) -> None:
    shutil.copy(tree / "train" / "bee" / "05.png", tree / "train" / "bee" / "twice.png")
    train, _ = _write(tree)
    assert find_copies(BetonFile(check_beton(train))).repeated == [(8, 6)]


def test_equal_checksums_of_different_images_are_no_copies(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, val = (BetonFile(check_beton(path)) for path in _write(tree))
    monkeypatch.setattr(module, "_keys", lambda file, digested: np.zeros(len(file.labels), dtype=np.uint64))
    assert find_copies(val, train) == module.Copies([], [], [])


def test_count_of_a_pair_that_was_not_written_together(tree: Path) -> None:
    shutil.copy(tree / "train" / "ant" / "02.png", tree / "val" / "ant" / "again.png")
    train, val = map(check_beton, _write(tree))
    assert count_val_copies(train, val) == 1
    sidecar = sidecar_path(val.path)
    sidecar.write_text(sidecar.read_text().replace(train.sha256, "0" * 64))
    assert count_val_copies(train, val) == 1
    differently = tree.parent / "differently"
    for options, count in (
        ({"quality": 70}, 1),  # pixels before encoding
        ({"max_side": 16}, None),
        ({"jpegs": "encode"}, 1),  # these are encoded by both
        ({"jpegs": "encode", "quality": 70}, None),
    ):
        write_folder(tree, Output(differently, options=WriteOptions(workers=1, **options)))
        assert count_val_copies(train, check_beton(differently / "val.beton")) == count
    assert count_val_copies(train, replace(train, path=val.path)) == 8  # one file for both
    assert zlib.adler32(BetonFile(val).jpeg(0)) == BetonFile(val).checksums[0]
