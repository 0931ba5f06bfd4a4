"""Evaluation: pasted masks, results in COCO's format, merging over ranks, and the scores of known predictions."""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_api

from mrmae_ds.data.loaders.base import LoaderRequest
from mrmae_ds.detection.coco import CocoIndex, open_index, open_split
from mrmae_ds.detection.evaluate import (
    SCORE_NAMES,
    Result,
    batch_results,
    coco_scores,
    image_results,
    merge_results,
    paste_mask,
    write_per_class,
    write_results,
)
from mrmae_ds.detection.loader import DetectionLoader
from mrmae_ds.errors import UserError
from tests.fixtures import FOLDER
from tests.support.coco import COCO200, needs_coco200, write_coco

SIZES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")


@pytest.fixture
def small(tmp_path: Path) -> CocoIndex:
    return open_index(write_coco(tmp_path)[0])


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> CocoIndex:
    return open_index(COCO200 / "annotations" / "instances_val.json", tmp_path_factory.mktemp("index"))


def perfect(index: CocoIndex, *, crowds: bool = False) -> list[Result]:
    """Return the annotations as results with score 1."""
    results = []
    for row, number in enumerate(index.image_ids.tolist()):
        own = index.annotations(row)
        for kind, crowd, box, mask in zip(own.classes, own.crowd, own.boxes.tolist(), own.masks, strict=True):
            if crowds or not crowd:
                segmentation = {"size": mask["size"], "counts": mask["counts"].decode()}
                category = int(index.category_ids[kind])
                results.append(
                    {"image_id": number, "category_id": category, "bbox": box, "score": 1.0}
                    | {"segmentation": segmentation}
                )
    return results


def changed(results: list[Result], change: Callable[[Result], Any]) -> list[Result]:
    """Apply a change to a copy of each result."""
    results = copy.deepcopy(results)
    for result in results:
        change(result)
    return results


def test_pasted_masks_are_the_references() -> None:
    """Detectron2 pasted these masks; they are stored in half precision, so a few pixels at the threshold may differ."""
    with np.load(FOLDER / "pasted_masks.npz") as file:
        reference = dict(file)
    wrong = pixels = 0
    for image, (height, width) in enumerate(((200, 256), (256, 160), (256, 256))):
        expected = np.unpackbits(reference[f"pasted{image}"], axis=2)[:, :, :width].astype(bool)
        masks = torch.from_numpy(reference[f"masks28{image}"]).float()
        for mask, box, theirs in zip(masks, (2 * reference[f"boxes{image}"]).tolist(), expected, strict=True):
            ours = paste_mask(mask, box, height, width)
            wrong, pixels = wrong + int((ours != theirs).sum()), pixels + theirs.size
    assert pixels > 1_000_000 and wrong <= 1e-4 * pixels


def test_a_mask_beyond_the_image_is_clipped() -> None:
    mask = torch.ones(28, 28)
    pasted = paste_mask(mask, (-10.0, 5.0, 6.0, 100.0), 20, 30)
    assert pasted.shape == (20, 30) and pasted[5:, :6].all() and pasted.sum() == 15 * 6
    assert not paste_mask(mask, (200.0, 200.0, 210.0, 210.0), 20, 30).any()


def test_boxes_return_to_original_pixels(small: CocoIndex) -> None:
    """Both axes have their own scale, as sizes were rounded; boxes are clipped, empty ones left out."""
    entry = small.image(3)  # 50 x 70
    boxes = torch.tensor([[10.0, 20, 30, 40], [-5, -5, 200, 200], [50, 10, 60, 20]])
    detections = {
        "boxes": boxes,
        "labels": torch.tensor([4, 1, 2]),
        "scores": torch.tensor([0.5, 0.25, 0.125]),
        "masks": torch.ones(3, 1, 28, 28),
    }
    results = image_results(detections, (64, 45), entry, small.category_ids)
    assert [(result["image_id"], result["category_id"], result["score"]) for result in results] == [
        (entry.id, 90, 0.5),
        (entry.id, 1, 0.25),
    ]
    x, y = 50 / 45, 70 / 64
    assert results[0]["bbox"] == pytest.approx([10 * x, 20 * y, 20 * x, 20 * y])
    assert results[1]["bbox"] == [0, 0, 50, 70]
    assert results[1]["segmentation"]["size"] == [70, 50]
    assert mask_api.decode(results[1]["segmentation"] | {}).all()
    none = {name: tensor[:0] for name, tensor in detections.items()}
    assert image_results(none, (64, 45), entry, small.category_ids) == []


def test_results_do_not_depend_on_the_ranks(tmp_path: Path) -> None:
    """Every rank repeats images so that all have the same number of batches; the results file is the same."""
    split = open_split(*write_coco(tmp_path), training=False)

    def evaluate(ranks: int) -> str:
        parts = []
        for rank in range(ranks):
            request = LoaderRequest("val", 64, 1, world_size=ranks, rank=rank)
            part = {}
            for batch in DetectionLoader(split, request, None, 0, torch.device("cpu")).epoch(0):
                part |= batch_results([detect(batch.images[0])], batch, split.index.category_ids)
            parts.append(part)
        assert sum(map(len, parts)) == 6
        # A repeated image whose mark was lost still counts once.
        parts[-1] |= parts[0]
        write_results(merge_results(parts, split.index.image_ids), tmp_path / "results.json")
        return (tmp_path / "results.json").read_text()

    assert evaluate(1) == evaluate(2) == evaluate(3) == evaluate(4)
    assert len(json.loads(evaluate(1))) == 2 * 6


