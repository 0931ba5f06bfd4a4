"""Runs made by commit d00ec3c are still read, tabulated, recognized, replayed and resumed, bit for bit.

README.md says how they were made. :func:`legacy_runs` is the one place that turns the archive into a folder to use.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from unittest import mock

import pytest
from PIL import Image

from mrmae_ds.config.recipe import load_recipe
from mrmae_ds.config.renamed import former_hash
from mrmae_ds.training.migrate import migrate
from tests.legacy.make import HERE, TRAIN, VAL, unpack_runs
from tests.support.pinned import PINNED, incomparable, weights_sha256
from tests.support.processes import REPOSITORY, Finished, environment, finish, rank_processes, run
from tests.support.sample_data import write_crops_beton
from tests.support.small_runs import curve

pytestmark = pytest.mark.multi_process

MADE = json.loads((HERE / "made_by.json").read_text())
comparable = pytest.mark.skipif(bool(incomparable(MADE)), reason=f"legacy runs: {incomparable(MADE)}")
CAPTURE = "runs/skipped/pretrain/captures/step_000000004"


def encode_whole(image: Image.Image, quality: int) -> bytes:
    """Encode without restart markers."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality, comment=None)
    return stream.getvalue()


def legacy_runs(folder: Path) -> Path:
    """Unpack the runs, the recipes and the data into ``folder``, as its user left it, and migrate them."""
    unpack_runs(folder)
    (folder / "datasets").mkdir()
    with mock.patch("mrmae_ds.data.convert.jpegs.encode", encode_whole):  # as that commit wrote them
        write_crops_beton(folder / "datasets", TRAIN, VAL)
    done, problems = migrate([folder / "recipes", folder / "runs"])
    assert done and not problems, problems
    return folder


def train(folder: Path, run_name: str, stage: str = "pretrain", ranks: int = 2) -> list[Finished]:
    """Run train.py in ``folder`` with the recipe of the legacy runs."""
    command = ["--ds_config", "recipes/mrmae.json", "--stage", stage, "--run", f"runs/{run_name}"]
    processes = rank_processes(ranks, *command, program=[str(REPOSITORY / "train.py")], cwd=folder)
    return finish(processes, 240)


@pytest.fixture
def legacy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder; processes started from here use the pinned kernels."""
    for name, value in PINNED.items():
        monkeypatch.setenv(name, value)
    return legacy_runs(tmp_path)


@comparable
def test_the_data_is_the_same(legacy: Path) -> None:
    """Keep a difference of the data from looking like one of the runs."""
    from mrmae_ds.files import file_sha256

    assert {path.stem: file_sha256(path) for path in (legacy / "datasets").glob("*.beton")} == MADE["data"]


ADDED_COLUMNS = {"fills_no_cell", "val_copies"}  # since these tables were stored


@pytest.mark.parametrize("number", [None, 3])
def test_the_table_is_the_stored_one(number: int | None, legacy: Path) -> None:
    paper = [] if number is None else ["--paper", str(number)]
    done = run(["mrmae", "table", "runs", "--out", "table", *paper], 120, environment(), legacy)
    assert done.status == 0, done.stderr
    for name in (f"table{number or ''}.md", f"table{number or ''}.csv"):
        assert _values(legacy / "table" / name) == _values(HERE / "table" / name, _present_hashes(legacy)), name


def _present_hashes(folder: Path) -> dict[str, str]:
    """Return the runs' present recipe hashes by their former ones: a hash is of a recipe's values under their keys."""
    hashes = {}
    for path in (folder / "runs").glob("*/*/recipe.yaml"):
        recipe, stage = load_recipe(path), path.parent.name
        hashes[former_hash(recipe.counted(stage))] = recipe.hash(stage)
    return hashes


def _values(path: Path, hashes: dict[str, str] | None = None) -> list[list[str]]:
    """Return the cells below the heads of a table's grids: their wording and alignment may change, values may not.

    Args:
        path: a table in Markdown or CSV.
        hashes: present recipe hashes by former ones, to be put in their place.
    """
    text = path.read_text()
    for former, present in (hashes or {}).items():
        text = text.replace(former, present)
    lines = text.splitlines()
    if path.suffix == ".csv":
        head, *rows = csv.reader(lines)
        return [[cell for name, cell in zip(head, row, strict=True) if name not in ADDED_COLUMNS] for row in rows]
    grid = [[cell.strip() for cell in line.split("|")] for line in lines if line.startswith("|")]
    rules = [index for index, cells in enumerate(grid) if not "".join(cells).strip("-:")]
    return [cells for index, cells in enumerate(grid) if index not in rules and index + 1 not in rules]


@comparable
def test_interrupted_run_equals_uninterrupted_run(legacy: Path) -> None:
    done = train(legacy, "interrupted")
    assert [rank.status for rank in done] == [0, 0], done[0].stderr
    stage, whole = legacy / "runs/interrupted/pretrain", json.loads((HERE / "uninterrupted.json").read_text())
    for expected, line in zip(whole["lines"], curve(stage), strict=True):
        assert line == expected, f"step {expected['step']} is the first that differs"
    assert weights_sha256(stage / "model.safetensors") == whole["weights_sha256"]
    assert json.loads((stage / "record.json").read_text())["status"] == "finished"


@comparable
def test_rerunning_a_finished_stage_changes_nothing(legacy: Path) -> None:
    """The recipe, its hash, the data and the teacher are those of the record."""
    weights = legacy / "runs/mrmae/finetune/model.safetensors"
    before = weights.read_bytes()
    (done,) = train(legacy, "mrmae", "finetune", ranks=1)
    assert done.status == 0 and "already finished" in done.stdout, done.stderr
    assert weights.read_bytes() == before


@comparable
def test_a_skipped_step_is_replayed(legacy: Path) -> None:
    done = run(["mrmae", "replay", CAPTURE], 120, environment(), legacy)
    assert done.status == 0, done.stderr
    capture = json.loads((legacy / CAPTURE / "capture.json").read_text())
    losses = [micro["losses"] for rank in capture["ranks"] for micro in rank]
    for loss in losses:
        assert f"pixels {float(loss['pixels']):g}, mimic {float(loss['mimic']):g}" in done.stdout
