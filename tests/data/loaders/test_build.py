"""The ffcv loader: pixels, independence of threads and ranks, damaged files, and clean-up."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mrmae_ds.data.beton.file_writer import BetonWriter
from mrmae_ds.data.beton.sidecar import sidecar_path
from mrmae_ds.data.convert.options import WriteOptions
from mrmae_ds.data.convert.writer import write_beton
from mrmae_ds.data.loaders._ffcv import _load_tbb
from mrmae_ds.data.loaders.base import Batch, Loader
from mrmae_ds.data.loaders.build import default_num_workers
from mrmae_ds.data.loaders.crop import CropSettings
from mrmae_ds.errors import UserError
from tests.data.loaders.test_crop import expected_box
from tests.support.jpegs import stored_jpegs
from tests.support.loaders import open_loader
from tests.support.processes import REPOSITORY
from tests.support.sample_data import Photographs

pytestmark = pytest.mark.timeout(120, method="thread")
CROP = CropSettings(scale=(0.2, 1.0))


def _loader(path: Path, train: bool, **changes: Any) -> Loader:
    """Return a loader of 32-pixel micro-batches of 4, two per training step, on one rank."""
    settings = {"accumulation": 2 if train else 1, "seed": 5, "crop": CROP if train else None}
    return open_loader(path, **settings | changes)


def _digest(batches: Iterable[Batch]) -> str:
    """Return one hash of the batches' content."""
    digest = hashlib.sha256()
    for batch in batches:
        for tensor in (batch.images, batch.labels, batch.indices, batch.valid):
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _by_sample(batches: Iterable[Batch]) -> dict[int, bytes]:
    """Return the pixels of each sample."""
    return {
        int(index): image.contiguous().numpy().tobytes()
        for batch in batches
        for index, image in zip(batch.indices, batch.images, strict=True)
    }


def _distance(image: torch.Tensor, expected: Image.Image) -> float:
    """Return the mean difference of an image [3, S, S] from another, of 255 levels."""
    return float(np.abs(image.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)).mean())


def _assert_crop(make: Callable[..., Image.Image], image: torch.Tensor) -> None:
    """Check that an image is the crop ``make(top, left, bottom, right, mirrored)``, to the pixel.

    The arguments are added to the sides of the correct box. The difference is not 0 because Pillow interpolates chroma
    before it resizes it, and the loader does not.
    """
    distance = _distance(image, make())
    assert distance < 1.5
    for other in ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, -1, 0), (0, 0, 0, -1)):
        assert _distance(image, make(*other)) > 1.2 * distance
    assert _distance(image, make(mirrored=True)) > 1.5 * distance


def test_batch_shapes_types_and_labels(betons: tuple[Path, Path]) -> None:
    loader = _loader(betons[0], train=True)
    assert (loader.num_samples, loader.batches_per_epoch) == (150, 36)
    batches = list(loader.epoch(0))
    assert len(batches) == 36
    labels = [label for _, label, _ in stored_jpegs(betons[0])]
    for batch in batches:
        assert batch.images.shape == (4, 3, 32, 32) and batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.labels.dtype == batch.indices.dtype == torch.int64
        assert batch.valid.dtype == torch.bool and batch.valid.all()
        assert batch.labels.tolist() == [labels[index] for index in batch.indices]


@pytest.mark.parametrize("size", [32, 96])
def test_training_pixels_follow_the_crop_rule(photographs: Path, size: int) -> None:
    crop, jpegs = CropSettings(scale=(0.1, 0.8)), stored_jpegs(photographs)
    loader = _loader(photographs, train=True, image_size=size, crop=crop)
    mirrored_count = 0
    for batch in loader.epoch(3):
        for index, image in zip(batch.indices.tolist(), batch.images, strict=True):
            source_image = Image.open(io.BytesIO(jpegs[index][0]))
            box = expected_box(source_image.height, source_image.width, index, seed=5, epoch=3, crop=crop)

            def cut(
                top: int = 0, left: int = 0, bottom: int = 0, right: int = 0, mirrored: bool = False,
                source_image: Image.Image = source_image, box: tuple[int, ...] = box,
            ) -> Image.Image:  # fmt: skip
                y, x, height, width, flip = box
                part = source_image.crop((x + left, y + top, x + width + right, y + height + bottom))
                part = part.resize((size, size), Image.Resampling.BICUBIC)
                return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip != mirrored else part

            _assert_crop(cut, image)
            mirrored_count += box[4]
    assert 0 < mirrored_count < 16


