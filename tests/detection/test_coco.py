"""COCO reader: every form of mask, the memory-mapped index, and an error for everything that is wrong in the files."""

from __future__ import annotations

import copy
import json
import logging
import math
import pickle
import re
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as mask_api
from pycocotools.coco import COCO

from mrmae_ds.detection import coco
from mrmae_ds.detection.coco import CocoIndex, check_same_categories, open_index, open_split
from mrmae_ds.detection.coco_json import parse_annotations
from mrmae_ds.errors import UserError
from mrmae_ds.files import file_sha256
from tests.support.coco import CATEGORIES, COCO200, needs_coco200, small_coco, write_coco


@pytest.fixture
def index(tmp_path: Path) -> CocoIndex:
    return open_index(write_coco(tmp_path)[0])


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    monkeypatch.delitem(sys.modules, "mrmae_ds.detection.rle")
    with pytest.raises(UserError, match=r"detection needs pycocotools .*pip install -e '\.\[detection\]' -c constr"):
        import_module("mrmae_ds.detection.rle")


def test_the_index_holds_what_pycocotools_reads(index: CocoIndex, tmp_path: Path) -> None:
    truth = COCO(tmp_path / "annotations.json")
    assert index.class_names == tuple(CATEGORIES.values())
    assert index.category_ids.tolist() == list(CATEGORIES)
    assert index.image_ids.tolist() == sorted(truth.getImgIds())
    for row in range(len(index)):
        entry, own = index.image(row), index.annotations(row)
        theirs = sorted(truth.loadAnns(truth.getAnnIds(entry.id)), key=lambda annotation: annotation["id"])
        assert truth.loadImgs(entry.id)[0]["file_name"] == entry.name
        assert own.ids.tolist() == [annotation["id"] for annotation in theirs]
        assert index.category_ids[own.classes].tolist() == [annotation["category_id"] for annotation in theirs]
        assert own.crowd.tolist() == [bool(annotation["iscrowd"]) for annotation in theirs]
        assert own.areas.tolist() == [annotation["area"] for annotation in theirs]
        assert own.boxes.tolist() == [annotation["bbox"] for annotation in theirs]
        for mask, annotation in zip(own.masks, theirs, strict=True):
            assert np.array_equal(mask_api.decode(mask), truth.annToMask(annotation))
            # The sample's masks are their boxes.
            left, top, width, height = annotation["bbox"]
            assert mask_api.decode(mask)[top : top + height, left : left + width].all()


def test_training_leaves_out_images_without_an_object(tmp_path: Path) -> None:
    path, images = write_coco(tmp_path)
    assert open_split(path, images, training=True).rows.tolist() == [0, 1, 2, 3]
    assert open_split(path, images, training=False).rows.tolist() == [0, 1, 2, 3, 4, 5]
    assert open_split(path, images, training=True, first=2).rows.tolist() == [0, 1]


def test_the_json_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = write_coco(tmp_path)
    first = open_index(path)
    monkeypatch.setattr(coco, "parse_annotations", lambda path: pytest.fail("parsed again"))
    assert open_index(path).file == first.file


