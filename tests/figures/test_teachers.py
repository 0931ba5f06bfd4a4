"""Tests of ``mrmae teachers``."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from torch import Tensor

from mrmae_ds.cli.main import main
from mrmae_ds.config.recipe import DataConfig, TeacherConfig
from mrmae_ds.data.convert.options import WriteOptions
from mrmae_ds.data.loaders.pillow import center_crop
from mrmae_ds.figures import teachers as teacher_preview
from mrmae_ds.teachers import build_teacher
from mrmae_ds.weights.paths import MODEL_FILE
from tests.support.sample_teachers import VIT, save_run

SIDE = 32


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Two teachers of 8x8 tokens: a run of this project, and a convolutional network's stage."""
    save_run(tmp_path / "run", VIT)
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "resnet.pt")
    mimic = {"tap": "encoder", "tokens": "visible", "normalize": "layer_norm", "weight": 0.5}
    content = {
        "name": "two",
        "method": "MR-MAE",
        "size": "Tiny",
        "model": {"arch": "cvit_tiny", "image_size": SIDE},
        "data": {"train": "absent.beton", "val": "absent.beton"},
        "teachers": {
            "own": {"kind": "checkpoint", "source": str(tmp_path / "run"), "precision": "fp32"},
            "net": {"kind": "timm", "source": "test_resnet", "weights": str(tmp_path / "resnet.pt")},
        },
        "stages": {
            "pretrain": {
                "epochs": 2,
                "batch_size": 8,
                "optimizer": {"lr": 1e-3, "warmup_epochs": 1, "betas": [0.9, 0.95]},
                "crop_scale": [0.5, 1.0],
                "teachers": ["own", "net"],
                "masking": {"keep_ratio": 0.25, "mode": "topk", "teacher": "own"},
                "objectives": {"a": {"target": "own", **mimic}, "b": {"target": "net", **mimic}},
            }
        },
    }
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return tmp_path / "two.yaml"


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(3)
    folder = tmp_path / "images"
    folder.mkdir()
    paths = [folder / f"{name}.png" for name in ("first", "second", "third")]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(path)
    return paths


def test_prints_each_teacher(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["teachers", str(recipe), "teachers.net.precision=fp32", "teachers.net.statistics=student"]) == 0
    out, err = capsys.readouterr()
    own, net = out.rstrip().split("\n\n")
    sha256 = {name: hashlib.sha256((recipe.parent / name).read_bytes()).hexdigest() for name in ("resnet.pt",)}
    run = hashlib.sha256((recipe.parent / "run" / MODEL_FILE).read_bytes()).hexdigest()
    assert own.splitlines()[0] == f"own: checkpoint {recipe.parent / 'run'}"
    assert run in own and sha256["resnet.pt"] in net
    assert "8x8 of width 16, features raw" in own and "in float32" in net
    assert "mean 0.4 0.5 0.6, std 0.2 0.25 0.3" in own and "mean 0.485 0.456 0.406" in net
    assert "class token to patches" in own and "feature norm of stage" in net
    assert err == "" and ".png" not in out


def _expected(recipe: Path, images: list[Path]) -> tuple[Tensor, dict[str, Tensor]]:
    """Pixels and each teacher's importance on them, the teachers built by themselves."""
    cuts = [np.asarray(center_crop(Image.open(path).convert("RGB"), SIDE)) for path in images]
    pixels = torch.from_numpy(np.stack(cuts)).permute(0, 3, 1, 2) / 255
    content = yaml.safe_load(recipe.read_text())
    data = DataConfig(**content["data"])
    teachers = {
        name: build_teacher(name, TeacherConfig(**section), data, SIDE, (8, 8))
        for name, section in content["teachers"].items()
    }
    return pixels, {name: teacher(pixels).importance.reshape(-1, 8, 8) for name, teacher in teachers.items()}