@pytest.mark.parametrize("size, short", [(96, 109), (256, 256)])
def test_evaluation_pixels_are_the_center_crop(photographs: Path, size: int, short: int) -> None:
    jpegs = stored_jpegs(photographs)
    for batch in _loader(photographs, train=False, image_size=size).epoch(0):
        for index, image in zip(batch.indices.tolist(), batch.images, strict=True):
            source_image = Image.open(io.BytesIO(jpegs[index][0]))
            sides = [int(short * side / min(source_image.size)) for side in source_image.size]
            resized = source_image.resize((sides[0], sides[1]), Image.Resampling.BICUBIC)
            x, y = (round((side - size) / 2) for side in sides)

            def cut(
                top: int = 0, left: int = 0, bottom: int = 0, right: int = 0, mirrored: bool = False,
                resized: Image.Image = resized, x: int = x, y: int = y,
            ) -> Image.Image:  # fmt: skip
                part = resized.crop((x + left, y + top, x + size + right, y + size + bottom)).resize((size, size))
                return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else part

            _assert_crop(cut, image)


def test_threads_do_not_change_pixels(betons: tuple[Path, Path], photographs: Path) -> None:
    for path in (betons[0], photographs):
        one, two = (_loader(path, train=True, num_workers=threads).epoch(1) for threads in (1, 2))
        assert _digest(one) == _digest(two)


