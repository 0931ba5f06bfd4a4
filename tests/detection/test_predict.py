"""mrmae detect: figures and results of image files by a finished stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import ExifTags, Image
from pycocotools.coco import COCO

from mrmae_ds.cli.main import main
from mrmae_ds.config.recipe import load_recipe
from mrmae_ds.data.convert.options import WriteOptions
from mrmae_ds.data.loaders.base import LoaderRequest
from mrmae_ds.detection.coco import open_split
from mrmae_ds.detection.detector import build_detector
from mrmae_ds.detection.evaluate import batch_results
from mrmae_ds.detection.loader import DetectionLoader
from mrmae_ds.detection.predict import plan_outputs
from mrmae_ds.errors import UserError
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


def test_folders_are_expanded_and_unreadable_images_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, out = folder / "images", folder / "images" / "found"
    (images / "0.jpg").write_bytes((images / "0.jpg").read_bytes()[:200])
    (images / "more").mkdir()
    (images / "1.jpg").rename(images / "more" / "1.jpg")
    (images / "notes.txt").write_text("no image")
    command = ["detect", str(folder / "run/detect"), str(images), str(images / "2.jpg"), "--out", str(out)]
    for _ in range(2):  # the second call does not take the first one's figures for images
        assert main([*command, "--device", "cpu"]) == 2
        printed, error = capsys.readouterr()
        names = ["2", "3", "4", "5", "more/1"]
        assert [line.partition(":")[0] for line in printed.splitlines()] == [f"{out / name}.png" for name in names]
        start = f"error: 1 of 6 images left out, the others are written: {images / '0.jpg'}: cannot be read ("
        assert error.startswith(start) and error.count("\n") == 1
    assert main([*command[:2], str(images / "notes.txt"), *command[-2:], "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {images / 'notes.txt'}: cannot be read (") and "others" not in error
    (found, *_) = json.loads((out / "more" / "1.json").read_text())
    assert (found["file_name"], found["image_id"]) == ("more/1.jpg", 5)


def test_outputs_have_names_of_their_own(tmp_path: Path) -> None:
    for name in ("a/0.jpg", "a/b/0.jpg", "c/1.jpg", "c/1.png", "c/2.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    out = tmp_path / "out"

    def figures(*names: str, out: Path = out) -> list[str]:
        return [
            str(planned.figure.relative_to(out)) for planned in plan_outputs([tmp_path / name for name in names], out)
        ]

    assert figures("a/0.jpg", "c/1.jpg", "a/../a/0.jpg") == ["0.png", "1.png"]
    assert figures("a") == ["0.png", "b/0.png"]
    assert figures("a/0.jpg", "a/b/0.jpg") == ["0.png", "b/0.png"]
    assert figures("a/b/0.jpg", "a", "c/2.jpg") == ["a/b/0.png", "a/0.png", "c/2.png"]
    assert figures("c", "a/0.jpg") == ["c/1.jpg.png", "c/1.png.png", "c/2.jpg.png", "a/0.jpg.png"]
    assert figures("c/2.jpg", out=tmp_path) == ["2.png"]
    with pytest.raises(UserError, match="a: the output would be beside the images"):  # a/0.png
        figures("a/0.jpg", "a/b/0.jpg", "c/2.jpg", out=tmp_path)
    assert figures("a", out=tmp_path / "a" / "b") == ["0.png"]  # what an earlier call wrote are no images
    (tmp_path / "a" / "0.jpg").unlink()
    with pytest.raises(UserError, match="a: no images but those of"):
        figures("a", out=tmp_path / "a" / "b")


def test_results_are_of_the_upright_image(folder: Path) -> None:
    """A photograph that its EXIF record turns has the figure and the results of the upright one."""
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    with Image.open(folder / "images" / "0.jpg") as image:
        image.save(folder / "upright.png")
        image.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=turned)
        size = image.size
    names, out = ["upright", "turned"], folder / "out"
    paths = [str(folder / f"{name}.png") for name in names]
    options = ["--out", str(out), "--score", "0.1", "--device", "cpu"]
    assert main(["detect", str(folder / "run/detect"), *paths, *options]) == 0
    (one, *_), (other, *_) = found = [json.loads((out / f"{name}.json").read_text()) for name in names]
    assert one["bbox"] == other["bbox"] and len(found[0]) == len(found[1])
    assert other["segmentation"]["size"] == [size[1], size[0]]
    figures = [Image.open(out / f"{name}.png") for name in names]
    assert figures[0].size == figures[1].size == size and figures[0].tobytes() == figures[1].tobytes()


def test_results_are_cocos(folder: Path) -> None:
    """pycocotools loads the files of one call as results of one data set."""
    annotations, out = json.loads((folder / "annotations.json").read_text()), folder / "out"
    options = ["--out", str(out), "--device", "cpu"]
    assert main(["detect", str(folder / "run/detect"), str(folder / "images"), *options]) == 0
    files = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    truth = COCO()
    truth.dataset = annotations | {
        "images": [image | {"id": number} for number, image in enumerate(annotations["images"])],
        "annotations": [],
    }
    truth.createIndex()
    loaded = truth.loadRes([result for results in files for result in results])
    assert len(files) == 6 and loaded.getCatIds() == list(CATEGORIES)
    for number, results in enumerate(files):
        assert len(loaded.getAnnIds(imgIds=number)) == len(results) > 0
        for result in results:
            assert result["category_id"] in CATEGORIES and 0 <= result["score"] <= 1
            left, top, width, height = result["bbox"]
            assert left >= 0 and top >= 0 and width > 0 and height > 0
            assert [top + height, left + width] <= [side + 1e-3 for side in result["segmentation"]["size"]]


def test_wrong_input_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torn = folder / "torn.jpg"
    torn.write_bytes((folder / "images" / "0.jpg").read_bytes()[:200])
    run, image = str(folder / "run" / "detect"), str(folder / "images" / "0.jpg")
    encoder = build_encoder(load_recipe(RECIPE, overrides(folder)).model.spec(), 64)
    about = {"kind": "encoder", **encoder_metadata(encoder), "mean": MEAN, "std": STD}
    (folder / "empty").mkdir()
    save_weights(folder / "encoder" / "model.safetensors", encoder.state_dict(), about)
    for arguments, message in (
        ([run, str(torn)], f"error: {torn}: cannot be read ("),
        ([run, image, "--score", "1.5"], "--score 1.5: scores are 0 to 1"),
        ([run, image, "--score", "nan"], "--score nan: scores are 0 to 1"),
        ([run, image, "--device", "foo"], "--device foo: expected cpu"),
        ([run, str(folder / "empty")], "empty holds no images"),
        ([run, image, "--out", torn], "torn.jpg: cannot be made"),
        ([run, image, "--out", torn.parent / "images"], "images: the output would be beside the images"),
        ([run, folder / "images", "--out", torn.parent / "images"], "images: the output would be beside the images"),
        ([str(folder / "encoder"), image], "holds no whole detector (CViT encoder); name a finished stage"),
        ([run, str(folder / "nowhere.jpg")], "nowhere.jpg: no such file or folder"),
    ):
        assert main(["detect", "--out", str(folder / "out"), *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_an_image_of_too_many_pixels_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WriteOptions, "max_pixels", 100)
    run, image = str(folder / "run" / "detect"), str(folder / "images" / "0.jpg")
    assert main(["detect", run, image, "--out", str(folder / "out")]) == 2
    error = capsys.readouterr().err
    assert "0.jpg: cannot be read (more than 100 pixels)" in error and error.count("\n") == 1