def test_one_of_the_processes_parses_a_faulty_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads, which the lock keeps apart like processes: both have begun when one of them fails."""
    path, _ = write_coco(tmp_path)
    path.write_text('{"images": [')
    begun, parsed = threading.Barrier(2, timeout=30), []
    monkeypatch.setattr(coco, "file_sha256", lambda path: (begun.wait(), file_sha256(path))[1])
    monkeypatch.setattr(coco, "parse_annotations", lambda path: parsed.append(path) or parse_annotations(path))
    with ThreadPoolExecutor(2) as threads:
        errors = [thread.exception(timeout=60) for thread in [threads.submit(open_index, path) for _ in range(2)]]
    assert {type(error) for error in errors} == {UserError} and str(errors[0]) == str(errors[1])
    assert "not a complete JSON file" in str(errors[0]) and len(parsed) == 1


def test_another_json_has_another_index(index: CocoIndex, tmp_path: Path) -> None:
    content = small_coco()
    content["annotations"].pop()
    other = open_index(write_coco(tmp_path, content)[0])
    assert other.file != index.file and other.num_annotations == index.num_annotations - 1
    assert other.sha256 != index.sha256


def test_the_index_is_mapped_and_reopened_by_workers(index: CocoIndex) -> None:
    assert str(index.file) in Path("/proc/self/maps").read_text()
    packed = pickle.dumps(index)
    assert len(packed) < 1000
    assert pickle.loads(packed).image_ids.tolist() == index.image_ids.tolist()


def test_the_index_can_be_in_another_folder(tmp_path: Path) -> None:
    path, _ = write_coco(tmp_path / "read_only")
    assert open_index(path, tmp_path / "cache").file.parent == tmp_path / "cache"


def _annotation(content: dict[str, Any], **values: Any) -> None:
    content["annotations"][0].update(values)


def _set(kind: str, number: int, **values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content[kind][number].update(values)


def _mask(segmentation: Any) -> Callable[[dict[str, Any]], object]:
    return _set("annotations", 0, segmentation=segmentation)


def _rle(counts: Any, size: Any = (64, 96)) -> Callable[[dict[str, Any]], object]:
    return _mask({"size": list(size), "counts": counts})


IDS = ("7", 7.0, True, None, [7], 2**63)
WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no list": (lambda c: c.pop("categories"), "annotations.json: no list 'categories'"),
    "no entry": (lambda c: c["images"].insert(2, 5), r"images\[2\] is 5, without keys"),
    "no key": (lambda c: c["images"][2].pop("height"), "image 27 has no 'height'"),
    "no id": (lambda c: c["annotations"][2].pop("id"), r"annotations\[2\] has no 'id'"),
    "unknown image": (lambda c: _annotation(c, image_id=5), "annotation 1000 names image_id 5, which does not exist"),
    "unknown category": (lambda c: _annotation(c, category_id=2), "annotation 1000 names category_id 2"),
    "repeated image": (lambda c: c["images"][1].update(id=7), "images with the same id: 7"),
    "repeated annotation": (lambda c: _annotation(c, id=999), "annotations with the same id: 999"),
    "repeated category": (lambda c: c["categories"][1].update(id=1), "categories with the same id: 1"),
    "repeated name": (lambda c: c["categories"][1].update(name="person"), "categories with the same name: person"),
    "boxes alone": (lambda c: c["annotations"][0].pop("segmentation"), "1 annotation without segmentation.*1000"),
    "empty segmentation": (lambda c: _annotation(c, segmentation=[]), "1 annotation without segmentation.*1000"),
    **{
        f"{kind} {key} {value!r}": (_set(kind, 0, **{key: value}), rf"{where} has the {key} .*; it must be an integer")
        for kind, key, where in (
            ("images", "id", r"images\[0\]"),
            ("annotations", "id", r"annotations\[0\]"),
            ("categories", "id", r"categories\[0\]"),
            ("annotations", "image_id", "annotation 1000"),
            ("annotations", "category_id", "annotation 1000"),
        )
        for value in IDS
    },
    **{
        f"{key} {value!r}": (
            _set("images", 0, **{key: value}),
            f"image 7 has the {key} .*; it must be an integer above 0",
        )
        for key in ("height", "width")
        for value in (0, -64, 64.0, "64", None)
    },
    "image that is too large": (_set("images", 0, width=2_000_000), "image 7 has 2000000 x 64 pixels .* not decoded"),
    **{
        f"file name {value!r}": (
            _set("images", 0, file_name=value),
            "image 7 has the file_name .*; it must be a path below",
        )
        for value in ("", " ", "/data/0.jpg", "../0.jpg", "a/../../0.jpg", "0\0.jpg", "\ud800.jpg", 0, None)
    },
    **{
        f"name {value!r}": (_set("categories", 0, name=value), "category 1 has the name .*; it must be a text")
        for value in ("", " ", 5, None, "\ud800")
    },
    **{
        f"box {value!r}": (
            _set("annotations", 0, bbox=value),
            r"annotation 1000 has the bbox .*; it must be \[left, top",
        )
        for value in (
            *([1, 2, 3], [1, 2, 3, 4, 5], [1, 2, "3", 4], [1, 2, None, 4], [1, 2, True, 4], "1234", None, {}),
            *([1, 2, -3, 4], [1, 2, 3, -4], [1, 2, 3, math.nan], [-math.inf, 2, 3, 4], [1, 2, 3, 10**400]),
        )
    },
    "box far above": (
        _set("annotations", 0, bbox=[0, -1e9, 5, 5]),
        "1000 has the bbox .* far outside its image of 96 x 64",
    ),
    "box far below": (_set("annotations", 0, bbox=[0, 0, 5, 1e300]), "1000 has the bbox .* far outside its image"),
    **{
        f"area {value!r}": (_set("annotations", 0, area=value), "annotation 1000 has the area .*; it must be a finite")
        for value in ("5", None, -1, math.nan, math.inf, True, 10**400)
    },
    **{
        f"iscrowd {value!r}": (
            _set("annotations", 0, iscrowd=value),
            "annotation 1000 has the iscrowd .*; it must be 0 or 1",
        )
        for value in ("0", None, 2, [], 0.5, math.nan)
    },
    **{
        f"segmentation {value!r}": (
            _mask(value),
            "annotation 1000 has the segmentation .*; it must be a list of polygons",
        )
        for value in ("1,2,3,4,5,6", 5, True)
    },
    **{
        f"polygon {value!r}": (_mask([value]), "annotation 1000 has a polygon .* a flat list of numbers")
        for value in (
            *(5, "123456", None, {"size": [64, 96], "counts": [6144]}, [[1, 2], [3, 4], [5, 6]]),
            *([1, 2, "3", 4, 5, 6], [1, 2, None, 4, 5, 6], [1, 2, True, 4, 5, 6]),
        )
    },
    "flat polygon": (_mask([1, 2, 30, 4, 5, 60]), "annotation 1000 has a polygon .* is 1; it must be a flat list"),
    "second polygon": (_mask([[1, 2, 3, 4, 5, 6], [1]]), "a polygon in its segmentation of 1 number; it needs x and y"),
    **{
        f"polygon of {count}": (
            _mask([[1.5] * count]),
            f"polygon in its segmentation of {count} numbers; it needs x and",
        )
        for count in (0, 2, 4, 7)
    },
    **{
        f"coordinate {value!r} at {place}": (
            _mask([[*range(place), value, *range(place, 5)]]),
            "annotation 1000 has a polygon .* with the coordinate .*, far outside its image of 96 x 64 pixels",
        )
        for value in (math.nan, math.inf, -1e9, 1e9, 193, -97, 10**400)
        for place in (0, 3, 4)
    },
    "mask of another size": (
        _rle([25], (5, 5)),
        r"annotation 1000 has a mask of size \[5, 5\], its image is \[64, 96\]",
    ),
    "mask of no size": (_rle([6144], ()), r"annotation 1000 has a mask of size \[\], its image is"),
    "torn runs": (_rle([25]), "1000 has a torn mask: its segmentation.counts cover 25 of 6144 pixels"),
    "no runs": (_rle([]), "1000 has a torn mask: its segmentation.counts cover 0 of 6144"),
    "negative runs": (_rle([7000, -856]), "1000 has a torn mask: its segmentation.counts have the negative run -856"),
    "huge runs": (_rle([10**400]), "1000 has a torn mask: its segmentation.counts cover 1"),
    **{
        f"runs {value!r}": (_rle(value), "1000 has a torn mask: its segmentation.counts are not all integers")
        for value in (["6144"], [6144.0], [None], [True, 6143], [[6144]])
    },
    **{f"counts {value!r}": (_rle(value), "1000 has a torn mask.*, neither a list nor") for value in (None, 6144, {})},
    **{
        f"counts {value!r}": (_rle(value), "1000 has a torn mask: its segmentation.counts are no compressed runs")
        for value in ("", "R", "01P", "0 1", "0\u00e9", "0\0", "ooooooooo0", "00\x7f")
    },
    "counts of other pixels": (_rle("01"), "1000 has a torn mask: its segmentation.counts cover 1 of 6144 pixels"),
    "negative counts": (_rle("@"), "1000 has a torn mask: its segmentation.counts have the negative run -16"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_annotations_are_named(case: str, tmp_path: Path) -> None:
    spoil, message = WRONG[case]
    content = copy.deepcopy(small_coco())
    spoil(content)
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        open_index(path)
    assert not list(tmp_path.glob("*.index"))


def test_torn_json(tmp_path: Path) -> None:
    path, _ = write_coco(tmp_path)
    path.write_text(path.read_text()[:-100])
    with pytest.raises(UserError, match=r"annotations\.json: not a complete JSON file"):
        open_index(path)


def test_missing_files(tmp_path: Path) -> None:
    path, images = write_coco(tmp_path)
    with pytest.raises(UserError, match=r"nothing\.json: no such annotation file"):
        open_index(tmp_path / "nothing.json")
    with pytest.raises(UserError, match="nowhere: no such image folder"):
        open_split(path, tmp_path / "nowhere", training=True)
    (images / "2.jpg").unlink()
    with pytest.raises(UserError, match=r"images: 1 of 4 annotated images are missing \(2\.jpg\)"):
        open_split(path, images, training=True)


def test_images_in_subfolders(tmp_path: Path) -> None:
    content = small_coco()
    content["images"][0]["file_name"] = "part/0.jpg"
    path, images = write_coco(tmp_path, content)
    with pytest.raises(UserError, match=r"part/0\.jpg"):
        open_split(path, images, training=True)
    (images / "part").mkdir()
    shutil.move(images / "0.jpg", images / "part" / "0.jpg")
    assert len(open_split(path, images, training=True).rows) == 4


def _crowds_only(annotation: dict[str, Any]) -> None:
    annotation["iscrowd"] = 1


def _no_height(annotation: dict[str, Any]) -> None:
    annotation["bbox"][3] = 0


def _no_pixel(annotation: dict[str, Any]) -> None:
    annotation["segmentation"] = [[-9, -9, -7, -9, -7, -7]]  # left of and above the image


@pytest.mark.parametrize("spoil", [_crowds_only, _no_height, _no_pixel, None])
@pytest.mark.parametrize("training", [True, False])
def test_a_set_without_an_object(
    spoil: Callable[[dict[str, Any]], None] | None, training: bool, tmp_path: Path
) -> None:
    content = small_coco()
    if spoil is None:
        content["annotations"] = []
    for annotation in content["annotations"][1:]:
        spoil(annotation)
    path, images = write_coco(tmp_path, content)
    purpose = "train" if training else "evaluate"
    if spoil is not None:
        assert open_split(path, images, training=training).num_samples > 0  # one is left
        spoil(content["annotations"][0])
        write_coco(tmp_path, content)
    with pytest.raises(
        UserError, match=rf"annotations\.json: no object to {purpose} on in its images; crowds, and boxes"
    ):
        open_split(path, images, training=training)


def test_first_images_without_an_object(tmp_path: Path) -> None:
    content = small_coco()
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] == 27]
    path, images = write_coco(tmp_path, content)
    assert len(open_split(path, images, training=False, first=3).rows) == 3
    with pytest.raises(UserError, match=r"no object to evaluate on in the first 2 images; .* or raise first"):
        open_split(path, images, training=False, first=2)


def _warnings(caplog: pytest.LogCaptureFixture, path: Path) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "mrmae_ds"):
        open_index(path)
    return caplog.messages


def test_boxes_of_another_form_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Corners for sizes: the sample's boxes are those of its masks, so that the counts follow from their numbers."""
    content = small_coco()
    expected, outside = [], 0
    for annotation in content["annotations"]:
        left, top, width, height = annotation["bbox"]
        annotation["bbox"] = [left, top, left + width, top + height]
        image = next(image for image in content["images"] if image["id"] == annotation["image_id"])
        outside += left + (left + width) / 2 > image["width"] or top + (top + height) / 2 > image["height"]
        if left > 3 + width / 4 or top > 3 + height / 4:
            expected.append(annotation["id"])
    path, _ = write_coco(tmp_path, content)
    (message,) = _warnings(caplog, path)
    assert outside == 1 and 0 < len(expected) < 18
    assert f"{path}: 1 of 18 boxes have their center outside" in message
    assert f" {len(expected)} of 18 boxes contradict their masks (annotations " in message
    assert "neither x1, y1, x2, y2 nor relative" in message
    assert _warnings(caplog, path) == [message]  # of the index
    monkeypatch.setenv("RANK", "1")
    assert _warnings(caplog, path) == []


