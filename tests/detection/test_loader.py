"""Loader of COCO: batches, order and exact resumption whatever workers and ranks, and errors that name the image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mrmae_ds.data.convert.options import WriteOptions
from mrmae_ds.data.loaders.base import LoaderRequest
from mrmae_ds.detection import loader as module
from mrmae_ds.detection.coco import CocoSplit, open_split
from mrmae_ds.detection.jitter import JitterSettings, eval_jitter
from mrmae_ds.detection.loader import DetectionBatch, DetectionLoader
from mrmae_ds.errors import UserError
from tests.support.coco import SIZES, small_coco, write_coco

CPU = torch.device("cpu")
SIDE = 64
JITTER = JitterSettings(SIDE)
STILL = JitterSettings(SIDE, scale=(1.0, 1.0), flip=0.0)


@pytest.fixture
def train(tmp_path: Path) -> CocoSplit:
    return open_split(*write_coco(tmp_path), training=True)


@pytest.fixture
def val(tmp_path: Path) -> CocoSplit:
    return open_split(*write_coco(tmp_path), training=False)


def loader(
    split: CocoSplit,
    jitter: JitterSettings | None = JITTER,
    *,
    workers: int = 0,
    batch: int = 1,
    ranks: int = 1,
    rank: int = 0,
) -> DetectionLoader:
    side = SIDE if jitter is None else jitter.image_size
    request = LoaderRequest(split="train", image_size=side, micro_batch=batch, seed=5, world_size=ranks, rank=rank)
    return DetectionLoader(split, request, jitter, workers, CPU)


def content(batches: list[DetectionBatch]) -> list[bytes]:
    """Return everything in some batches, image by image."""
    parts = []
    for batch in batches:
        for number, (image, target) in enumerate(zip(batch.images, batch.targets, strict=True)):
            tensors = image, *(target[name] for name in ("boxes", "labels", "masks"))
            described = str((batch.sizes[number], batch.entries[number], batch.indices[number]))
            parts.append(described.encode() + b"".join(tensor.numpy().tobytes() for tensor in tensors))
    return parts


@pytest.mark.multi_process
def test_workers_change_nothing(train: CocoSplit) -> None:
    results = []
    for workers in (0, 1, 3):
        own = loader(train, workers=workers, batch=2)
        results.append([content(list(own.epoch(epoch))) for epoch in (0, 1, 0)])
        own.close()
    assert results[0] == results[1] == results[2]
    assert results[0][0] == results[0][2] != results[0][1]


def test_ranks_change_nothing(train: CocoSplit) -> None:
    alone = content(list(loader(train, batch=2).epoch(1)))
    both = [content(list(loader(train, ranks=2, rank=rank).epoch(1))) for rank in (0, 1)]
    assert [part for pair in zip(*both, strict=True) for part in pair] == alone


def test_an_epoch_resumes_at_any_batch(train: CocoSplit) -> None:
    own = loader(train)
    whole = content(list(own.epoch(3)))
    assert len(whole) == own.batches_per_epoch == 4
    for start in range(5):
        assert content(list(own.epoch(3, start))) == whole[start:]
    with pytest.raises(UserError, match="no batch 5 in epoch 3"):
        own.epoch(3, 5)


def test_every_epoch_has_its_own_jitter(train: CocoSplit) -> None:
    both = [{int(b.indices[0]): b.images for b in loader(train).epoch(epoch)} for epoch in (0, 1)]
    assert both[0].keys() == both[1].keys()
    assert not any(torch.equal(both[0][row], both[1][row]) for row in both[0])


def test_another_epoch_ends_the_open_one(train: CocoSplit) -> None:
    own = loader(train)
    first = own.epoch(0)
    next(first)
    next(own.epoch(1))
    with pytest.raises(RuntimeError, match="this epoch has ended"):
        next(first)


def test_objects_without_jitter_are_the_annotations(train: CocoSplit) -> None:
    """At the image's own size, boxes and masks are exactly those of the file, without the crowd."""
    own = loader(train, JitterSettings(96, scale=(1.0, 1.0), flip=0.0))
    seen = 0
    for batch in own.epoch(0):
        (entry,), (target,), (size,) = batch.entries, batch.targets, batch.sizes
        if max(entry.height, entry.width) != 96:
            continue
        seen += 1
        annotations = [a for a in small_coco()["annotations"] if a["image_id"] == entry.id and not a["iscrowd"]]
        annotations.sort(key=lambda annotation: annotation["id"])
        corners = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in annotations)]
        assert size == (entry.height, entry.width)
        assert target["boxes"].tolist() == corners and target["boxes"].dtype == torch.float32
        assert target["labels"].tolist() == [1 + [1, 3, 7, 90].index(a["category_id"]) for a in annotations]
        assert target["masks"].shape == (len(annotations), *size) and target["masks"].dtype == torch.uint8
        for mask, (left, top, right, bottom) in zip(target["masks"], corners, strict=True):
            assert mask.sum() == mask[top:bottom, left:right].sum() == (right - left) * (bottom - top)
    assert seen == 2


