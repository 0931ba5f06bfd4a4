"""``mrmae data verify`` with and without the images that a .beton was made from."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from mrmae_ds.data.beton.sidecar import check_beton, read_sidecar, sidecar_path
from mrmae_ds.data.convert.compare import compare, compare_with_source, psnr
from mrmae_ds.data.convert.folder import open_folder, write_folder
from mrmae_ds.data.convert.index import ImageIndex
from mrmae_ds.data.convert.options import Output, WriteOptions
from mrmae_ds.data.convert.verify import describe_beton, verify_beton
from mrmae_ds.data.convert.writer import write_beton
from mrmae_ds.errors import UserError
from mrmae_ds.files import file_sha256
from tests.support.jpegs import stored_jpegs
from tests.support.sample_data import Photographs, photograph

pytestmark = pytest.mark.timeout(120, method="thread")


@pytest.fixture
def beton(tmp_path: Path) -> Path:
    """16 photographs, sides of 33 to 128 pixels."""
    path = tmp_path / "x.beton"
    options = WriteOptions(max_side=128, workers=1)
    write_beton(Photographs(), path, options, class_names=["wide", "tall"], name="t", source="tests")
    return path


@pytest.fixture
def without_ffcv(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a machine without ffcv."""

    def missing() -> None:
        raise UserError("no ffcv")

    monkeypatch.setattr("mrmae_ds.data.loaders._ffcv.import_ffcv", missing)


def _rewrite(path: Path, content: bytes, **changes: Any) -> None:
    """Replace the content, with a matching sidecar that lacks the tables' checksum."""
    path.write_bytes(content)
    sidecar = read_sidecar(path) | {"sha256": file_sha256(path), "tables_sha256": None} | changes
    sidecar_path(path).write_text(json.dumps(sidecar))


def test_intact_file_passes(beton: Path) -> None:
    assert verify_beton(beton) == check_beton(beton)


def test_bytes_of_an_image_are_those_of_its_jpeg(beton: Path) -> None:
    """Leave out the tables and the page of 2 MB, most of which a small file does not use."""
    sizes = [len(jpeg) for jpeg, _, _ in stored_jpegs(beton)]
    assert f", {sum(sizes) / 16:,.0f} bytes per image\n" in describe_beton(beton)
    assert " with 1 worker, " in describe_beton(beton)


def test_a_file_is_described_without_any_one_key_of_its_sidecar(beton: Path) -> None:
    """Earlier versions did not write all of them; without a required one there is an error that names it."""
    sidecar = read_sidecar(beton)
    missing = []
    for key in sidecar:
        sidecar_path(beton).write_text(json.dumps({other: sidecar[other] for other in sidecar if other != key}))
        try:
            assert describe_beton(beton).startswith(f"{beton}: t, 16 images, 2 classes (wide, tall)")
        except UserError as error:
            assert f"lacks {key};" in str(error)
            missing.append(key)
    required = {"format", "num_samples", "class_names", "max_side", "quality", "name", "source"}
    assert set(missing) == required | {"size", "sha256", "versions"}


def test_changed_byte_is_detected(beton: Path) -> None:
    content = bytearray(beton.read_bytes())
    content[bytes(content).index(stored_jpegs(beton)[1][0]) + 700] ^= 0xFF
    beton.write_bytes(content)
    check_beton(beton)
    with pytest.raises(UserError, match=r"SHA-256.*\n  sample 1: damaged image in"):
        verify_beton(beton)
    beton.write_bytes(content[:-1])
    with pytest.raises(UserError, match="truncated"):
        check_beton(beton)


def _damage(beton: Path, row: int) -> None:
    """Blank the second half of a stored JPEG."""
    content, jpeg = beton.read_bytes(), stored_jpegs(beton, intact=False)[row][0]
    place = content.index(jpeg)
    half = len(jpeg) // 2
    _rewrite(beton, content[: place + half] + bytes(len(jpeg) - half) + content[place + len(jpeg) :])


def test_undecodable_samples_are_listed(beton: Path) -> None:
    _damage(beton, 1)
    _damage(beton, 9)
    with pytest.raises(
        UserError, match=r"2 faults; .*\n  sample 1: damaged image in segment \d.*\n  sample 9: damaged image in"
    ):
        verify_beton(beton)


