"""COCO's scores while a detector trains: every image once on any number of ranks, and what rank 0 writes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from mrmae_ds.config.engine import load_engine_config
from mrmae_ds.config.recipe import load_recipe
from mrmae_ds.distributed.launch import Launch
from mrmae_ds.training.evaluation.base import EvalContext
from mrmae_ds.training.tasks.build import build_task
from mrmae_ds.training.tasks.detect import DetectTask
from tests.support.coco import CATEGORIES, small_coco
from tests.support.ranks import run_in_group
from tests.support.small_detections import RECIPE, overrides, write_detection_data
from tests.training.parity.cases import write_engine

pytestmark = pytest.mark.multi_process
CPU = torch.device("cpu")


def evaluate(rank: int, world_size: int, folder: Path) -> None:
    """Evaluate a detector with random weights; write this rank's scores."""
    torch.set_num_threads(1)
    recipe = load_recipe(RECIPE, overrides(folder))
    engine = load_engine_config(folder / "engine.json")
    torch.manual_seed(5)
    task = build_task(recipe, "detect", engine, len(CATEGORIES))
    assert isinstance(task, DetectTask)
    out = folder / f"ranks{world_size}"
    out.mkdir(exist_ok=True)
    _, val = task.open_data(recipe)
    context = EvalContext(recipe, engine, Launch(rank, rank, world_size, world_size), CPU, val, lambda _: None, out)
    evaluator = task.build_evaluator(context)
    scores = evaluator.run(task.model)
    evaluator.loader.close()
    (out / f"scores{rank}.json").write_text(json.dumps(scores))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Evaluations by one, two and four ranks; six images, so that four ranks repeat two of them."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_detection_data(folder)
    write_engine(folder / "engine.json")
    for world_size in (1, 2, 4):
        run_in_group(evaluate, world_size, folder)
    return folder


@pytest.mark.parametrize("world_size", [2, 4])
def test_results_do_not_depend_on_the_ranks(world_size: int, folder: Path) -> None:
    alone, together = folder / "ranks1", folder / f"ranks{world_size}"
    for name in ("results_val.json", "per_class.csv", "predictions.png"):
        assert (together / name).read_bytes() == (alone / name).read_bytes()
    scores = json.loads((alone / "scores0.json").read_text())
    for rank in range(world_size):
        assert json.loads((together / f"scores{rank}.json").read_text()) == scores


def test_results_and_scores(folder: Path) -> None:
    out = folder / "ranks1"
    results = json.loads((out / "results_val.json").read_text())
    assert {result["category_id"] for result in results} <= CATEGORIES.keys() and len(results) > 6
    assert {result["image_id"] for result in results} <= {image["id"] for image in small_coco()["images"]}
    scores = json.loads((out / "scores0.json").read_text())
    assert scores["eval_samples"] == 6
    assert {"box/AP", "box/AP50", "box/AR100", "mask/AP", "mask/AP75"} <= scores.keys()
    with (out / "per_class.csv").open() as file:
        classes = list(csv.DictReader(file))
    assert [line["class"] for line in classes] == list(CATEGORIES.values())
    mean = sum(float(line["box AP"]) for line in classes) / len(classes)
    assert mean == pytest.approx(scores["box/AP"], abs=0.01)
    with Image.open(out / "predictions.png") as figure:
        assert figure.width > 800
