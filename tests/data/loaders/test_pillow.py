"""The Pillow backend: torchvision's pixels, the FFCV backend's samples and boxes."""

from __future__ import annotations

import io
import math
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from mrmae_ds.data.beton.file import BetonFile
from mrmae_ds.data.beton.sidecar import check_beton, sidecar_path
from mrmae_ds.data.loaders.augment import AugmentSettings
from mrmae_ds.data.loaders.base import Batch, Loader
from mrmae_ds.data.loaders.crop import CropSettings
from mrmae_ds.errors import UserError
from tests.data.loaders.test_crop import expected_box
from tests.support.jpegs import stored_jpegs
from tests.support.loaders import open_loader

pytestmark = pytest.mark.timeout(120, method="thread")
CROP = CropSettings(scale=(0.2, 1.0))
POLICY = AugmentSettings((0.5, 0.5, 0.5), "rand-m9-mstd0.5-inc1")


def _loader(path: Path, train: bool, backend: str = "pillow", **changes: Any) -> Loader:
    return open_loader(path, backend, **{"seed": 5, "crop": CROP if train else None, **changes})


def _samples(loader: Loader, epoch: int = 0, start: int = 0) -> list[tuple[int, bytes]]:
    batches = [
        (index, image.contiguous().numpy().tobytes())
        for batch in loader.epoch(epoch, start)
        for index, image in zip(batch.indices.tolist(), batch.images, strict=True)
    ]
    loader.close()
    return batches


def _image(jpeg: bytes) -> Image.Image:
    return Image.open(io.BytesIO(jpeg)).convert("RGB")


@pytest.mark.parametrize("size", [32, 224])
def test_training_pixels_equal_torchvision(photographs: Path, size: int) -> None:
    jpegs, mirrored = stored_jpegs(photographs), 0
    loader = _loader(photographs, train=True, image_size=size)
    for batch in loader.epoch(3):
        for index, image in zip(batch.indices.tolist(), batch.images, strict=True):
            source_image = _image(jpegs[index][0])
            box = expected_box(source_image.height, source_image.width, index, seed=5, epoch=3, crop=CROP)
            top, left, height, width, flip = box
            bicubic = TF.InterpolationMode.BICUBIC
            expected = TF.resized_crop(source_image, top, left, height, width, [size, size], interpolation=bicubic)
            expected = TF.horizontal_flip(expected) if flip else expected
            assert torch.equal(image, TF.pil_to_tensor(expected))
            mirrored += flip
    loader.close()
    assert 0 < mirrored < 16