def test_draws_images_maps_and_kept_patches(recipe: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[Any, ...]] = []
    monkeypatch.setattr(teacher_preview, "attention_grid", lambda *args, **kwargs: drawn.append((*args, kwargs)))
    out = recipe.parent / "out.png"
    assert main(["teachers", str(recipe), "--images", *map(str, images), "--out", str(out)]) == 0
    (drawn_pixels, maps, visible, path, texts) = drawn[0]
    pixels, importance = _expected(recipe, images)
    assert path == out and texts["captions"] == ("first.png", "second.png", "third.png")
    torch.testing.assert_close(drawn_pixels, pixels)
    assert list(maps) == [f"own\n{recipe.parent.name}/run", "net\ntest_resnet"]
    for drawn_map, name in zip(maps.values(), importance, strict=True):
        torch.testing.assert_close(drawn_map, importance[name])
    for image in range(3):
        kept = {int(i) for i in visible[image].flatten().nonzero()}
        assert kept == set(np.argsort(importance["own"][image].flatten().numpy())[-16:].tolist())
    assert "topk, by own" in texts["legend"][-1]


VISIBLE = [
    "teachers.own.sees=visible",
    "teachers.own.layers=[0]",
    "stages.pretrain.masking={mode: random, teacher: null}",
]


def test_a_teacher_of_visible_tokens_is_described_and_not_drawn(
    recipe: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[tuple[Any, ...]] = []
    monkeypatch.setattr(teacher_preview, "attention_grid", lambda *args, **kwargs: drawn.append((*args, kwargs)))
    assert main(["teachers", str(recipe), *VISIBLE, "--images", str(images[0])]) == 0
    out = capsys.readouterr().out
    assert "features raw of block 0, visible tokens only" in out and "none (visible tokens only)" in out
    assert list(drawn[0][1]) == ["net\ntest_resnet"]


def test_unreadable_images_are_left_out_and_reported_at_the_end(
    recipe: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[Tensor] = []
    monkeypatch.setattr(teacher_preview, "attention_grid", lambda pixels, *_, **__: drawn.append(pixels))
    monkeypatch.setattr(WriteOptions, "max_pixels", 50 * 70)
    large = images[0].with_name("large.png")
    Image.new("RGB", (50, 71)).save(large)
    out = str(recipe.parent / "out.png")
    assert main(["teachers", str(recipe), "--images", str(images[0].parent), "--out", out]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: 1 of 4 images left out, the others are in {out}: {large}: cannot be read")
    assert "pixels" in error and len(drawn[0]) == 3
    for path in images:
        path.unlink()
    assert main(["teachers", str(recipe), "--images", str(large), "--out", out]) == 2
    assert capsys.readouterr().err.startswith(f"error: {large}: cannot be read") and len(drawn) == 1


def test_the_number_of_images_of_a_folder_can_be_chosen(
    recipe: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Tensor] = []
    monkeypatch.setattr(teacher_preview, "attention_grid", lambda pixels, *_, **__: drawn.append(pixels))
    out = str(recipe.parent / "out.png")
    folder = str(images[0].parent)
    assert main(["teachers", str(recipe), "--images", folder, "--num-images", "2", "--out", out]) == 0
    assert len(drawn[0]) == 2


def test_the_figure_is_written_and_overrides_may_follow_the_images(
    recipe: Path, images: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe.parent)
    late = "stages.pretrain.masking.mode=random"
    assert main(["teachers", str(recipe), "--images", str(images[0].parent), late]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "two_teachers.png"
    with Image.open("two_teachers.png") as figure:
        assert figure.width > 500 and figure.height > 500
    # Without a pre-training there is no mask, and two rows fewer.
    assert main(["teachers", str(recipe), "stages.pretrain=null", "--images", str(images[0].parent)]) == 0
    with Image.open("two_teachers.png") as smaller:
        assert smaller.height < figure.height - 200


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["teachers=null", "stages.pretrain=null"], "recipe two has no teachers"),
        (["teachers.net.stage=0"], "teachers.net: stage 0 does not have the student's 8x8 grid"),
        (["teachers.net.weights=absent.pt"], "teachers.net.weights: absent.pt: no such file"),
        (
            [
                *(*VISIBLE, "teachers.net=null", "stages.pretrain.teachers=[own]", "stages.pretrain.objectives.b=null"),
                *("--images", "docs/assets/overview.png"),
            ],
            "no teacher of recipe two sees the whole image",
        ),
        (["--images", "nowhere.jpg"], "nowhere.jpg"),
        (["--images", "3"], "absent.beton"),
    ],
)
def test_mistakes_are_reported_in_one_line_with_status_2(
    arguments: list[str], error: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["teachers", str(recipe), *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and error in err and err.count("\n") == 1