@pytest.mark.parametrize("at_once", [1, 100])
def test_boxes_drawn_at_once_do_not_change_pixels(
    betons: tuple[Path, Path], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for train in (True, False):
        expected = _digest(_loader(betons[0], train).epoch(1, start_batch=1))
        monkeypatch.setattr("mrmae_ds.data.loaders.ffcv._BOXES_AT_ONCE", at_once)
        assert _digest(_loader(betons[0], train).epoch(1, start_batch=1)) == expected
        monkeypatch.undo()


def test_ranks_share_the_same_steps_and_pixels(betons: tuple[Path, Path]) -> None:
    def steps(**split: int) -> list[dict[int, bytes]]:
        shares = [list(_loader(betons[0], True, rank=rank, **split).epoch(2)) for rank in range(split["world_size"])]
        micro_steps = split["accumulation"]
        return [
            _by_sample(batch for share in shares for batch in share[start : start + micro_steps])
            for start in range(0, len(shares[0]), micro_steps)
        ]

    alone = steps(world_size=1, micro_batch=4, accumulation=2)
    assert len(alone) == 18 and all(len(step) == 8 for step in alone)
    assert steps(world_size=2, micro_batch=4, accumulation=1) == alone
    assert steps(world_size=2, micro_batch=1, accumulation=4) == alone


_IN_ANOTHER_PROCESS = """
import sys
from pathlib import Path
from tests.data.loaders.test_build import _digest, _loader
for path in sys.argv[1:]:
    print(_digest(_loader(Path(path), train=True, num_workers=4).epoch(1)))
"""


def test_another_process_with_four_threads_yields_the_same(betons: tuple[Path, Path], photographs: Path) -> None:
    paths = betons[0], photographs
    done = subprocess.run(
        [sys.executable, "-c", _IN_ANOTHER_PROCESS, *map(str, paths)],
        capture_output=True, text=True, timeout=110, cwd=REPOSITORY, check=False,
        env={**os.environ, "NUMBA_NUM_THREADS": "4"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [_digest(_loader(path, train=True).epoch(1)) for path in paths]


@pytest.mark.parametrize("train", [True, False])
def test_epoch_resumes_at_any_batch(betons: tuple[Path, Path], train: bool) -> None:
    loader = _loader(betons[not train], train=train)
    batches = list(loader.epoch(1))
    assert len(batches) == loader.batches_per_epoch
    for start in range(len(batches) + 1):
        assert _digest(loader.epoch(1, start)) == _digest(batches[start:])


def test_another_epoch_or_seed_differs(betons: tuple[Path, Path]) -> None:
    loader = _loader(betons[0], train=True)
    first = _by_sample(loader.epoch(0))
    for other in (_by_sample(loader.epoch(1)), _by_sample(_loader(betons[0], True, seed=6).epoch(0))):
        same = [first[index] == other[index] for index in first.keys() & other.keys()]
        assert len(same) > 100 and np.mean(same) < 0.1
    assert _by_sample(loader.epoch(0)) == first


@pytest.mark.parametrize("ranks, batch", [(1, 4), (2, 4), (3, 16), (2, 30)])
def test_evaluation_counts_each_sample_once(betons: tuple[Path, Path], ranks: int, batch: int) -> None:
    counted: list[int] = []
    lengths = set()
    for rank in range(ranks):
        loader = _loader(betons[1], train=False, world_size=ranks, rank=rank, micro_batch=batch)
        batches = list(loader.epoch(0))
        lengths.add(len(batches))
        assert len(batches) == loader.batches_per_epoch
        assert all(len(one.images) == batch for one in batches)
        counted += [int(index) for one in batches for index in one.indices[one.valid]]
    assert sorted(counted) == list(range(37))
    assert len(lengths) == 1


def test_kept_batches_are_not_overwritten(betons: tuple[Path, Path]) -> None:
    loader, kept, seen = _loader(betons[0], train=True), [], []
    for batch in loader.epoch(0):
        kept.append(batch)
        seen.append(_digest([batch]))
    assert [_digest([batch]) for batch in kept] == seen
    assert len(set(seen)) == len(seen)


def test_two_loaders_run_side_by_side(betons: tuple[Path, Path]) -> None:
    train, val = _loader(betons[0], True, num_workers=2), _loader(betons[1], False, num_workers=2)
    expected = _digest(list(train.epoch(4))[:9]), _digest(list(val.epoch(0))[:9])
    together = [(a, b) for _, a, b in zip(range(9), train.epoch(4), val.epoch(0), strict=False)]
    assert (_digest(a for a, _ in together), _digest(b for _, b in together)) == expected


def test_abandoned_epochs_leave_no_threads(betons: tuple[Path, Path]) -> None:
    loader = _loader(betons[0], train=True)
    before = threading.active_count()
    for _ in loader.epoch(0):
        break
    assert threading.active_count() == before
    left = loader.epoch(1)
    next(left)
    loader.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="has ended"):
        next(left)
    first, second = loader.epoch(2), loader.epoch(3)
    next(first)
    assert next(second).indices.tolist() != next(_loader(betons[0], True).epoch(2)).indices.tolist()
    with pytest.raises(RuntimeError, match="has ended"):
        next(first)
    assert len(list(second)) == 35
    assert threading.active_count() == before


def test_torch_threads_are_restored(betons: tuple[Path, Path]) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        list(_loader(betons[0], train=True, num_workers=2).epoch(0))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def _flip_bit(beton: Path, folder: Path, place: int) -> Path:
    """Copy a file and flip one bit."""
    path = folder / "train.beton"
    content = bytearray(beton.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    shutil.copy(sidecar_path(beton), sidecar_path(path))
    return path


@pytest.mark.parametrize("backend", [pytest.param("ffcv", marks=pytest.mark.ffcv), "pillow"])
@pytest.mark.parametrize("where", [0.01, 0.5, 0.9])  # the center crop needs no segments after the last one
def test_changed_bit_in_an_image_is_an_error(photographs: Path, tmp_path: Path, where: float, backend: str) -> None:
    content, jpeg = photographs.read_bytes(), stored_jpegs(photographs)[6][0]
    path = _flip_bit(photographs, tmp_path, content.index(jpeg) + int(where * len(jpeg)))
    loader = _loader(path, train=False, backend=backend)
    with pytest.raises(UserError, match=r"damaged (JPEG|image) in sample 6"):
        list(loader.epoch(0))
    loader.close()


@pytest.mark.parametrize("backend", [pytest.param("ffcv", marks=pytest.mark.ffcv), "pillow"])
@pytest.mark.parametrize("what", ["version", "label", "checksum", "length"])
def test_changed_bit_in_the_tables_is_an_error(photographs: Path, tmp_path: Path, what: str, backend: str) -> None:
    """Flip a bit of a sample's entry, or of the table of offsets and lengths at the end of the file."""
    content, (jpeg, label, _) = photographs.read_bytes(), stored_jpegs(photographs)[6]
    place = content.index(jpeg).to_bytes(8, "little")
    entry = content.index(place + b"\0" * 3 + label.to_bytes(8, "little"))
    where = {"version": 0, "label": entry + 11, "checksum": entry + 27, "length": content.rindex(place) + 8}[what]
    path = _flip_bit(photographs, tmp_path, where)
    with pytest.raises(UserError, match=r"does not hold what its sidecar describes.*copy or write it again"):
        _loader(path, train=False, backend=backend)


def test_truncated_or_exchanged_file_is_an_error(photographs: Path, betons: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "train.beton"
    for content in (photographs.read_bytes()[:-1], b"", betons[0].read_bytes()):
        path.write_bytes(content)
        shutil.copy(sidecar_path(photographs), sidecar_path(path))
        with pytest.raises(UserError, match=r"has [\d,]+ bytes, its sidecar says|no such file"):
            _loader(path, train=False)
    # A file of the same size from another run of the writer, with the wrong sidecar.
    options = WriteOptions(max_side=256, quality=95, workers=1)
    write_beton(Relabeled(), path, options, class_names=["wide", "tall"], name="other", source="a photograph")
    assert path.stat().st_size == photographs.stat().st_size
    shutil.copy(sidecar_path(photographs), sidecar_path(path))
    with pytest.raises(UserError, match="its tables have changed since they were written"):
        _loader(path, train=False)


class Relabeled(Photographs):
    """The same images with other labels."""

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image, label = super().__getitem__(index)
        return image, 1 - label


@pytest.mark.ffcv
def test_reads_files_of_ffcv_writer(photographs: Path, tmp_path: Path) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    path, images = tmp_path / "train.beton", Photographs()
    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=95), "label": IntField(), "index": IntField()}
    samples = [(np.asarray(images[row][0].resize((60, 44))), images[row][1], row) for row in range(len(images))]
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(samples)
    sidecar = json.loads(sidecar_path(photographs).read_text())
    del sidecar["tables_sha256"]
    sidecar_path(path).write_text(json.dumps(sidecar | {"size": path.stat().st_size}))
    for backend in ("ffcv", "pillow"):
        loader = _loader(path, train=False, image_size=44, backend=backend)
        batches = list(loader.epoch(0))
        loader.close()
        assert [label for batch in batches for label in batch.labels.tolist()] == [label for _, label, _ in samples]
        for batch in batches:
            for index, image in zip(batch.indices.tolist(), batch.images, strict=True):
                whole = Image.fromarray(samples[index][0]).resize((68, 50), Image.Resampling.BICUBIC)
                assert _distance(image, whole.crop((12, 3, 56, 47))) < 6


@pytest.mark.parametrize("backend", [pytest.param("ffcv", marks=pytest.mark.ffcv), "pillow"])
def test_image_damaged_before_writing_is_an_error(photographs: Path, tmp_path: Path, backend: str) -> None:
    """Store a truncated JPEG with a matching checksum."""
    path = tmp_path / "train.beton"
    with BetonWriter(path, 2, 256, digests=False) as file:
        for jpeg in (stored_jpegs(photographs)[0][0], stored_jpegs(photographs)[6][0][:-300]):
            file.append(jpeg, *Image.open(io.BytesIO(jpeg)).size, 0, None)
    sidecar = json.loads(sidecar_path(photographs).read_text())
    del sidecar["tables_sha256"]
    sidecar_path(path).write_text(json.dumps(sidecar | {"size": path.stat().st_size, "num_samples": 2}))
    loader = _loader(path, train=False, backend=backend)
    with pytest.raises(UserError, match=r"damaged (JPEG|image) in sample 1"):
        list(loader.epoch(0))
    loader.close()


def test_exception_in_ffcv_thread_is_raised(betons: tuple[Path, Path]) -> None:
    loader = _loader(betons[0], train=True)
    loader._file.table = loader._file.table[:10]  # type: ignore[attr-defined]
    with pytest.raises(IndexError):
        list(loader.epoch(0))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"micro_batch": 80}, "150 samples, fewer than one global batch of 160"),
        ({"micro_batch": 0}, "micro_batch must be at least 1"),
        ({"rank": 1}, r"rank must be in 0\.\.0"),
        ({"seed": -1}, "seed"),
        ({"backend": "dali"}, "unknown data backend 'dali'; choose from: ffcv, pillow"),
        ({"num_workers": 5000}, "num_workers is 5000, but"),
    ],
)
def test_invalid_settings_are_errors(betons: tuple[Path, Path], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _loader(betons[0], True, **changes)


def test_nonexistent_batch_is_an_error(betons: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="no batch 37 in epoch 0"):
        _loader(betons[0], train=True).epoch(0, 37)


@pytest.mark.parametrize(
    "environment, threads",
    [
        ({}, 8),
        ({"LOCAL_WORLD_SIZE": "4"}, 2),
        ({"LOCAL_SIZE": "16"}, 1),
        ({"SLURM_CPUS_PER_TASK": "6", "SLURM_NTASKS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, 3),
        ({"SLURM_CPUS_PER_TASK": "6", "SLURM_NTASKS": "2", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, 6),
        ({"SLURM_CPUS_PER_TASK": "64"}, 8),
    ],
)
def test_default_num_workers_share_the_cores_among_local_ranks(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], threads: int
) -> None:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE", "SLURM_CPUS_PER_TASK", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert default_num_workers() == threads


def test_check_beton_imports_no_ffcv(betons: tuple[Path, Path]) -> None:
    code = (
        "import sys; from mrmae_ds.data.beton.sidecar import check_beton; print(check_beton(sys.argv[1]).num_samples, "
        "'ffcv' in sys.modules, 'numba' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(betons[0])], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["150", "False", "False"]


@pytest.mark.gpu
def test_cuda_device_gets_the_same_pixels(betons: tuple[Path, Path]) -> None:
    device = torch.device("cuda", 0)
    batches = []
    for batch in _loader(betons[0], train=True, device=device).epoch(0):
        assert batch.images.device == batch.labels.device == batch.valid.device == device
        images, labels, indices, valid = (x.cpu() for x in (batch.images, batch.labels, batch.indices, batch.valid))
        batches.append(Batch(images, labels, indices, valid, batch.keys))
    assert _digest(batches) == _digest(_loader(betons[0], train=True).epoch(0))


def test_missing_ffcv_is_an_error_naming_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    from mrmae_ds.data.loaders.build import check_backend

    monkeypatch.setitem(sys.modules, "ffcv.loader", None)
    with pytest.raises(UserError, match=r"needs ffcv.*pip install -e '\.\[ffcv\]' -c constraints\.txt.*=pillow"):
        check_backend()


def test_tbb_of_pip_is_found_where_the_system_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def load(name: str) -> None:
        loaded.append(name)
        if "/" not in name:
            raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("mrmae_ds.data.loaders._ffcv.ctypes.CDLL", load)
    _load_tbb()
    assert loaded == ["libtbb.so.12", f"{sys.prefix}/lib/libtbb.so.12"]
