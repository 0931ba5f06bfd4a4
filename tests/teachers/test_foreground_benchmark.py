"""benchmarks/teacher_foreground.py: masks, patches and the curve by hand, then the whole command."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.support.sample_teachers import VIT, save_run

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "teacher_foreground.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("teacher_foreground", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["teacher_foreground"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# ---- the curve


@pytest.mark.parametrize(
    ("importance", "positive", "auc"),
    [
        ([1, 2, 3, 4], [0, 0, 1, 1], 1.0),
        ([4, 3, 2, 1], [0, 0, 1, 1], 0.0),
        ([1, 2, 3, 4], [0, 1, 0, 1], 0.75),  # of 4 pairs, 3 in order
        ([1, 1, 1, 1], [0, 1, 0, 1], 0.5),
        ([1, 2, 2, 3], [0, 0, 1, 1], 0.875),  # one tie of 4 pairs
        ([1, 2], [0.5, 1], 5 / 6),  # a third of the foreground ties with all of the background, the rest is above it
        ([5, 5], [0.25, 0.75], 0.5),
    ],
)
def test_area_under_curve_equals_that_by_hand(
    script: ModuleType, importance: list[float], positive: list[float], auc: float
) -> None:
    assert script.area_under_curve(np.array(importance, float), np.array(positive, float)) == pytest.approx(auc)


def test_the_area_is_the_share_of_pairs_in_order(script: ModuleType) -> None:
    rng = np.random.default_rng(1)
    importance = rng.integers(0, 6, 40).astype(float)
    foreground = rng.integers(0, 5, 40)  # of 4 pixels a patch
    pixels = [(value, i < count) for value, count in zip(importance, foreground, strict=True) for i in range(4)]
    pairs = [
        1.0 if high > low else 0.5 if high == low else 0.0
        for high, inside in pixels
        if inside
        for low, outside in pixels
        if not outside
    ]
    assert script.area_under_curve(importance, foreground / 4) == pytest.approx(np.mean(pairs))


def test_images_of_one_kind_have_no_area(script: ModuleType) -> None:
    for positive in (np.zeros(3), np.ones(3)):
        assert script.area_under_curve(np.arange(3.0), positive) is None


# ---- masks


def pack(counts: list[int]) -> str:
    """COCO's string of run lengths, as its maskApi writes it."""
    text = ""
    for i, count in enumerate(counts):
        value = count - counts[i - 2] if i > 2 else count
        more = True
        while more:
            bits, value = value & 31, value >> 5
            more = value != -1 if bits & 16 else value != 0
            text += chr((bits | 32 if more else bits) + 48)
    return text


def runs_of(mask: np.ndarray) -> list[int]:
    """Lengths of alternating runs down the columns, background first."""
    counts, current = [0], False
    for value in mask.T.ravel():
        if value != current:
            counts.append(0)
            current = not current
        counts[-1] += 1
    return counts