def test_boxes_centered_outside_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = small_coco()
    content["annotations"][4]["bbox"] = [60.5, 2, 8, 8]  # of an image of 64 x 96
    content["annotations"][8]["bbox"] = [3, -4.5, 8, 8]
    path, _ = write_coco(tmp_path, content)
    (message,) = _warnings(caplog, path)
    assert (
        "2 of 18 boxes have their center outside the image (annotations 996, 992), 2 of 18 boxes contradict" in message
    )


def test_boxes_near_their_masks_are_right(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Boxes may differ by 3 pixels and a quarter of the side of a mask, and empty masks say nothing."""
    content = small_coco()
    annotation = content["annotations"][0]  # 3, 2, 9, 8
    _no_pixel(content["annotations"][1])
    for box, count in (([3 - 5.2, 2, 9, 8], 0), ([3 - 5.3, 2, 9, 8], 1), ([3, 2, 9, 12.9], 0), ([3, 2, 9, 13.1], 1)):
        annotation["bbox"] = box
        assert len(_warnings(caplog, write_coco(tmp_path, content)[0])) == count


def test_train_and_val_have_the_same_categories(index: CocoIndex, tmp_path: Path) -> None:
    content = small_coco()
    content["categories"][1]["name"] = "bicycle"
    other = open_index(write_coco(tmp_path / "other", content)[0])
    check_same_categories(index, index)
    with pytest.raises(UserError, match=re.escape("number 1 is '3: car', the other '3: bicycle'")):
        check_same_categories(index, other)


@needs_coco200
def test_real_coco(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Counts of the subset, and both forms of its masks: polygons do not follow a mask exactly. Its boxes are right."""
    folder = COCO200 / "annotations"
    for file in folder.glob("*.json"):
        open_index(file, tmp_path)
    assert not caplog.messages
    both = [open_index(folder / name, tmp_path) for name in ("instances_train.json", "instances_train_poly.json")]
    crowds = [sum(index.annotations(row).crowd.sum() for row in range(100)) for index in both]
    assert [index.num_annotations for index in both] == [746, 746] and crowds == [6, 6]
    assert len(both[0].trainable_rows()) == 98
    overlaps = []
    for row in range(100):
        ours, theirs = (index.annotations(row) for index in both)
        assert ours.ids.tolist() == theirs.ids.tolist()
        pairs = zip(ours.masks, theirs.masks, strict=True)
        overlaps += [mask_api.iou([mask], [other], [0])[0, 0] for mask, other in pairs]
    assert min(overlaps) > 0.8 and np.mean(overlaps) == pytest.approx(0.995, abs=0.001)