def test_the_square_is_zero_outside_the_image(train: CocoSplit) -> None:
    batch = next(loader(train, STILL, batch=4).epoch(0))
    assert batch.images.shape == (4, 3, SIDE, SIDE) and batch.images.dtype == torch.uint8
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1), torch.full((1, 3, 1, 1), 0.25)
    normalized = batch.normalized(mean, std)
    for image, raw, (height, width) in zip(normalized, batch.images, batch.sizes, strict=True):
        assert min(height, width) < SIDE or (height, width) == (SIDE, SIDE)
        for pixels in (image, raw):
            assert not pixels[:, height:].any() and not pixels[:, :, width:].any()
        expected = (raw[:, :height, :width] / 255 - mean[0]) / std[0]
        assert torch.equal(image[:, :height, :width], expected)


def test_objects_that_are_cropped_away_are_dropped(tmp_path: Path) -> None:
    """Zero-width boxes, crowds and masks outside the crop are no objects; an image may end without any."""
    annotations = small_coco()
    for entry in annotations["annotations"]:
        if entry["image_id"] == 7:
            entry["bbox"][2] = 0
    split = open_split(*write_coco(tmp_path, annotations), training=True)
    sizes = {}
    own = loader(split, JitterSettings(SIDE, scale=(1.9, 2.0)))
    for epoch in range(6):
        for batch in own.epoch(epoch):
            (target,), (size,) = batch.targets, batch.sizes
            sizes.setdefault(batch.entries[0].id, []).append(len(target["labels"]))
            assert target["masks"].shape == (len(target["labels"]), *size)
            assert target["masks"].any(dim=(1, 2)).all() if len(target["masks"]) else True
            assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()
    assert set(sizes[7]) == {0}
    assert min(sizes[17]) < 4  # some of its four objects are outside


def test_every_image_is_evaluated_once(val: CocoSplit) -> None:
    for ranks in (1, 2, 3):
        lists = [list(loader(val, None, batch=1, ranks=ranks, rank=rank).epoch(0)) for rank in range(ranks)]
        assert len({len(batches) for batches in lists}) == 1
        seen = [b.entries[0].id for batches in lists for b in batches if b.valid[0]]
        assert sorted(seen) == val.index.image_ids.tolist()
    assert lists[0][0].targets == ()


def test_evaluation_resizes_to_the_square(val: CocoSplit) -> None:
    batch = next(loader(val, None, batch=6).epoch(0))
    assert batch.sizes == tuple(eval_jitter(height, width, SIDE).size for width, height in SIZES)


def test_gray_and_cmyk_images_are_converted(train: CocoSplit) -> None:
    for number, mode in ((0, "L"), (1, "CMYK")):
        path = train.folder / f"{number}.jpg"
        Image.open(path).convert(mode).save(path)
    images = {int(b.indices[0]): b.images[0] for b in loader(train, STILL).epoch(0)}
    assert torch.equal(images[0][0], images[0][1]) and not torch.equal(images[1][0], images[1][2])


