"""Teachers exist only in stages that use them, in the recipe's placement, and are released afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from mrmae_ds.config.recipe import load_recipe
from mrmae_ds.training.job import TrainArgs, prepare_stage
from mrmae_ds.training.tasks.base import Task
from tests.support.jobs import ALONE, make_batch, make_schedule
from tests.support.processes import finish, rank_processes
from tests.support.release_worker import ENGINE, RECIPE, TEACHER, save_teacher
from tests.support.sample_data import write_sample_beton

pytestmark = pytest.mark.multi_process

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    train, val = write_sample_beton(tmp_path_factory.mktemp("images"), train=64, val=20)
    return f"data.train={train}", f"data.val={val}"


def _task(stage: str, recipe: Path, folder: Path, *overrides: str) -> Task[Any]:
    return prepare_stage(TrainArgs(ENGINE, stage, recipe, folder, "never", overrides), ALONE).task


def test_stage_without_teachers_builds_none(
    images: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(kind: str, *_: object) -> None:
        raise AssertionError(f"a {kind} was built")

    monkeypatch.setattr("mrmae_ds.teachers.build._source", refuse)
    defined = ("teachers.mae={kind: checkpoint, source: nowhere}", *images)
    tasks = [
        _task("finetune", RECIPE, tmp_path, *defined, "stages.finetune.init=scratch"),
        _task("pretrain", TEACHER, tmp_path, *defined),
    ]
    for task in tasks:
        task.to(CPU)
        assert task.teachers == {}
        task.release()
    with pytest.raises(AssertionError, match="a checkpoint was built"):
        _task("pretrain", RECIPE, tmp_path, *defined)


@pytest.mark.parametrize("kind", ["device", "step", "stream"])
def test_released_task_holds_no_teacher_weights_and_computes_no_losses(
    kind: str, images: tuple[str, str], tmp_path: Path
) -> None:
    source = f"teachers.mae.source={save_teacher(tmp_path / 'mae')}"
    task = _task("pretrain", RECIPE, tmp_path, *images, source, f"stages.pretrain.placement={kind}")
    weights = [StorageWeakRef(parameter.untyped_storage()) for parameter in task.teachers["mae"].parameters()]
    task.to(CPU)
    batch, key = make_batch(4), make_schedule().key(0, 0)
    assert task.losses(task.model, batch, key)["loss"] > 0
    assert (task.placed["mae"].resident_bytes > 0) == (kind == "device")
    task.release()
    assert all(storage.expired() for storage in weights)
    with pytest.raises(RuntimeError, match="released"):
        task.losses(task.model, batch, key)
    task.release()
    assert task.teachers["mae"].details["placement"] == kind  # for the record of a run that failed


def test_stage_frees_teacher_memory_on_success_and_failure(tmp_path: Path) -> None:
    program = ("-m", "tests.support.release_worker")
    (ended,) = finish(rank_processes(1, tmp_path, "sharded", program=program), limit_s=280)
    assert ended.status == 0, ended.stderr[-3000:]
    report = json.loads(ended.stdout.splitlines()[-1])
    assert report["failed"] == {"error": "no more", "left": 0, "hooks": 0}
    assert report["ended"] == {"error": None, "left": 0, "hooks": 0}
    assert report["status"] == "finished"
    assert report["teachers"]["mae"]["facts"]["placement"] == "sharded"
    assert load_recipe(tmp_path / "run/pretrain/recipe.yaml").stages.pretrain.placement["mae"].kind == "sharded"
