"""The detection demo: its choice of images, and its whole run on real COCO."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mrmae_ds.records.metrics import read_metrics
from mrmae_ds.records.record import RunRecord
from tests.support.coco import COCO200, needs_coco200, write_coco
from tests.support.processes import finish, rank_processes, run

SUBSET, RECIPE = Path("data/coco_subset.py"), Path("ds_configs/detection/demo.yaml")


def test_images_with_few_large_objects_are_copied(tmp_path: Path) -> None:
    """The first of the small data set has five objects, the others four, the last two none or a crowd."""
    path, images = write_coco(tmp_path)
    command = [
        sys.executable,
        SUBSET,
        images,
        path,
        "--out",
        tmp_path / "out",
        "--max-objects",
        "4",
        "--num-images",
        "2",
    ]
    done = run([*command, "--min-area", "0.001"], 60)
    assert done.status == 0 and done.stdout == f"{tmp_path / 'out'}: 2 images, 8 objects\n", done.stderr
    written, content = json.loads((tmp_path / "out/annotations.json").read_text()), json.loads(path.read_text())
    assert written["images"] == content["images"][1:3] and written["categories"] == content["categories"]
    assert sorted(file.name for file in (tmp_path / "out/images").iterdir()) == ["1.jpg", "2.jpg"]
    refused = run([*command, "--min-area", "0.9"], 60)
    assert refused.status == 2 and "no image with at most 4 large objects" in refused.stderr
    for annotation in content["annotations"]:
        del annotation["area"]  # those of boxes are taken
    path.write_text(json.dumps(content))
    assert run([*command, "--min-area", "0.001"], 60).stdout == done.stdout
    content["annotations"][0]["bbox"] = "3 2 9 8"
    path.write_text(json.dumps(content))
    spoiled = run(command, 60)
    assert spoiled.status == 2 and "annotation 1000 has the bbox '3 2 9 8'; it must be" in spoiled.stderr


@needs_coco200
@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.timeout(2000)
def test_the_demo_learns_boxes_and_masks(tmp_path: Path) -> None:
    """The least of three seeds ended at 0.015 of its first loss, with AP50 of boxes and masks of 100.

    Limits leave room: another version of torch rounds otherwise.
    """
    data, folder = tmp_path / "data", tmp_path / "run"
    annotations = COCO200 / "annotations" / "instances_train.json"
    chosen = run([sys.executable, SUBSET, COCO200 / "images" / "train", annotations, "--out", data], 60)
    assert chosen.status == 0 and "8 images, 13 objects" in chosen.stdout, chosen.stderr
    files = f"{{images: {data / 'images'}, annotations: {data / 'annotations.json'}, first: 8}}"
    arguments = ["--ds_config", RECIPE.with_suffix(".json"), "--stage", "detect", "--run", folder]
    sets = [f"data.detection.{split}={files}" for split in ("train", "val")]
    ended = finish(rank_processes(2, *arguments, *sets), 1900)
    assert [process.status for process in ended] == [0, 0], ended[0].stderr[-4000:]
    record, lines = RunRecord.load(folder / "detect"), read_metrics(folder / "detect")
    assert lines[-1]["loss"] < lines[0]["loss"] / 20
    scores = [record.results.value(name) for name in ("box/AP50", "mask/AP50")]
    assert all(score is not None and score > limit for score, limit in zip(scores, (75, 75), strict=True)), scores
