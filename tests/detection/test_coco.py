"""COCO reader: every form of mask, the memory-mapped index, and an error for everything that is wrong in the files."""

from __future__ import annotations

import copy
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as mask_api
from pycocotools.coco import COCO

from mrmae_ds.detection import coco
from mrmae_ds.detection.coco import CocoIndex, check_same_categories, open_index, open_split
from mrmae_ds.errors import UserError
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


WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no list": (lambda c: c.pop("categories"), "annotations.json: no list 'categories'"),
    "no key": (lambda c: c["images"][2].pop("height"), r"images\[2\] has no 'height'"),
    "unknown image": (lambda c: _annotation(c, image_id=5), "annotation 1000 names image_id 5, which does not exist"),
    "unknown category": (lambda c: _annotation(c, category_id=2), "annotation 1000 names category_id 2"),
    "repeated image": (lambda c: c["images"][1].update(id=7), "images with the same id: 7"),
    "repeated annotation": (lambda c: _annotation(c, id=999), "annotations with the same id: 999"),
    "repeated name": (lambda c: c["categories"][1].update(name="person"), "categories with the same name: person"),
    "boxes alone": (lambda c: c["annotations"][0].pop("segmentation"), "1 annotation without segmentation.*1000"),
    "empty segmentation": (lambda c: _annotation(c, segmentation=[]), "1 annotation without segmentation.*1000"),
    "short polygon": (lambda c: _annotation(c, segmentation=[[1, 2, 3, 4]]), "annotation 1000 has a polygon of 4 num"),
    "mask of another size": (
        lambda c: _annotation(c, segmentation={"size": [5, 5], "counts": [25]}),
        r"annotation 1000 has a mask of size \[5, 5\], its image 7 is \[64, 96\]",
    ),
    "torn runs": (
        lambda c: _annotation(c, segmentation={"size": [64, 96], "counts": [25]}),
        "annotation 1000 has a torn mask: its runs cover 25 of 6144 pixels",
    ),
    "torn counts": (
        lambda c: _annotation(c, segmentation={"size": [64, 96], "counts": "R2m1"}),
        "annotation 1000 has a torn mask",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_annotations_are_named(case: str, tmp_path: Path) -> None:
    spoil, message = WRONG[case]
    content = copy.deepcopy(small_coco())
    spoil(content)
    path, _ = write_coco(tmp_path, content)
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


def test_no_trainable_image(tmp_path: Path) -> None:
    content = small_coco()
    content["annotations"] = [entry for entry in content["annotations"] if entry["iscrowd"]]
    path, images = write_coco(tmp_path, content)
    assert len(open_split(path, images, training=False).rows) == 6
    with pytest.raises(UserError, match="lacks an image with an annotation that is not a crowd"):
        open_split(path, images, training=True)


def test_train_and_val_have_the_same_categories(index: CocoIndex, tmp_path: Path) -> None:
    content = small_coco()
    content["categories"][1]["name"] = "bicycle"
    other = open_index(write_coco(tmp_path / "other", content)[0])
    check_same_categories(index, index)
    with pytest.raises(UserError, match=re.escape("number 1 is '3: car', the other '3: bicycle'")):
        check_same_categories(index, other)


@needs_coco200
def test_real_coco(tmp_path: Path) -> None:
    """Counts of the subset, and both forms of its masks: polygons do not follow a mask exactly."""
    folder = COCO200 / "annotations"
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
