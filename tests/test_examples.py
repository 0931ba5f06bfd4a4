"""The examples, and torch.hub's entry points, run as their users run them."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from mrmae_ds.api import ImageEncoder
from mrmae_ds.data.beton.sidecar import check_beton
from mrmae_ds.errors import UserError
from tests.support.processes import REPOSITORY
from tests.support.record_runs import CVIT, VIT, make_recipe, save_pretraining
from tests.support.sample_data import SIDE, write_sample_beton


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


NOTEBOOK, RUN = REPOSITORY / "examples" / "pretraining.ipynb", 'RUN = Path("runs/tiny/pretrain")'
SHAPES = "list(map(list, (pixels.shape, rebuilt.masked.shape, attention.teachers['guide'].shape, colors.shape)))"


def notebook_of(run: Path) -> Any:
    """The notebook with another run than the demo's."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (start,) = (cell for cell in notebook.cells if RUN in cell.source)
    start.source = start.source.replace(RUN, f"RUN = Path({str(run)!r})")
    return notebook


@pytest.mark.slow
@pytest.mark.multi_process
def test_the_notebook(tmp_path: Path) -> None:
    write_sample_beton(tmp_path, train=8, val=16)
    save_pretraining(tmp_path / "mae", make_recipe(tmp_path / "val.beton", "MAE", VIT, SIDE, None), seed=1)
    recipe = make_recipe(tmp_path / "val.beton", "MR-MAE", CVIT, SIDE, tmp_path / "mae" / "pretrain")
    save_pretraining(tmp_path / "mrmae", recipe, seed=2)
    notebook = notebook_of(tmp_path / "mrmae" / "pretrain")
    notebook.cells.append(nbformat.v4.new_code_cell(SHAPES))
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    executed = client.execute()  # by a kernel of its own
    outputs = [output for cell in executed.cells for output in cell.get("outputs", ())]
    images = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(set(images)) == 3 and not [output for output in outputs if output.output_type == "error"]
    side, grid = [8, 3, SIDE, SIDE], SIDE // 4
    assert outputs[-1].data["text/plain"] == str([side, side, [8, grid, grid], [8, 3, grid, grid]])


def test_the_notebook_without_its_run_names_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(NOTEBOOK.parent)
    code = [cell.source for cell in notebook_of(tmp_path / "absent").cells if cell.cell_type == "code"]
    with pytest.raises(UserError, match=r"absent is missing: run `make demo` in the repository, or set RUN"):
        exec(code[0], {})


def test_the_notebook_is_stored_without_outputs() -> None:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