def detect(image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return two detections that depend on the image."""
    shift = image.float().mean() / 255
    boxes = torch.tensor([[2.0, 3, 20, 30], [5, 6, 25, 20]]) + shift
    return {
        "boxes": boxes,
        "labels": torch.tensor([1, 2]),
        "scores": torch.stack([shift, shift / 2]),
        "masks": torch.ones(2, 1, 28, 28),
    }


def test_an_image_that_no_rank_has_is_an_error(small: CocoIndex) -> None:
    numbers = small.image_ids.tolist()
    with pytest.raises(UserError, match=f"no rank has evaluated 1 of 6 images.*{numbers[2]}"):
        merge_results([{number: [] for number in numbers if number != numbers[2]}], small.image_ids)


def test_the_annotations_as_results_are_perfect(small: CocoIndex) -> None:
    """Boxes whose only fault is their place in the list: any score, and crowds among them."""
    rows, generator = np.arange(len(small)), np.random.default_rng(0)
    shuffled = changed(perfect(small), lambda result: result.update(score=float(generator.random())))
    for results in (perfect(small), shuffled, perfect(small, crowds=True)):
        before = copy.deepcopy(results)
        scores = coco_scores(results, small, rows)
        assert results == before
        for kind in (scores.box, scores.mask):
            assert tuple(kind) == SCORE_NAMES
            assert kind["AP"] == kind["AP50"] == kind["AR100"] == kind["APs"] == pytest.approx(100)
            assert kind["APl"] is None  # the sample has no large object
        assert all(pair == pytest.approx((100, 100)) for pair in scores.per_class.values())


def test_no_detections_score_zero(small: CocoIndex) -> None:
    scores = coco_scores([], small, np.arange(len(small)))
    assert scores.box["AP"] == scores.mask["AR100"] == 0.0 and scores.box["APl"] is None


def test_some_images_are_scored_alone(small: CocoIndex) -> None:
    """The annotations of images that were not evaluated are not missed objects."""
    first = [result for result in perfect(small) if result["image_id"] == 7]
    assert coco_scores(first, small, np.array([0])).box["AP"] == pytest.approx(100)
    assert coco_scores(first, small, np.arange(6)).box["AP"] < 30


def test_masks_are_sized_by_their_own_area(small: CocoIndex) -> None:
    """A wrong mask of one pixel is a small detection, although its box is not."""
    results = perfect(small)
    tiny = np.zeros((64, 96), dtype=np.uint8, order="F")
    tiny[60, 90] = 1
    counts = mask_api.encode(tiny)["counts"].decode()
    wrong = results[0] | {"bbox": [0, 0, 60, 60], "score": 2.0, "segmentation": {"size": [64, 96], "counts": counts}}
    content = [wrong | {"category_id": category} for category in (1, 3, 7, 90)]
    scores = coco_scores([*content, *results], small, np.arange(6))
    assert scores.box["APs"] == pytest.approx(100)  # its box is a medium one
    assert scores.mask["APs"] < 95


def test_absent_classes_are_blank(small: CocoIndex, tmp_path: Path) -> None:
    path = tmp_path / "per_class.csv"
    scores = coco_scores([], small, np.array([4, 5]))  # a crowd and nothing
    assert set(scores.per_class.values()) == {(None, None)} and scores.box["AP"] is None
    whole = coco_scores(perfect(small)[1:], small, np.arange(6))
    present = [pair[0] for pair in whole.per_class.values()]
    assert np.mean(present) == pytest.approx(whole.box["AP"])
    write_per_class(scores, path)
    assert list(csv.reader(path.open()))[:2] == [["class", "box AP", "mask AP"], ["person", "", ""]]


@needs_coco200
def test_perfect_results_on_real_coco(real: CocoIndex) -> None:
    rows, generator = np.arange(100), np.random.default_rng(0)
    shuffled = changed(perfect(real), lambda result: result.update(score=float(generator.random())))
    for results in (perfect(real, crowds=True), shuffled):
        scores = coco_scores(results, real, rows)
        for kind in (scores.box, scores.mask):
            assert [kind[name] for name in SIZES] == pytest.approx([100] * len(SIZES))
        present = {number for row in rows for number in real.annotations(row).classes.tolist()}
        blank = [number for number, pair in enumerate(scores.per_class.values()) if pair[0] is None]
        assert set(blank) == set(range(80)) - present and len(present) == 72


def _corners(result: Result) -> None:
    left, top, width, height = result["bbox"]
    result["bbox"] = [left, top, left + width, top + height]


def _contiguous(index: CocoIndex) -> Callable[[Result], None]:
    numbers = {category: number for number, category in enumerate(index.category_ids.tolist())}
    return lambda result: result.update(category_id=numbers[result["category_id"]] + 1)


def _class_before(index: CocoIndex) -> Callable[[Result], None]:
    before = dict(zip(index.category_ids.tolist()[1:], index.category_ids.tolist(), strict=False))
    return lambda result: result.update(category_id=before.get(result["category_id"], result["category_id"]))


@needs_coco200
@pytest.mark.parametrize(
    ("mistake", "score"),
    [
        ("corners", 6.7),
        ("category off by one", 1.4),
        ("contiguous ids", 15.3),
        ("missing half", 46.8),
        ("doubled half", 86.1),
    ],
)
def test_mistakes_score_less(real: CocoIndex, mistake: str, score: float) -> None:
    results = perfect(real)
    half = set(real.image_ids[::2].tolist())
    spoiled = {
        "corners": lambda: changed(results, _corners),
        "category off by one": lambda: changed(results, _class_before(real)),
        "contiguous ids": lambda: changed(results, _contiguous(real)),
        "missing half": lambda: [result for result in results if result["image_id"] in half],
        "doubled half": lambda: results + results[: len(results) // 2],
    }[mistake]()
    assert coco_scores(spoiled, real, np.arange(100)).box["AP"] == pytest.approx(score, abs=0.05)
