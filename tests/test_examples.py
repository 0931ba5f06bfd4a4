"""The examples, and torch.hub's entry points, run as their users run them."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from mrmae_ds.api import ImageEncoder
from mrmae_ds.data.beton.sidecar import check_beton
from tests.support.processes import REPOSITORY
from tests.support.record_runs import VIT, make_recipe, save_pretraining


def test_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["own_data.py", str(tmp_path)])
    runpy.run_path(str(REPOSITORY / "examples" / "own_data.py"))
    infos = [check_beton(tmp_path / f"{part}.beton") for part in ("train", "val")]
    assert [info.num_samples for info in infos] == [64, 16] and list(infos[0].class_names) == ["dark", "bright"]
    assert f"data.train={tmp_path}/train.beton" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("example", "losses"), [("own_teacher", "loss pixels mimic"), ("own_objective", "loss pixels similarity")]
)
def test_own_teacher_and_objective(
    example: str, losses: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    names = runpy.run_path(str(REPOSITORY / "examples" / f"{example}.py"))
    lines = capsys.readouterr().out.splitlines()
    pattern = r"\{" + ", ".join(rf"'{name}': [\d.]+" for name in losses.split()) + r"\}"
    assert len(lines) == 3 and all(re.fullmatch(pattern, line) for line in lines)
    values = [[float(value) for value in re.findall(r"[\d.]+", line)] for line in lines]
    assert len({tuple(line) for line in values}) == 3  # the student changes
    assert all(parameter.grad is None for parameter in names["model"].parameters())


def test_torch_hub(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "val.beton", "MAE", VIT, 32, None)
    save_pretraining(tmp_path, recipe, seed=1)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    loaded = torch.hub.load(str(REPOSITORY), "encoder", str(tmp_path / "pretrain"), source="local")
    expected = ImageEncoder.from_file(tmp_path / "pretrain").features(images)
    assert torch.equal(loaded.features(images).pooled, expected.pooled)
    pretraining = torch.hub.load(str(REPOSITORY), "pretraining", str(tmp_path / "pretrain"), source="local")
    assert pretraining.reconstruct(images).prediction.shape == (2, 3, 32, 32)
    model = torch.hub.load(str(REPOSITORY), "model", "cvit_tiny", source="local", num_classes=5)
    assert model.eval()(torch.rand(1, 3, 32, 32)).shape == (1, 5)
