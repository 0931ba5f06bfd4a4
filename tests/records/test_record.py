from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from mrmae_ds.errors import UserError
from mrmae_ds.records.record import RunRecord, find_records, summarize_finetuning, summarize_pretraining
from mrmae_ds.records.sections import (
    FROM_SCRATCH,
    DataInfo,
    Hardware,
    Init,
    Member,
    Operations,
    Results,
    Schedule,
    StageCost,
    TeacherInfo,
)
from tests.support.records import make_record


def test_loads_a_record_as_written(tmp_path: Path) -> None:
    record = make_record(teachers={"clip": TeacherInfo(kind="clip", source="openai/ViT-B-16", sha256="cd")})
    record.write(tmp_path)
    assert RunRecord.load(tmp_path) == record
    content = json.loads((tmp_path / "record.json").read_text())
    assert content["ended"] == "2025-01-02T00:00:00Z"
    assert content["results"]["top1"] == 80.0
    assert content["teachers"]["clip"]["source"] == "openai/ViT-B-16"


def test_records_contain_no_folder_names(tmp_path: Path) -> None:
    assert DataInfo(dataset="x", file=Path("/home/me/a.beton"), samples=1).file == "a.beton"
    assert Init(file="/home/me/model.safetensors").file == "model.safetensors"
    assert TeacherInfo(kind="own", source="/home/me/dino.safetensors").source == "dino.safetensors"


def test_a_failed_write_keeps_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_record(top1=70.0).write(tmp_path)

    def full_disk(source: Path, target: Path) -> None:
        assert source.parent == target.parent  # else the two may lie on different disks
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="disk full"):
        make_record(top1=90.0).write(tmp_path)
    assert RunRecord.load(tmp_path).results.top1 == 70.0
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_rejects_an_inconsistent_record(tmp_path: Path) -> None:
    make_record(top1=70.0).write(tmp_path)
    early = make_record()
    early.schedule.steps_done = 99
    with pytest.raises(UserError, match=r"record\.json.*99 of 100 steps"):
        early.write(tmp_path)
    endless = make_record()
    endless.ended = None
    with pytest.raises(UserError, match="needs the time at which the run ended"):
        endless.write(tmp_path)
    unlabeled = make_record()
    unlabeled.data.classes = None
    with pytest.raises(UserError, match=r"data\.classes"):
        unlabeled.write(tmp_path)
    assert RunRecord.load(tmp_path).results.top1 == 70.0


@pytest.mark.parametrize("top1", [math.nan, math.inf, 100.5, -1.0])
def test_rejects_an_impossible_accuracy(top1: float) -> None:
    with pytest.raises(ValueError, match="top1"):
        Results(top1=top1, eval_samples=10)


def test_an_accuracy_needs_its_sample_count() -> None:
    with pytest.raises(ValueError, match="eval_samples"):
        Results(top1=50.0)


