"""mrmae detect: figures and results of image files by a finished stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from mrmae_ds.cli.main import main
from mrmae_ds.config.recipe import load_recipe
from mrmae_ds.data.convert.options import WriteOptions
from mrmae_ds.data.loaders.base import LoaderRequest
from mrmae_ds.detection.coco import open_split
from mrmae_ds.detection.detector import build_detector
from mrmae_ds.detection.evaluate import batch_results
from mrmae_ds.detection.loader import DetectionLoader
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.weights.model_file import encoder_metadata, save_weights
from tests.support.coco import CATEGORIES
from tests.support.small_detections import RECIPE, detector_of_recipe, overrides

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folder with images, and a finished stage with random weights in ``run/detect``."""
    model, recipe = detector_of_recipe(tmp_path), load_recipe(RECIPE, overrides(tmp_path))
    about = {
        "kind": "detector",
        **encoder_metadata(model.encoder),
        "num_classes": len(CATEGORIES),
        "class_names": list(CATEGORIES.values()),
    }
    about |= {"category_ids": list(CATEGORIES), "mean": MEAN, "std": STD, "recipe": recipe.model_dump(mode="json")}
    save_weights(tmp_path / "run" / "detect" / "model.safetensors", model.state_dict(), about)
    return tmp_path


def test_detections_are_those_of_the_evaluation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = folder / "images" / "3.jpg"
    assert (
        main(["detect", str(folder / "run/detect"), str(image), "--out", str(folder / "out"), "--device", "cpu"]) == 0
    )
    printed = capsys.readouterr().out
    found = json.loads((folder / "out" / "3.json").read_text())
    drawn = sum(result["score"] >= 0.5 for result in found)
    assert printed == f"{folder / 'out' / '3.png'}: {drawn} object{'' if drawn == 1 else 's'}\n"
    with Image.open(folder / "out" / "3.png") as figure, Image.open(image) as original:
        assert figure.size == original.size
    recipe = load_recipe(RECIPE, overrides(folder))
    assert recipe.stages.detect is not None
    torch.manual_seed(1)
    model = build_detector(recipe.model, recipe.stages.detect, len(CATEGORIES)).eval()
    split = open_split(folder / "annotations.json", folder / "images", training=False)
    loader = DetectionLoader(split, LoaderRequest("val", 64, 1), None, 0, torch.device("cpu"))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    (batch,) = [batch for batch in loader.epoch(0) if batch.entries[0].name == "3.jpg"]
    with torch.no_grad():
        results = batch_results(model(batch.normalized(mean, std), batch.sizes), batch, split.index.category_ids)
    ((_, expected),) = results.items()
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["category"] == CATEGORIES[theirs["category_id"]] and ours["file_name"] == "3.jpg"
        assert {key: ours[key] for key in ("bbox", "score", "segmentation", "category_id")} == {
            key: theirs[key] for key in ("bbox", "score", "segmentation", "category_id")
        }


def test_wrong_input_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torn = folder / "torn.jpg"
    torn.write_bytes((folder / "images" / "0.jpg").read_bytes()[:200])
    other = folder / "other" / "0.jpg"
    other.parent.mkdir()
    other.write_bytes((folder / "images" / "0.jpg").read_bytes())
    run, image = str(folder / "run" / "detect"), str(folder / "images" / "0.jpg")
    encoder = build_encoder(load_recipe(RECIPE, overrides(folder)).model.spec(), 64)
    about = {"kind": "encoder", **encoder_metadata(encoder), "mean": MEAN, "std": STD}
    save_weights(folder / "encoder" / "model.safetensors", encoder.state_dict(), about)
    for arguments, message in (
        ([run, str(torn)], "torn.jpg: not a readable image"),
        ([run, image, str(other)], "0: two images have this name"),
        ([str(folder / "encoder"), image], "holds no whole detector (CViT encoder); name a finished stage"),
        ([run, str(folder / "nowhere.jpg")], "nowhere.jpg: no such file or folder"),
    ):
        assert main(["detect", *arguments, "--out", str(folder / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_an_image_of_too_many_pixels_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WriteOptions, "max_pixels", 100)
    run, image = str(folder / "run" / "detect"), str(folder / "images" / "0.jpg")
    assert main(["detect", run, image, "--out", str(folder / "out")]) == 2
    error = capsys.readouterr().err
    assert "0.jpg: not a readable image (more than 100 pixels)" in error and error.count("\n") == 1
