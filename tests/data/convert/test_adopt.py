"""Files of FFCV's own writer: adopted after a check of every sample, and read as FFCV and Pillow decode them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mrmae_ds.cli.main import main
from mrmae_ds.data.beton.file import RAW, BetonFile
from mrmae_ds.data.beton.sidecar import check_beton, read_sidecar, sidecar_path
from mrmae_ds.data.convert.adopt import adopt_beton
from mrmae_ds.data.convert.verify import verify_beton
from mrmae_ds.errors import UserError
from tests.support.loaders import open_loader
from tests.support.sample_data import photograph

pytestmark = [pytest.mark.ffcv, pytest.mark.timeout(240, method="thread")]
SIZE = (60, 44)


def _samples(count: int = 8) -> list[tuple[np.ndarray, int]]:
    whole = photograph()
    return [(np.asarray(whole.crop((8 * n, 5 * n, 8 * n + SIZE[0], 5 * n + SIZE[1]))), n % 2) for n in range(count)]


def _write(path: Path, mode: str, samples: list[Any] | None = None, **fields: Any) -> Path:
    """Write a file as ffcv-imagenet does."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    image = RGBImageField(write_mode=mode, jpeg_quality=90, compress_probability=0.5)
    columns = {"image": image, "label": IntField(), **fields}
    DatasetWriter(str(path), columns, num_workers=1).from_indexed_dataset(_samples() if samples is None else samples)
    return path


def _decoded_by_ffcv(path: Path) -> list[np.ndarray]:
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader

    loader = Loader(
        str(path), 8, num_workers=1, os_cache=True, pipelines={"image": [SimpleRGBImageDecoder()], "label": None}
    )
    return [image.copy() for (batch,) in loader for image in np.asarray(batch)]


@pytest.mark.parametrize("mode", ["jpg", "raw", "proportion"])
def test_pixels_are_those_of_ffcv_and_pillow(mode: str, tmp_path: Path) -> None:
    path = _write(tmp_path / "train.beton", mode)
    info = adopt_beton(path)
    file = BetonFile(info)
    assert {"jpg": {0}, "raw": {RAW}, "proportion": {0, RAW}}[mode] >= set(file.table[:, 4].tolist())
    assert file.labels.tolist() == [label for _, label in _samples()]
    for row, (stock, (pixels, _)) in enumerate(zip(_decoded_by_ffcv(path), _samples(), strict=True)):
        ours = np.asarray(file.image(row))
        if file.table[row, 4] == RAW:
            assert (ours == pixels).all() and (stock == pixels).all()
        else:
            assert (ours == np.asarray(Image.open(io.BytesIO(file.jpeg(row))))).all()
            assert np.abs(ours.astype(int) - stock).mean() < 1.5  # FFCV's fast inverse transform
    assert verify_beton(path) == info and read_sidecar(path)["class_counts"] == [4, 4]


@pytest.mark.parametrize("mode", ["raw", "proportion"])
def test_both_backends_read_raw_images_alike(mode: str, tmp_path: Path) -> None:
    info = adopt_beton(_write(tmp_path / "train.beton", mode))
    file, images = BetonFile(info), {}
    for backend in ("ffcv", "pillow"):
        loader = open_loader(info.path, backend)
        batches = list(loader.epoch(0))
        images[backend] = np.concatenate([batch.images.numpy() for batch in batches])
        assert [label for batch in batches for label in batch.labels.tolist()] == [n % 2 for n in range(8)]
        loader.close()
    difference = np.abs(images["ffcv"].astype(int) - images["pillow"])
    raw = file.table[:, 4] == RAW
    assert difference[raw].max() <= 2 and difference.mean() < 1.5


