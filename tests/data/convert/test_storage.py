"""Images stored as raw pixels: no loss, the rule of sizes, damage, interruptions, copies, and the expected size."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mrmae_ds.cli.main import main
from mrmae_ds.data.beton.file import RAW, BetonFile
from mrmae_ds.data.beton.file_writer import BetonWriter
from mrmae_ds.data.beton.sidecar import check_beton, read_sidecar
from mrmae_ds.data.convert.expected_size import announce_size
from mrmae_ds.data.convert.folder import write_folder
from mrmae_ds.data.convert.journal import Journal
from mrmae_ds.data.convert.options import Output, WriteOptions
from mrmae_ds.data.convert.verify import describe_beton, verify_beton
from mrmae_ds.data.convert.writer import write_beton
from mrmae_ds.data.loaders.crop import CropSettings
from mrmae_ds.errors import UserError
from tests.support.loaders import open_loader
from tests.support.sample_data import Photographs, photograph
from tests.support.shards import write_webdataset

pytestmark = pytest.mark.timeout(240, method="thread")
BACKENDS = [pytest.param("ffcv", marks=pytest.mark.ffcv), "pillow"]
ABOUT = {"class_names": ["wide", "tall"], "name": "t", "source": "tests"}


def _write(path: Path, storage: str, **options: object) -> Path:
    """Write photographs of 64 x 64 to 512 x 600 pixels."""
    values = {"max_side": 600, "workers": 2, "max_bad": 0, "storage": storage, **options}
    return write_beton(Photographs(), path, WriteOptions(**values), **ABOUT).path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("mixed") / "train.beton", "auto")


def test_raw_images_have_the_pixels_of_their_source(tmp_path: Path) -> None:
    path = _write(tmp_path / "train.beton", "raw")
    file = BetonFile(check_beton(path))
    for row in range(len(Photographs())):
        image, label = Photographs()[row]
        assert np.array_equal(np.asarray(file.image(row)), np.asarray(image)) and file.labels[row] == label
    assert (file.table[:, 4] == RAW).all() and read_sidecar(path)["modes"] == {"raw": 16}
    verify_beton(path)
    assert "  images    raw, longer side at most 600 pixels" in describe_beton(path)
    assert "jpegtran" not in read_sidecar(path)["versions"]


def test_auto_stores_images_of_at_most_96_pixels_raw(mixed: Path) -> None:
    file = BetonFile(check_beton(mixed))
    sides = [max(Photographs()[row][0].size) for row in range(16)]
    assert {64, 90, 256} < set(sides)
    assert [bool(side <= 96) for side in sides] == (file.table[:, 4] == RAW).tolist()
    verify_beton(mixed)
    assert read_sidecar(mixed)["modes"] == {"JPEG": 10, "raw": 6}
    assert "6 raw, 10 JPEG quality 90" in describe_beton(mixed)


def test_the_rule_counts_the_side_that_is_stored(tmp_path: Path) -> None:
    file = BetonFile(check_beton(_write(tmp_path / "train.beton", "auto", max_side=96)))
    assert (file.table[:, 2:4].max(axis=1) <= 96).all() and (file.table[:, 4] == RAW).all()


@pytest.mark.ffcv
def test_backends_read_raw_images_alike(mixed: Path) -> None:
    raw = BetonFile(check_beton(mixed)).table[:, 4] == RAW
    images = {}
    for backend in ("ffcv", "pillow"):
        loader = open_loader(mixed, backend, crop=CropSettings(scale=(0.2, 1.0)))
        read = {int(i): image for b in loader.epoch(0) for i, image in zip(b.indices, b.images.numpy(), strict=True)}
        loader.close()
        images[backend] = np.stack([read[row] for row in range(16)]).astype(int)
    difference = np.abs(images["ffcv"] - images["pillow"])
    assert difference[raw].max() <= 2 and difference[~raw].mean() < 1.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_flipped_bit_of_raw_pixels_is_an_error(mixed: Path, tmp_path: Path, backend: str) -> None:
    row = int(np.flatnonzero(BetonFile(check_beton(mixed)).table[:, 4] == RAW)[2])
    path = tmp_path / "train.beton"
    for name in ("train.beton", "train.beton.json"):
        shutil.copy(mixed.with_name(name), tmp_path / name)
    content = bytearray(path.read_bytes())
    content[BetonFile(check_beton(path)).table[row, 0] + 1000] ^= 1
    path.write_bytes(content)
    loader = open_loader(path, backend)
    with pytest.raises(UserError, match=rf"damaged image in sample {row}\b.*; `mrmae data verify {path}` lists"):
        list(loader.epoch(0))
    loader.close()
    with pytest.raises(UserError, match=rf"SHA-256.*\n  sample {row}: damaged image$"):
        verify_beton(path)


def test_an_interrupted_conversion_continues_with_raw_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for row in range(12):
        folder = tmp_path / "in" / "train" / "ab"[row % 2]
        for target in (folder, tmp_path / "in" / "val" / "ab"[row % 2]):
            target.mkdir(parents=True, exist_ok=True)
            photograph().crop((row, 0, row + 60 + 8 * row, 50)).save(target / f"{row}.png")
    options = WriteOptions(workers=1, max_bad=0, storage="auto")
    write_folder(tmp_path / "in", Output(tmp_path / "unbroken", "t", options))
    monkeypatch.setattr("mrmae_ds.data.convert.writer.SAVE_EVERY_S", 0.0)
    added, add = [], Journal.add

    def interrupt(journal: object, *line: object) -> None:
        add(journal, *line)
        added.append(line)
        if len(added) == 9:  # after both kinds
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_folder(tmp_path / "in", Output(tmp_path / "out", "t", options))
    assert (tmp_path / "out" / ".train.beton.partial").exists()
    write_folder(tmp_path / "in", Output(tmp_path / "out", "t", options))
    for part in ("train", "val"):
        broken, whole = (tmp_path / folder / f"{part}.beton" for folder in ("out", "unbroken"))
        assert broken.read_bytes() == whole.read_bytes()
        assert read_sidecar(broken)["modes"] == read_sidecar(whole)["modes"] == {"JPEG": 7, "raw": 5}


def test_copies_are_found_among_raw_images_and_jpegs(tmp_path: Path) -> None:
    train = _write(tmp_path / "train.beton", "jpeg")
    write_beton(
        Photographs(), tmp_path / "val.beton", WriteOptions(max_side=600, storage="raw"), **ABOUT,
        train=(train, Photographs()),
    )  # fmt: skip
    assert read_sidecar(tmp_path / "val.beton")["copies"]["of_train"] == 16


@pytest.mark.parametrize("storage", ["raw", "auto", "jpeg"])
def test_the_expected_size_is_printed_before_writing(
    storage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path = _write(tmp_path / "train.beton", storage, max_side=300)
    (line,) = [line for line in caplog.messages if "by a sample of 16" in line]
    mean = BetonFile(check_beton(path)).table[:, 1].mean()
    assert f"16 images of {mean:,.0f} bytes" in line
    assert {"raw": "(raw pixels)", "auto": "(38% raw pixels, else JPEGs)", "jpeg": "(JPEGs)"}[storage] in line
    announced = re.search(r"about ([\d,]+) MB", line)
    assert announced is not None and abs(float(announced[1]) - path.stat().st_size / 1e6) <= 1


@pytest.mark.parametrize("size", [100_000, 700_000, 1_100_000])
def test_the_expected_size_counts_pages_that_images_do_not_fill(
    size: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Pages have 2 MB; those of images of 700 kB are filled by two thirds, those of 1.1 MB by a half."""
    caplog.set_level("INFO")
    path, count = tmp_path / "train.beton", 30
    with BetonWriter(path, count, 512, digests=True) as writer:
        for _ in range(count):
            writer.append(bytes(size), 1, 1, 0, 0)
    announce_size(path, lambda row: (size, True), count, WriteOptions(workers=1))
    assert f"about {path.stat().st_size / 1e6:,.0f} MB" in caplog.text