def test_images_are_not_rotated_by_their_exif_record(train: CocoSplit) -> None:
    """Annotations are of the pixels as they are stored."""
    images = {path: Image.open(path).copy() for path in train.folder.iterdir()}
    turned = Image.Exif()
    turned[274] = 6  # a quarter

    def written(**options: Any) -> list[bytes]:
        for path, image in images.items():
            image.save(path, quality=95, **options)
        return content(list(loader(train).epoch(0)))

    assert written() == written(exif=turned)


@pytest.mark.parametrize(
    ("orientation", "message"),
    [
        (6, "its EXIF orientation, which training ignores, makes them equal: the upright image was annotated"),
        (3, "width and height are exchanged: correct them"),
        (None, "width and height are exchanged: correct them"),
    ],
)
def test_exchanged_width_and_height_are_explained(tmp_path: Path, orientation: int | None, message: str) -> None:
    annotations = small_coco()
    image = annotations["images"][0]
    image["width"], image["height"] = image["height"], image["width"]
    annotations["annotations"] = [entry for entry in annotations["annotations"] if entry["image_id"] != image["id"]]
    split = open_split(*write_coco(tmp_path, annotations), training=False)
    if orientation is not None:
        turned = Image.Exif()
        turned[274] = orientation
        Image.open(split.folder / "0.jpg").save(split.folder / "0.jpg", exif=turned)
    with pytest.raises(UserError, match=rf"0.jpg is 96 x 64 pixels, but 64 x 96 in the annotations; {message}"):
        list(loader(split, None).epoch(0))


@pytest.mark.parametrize("share", [2, 4])  # Pillow warns beyond the limit, and raises beyond twice of it
def test_images_of_too_many_pixels_are_named(train: CocoSplit, share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = min(width * height for width, height in SIZES) * 2 // share - 1
    monkeypatch.setattr(WriteOptions, "max_pixels", limit)
    with pytest.raises(UserError, match=rf"\.jpg: not a readable image \(more than {limit:,} pixels\); copy"):
        list(loader(train, STILL).epoch(0))


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.multi_process)])
def test_damaged_images_are_named_with_their_rank(train: CocoSplit, workers: int) -> None:
    path = train.folder / "2.jpg"
    path.write_bytes(path.read_bytes()[:500])
    own = loader(train, workers=workers, ranks=2, rank=1, batch=2)
    with pytest.raises(UserError, match=r"rank 1: .*/2\.jpg: not a readable image"):
        for epoch in range(8):
            list(own.epoch(epoch))
    own.close()


class _Unsendable(module._Collate):
    """Its batches cannot leave a process."""

    def __call__(self, samples: object) -> Any:
        return lambda: None


@pytest.mark.multi_process
@pytest.mark.timeout(120, method="thread")
def test_a_batch_that_shared_memory_cannot_take_ends_the_epoch(
    train: CocoSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread of a worker that sends it only prints a traceback, and the training would wait for the batch."""
    monkeypatch.setattr(module, "_Collate", _Unsendable)
    own = loader(train, workers=1)
    with pytest.raises(UserError, match=r"a process that prepares images ended: out of memory, or /dev/shm is full"):
        next(own.epoch(0))
    own.close()


def test_sizes_unlike_the_annotations_are_named(tmp_path: Path) -> None:
    annotations = small_coco()
    annotations["images"][5].update(width=90, height=33)  # as if it had been rotated
    split = open_split(*write_coco(tmp_path, annotations), training=False)
    with pytest.raises(UserError, match=r"5\.jpg is 33 x 90 pixels, but 90 x 33 in the annotations"):
        list(loader(split, None).epoch(0))


def test_a_set_smaller_than_a_batch_is_refused(train: CocoSplit) -> None:
    with pytest.raises(UserError, match="4 samples, fewer than one global batch of 5"):
        loader(train, batch=5)