def test_command_and_class_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path, names = _write(tmp_path / "birds.beton", "jpg"), tmp_path / "names.txt"
    names.write_text("finch\nwren\n")
    assert main(["data", "adopt", str(path), "--classes", str(names)]) == 0
    assert "birds, 8 images, 2 classes (finch, wren)" in capsys.readouterr().out and "--classes" not in caplog.text
    assert check_beton(path).class_names == ("finch", "wren")
    assert main(["data", "adopt", str(path)]) == 2
    assert "has a sidecar already" in capsys.readouterr().err
    sidecar_path(path).unlink()
    names.write_text("finch\n")
    with pytest.raises(UserError, match="label 1 of 1"):
        adopt_beton(path, names)
    names.write_text("caf\xe9\ncafe\u0301\n")
    with pytest.raises(UserError, match=r"'caf.xe9' and 'cafe.u0301' are one name in two Unicode forms"):
        adopt_beton(path, names)
    names.write_text("finch\nfinch\n")
    with pytest.raises(UserError, match="finch is there twice"):
        adopt_beton(path, names)
    assert not sidecar_path(path).exists()
    names.write_text("finch\nwren\nowl\n")
    adopt_beton(path, names)
    assert "birds.beton: no sample of 1 class: owl" in caplog.text
    sidecar_path(path).unlink()
    adopt_beton(path)
    assert "birds.beton: names no classes, which are called by their numbers; --classes FILE names them" in caplog.text


def test_other_fields_and_damaged_samples_are_refused(tmp_path: Path) -> None:
    from ffcv.fields import FloatField, JSONField, RGBImageField
    from ffcv.writer import DatasetWriter

    extra = [(image, label, 0.5) for image, label in _samples()]
    adopt_beton(_write(tmp_path / "extra.beton", "jpg", extra, weight=FloatField()))
    with pytest.raises(UserError, match=r"fields .*'note': 5"):
        adopt_beton(_write(tmp_path / "json.beton", "jpg", [(i, n, {}) for i, n in _samples()], note=JSONField()))
    soft = {"image": RGBImageField(write_mode="jpg"), "label": FloatField()}
    DatasetWriter(str(tmp_path / "soft.beton"), soft, num_workers=1).from_indexed_dataset([(_samples()[0][0], 0.5)])
    with pytest.raises(
        UserError,
        match=r"does not hold samples of an image and a label .*, without .*; it needs `image` \(RGBImageField\) and",
    ):
        adopt_beton(tmp_path / "soft.beton")
    path = _write(tmp_path / "damaged.beton", "jpg")
    content = bytearray(path.read_bytes())
    place = content.rindex(b"\xff\xd8\xff")
    content[place + 200 : place + 700] = bytes(500)
    path.write_bytes(content)
    with pytest.raises(UserError, match="1 bad sample;"):
        adopt_beton(path)
    for content, message in (
        (b"text", r"is no \.beton, it has 4 bytes"),
        (b"text" * 99, r"is no \.beton of FFCV's format 2"),
    ):
        (tmp_path / "no.beton").write_bytes(content)
        with pytest.raises(UserError, match=message):
            adopt_beton(tmp_path / "no.beton")


@pytest.mark.parametrize("backend", ["ffcv", "pillow"])
def test_a_raw_image_that_changed_later_is_an_error(backend: str, tmp_path: Path) -> None:
    info = adopt_beton(_write(tmp_path / "train.beton", "raw"))
    with info.path.open("r+b") as file:
        file.seek(int(BetonFile(info).table[3, 0]) + 40)
        file.write(b"\0\0\0\xff")
    loader = open_loader(info.path, backend)
    with pytest.raises(UserError, match=r"damaged (JPEG|image) in sample 3"):
        list(loader.epoch(0))
    loader.close()


def test_damaged_checksums_in_the_sidecar_are_an_error(tmp_path: Path) -> None:
    info = adopt_beton(_write(tmp_path / "train.beton", "raw"))
    sidecar = json.loads(sidecar_path(info.path).read_text())
    for damaged in (sidecar["adler32"][1:], "%" + sidecar["adler32"][1:], "AAAA" * 2):
        sidecar_path(info.path).write_text(json.dumps(sidecar | {"adler32": damaged}))
        with pytest.raises(UserError, match=r"train\.beton\.json: .*checksums.*adopt the file again"):
            BetonFile(check_beton(info.path))
