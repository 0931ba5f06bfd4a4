"""Unusual and damaged images through the writer and the loader."""

from __future__ import annotations

import csv
import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torchvision.transforms import v2

from mrmae_ds.config.sections import Backend
from mrmae_ds.data.beton.sidecar import read_sidecar
from mrmae_ds.data.convert.folder import scan
from mrmae_ds.data.convert.images import ImageError, open_image, pixel_limit, read_rgb, read_upright, to_rgb
from mrmae_ds.data.convert.options import WriteOptions
from mrmae_ds.data.convert.splits import find_classes
from mrmae_ds.data.convert.verify import verify_beton
from mrmae_ds.data.convert.writer import write_beton
from mrmae_ds.data.loaders.crop import CropSettings
from tests.support.jpegs import stored_jpegs
from tests.support.loaders import open_loader
from tests.support.odd_images import MAX_PIXELS, MAX_SIDE, ODD, RAMP_8, make_odd_images, plain

pytestmark = pytest.mark.timeout(120, method="thread")
SIZE = 32
TAKEN = [name for name, odd in ODD.items() if not isinstance(odd.expected, str)]
REFUSED = [name for name in ODD if name not in TAKEN]


def _ids(names: list[str]) -> list[str]:
    return [os.fsencode(name).decode("ascii", "backslashreplace") for name in names]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All unusual images as one .beton, in the order of their names."""
    root = tmp_path_factory.mktemp("odd")
    make_odd_images(root / "in" / "class")
    options = WriteOptions(
        quality=97, max_side=MAX_SIDE, jpegs="encode", max_pixels=MAX_PIXELS, max_bad=len(REFUSED), workers=2
    )
    classes, _ = find_classes(root / "in")
    dataset = scan(root / "in", classes)
    write_beton(dataset, root / "x.beton", options, class_names=classes, name="odd", source="tests")
    return root / "x.beton"


@pytest.fixture(scope="module")
def images(written: Path) -> dict[str, Image.Image]:
    """Stored images by file name."""
    jpegs = [Image.open(io.BytesIO(content)) for content, _, _ in stored_jpegs(written)]
    return dict(zip(sorted(TAKEN), jpegs, strict=True))


@pytest.fixture(scope="module")
def read_back(written: Path) -> dict[str, torch.Tensor]:
    """Images of the loader, uint8 [3, 32, 32], by file name."""
    loader = open_loader(written, image_size=SIZE, micro_batch=8)
    images = [image for batch in loader.epoch(0) for image in batch.images[batch.valid]]
    loader.close()
    return dict(zip(sorted(TAKEN), images, strict=True))


@pytest.mark.parametrize("name", TAKEN, ids=_ids(TAKEN))
def test_odd_images_are_converted(
    name: str, images: dict[str, Image.Image], read_back: dict[str, torch.Tensor]
) -> None:
    expected, tolerance = ODD[name].expected, ODD[name].tolerance
    assert isinstance(expected, Image.Image)
    assert (images[name].mode, images[name].size) == ("RGB", expected.size)
    difference = np.asarray(images[name], dtype=float) - np.asarray(expected, dtype=float)
    assert np.abs(difference).mean() < tolerance
    if min(expected.size) > 1:
        cut = v2.Compose([v2.PILToTensor(), v2.Resize(int(SIZE / 0.875), antialias=True), v2.CenterCrop(SIZE)])
        difference = read_back[name].float() - cut(expected).float()
        assert difference.abs().mean() < tolerance + 3
    else:  # the center of a line is one pixel
        center = torch.tensor(expected.getpixel((expected.width // 2, expected.height // 2)))
        assert (read_back[name].float().mean((1, 2)) - center).abs().max() < 12


@pytest.mark.parametrize("backend", [pytest.param("ffcv", marks=pytest.mark.ffcv), "pillow"])
def test_training_reads_all_converted_images(written: Path, backend: Backend) -> None:
    loader = open_loader(written, backend, crop=CropSettings(scale=(0.2, 1.0)), image_size=SIZE)
    indices = torch.cat([batch.indices for batch in loader.epoch(0)])
    loader.close()
    assert len(set(indices.tolist())) == len(TAKEN) // 4 * 4


@pytest.mark.parametrize("name", REFUSED)
def test_unreadable_images_are_left_out_with_a_reason(name: str, written: Path) -> None:
    (entry,) = [entry for entry in read_sidecar(written)["skipped"] if Path(entry["name"]).name == name]
    assert isinstance(ODD[name].expected, str)
    assert re.search(ODD[name].expected, entry["reason"])
    assert entry["row"] == sorted(ODD).index(name)


def test_report_lists_the_images_left_out(written: Path) -> None:
    with written.with_name("x.beton.skipped.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert sorted(Path(line["name"]).name for line in lines) == sorted(REFUSED)
    listed = [{"row": int(line["row"]), "name": line["name"], "reason": line["reason"]} for line in lines]
    assert listed == read_sidecar(written)["skipped"]


def test_sidecar_counts_conversions(written: Path) -> None:
    expected: dict[str, int] = {}
    for name in TAKEN:
        for kind in ODD[name].kinds:
            expected[kind] = expected.get(kind, 0) + 1
    found = dict(read_sidecar(written)["converted"])
    # Pillow's loading strategy decides whether an animated GIF has a palette.
    assert found.pop("palette") in (expected["palette"], expected["palette"] + 1)
    del expected["palette"]
    assert found == expected


def test_converted_file_verifies(written: Path) -> None:
    info = verify_beton(written)
    assert info.num_samples == len(TAKEN)
    assert [index for _, _, index in stored_jpegs(written)] == list(range(len(TAKEN)))


DEEP = [name for name in TAKEN if name.startswith(("gray16", "int32", "floats."))]


@pytest.mark.parametrize("name", DEEP)
def test_16_bit_values_keep_range_and_order(name: str, images: dict[str, Image.Image]) -> None:
    row = np.asarray(images[name], dtype=int)[:, :, 1].mean(axis=0)
    assert row[0] < 3 and row[-1] > 252
    assert (np.diff(row) > 0).all()
    assert np.abs(row - np.asarray(RAMP_8, dtype=int)[0, :, 1]).max() < 3


@pytest.mark.parametrize(("white", "dark"), [(4095, 2), (8191, 2), (8192, 1), (65535, 1)])
def test_dark_16_bit_images_are_a_warning(
    white: int, dark: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in" / "scan").mkdir(parents=True)
    for number, peak in enumerate((white, 100)):
        ramp = np.linspace(0, peak, 24 * 24).astype(np.uint16).reshape(24, 24)
        Image.fromarray(ramp).save(tmp_path / "in" / "scan" / f"{number}.png")
    options = WriteOptions(workers=1)
    write_beton(
        scan(tmp_path / "in", ["scan"]), tmp_path / "x.beton", options, class_names=["scan"], name="x", source="x"
    )
    assert f"brighter than an eighth of white, 65,535: {dark} of 2; if" in caplog.text


def test_exif_orientation_is_applied(images: dict[str, Image.Image]) -> None:
    """Compare with the image and its seven other orientations."""
    for way in range(2, 9):
        stored = np.asarray(images[f"turned{way}.jpg"], dtype=float)
        here = np.abs(stored - np.asarray(plain(), dtype=float)).mean()
        for turn in (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM):
            assert here * 5 < np.abs(stored - np.asarray(plain().transpose(turn), dtype=float)).mean()


def test_cmyk_has_the_colors_of_the_original(images: dict[str, Image.Image]) -> None:
    means = np.asarray(plain(), dtype=float).mean((0, 1))
    for name in ("cmyk_adobe.jpg", "cmyk_plain.jpg", "cmyk.tif"):
        assert np.abs(np.asarray(images[name], dtype=float).mean((0, 1)) - means).max() < 2


def test_background_color_option(tmp_path: Path) -> None:
    ODD["rgba.png"].make(tmp_path / "x.png")
    image, kinds = to_rgb(open_image(tmp_path / "x.png"), max_side=512, max_pixels=10**6, background="#0000ff")
    assert image.getpixel((image.width - 1, 5)) == (0, 0, 255)
    assert kinds == ["transparent"]


def test_large_jpeg_is_decoded_at_reduced_size(tmp_path: Path) -> None:
    large = plain().resize((2400, 1800), Image.Resampling.BICUBIC)
    large.save(tmp_path / "x.jpg", quality=95)
    opened = open_image(tmp_path / "x.jpg")
    image, _ = to_rgb(opened, max_side=300, max_pixels=10**7, background="white")
    assert opened.size == (600, 450)  # decoded at a quarter, twice the target
    difference = np.asarray(image, dtype=float) - np.asarray(large.resize((300, 225), Image.Resampling.BICUBIC))
    assert image.size == (300, 225) and np.abs(difference).mean() < 2


@pytest.mark.parametrize("name", ["turned6.jpg", "turned.png", "turned.tif"])
def test_rotated_image_is_reduced(tmp_path: Path, name: str) -> None:
    ODD[name].make(tmp_path / name)
    image, kinds = to_rgb(open_image(tmp_path / name), max_side=48, max_pixels=10**6, background="white")
    assert image.size == (48, 36) and kinds == ["reduced", *ODD[name].kinds]
    expected = np.asarray(plain().resize((48, 36), Image.Resampling.BICUBIC), dtype=float)
    assert np.abs(np.asarray(image, dtype=float) - expected).mean() < 3


def test_file_without_read_permission_is_an_error(tmp_path: Path) -> None:
    plain().save(tmp_path / "x.png")
    (tmp_path / "x.png").chmod(0)
    if os.geteuid() == 0:  # root may read anything
        assert open_image(tmp_path / "x.png").size == plain().size
    else:
        with pytest.raises(PermissionError):
            open_image(tmp_path / "x.png")


def test_pixel_limit_ends_with_the_block(tmp_path: Path) -> None:
    plain().save(tmp_path / "x.png")
    before = Image.MAX_IMAGE_PIXELS
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        with pixel_limit(100):
            assert not ImageFile.LOAD_TRUNCATED_IMAGES
            with pytest.raises((Image.DecompressionBombError, Image.DecompressionBombWarning)):
                open_image(tmp_path / "x.png")
        assert ImageFile.LOAD_TRUNCATED_IMAGES
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    assert before == Image.MAX_IMAGE_PIXELS
    with pytest.raises(ImageError, match=r"96 x 72: more than 100 pixels \(--max-pixels\)"):
        to_rgb(open_image(tmp_path / "x.png"), max_side=512, max_pixels=100, background="white")


@pytest.mark.parametrize("name", [name for name, odd in ODD.items() if "reduced" not in odd.kinds], ids=ascii)
def test_one_file_is_decoded_as_conversion_does(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``read_upright`` gives the expected image, ``read_rgb`` the same before its rotation."""
    monkeypatch.setattr(WriteOptions, "max_pixels", MAX_PIXELS)
    odd, path = ODD[name], tmp_path / name
    odd.make(path)
    if isinstance(odd.expected, str):
        for read in (read_rgb, read_upright):
            with pytest.raises((ImageError, OSError)):
                read(path)
        return
    upright, expected = np.asarray(read_upright(path)).astype(float), np.asarray(odd.expected)
    assert np.abs(upright - expected).mean() <= odd.tolerance
    stored = np.asarray(read_rgb(path))
    if "rotated" in odd.kinds:
        assert sorted(stored.ravel()) == sorted(upright.ravel()) and not np.array_equal(stored, upright)
    else:
        assert np.array_equal(stored, upright)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "RGBA", "LA"])
def test_ordinary_images_have_the_pixels_that_torchvision_reads(mode: str, tmp_path: Path) -> None:
    path = tmp_path / f"image.{'jpg' if mode == 'CMYK' else 'png'}"
    plain().convert(mode).save(path)
    with Image.open(path) as image:
        assert image.mode == mode and np.array_equal(np.asarray(read_rgb(path)), np.asarray(image.convert("RGB")))
