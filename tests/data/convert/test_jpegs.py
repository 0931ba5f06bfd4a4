"""Encoding with restart markers, and transcoding without loss."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from mrmae_ds.data.beton.copies import find_copies
from mrmae_ds.data.beton.file import BetonFile
from mrmae_ds.data.beton.segments import MAGIC, read_header
from mrmae_ds.data.beton.sidecar import read_sidecar
from mrmae_ds.data.convert import jpegs
from mrmae_ds.data.convert.options import WriteOptions
from mrmae_ds.data.convert.verify import verify_beton
from mrmae_ds.data.convert.writer import write_beton
from mrmae_ds.errors import UserError
from tests.support.jpegs import Files, stored_jpegs
from tests.support.sample_data import photograph

pytestmark = pytest.mark.timeout(60, method="thread")
needs_jpegtran = pytest.mark.skipif(jpegs.find_jpegtran() is None, reason="needs jpegtran (libjpeg-turbo-progs)")
ABOUT = {"class_names": ["a"], "name": "t", "source": "tests"}
Change = Callable[[Image.Image], Image.Image]


def _image() -> Image.Image:
    return photograph().crop((100, 50, 100 + 203, 50 + 301))


def _file(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **{"quality": 80, **options})
    return stream.getvalue()


def _write(folder: Path, contents: dict[str, bytes], **options: object) -> dict[str, bytes]:
    """Convert files; return what is stored of each."""
    path = folder / "train.beton"
    write_beton(Files(*contents.values()), path, WriteOptions(workers=1, max_bad=0, **options), **ABOUT)
    return dict(zip(contents, (jpeg for jpeg, _, _ in stored_jpegs(path)), strict=True))


def _pixels(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


@pytest.mark.parametrize("quality", [50, 90, 94, 95, 100])
@pytest.mark.parametrize("size", [(203, 301), (33, 17), (1, 1)])
def test_markers_change_no_pixel(size: tuple[int, int], quality: int) -> None:
    image = photograph().resize(size)
    jpeg = jpegs.encode(image, quality)
    assert np.array_equal(_pixels(jpeg), _pixels(_file(image, quality=quality)))
    header = read_header(jpeg)
    assert header is not None and header.interval and MAGIC in jpeg[:14]


@pytest.mark.parametrize("quality", [50, 94, 100])
def test_noise_is_encoded(quality: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 2, (400, 500, 3), dtype=np.uint8) * 255
    assert _pixels(jpegs.encode(Image.fromarray(pixels), quality)).shape == pixels.shape


@needs_jpegtran
def test_jpegs_of_all_kinds_are_kept(tmp_path: Path) -> None:
    """The pixels are those of the original; progressive and baseline JPEGs of the same image become equal."""
    files = {name: _file(_image(), subsampling=name) for name in ("4:4:4", "4:2:2", "4:2:0")}
    files |= {
        "progressive": _file(_image(), progressive=True, comment="of another file"),
        "gray": _file(ImageOps.grayscale(_image())),
        "one pixel": _file(_image().resize((1, 1))),
        "low quality": _file(_image(), quality=3),
        "tables of 16 bits": _file(_image(), qtables=[[300] * 64, [400] * 64]),
        "several images": _file(_image(), "MPO", save_all=True, append_images=[_image().rotate(180)]),
    }
    stored = _write(tmp_path, files, jpegs="auto")
    for name, content in files.items():
        assert np.array_equal(_pixels(stored[name]), _pixels(content)), name
        assert MAGIC in stored[name][:14], name
    assert stored["progressive"] == stored["4:2:0"] == stored["several images"]
    sidecar = read_sidecar(tmp_path / "train.beton")
    assert sidecar["converted"][jpegs.LOSSLESS] == len(files) and "jpegtran" in sidecar["versions"]
    info = verify_beton(tmp_path / "train.beton")
    assert find_copies(BetonFile(info)).repeated == [(3, 2), (8, 2)]


@needs_jpegtran
@pytest.mark.parametrize("kind", ["4:4:4", "4:2:2", "4:2:0", "gray"])
def test_markers_and_index_cost_little_of_a_small_file(kind: str, tmp_path: Path) -> None:
    """Segments of 4 MCUs of 8 pixels would cost 17 % of such a gray JPEG, and 12 % of one with full chroma."""
    image = photograph().resize((384, 256))
    content = _file(ImageOps.grayscale(image)) if kind == "gray" else _file(image, subsampling=kind)
    (stored,) = _write(tmp_path, {kind: content}, jpegs="keep").values()
    header = read_header(stored)
    assert header is not None and header.interval * header.mcu[0] * header.mcu[1] == 512
    assert len(stored) < 1.08 * len(content)


@needs_jpegtran
def test_other_jpegs_are_encoded(tmp_path: Path) -> None:
    plain = _file(_image())
    exif = Image.Exif()
    exif[274] = 6
    half = len(plain) // 2
    damaged = plain[:half] + b"\xff\xd3" * 8 + plain[half + 16 :]
    png = io.BytesIO()
    _image().save(png, "PNG")
    files = {
        "reduced": _file(_image().resize((406, 602))),
        "rotated": _file(_image(), exif=exif),
        "cmyk": _file(_image().convert("CMYK")),
        "rgb": _file(_image(), keep_rgb=True),
        "damaged stretch": damaged,
        "png": png.getvalue(),
    }
    stored = _write(tmp_path, files, max_side=400, jpegs="keep")
    assert jpegs.LOSSLESS not in read_sidecar(tmp_path / "train.beton")["converted"]
    again = _write(tmp_path / "again", files, max_side=400, jpegs="encode")
    assert stored == again
    assert np.array_equal(_pixels(stored["png"]), _pixels(_file(_image(), quality=90)))


@needs_jpegtran
@pytest.mark.parametrize("mode, kept", [("auto", 3), ("keep", 5), ("encode", 0)])
def test_auto_keeps_jpegs_up_to_the_quality(tmp_path: Path, mode: str, kept: int) -> None:
    files = {str(quality): _file(_image(), quality=quality) for quality in (30, 75, 90, 91, 100)}
    _write(tmp_path, files, jpegs=mode)
    assert read_sidecar(tmp_path / "train.beton")["converted"].get(jpegs.LOSSLESS, 0) == kept


@pytest.mark.parametrize("program", [None, "echo cannot be loaded >&2; exit 127", "exec jpegtran -progressive"])
def test_without_a_working_jpegtran_jpegs_are_encoded(
    program: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is missing, broken, or writes progressive JPEGs as MozJPEG's does."""
    script = tmp_path / "jpegtran"
    script.write_text(f"#!/bin/sh\n{program}\n")
    script.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda name: program and str(script))
    jpegs.find_jpegtran.cache_clear()
    jpegs._warn.cache_clear()
    try:
        for part in ("one", "two"):
            stored = _write(tmp_path / part, {"jpeg": _file(_image())}, jpegs="auto")
        assert caplog.text.count("libjpeg-turbo-progs") == 1
        assert stored["jpeg"] == jpegs.encode(Image.open(io.BytesIO(_file(_image()))), 90)
        with pytest.raises(UserError, match="libjpeg-turbo-progs"):
            _write(tmp_path / "keep", {"jpeg": _file(_image())}, jpegs="keep")
    finally:
        jpegs.find_jpegtran.cache_clear()