@pytest.mark.parametrize("shape", [(5, 7), (60, 90)])
def test_run_lengths_plain_and_packed(script: ModuleType, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    mask = np.kron(rng.random((shape[0] // 5, shape[1])) > 0.5, np.ones((5, 1))).astype(bool)
    mask[:, -2:] = True  # a long run, and differences of both signs before it
    for counts in (runs_of(mask), pack(runs_of(mask))):
        assert (script.decode_runs({"counts": counts, "size": list(shape)}) == mask).all()


def test_foreground_is_the_union_of_polygons_and_runs(script: ModuleType) -> None:
    run_mask = np.zeros((8, 10), bool)
    run_mask[6:, 7:] = True
    things = ([[1, 1, 4, 1, 4, 3, 1, 3], [6, 0, 8, 0, 8, 1, 6, 1]], {"counts": runs_of(run_mask), "size": [8, 10]})
    found = script.foreground(script.Annotated(Path("x.jpg"), (8, 10), things))
    expected = run_mask.copy()
    expected[1:4, 1:5] = True
    expected[0:2, 6:9] = True
    assert (found == expected).all()


def test_shares_are_of_the_cut_image(script: ModuleType) -> None:
    mask = np.zeros((16, 24), bool)
    mask[:, 4:12] = True  # the cut is columns 4 to 19
    shares = script.shares(mask, 8, (2, 4))
    np.testing.assert_allclose(shares, [[1, 1, 0, 0]] * 2, atol=0.01)
    mask[:8] = False
    np.testing.assert_allclose(script.shares(mask, 8, (2, 4))[0], 0, atol=0.01)


def test_images_are_cut_like_their_masks(script: ModuleType) -> None:
    image = np.zeros((16, 24, 3), np.uint8)
    image[:, 4:12] = 255
    found = np.asarray(script.cut(Image.fromarray(image), 8, Image.Resampling.BOX))
    assert found.shape == (8, 8, 3)
    assert (found[:, :4] == 255).all() and (found[:, 4:] == 0).all()


# ---- the command


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Three images of noise: a thing in the middle, everything a thing, and one without annotations."""
    rng = np.random.default_rng(2)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images" / "val").mkdir(parents=True)
    boxes = {"a.png": [8, 8, 24, 8, 24, 24, 8, 24], "b.png": [0, 0, 40, 0, 40, 40, 0, 40]}
    content: dict[str, Any] = {"images": [], "annotations": []}
    for number, name in enumerate(("a.png", "b.png", "c.png")):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "images" / "val" / name)
        content["images"].append({"id": number, "file_name": name, "height": 32, "width": 32})
        if name in boxes:
            content["annotations"].append({"image_id": number, "segmentation": [boxes[name]]})
    (tmp_path / "annotations" / "instances_val.json").write_text(json.dumps(content))
    return tmp_path


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    save_run(tmp_path / "run", VIT, image_size=32)
    content = {
        "name": "one",
        "method": "MR-MAE",
        "size": "Tiny",
        "model": {"arch": "cvit_tiny", "image_size": 32},
        "data": {"train": "absent.beton", "val": "absent.beton"},
        "teachers": {"own": {"kind": "checkpoint", "source": str(tmp_path / "run"), "precision": "fp32"}},
        "stages": {},
    }
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "one.yaml"


def test_command_reports_teachers_and_the_center_baseline(
    script: ModuleType, coco: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = coco / "results" / "out.json"
    assert script.main(["--coco", str(coco), "--split", "val", str(recipe), "--out", str(out)]) == 0
    own, center = json.loads(out.read_text())["teachers"]
    assert (own["teacher"], own["grid"], own["images"], len(own["sha256"])) == ("own", "8x8", 1, 64)
    assert own["per_image"].keys() == {"a.png"}  # b has no background, c no annotations
    assert 0 < own["mean_auc"] < 1 and own["standard_error"] is None
    # The thing is the 17x17 pixels from 8 to 24: the inner 4x4 patches, whole, and a pixel's width of the next.
    assert center["mean_auc"] > 0.95
    printed = capsys.readouterr().out.splitlines()
    assert printed[2].startswith("| one.yaml | own |") and f"{own['mean_auc']:.3f}" in printed[2]
    assert printed[3].startswith("| one.yaml | center |")


def test_wrong_folders_annotations_and_images_are_reported(
    script: ModuleType, coco: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, error in (
        (["--split", "train"], "contains neither train/ nor images/train/"),
        (["--split", "val", "--annotations", str(recipe)], "no instance annotations of COCO"),
        (["--split", "val", "--annotations", str(coco / "absent.json")], "absent.json: no instance annotations"),
    ):
        assert script.main(["--coco", str(coco), *arguments, str(recipe)]) == 2
        assert error in capsys.readouterr().err
    (coco / "images" / "val" / "a.png").write_bytes(b"no image")
    assert script.main(["--coco", str(coco), "--split", "val", str(recipe)]) == 2
    assert "a.png: cannot be read as an image" in capsys.readouterr().err
