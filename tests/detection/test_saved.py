"""Whole detectors on disk: released ones in check, detection and export, each by the same verdict."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mrmae_ds.cli.inspect import describe
from mrmae_ds.cli.main import main
from mrmae_ds.detection.saved import open_detector
from mrmae_ds.errors import UserError
from mrmae_ds.imagenet import IMAGENET_MEAN
from mrmae_ds.teachers.sources.checkpoint import encoder_attention
from mrmae_ds.weights.detectors import SCORES
from mrmae_ds.weights.finished_run import open_saved
from mrmae_ds.weights.model_file import read_metadata
from tests.fixtures import load_reference, part
from tests.support.detectors import NUM_CLASSES, SIDE, load_whole, reference_batch, small_detector
from tests.support.sample_data import photograph

NAMES = ["ant", "bee", "cat", "dog", "emu"]


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return load_reference("mask_rcnn")


@pytest.fixture
def released(reference: dict[str, Tensor], tmp_path: Path) -> Path:
    """A file of the authors' ViTDet-style code, with a configuration that has what no tensor shows."""
    path = tmp_path / "model_final.pth"
    torch.save({"model": part(reference, "state/")}, path)
    (tmp_path / "config.json").write_text(json.dumps({"id2label": dict(enumerate(NAMES))}))
    return path


def rows_of(path: Path) -> dict[str, str]:
    return {row[:13].strip(): row[13:].strip() for row in describe(path).splitlines()[1:]}