@pytest.mark.usefixtures("without_ffcv")
def test_damage_is_detected_without_ffcv(beton: Path) -> None:
    verify_beton(beton)
    content, jpeg = beton.read_bytes(), stored_jpegs(beton)[1][0]
    entry = content.rindex(content.index(jpeg).to_bytes(8, "little"))  # in the table at the end: offset, then length
    _rewrite(beton, content[: entry + 8] + (len(jpeg) // 2).to_bytes(8, "little") + content[entry + 16 :])
    with pytest.raises(UserError, match=r"1 fault; .*\n  sample 1: damaged image in segment \d"):
        verify_beton(beton)


def test_swapped_images_are_detected_by_size(beton: Path) -> None:
    """Exchange offsets and checksums, and so the images, of samples 3 and 5."""
    content = bytearray(beton.read_bytes())
    with_image = {row: bytes(content).index(stored_jpegs(beton)[row][0]).to_bytes(8, "little") for row in (3, 5)}
    table = {row: bytes(content).index(place) for row, place in with_image.items()}
    content[table[3] : table[3] + 8], content[table[5] : table[5] + 8] = with_image[5], with_image[3]
    three, five = (slice(table[row] + 27, table[row] + 35) for row in (3, 5))
    content[three], content[five] = content[five], content[three]
    _rewrite(beton, bytes(content))
    with pytest.raises(UserError, match=r"sample 3: 128 x 128, 128 x 33 in the table\n  sample 5: 128 x 33, 128 x 128"):
        verify_beton(beton)


def test_counts_and_labels_are_compared_with_the_sidecar(beton: Path) -> None:
    counts = read_sidecar(beton)["class_counts"]
    _rewrite(beton, beton.read_bytes(), class_counts=[counts[0] + 1, counts[1] - 1])
    with pytest.raises(UserError, match=rf"class wide: {counts[0]} images, {counts[0] + 1} in the sidecar"):
        verify_beton(beton)
    _rewrite(beton, beton.read_bytes(), class_counts=counts[:1], class_names=["wide"])
    with pytest.raises(UserError, match=r"sample 2: index 2, label 1 of 1\n"):
        verify_beton(beton)


def test_psnr_equals_opencv() -> None:
    one = photograph().crop((0, 0, 64, 48))
    noise = np.random.default_rng(0).normal(0, 12, (48, 64, 3))
    other = Image.fromarray(np.clip(np.asarray(one) + noise, 0, 255).astype(np.uint8))
    assert psnr(one, other) == pytest.approx(cv2.PSNR(np.asarray(one), np.asarray(other)), abs=1e-9)
    assert psnr(one, one) == float("inf")


def _training(tree: Path) -> ImageIndex:
    return open_folder(tree, 0.25)[0].limited(10, "train")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """SRC/CLASS/*.png, two classes of eight images of which one is damaged."""
    for place in range(16):
        path = tmp_path / "in" / "ab"[place % 2] / f"{place:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph().crop((15 * place, 20 * place, 15 * place + 90, 20 * place + 120)).save(path)
    Path(_training(tmp_path / "in").name(1)).write_bytes(b"")
    return tmp_path / "in"


@pytest.fixture
def written(tree: Path, tmp_path: Path) -> Path:
    """The tree's train.beton."""
    options = WriteOptions(max_side=64, quality=80, workers=1, max_bad=1)
    return write_folder(tree, Output(tmp_path / "out", options=options, train_count=10), val_fraction=0.25)[0].path


def test_stored_images_equal_their_source(written: Path, tree: Path) -> None:
    assert len(read_sidecar(written)["skipped"]) == 1
    lowest = compare_with_source(written, tree, count=100)
    stored = [Image.open(io.BytesIO(jpeg)) for jpeg, _, _ in stored_jpegs(written)]
    sources = [path for path in _training(tree).places if Path(path).stat().st_size]
    expected = []
    for image, path in zip(stored, sources, strict=True):
        reduced = np.asarray(Image.open(path).resize((48, 64), Image.Resampling.BICUBIC))
        expected.append(cv2.PSNR(np.asarray(image), reduced))
    assert lowest == pytest.approx(min(expected), abs=1e-6)
    assert compare_with_source(written, tree, count=2) >= lowest


def test_different_images_are_detected(written: Path, tree: Path) -> None:
    path = Path(_training(tree).name(2))
    original = path.read_bytes()
    Image.open(path).point(lambda value: value * 0.93).save(path)  # a little darker
    with pytest.raises(UserError, match=rf"1 of 9 images .*\n  sample 1: \d+\.\d dB from {path}, a JPEG"):
        compare_with_source(written, tree, count=100)
    Image.open(io.BytesIO(original)).rotate(90, expand=True).save(path)
    with pytest.raises(UserError, match=rf"sample 1: 48 x 64, {path} gives 64 x 48"):
        compare_with_source(written, tree, count=100)
    path.write_bytes(original[:-300])
    with pytest.raises(UserError, match=rf"sample 1: {path} cannot be read: OSError: "):
        compare_with_source(written, tree, count=100)
    for path in sorted((tree / "a").iterdir())[:6]:
        path.unlink()
    with pytest.raises(UserError, match="the tree has changed since"):
        compare_with_source(written, tree, count=100)


def test_compare_accepts_any_data_set(beton: Path, tree: Path) -> None:
    assert compare(beton, Photographs(), count=16) > 25

    class Relabeled(Photographs):
        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            image, label = super().__getitem__(index)
            return image, 1 - label if index == 7 else label

    with pytest.raises(UserError, match=r"1 of 16 .*\n  sample 7: has the label 0, its source 1"):
        compare(beton, Relabeled(), count=16)

    class Fewer(Photographs):
        SIZES = Photographs.SIZES[:3]

    with pytest.raises(UserError, match="holds 16 images, the source 6"):
        compare(beton, Fewer(), count=16)
    with pytest.raises(UserError, match=r"names no folder of images.*mrmae_ds\.data\.convert\.compare\.compare"):
        compare_with_source(beton, tree, count=1)