def test_too_small_a_disk_is_noticed_before_writing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = shutil._ntuple_diskusage(10**9, 10**9 - 10**5, 10**5)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk)
    _write(tmp_path / "train.beton", "raw", max_side=64)
    assert "0 MB are free, which is not enough" in caplog.text


def test_contradicting_options_are_an_error() -> None:
    with pytest.raises(UserError, match="--format raw stores no JPEGs, so --jpegs keep"):
        WriteOptions(storage="raw", jpegs="keep")
    with pytest.raises(UserError, match="--format must be one of jpeg, raw, auto, not 'png'"):
        WriteOptions(storage="png")  # type: ignore[arg-type]


def test_jpegs_are_kept_only_where_they_are_stored_as_jpegs(tmp_path: Path) -> None:
    """With --format auto, --jpegs keep transcodes the large JPEG and leaves the small one's pixels."""

    class Jpegs:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            stream = io.BytesIO()
            side = (96, 112)[index]
            photograph().crop((0, 0, side, side)).save(stream, "JPEG", quality=80)
            return Image.open(stream), index

    info = write_beton(Jpegs(), tmp_path / "train.beton", WriteOptions(storage="auto", jpegs="keep"), **ABOUT)
    file = BetonFile(info)
    assert file.table[:, 4].tolist() == [RAW, 0]
    for row in range(2):
        assert np.array_equal(np.asarray(file.image(row)), np.asarray(Jpegs()[row][0]))
    assert read_sidecar(info.path)["converted"] == {"transcoded without loss": 1}


def test_archives_are_stored_raw(tmp_path: Path) -> None:
    source = write_webdataset(tmp_path / "in")
    assert main(["data", "tars", str(source), "--out", str(tmp_path), "--format", "raw", "--workers", "1"]) == 0
    assert read_sidecar(tmp_path / "train.beton")["modes"] == {"raw": 6}