def detections(path: Path, reference: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    images, sizes, _ = reference_batch(reference)
    with torch.no_grad():
        return open_detector(path).load()(images, sizes)


def test_released_detector_is_used_whole_without_a_recipe(released: Path, reference: dict[str, Tensor]) -> None:
    saved = open_detector(released)
    assert (saved.image_size, saved.metadata["class_names"], saved.metadata["category_ids"]) == (
        SIDE,
        NAMES,
        [1, 2, 3, 4, 5],
    )
    assert saved.metadata["mean"] == list(IMAGENET_MEAN)
    rows = rows_of(released)
    assert rows["input"].endswith("by MCMAE's architecture") and rows["heads"].startswith("2, by the width of its rel")
    for i, found in enumerate(detections(released, reference)):
        assert torch.equal(found["labels"], reference[f"det{i}/classes"].long() + 1)
        torch.testing.assert_close(found["scores"], reference[f"det{i}/scores"], atol=1e-5, rtol=1e-4)


def test_exported_detector_is_the_same(released: Path, reference: dict[str, Tensor], tmp_path: Path) -> None:
    out = tmp_path / "out" / "detector.safetensors"
    out.parent.mkdir()
    assert main(["export", str(released), "--out", str(out)]) == 0
    metadata = read_metadata(out)
    assert (metadata["kind"], metadata["class_names"], metadata["input_size"]) == ("detector", NAMES, SIDE)
    for ours, theirs in zip(detections(out, reference), detections(released, reference), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    rows = rows_of(out)
    assert rows["classes"] == "ant, bee, cat, dog, emu" and rows["written by"].startswith("this project")
    for path in (released, out):
        with pytest.raises(UserError, match="windows and relative positions"):
            open_saved(path)


def test_check_prints_how_to_use_it(released: Path) -> None:
    rows = rows_of(released)
    assert rows["kind"] == "whole ViTDet-style detector in Detectron2's names, Mask R-CNN"
    assert rows["detector"].startswith("5 classes, image 128, window 5, global blocks 1, channels 16, box convs 4")
    assert rows["use it"] == (
        f"stages.detect.init={released} with model.arch=cvit_tiny model.overrides.dims=[8,16,24] "
        "model.overrides.patches=[4,2,2] model.overrides.num_heads=2 "
        "model.image_size=64 stages.detect.image_size=128 stages.detect.detector.window=5 "
        "stages.detect.detector.global_blocks=[1] stages.detect.detector.channels=16 stages.detect.detector.fc=32"
    )
    assert rows["its encoder"] == f"stages.detect.init={released}#backbone.net"
    assert rows["evaluate it"] == f"stages.evaluate.members=[{released}]"
    assert rows_of(Path(f"{released}#backbone.net"))["use it"].startswith("stages.detect.init=")


def test_what_no_tensor_shows_is_refused_with_the_fix(released: Path) -> None:
    released.with_name("config.json").unlink()
    message = "does not record the names of its 5 classes; put a config.json"
    with pytest.raises(UserError, match=message):
        open_detector(released)
    assert message in rows_of(released)["refused yet"]
    load_whole(small_detector(), released)  # a recipe has them


def test_80_classes_are_cocos(released: Path, reference: dict[str, Tensor]) -> None:
    state = part(reference, "state/")
    for name, rows in (("box_predictor.cls_score", 1), ("box_predictor.bbox_pred", 4), ("mask_head.predictor", 1)):
        for kind in ("weight", "bias"):
            full = f"roi_heads.{name}.{kind}"
            count = 81 if "cls_score" in name else 80 * rows
            state[full] = state[full][:1].expand(count, *state[full].shape[1:]).clone()
    torch.save({"model": state}, released)
    released.with_name("config.json").unlink()
    metadata = open_detector(released).metadata
    names, ids = metadata["class_names"], metadata["category_ids"]
    assert len(names) == 80 and (names[0], ids[0]) == ("person", 1) and (names[-1], ids[-1]) == ("toothbrush", 90)
    assert (names[11], ids[11]) == ("stop sign", 13)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_check_and_loading_refuse_the_same(released: Path, value: float, capsys: pytest.CaptureFixture[str]) -> None:
    content = torch.load(released)
    content["model"]["roi_heads.box_predictor.cls_score.weight"][0, 0] = value
    torch.save(content, released)
    problem = f"1 tensor with NaN or infinity: {SCORES}"
    rows = rows_of(released)
    assert rows["NOT USABLE"] == problem and "use it" not in rows and "its encoder" in rows
    with pytest.raises(UserError, match=problem):
        load_whole(small_detector(), released)
    image = released.with_name("image.jpg")
    photograph().crop((0, 0, 96, 64)).save(image)
    out = released.with_name("out.safetensors")
    for command in (["detect", str(released), str(image), "--out", str(out)], ["export", str(released)]):
        assert main(command) == 2
        assert problem in capsys.readouterr().err


def test_check_refuses_what_a_model_of_its_sizes_lacks(released: Path) -> None:
    content = torch.load(released)
    removed = content["model"].pop("backbone.simfp_3.0.weight")
    torch.save(content, released)
    assert "differs from the model's in 1 tensor (backbone.simfp_3.0.weight)" in rows_of(released)["NOT USABLE"]
    content["model"]["backbone.simfp_3.0.weight"] = removed[:, :1]
    torch.save(content, released)
    assert rows_of(released)["NOT USABLE"].startswith("backbone.simfp_3.0.weight is (24, 1, 2, 2), expected")
    with pytest.raises(UserError, match=r"simfp_3\.0\.weight is"):
        open_detector(released)


def test_files_that_are_no_detector(tmp_path: Path) -> None:
    path = tmp_path / "encoder.pth"
    torch.save({"model": {f"backbone.net.{n}": t for n, t in small_detector().encoder.state_dict().items()}}, path)
    with pytest.raises(UserError, match=r"holds no whole detector \(CViT encoder\)"):
        open_detector(path)
    assert len(NAMES) == NUM_CLASSES


def test_show_draws_the_encoders_attention(released: Path, reference: dict[str, Tensor], tmp_path: Path) -> None:
    """Attention that cells receive in the last block, by torch's formula; its windows and tables are the file's."""
    released.write_bytes(_all_global(released))
    saved = open_saved(released, detectors=True)
    encoder, images = saved.load(), torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    attention, seen = encoder.blocks3[-1].attn, []
    handle = attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        found = encoder_attention(encoder, images).importance
    handle.remove()
    x = seen[0].flatten(1, 2)
    q, k, _ = attention.qkv(x).reshape(2, 64, 3, 2, 12).permute(2, 0, 3, 1, 4)
    expected = torch.zeros(2, 64)
    for query in range(64):
        for head in range(2):
            cells = range(64)
            rows = torch.stack([attention.rel_pos_h[query // 8 - cell // 8 + 7] for cell in cells])
            columns = torch.stack([attention.rel_pos_w[query % 8 - cell % 8 + 7] for cell in cells])
            logits = (q[:, head, query, None] * (12**-0.5 * k[:, head] + rows + columns)).sum(dim=2)
            expected += logits.softmax(dim=1) / 128
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    image = tmp_path / "image.jpg"
    photograph().crop((0, 0, 200, 160)).save(image)
    assert main(["show", str(released), "--images", str(image), "--out", str(tmp_path / "shown")]) == 0
    assert (tmp_path / "shown" / "attention.png").stat().st_size > 1000


def _all_global(path: Path) -> bytes:
    """Return the file with the last block's tables of a global block."""
    content = torch.load(path)
    for axis in "hw":
        content["model"][f"backbone.net.blocks3.2.attn.rel_pos_{axis}"] = torch.randn(15, 12)
    changed = io.BytesIO()
    torch.save(content, changed)
    return changed.getvalue()


def test_a_last_block_in_windows_is_not_drawn(released: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = released.with_name("image.jpg")
    photograph().crop((0, 0, 96, 64)).save(image)
    assert main(["show", str(released), "--images", str(image)]) == 2
    assert "attends in windows" in capsys.readouterr().err