def test_nonfinite_numbers_become_null(tmp_path: Path) -> None:
    results = Results(loss=math.nan)
    results.mimic = math.inf  # type: ignore[attr-defined]
    make_record(results=results, status="failed").write(tmp_path)
    text = (tmp_path / "record.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["results"]["loss"] is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"schema_version": 1, "na', "unreadable as JSON"),
        ('{"accuracy": 3}', "schema version 1"),
        ("[1, 2]", "schema version 1"),
        ('{"schema_version": 2}', "found 2"),
        ('{"schema_version": 1, "name": "x"}', "method: Field required"),
    ],
)
def test_names_a_file_that_is_not_a_record(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "a" / "record.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        find_records([tmp_path])
    assert str(path) in str(caught.value)
    assert reason in str(caught.value)


def test_names_an_unknown_key(tmp_path: Path) -> None:
    path = make_record().write(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hostname": "node7"}))
    with pytest.raises(UserError, match="hostname"):
        RunRecord.load(tmp_path)


def test_find_records_returns_each_run_once(tmp_path: Path) -> None:
    for name in ("b/finetune", "a/pretrain", "a/pretrain/checkpoints/step_1"):
        make_record().write(tmp_path / name)
    folders = [folder for folder, _ in find_records([tmp_path / "b", tmp_path, tmp_path / "b" / "finetune"])]
    assert folders == [tmp_path / "a/pretrain", tmp_path / "b/finetune"]


def test_names_a_missing_root(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        find_records([tmp_path / "nowhere"])


def test_pretraining_summary_counts_completed_epochs() -> None:
    summary = summarize_pretraining(_stopped(pretrain=None))
    assert (summary.method, summary.epochs, summary.dataset) == ("MR-MAE", 100.0, "Fashion-MNIST")


def _stopped(**fields: Any) -> RunRecord:
    schedule = Schedule(epochs=400, global_batch=8, steps=200, steps_done=50)
    return make_record(results=Results(), stage="pretrain", status="stopped", schedule=schedule, **fields)


def test_pretraining_summary_adds_epochs_of_the_continued_run() -> None:
    assert summarize_pretraining(_stopped(pretrain=20)).epochs == 120.0
    assert summarize_pretraining(_stopped(init=Init(file="released.pth"))).epochs is None


def test_pretrain_epochs_and_method_follow_the_initial_weights() -> None:
    assert (make_record(pretrain=20).pretrain_epochs, make_record(pretrain=20).pretrain_method) == (
        20,
        "MR-MAE",
    )
    scratch = make_record(pretrain=None)
    assert (scratch.pretrain_epochs, scratch.pretrain_method) == (0, FROM_SCRATCH)
    foreign = make_record(init=Init(file="released.pth"))
    assert (foreign.pretrain_epochs, foreign.pretrain_method) == (None, "MR-MAE")


def _ensemble(*tuned: RunRecord | None) -> RunRecord:
    members = [Member(file="model.safetensors", sha256="ab", finetune=t and summarize_finetuning(t)) for t in tuned]
    return make_record(method="Two", stage="evaluate", init=None, members=members)


def test_ensemble_properties_are_those_that_members_share() -> None:
    alike = _ensemble(make_record(seed=0), make_record(seed=1))
    assert (alike.pretrain_method, alike.pretrain_epochs, alike.finetune_epochs) == ("MR-MAE", 20, 10)
    assert alike.finetune_data == make_record().data
    other = _ensemble(make_record(), make_record(method="MAE", pretrain=40, samples=99))
    assert (other.pretrain_method, other.pretrain_epochs, other.finetune_data) == ("Two", None, None)
    unknown = _ensemble(make_record(), None)
    assert (unknown.pretrain_method, unknown.pretrain_epochs, unknown.finetune_epochs) == ("Two", None, None)


def test_loads_an_ensemble_as_written(tmp_path: Path) -> None:
    record = _ensemble(make_record(seed=3), None)
    record.write(tmp_path)
    assert RunRecord.load(tmp_path) == record
    assert [t and t.seed for t in record.finetunings] == [3, None]


def _pretraining(**fields: Any) -> RunRecord:
    values = {
        "stage": "pretrain",
        "pretrain": None,
        "wall_seconds": 900.0,
        "images_seen": 2000,
        "hardware": Hardware(device="H100", count=8, world_size=16),
        "operations": Operations(training=3_000_000),
        "results": Results(images_per_s=12.5),
        **fields,
    }
    return make_record(**values)


def test_summaries_contain_the_stage_cost() -> None:
    spent = summarize_pretraining(_pretraining()).spent
    # A quarter of an hour on 16 processes; 3e6 operations on each of 2000 images.
    assert spent == StageCost(device="H100", device_hours=4.0, images_per_s=12.5, operations=6e9)
    tuned = make_record(wall_seconds=360.0, operations=Operations(training=5, forward=2))
    summary = summarize_finetuning(tuned)
    assert summary.forward == 2 and summary.spent is not None and summary.spent.device_hours == 0.1


def test_a_continued_pretraining_adds_both_costs() -> None:
    first = summarize_pretraining(_pretraining())
    second = summarize_pretraining(_pretraining(init=Init(file="m", pretrain=first), results=Results(images_per_s=9.0)))
    assert second.spent == StageCost(device="H100", device_hours=8.0, images_per_s=None, operations=1.2e10)
    uncounted = _pretraining(init=Init(file="m", pretrain=first), operations=None)
    assert summarize_pretraining(uncounted).spent == StageCost(device="H100", device_hours=8.0, images_per_s=12.5)
    foreign = _pretraining(init=Init(file="released.pth"))
    assert summarize_pretraining(foreign).spent is None


def test_loads_a_record_without_the_newer_fields(tmp_path: Path) -> None:
    path = make_record().write(tmp_path)
    content = json.loads(path.read_text())
    for key in ("model", "design", "operations", "slurm_job"):
        del content[key]
    path.write_text(json.dumps(content))
    assert RunRecord.load(tmp_path) == make_record()
