"""The stage ``evaluate`` of a detector: results on any number of ranks and of any file, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mrmae_ds.cli import train
from mrmae_ds.detection.coco import open_split
from mrmae_ds.detection.evaluate import coco_scores
from mrmae_ds.detection.predict import Predictor
from mrmae_ds.errors import UserError
from mrmae_ds.records.record import RunRecord
from mrmae_ds.training.evaluate_detector import run_detector
from mrmae_ds.training.evaluation import job
from mrmae_ds.training.job import TrainArgs
from mrmae_ds.weights import resolve
from tests.support.coco import CATEGORIES, small_coco
from tests.support.jobs import ALONE
from tests.support.ranks import Ranks, start
from tests.support.small_detections import RECIPE, detector_of_recipe, overrides
from tests.training.parity.cases import write_engine

NAMES = list(CATEGORIES.values())
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folder with data, and a detector of random weights in ``detector.pth``."""
    model = detector_of_recipe(tmp_path)
    torch.save({"model": model.state_dict()}, tmp_path / "detector.pth")
    statistics = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(statistics))
    name_classes(tmp_path, NAMES)
    return tmp_path


def name_classes(folder: Path, names: list[str]) -> None:
    (folder / "config.json").write_text(json.dumps({"id2label": dict(enumerate(names))}))


def evaluate(folder: Path, name: str, ranks: int = 1) -> Ranks:
    engine = write_engine(folder / "engine.json")
    command = ["--ds_config", engine, "--recipe", RECIPE, "--stage", "evaluate", "--run", folder / name]
    chosen = f"stages.evaluate.members=[{folder / 'detector.pth'}]"
    return start(ranks, [*command, *overrides(folder, chosen)], folder / "logs" / name)


def results_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((folder / name / "evaluate" / "results_val.json").read_text())


@pytest.mark.multi_process
def test_results_are_those_of_single_images(folder: Path) -> None:
    split = open_split(folder / "annotations.json", folder / "images", training=False)
    predictor, expected = Predictor(folder / "detector.pth", CPU), []
    predictor.category_ids = split.index.category_ids
    for row in split.rows.tolist():
        entry = split.index.image(row)
        with Image.open(folder / "images" / entry.name) as image:
            expected += predictor.detect(image.convert("RGB"), entry)
    scores = coco_scores(expected, split.index, split.rows)
    for name, ranks in (("one", 1), ("two", 2)):
        ended = evaluate(folder, name, ranks)
        assert ended.wait(120) == [0] * ranks, ended.text()
        found, record = results_of(folder, name), RunRecord.load(folder / name / "evaluate")
        assert len(found) == len(expected) > 100
        for ours, theirs in zip(found, expected, strict=True):
            assert ours["category_id"] == theirs["category_id"] and ours["image_id"] == theirs["image_id"]
            assert ours["score"] == pytest.approx(theirs["score"], abs=1e-5)
            assert ours["bbox"] == pytest.approx(theirs["bbox"], abs=1e-2)
        assert (record.status, record.results.eval_samples, record.schedule.steps) == ("finished", 6, 0)
        assert record.results.value("box/AP") == pytest.approx(scores.box["AP"], abs=0.1)
        assert [member.file for member in record.members] == ["detector.pth"]
    again = evaluate(folder, "one")
    assert again.wait(120) == [0] and "already finished" in again.text()


@pytest.mark.multi_process
def test_classes_are_matched_by_name(folder: Path) -> None:
    """A detector of the same classes in another order, and of data with some of them."""
    whole = evaluate(folder, "whole")
    assert whole.wait(120) == [0], whole.text()
    content = small_coco()
    content["categories"] = [c for c in content["categories"] if c["name"] != "car"]
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] != 3]
    (folder / "annotations.json").write_text(json.dumps(content))
    part = evaluate(folder, "part")
    assert part.wait(120) == [0], part.text()
    expected = [result for result in results_of(folder, "whole") if result["category_id"] != 3]
    assert results_of(folder, "part") == expected and len(expected) > 100
    (member,) = RunRecord.load(folder / "part" / "evaluate").members
    assert member.of_classes == 4
    name_classes(folder, NAMES[::-1])
    turned = evaluate(folder, "turned")
    assert turned.wait(120) == [0], turned.text()
    swapped = dict(zip(CATEGORIES, reversed(CATEGORIES), strict=True))
    assert sorted(r["score"] for r in results_of(folder, "turned") if r["category_id"] == 90) == sorted(
        r["score"] for r in results_of(folder, "whole") if swapped[r["category_id"]] == 90
    )


def arguments(folder: Path, *more: str) -> TrainArgs:
    """Return the arguments of an evaluation on one rank."""
    engine = Path(write_engine(folder / "engine.json"))
    return TrainArgs(engine, "evaluate", RECIPE, folder / "run", overrides=tuple(overrides(folder, *more)))


def test_configs_and_weights_are_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of another project shows only by its tensors that it holds a detector."""
    read: list[str] = []
    for module, name in ((job, "load_configs"), (resolve, "read_tensor_file")):
        whole = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, n=name, w=whole: read.append(n) or w(*args))
    run = train._prepare(arguments(folder, f"stages.evaluate.members=[{folder / 'detector.pth'}]"), ALONE)
    assert run.func is run_detector and read == ["load_configs", "read_tensor_file"]


def test_evaluations_that_are_refused(folder: Path) -> None:
    path = folder / "detector.pth"
    one = f"stages.evaluate.members=[{path}]"

    def refused(*more: str) -> str:
        with pytest.raises(UserError) as error:
            train._prepare(arguments(folder, *more), ALONE)
        return str(error.value)

    assert "detectors are evaluated one by one" in refused(f"stages.evaluate.members=[{path},{folder / 'x.pth'}]")
    assert "data.detection: evaluating a detector needs" in refused(one, "data.detection=null", "stages.detect=null")
    annotations = folder / "annotations.json"
    whole = annotations.read_text()
    annotations.write_text(json.dumps(small_coco() | {"annotations": []}))
    assert "annotations.json: no object to evaluate on in its images" in refused(one)
    annotations.write_text(whole)
    name_classes(folder, ["ant", *NAMES[1:]])
    assert "and not on 'person'" in refused(one)
    state = torch.load(path)
    state["model"]["rpn.head.cls_logits.bias"][0] = torch.inf
    torch.save(state, path)
    assert "with NaN or infinity: rpn.head.cls_logits.bias" in refused(one)