@pytest.mark.parametrize("size", [32, 96, 224, 256])
def test_evaluation_pixels_equal_torchvision(photographs: Path, size: int) -> None:
    short = size if size > 224 else math.floor(size / 0.875)
    transform = v2.Compose([v2.Resize(short, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(size)])
    jpegs = stored_jpegs(photographs)
    loader = _loader(photographs, train=False, image_size=size)
    count = 0
    for batch in loader.epoch(0):
        for index, image in zip(batch.indices.tolist(), batch.images, strict=True):
            assert torch.equal(image, TF.pil_to_tensor(transform(_image(jpegs[index][0])))), index
            count += 1
    loader.close()
    assert count == 16


def _distances(path: Path, train: bool, other_seed: int = 5) -> list[float]:
    """Return the mean difference of the backends in each image, of 255 levels."""
    first = _loader(path, train, "ffcv", image_size=64)
    second = _loader(path, train, "pillow", image_size=64, seed=other_seed)
    others = {int(i): image for batch in second.epoch(2) for i, image in zip(batch.indices, batch.images, strict=True)}
    second.close()
    return [
        float((image.float() - others[int(i)].float()).abs().mean())
        for batch in first.epoch(2)
        for i, image in zip(batch.indices, batch.images, strict=True)
    ]


@pytest.mark.parametrize("train", [True, False])
def test_both_backends_crop_the_same_part(photographs: Path, train: bool) -> None:
    # The rest is chroma's interpolation: see test_jpeg_kernel.py.
    assert max(_distances(photographs, train)) < 1.5


def test_another_crop_would_be_detected(photographs: Path) -> None:
    assert np.median(_distances(photographs, True, other_seed=6)) > 12


def test_pixels_do_not_depend_on_processes_ranks_or_start_batch(betons: tuple[Path, Path]) -> None:
    whole = _samples(_loader(betons[0], True), 1)
    assert _samples(_loader(betons[0], True, num_workers=2), 1) == whole
    assert _samples(_loader(betons[0], True), 1, start=20) == whole[80:]
    assert _samples(_loader(betons[0], True), 2) != whole
    ranks = [_samples(_loader(betons[0], True, micro_batch=2, world_size=2, rank=rank), 1) for rank in (0, 1)]
    assert dict(ranks[0] + ranks[1]) == dict(whole)


def test_abandoned_epoch_and_new_epoch(betons: tuple[Path, Path]) -> None:
    whole = _samples(_loader(betons[0], True), 1)
    loader = _loader(betons[0], True)
    left = loader.epoch(0)
    next(left)
    batch: Batch = next(loader.epoch(1))
    pixels = [image.contiguous().numpy().tobytes() for image in batch.images]
    assert list(zip(batch.indices.tolist(), pixels, strict=True)) == whole[:4]
    with pytest.raises(RuntimeError, match="this epoch has ended"):
        next(left)
    loader.close()
    assert _samples(loader, 1) == whole


def test_damaged_image_is_an_error_naming_the_sample(betons: tuple[Path, Path], tmp_path: Path) -> None:
    copy = tmp_path / "train.beton"
    content = bytearray(betons[0].read_bytes())
    place = content.index(stored_jpegs(betons[0])[7][0])
    content[place : place + 400] = bytes(400)
    copy.write_bytes(content)
    sidecar_path(copy).write_text(sidecar_path(betons[0]).read_text())
    with pytest.raises(UserError, match=r"train\.beton: damaged image in sample 7 "):
        _samples(_loader(copy, True))


def _unsendable(images: object) -> object:
    return lambda: None


@pytest.mark.multi_process
def test_a_batch_that_shared_memory_cannot_take_ends_the_epoch(
    betons: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread of a worker that sends it only prints a traceback, and the training would wait for the batch."""
    import mrmae_ds.data.loaders.pillow as module

    monkeypatch.setattr(module, "stack_images", _unsendable)
    with pytest.raises(UserError, match=r"a process that prepares images ended: out of memory, or /dev/shm is full"):
        _samples(_loader(betons[0], True))


def test_too_small_a_shared_memory_is_found_at_the_start(
    betons: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 16, 0, 1 << 16))
    with pytest.raises(UserError, match=r"/dev/shm: the Pillow reader needs .* MiB .* has 0.0625 MiB.*num_workers"):
        _loader(betons[0], True)


def test_pillow_backend_imports_no_ffcv(betons: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import mrmae_ds.data.loaders._ffcv as module

    def missing() -> None:
        raise UserError("no ffcv here")

    monkeypatch.setattr(module, "import_ffcv", missing)
    with pytest.raises(UserError, match="no ffcv here"):
        _loader(betons[1], False, "ffcv")
    assert len(_samples(_loader(betons[1], False))) == 40


def test_workers_are_not_forked_from_the_training_process(betons: tuple[Path, Path]) -> None:
    """Its threads, of gloo, NCCL and CUDA, hold locks that a fork would never release; the fork server has none."""
    before = set(multiprocessing.active_children())  # of loaders that an earlier test left
    loader = _loader(betons[0], True, num_workers=2)
    batches = loader.epoch(0)
    next(batches)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    parents = {int(Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[1]) for worker in workers}
    assert len(parents) == 1 and os.getpid() not in parents
    loader.close()


def test_an_open_file_is_pickled_without_its_content(betons: tuple[Path, Path]) -> None:
    file = BetonFile(check_beton(betons[0]))
    pickled = pickle.dumps(file)
    assert len(pickled) < 4096 < len(file.content) and pickle.loads(pickled).jpeg(3) == file.jpeg(3)
