"""Runs whose initial or evaluated weights were made over since are found, and named where their results are shown."""

from __future__ import annotations

import os
import shutil
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

import pytest
import yaml

from mrmae_ds.cli.inspect import describe
from mrmae_ds.records.record import RunRecord
from mrmae_ds.records.sections import Init, Member, TeacherInfo
from mrmae_ds.tables.markdown import to_markdown
from mrmae_ds.tables.scaling import scaling_table
from mrmae_ds.weights.changed import changed_weights
from tests.support.records import make_record

OLD, NEW = b"weights of seed 0", b"weights of seed 7"


def _run(folder: Path, init: str | Path = "pretrain") -> tuple[Path, RunRecord]:
    """A fine-tuning in ``folder`` that started from OLD."""
    stage = folder / "finetune"
    record = make_record(pretrain=20)
    assert record.init is not None
    record.init = Init(file="model.safetensors", sha256=sha256(OLD).hexdigest(), pretrain=record.init.pretrain)
    record.write(stage)
    (stage / "recipe.yaml").write_text(yaml.safe_dump({"stages": {"finetune": {"init": str(init)}}}))
    _write(folder / "pretrain", OLD)
    return stage, record


def _write(stage: Path, content: bytes) -> Path:
    stage.mkdir(parents=True, exist_ok=True)
    (stage / "model.safetensors").write_bytes(content)
    return stage / "model.safetensors"


@pytest.mark.parametrize("named", ["pretrain", "folder", "file"])
def test_finds_initial_weights_that_were_made_over(named: str, tmp_path: Path) -> None:
    file = tmp_path / "pretrain" / "model.safetensors"
    run = _run(tmp_path, {"folder": file.parent, "file": file}.get(named, named))
    assert changed_weights(*run) == []
    _write(file.parent, NEW)
    assert changed_weights(*run) == [file]


def test_finds_evaluated_weights_that_were_made_over(tmp_path: Path) -> None:
    files = [_write(tmp_path / name / "finetune", OLD) for name in ("a", "b")]
    member = Member(file="model.safetensors", sha256=sha256(OLD).hexdigest())
    record = make_record(stage="evaluate", pretrain=None, members=(member, member))
    (tmp_path / "a" / "evaluate").mkdir()
    members = [str(file.parent) for file in files]
    (tmp_path / "a/evaluate/recipe.yaml").write_text(yaml.safe_dump({"stages": {"evaluate": {"members": members}}}))
    assert changed_weights(tmp_path / "a" / "evaluate", record) == []
    _write(files[1].parent, NEW)
    assert changed_weights(tmp_path / "a" / "evaluate", record) == [files[1]]


@pytest.mark.parametrize("kind", ["checkpoint", "timm"])
def test_finds_a_teacher_that_was_made_over(kind: str, tmp_path: Path) -> None:
    file = _write(tmp_path / "teacher" / "pretrain", OLD)
    teacher = TeacherInfo(kind=kind, source="x", sha256=sha256(OLD).hexdigest())
    record = make_record(stage="pretrain", pretrain=None, teachers={"t": teacher, "tag": teacher})
    named = {"source": str(file.parent), "weights": None} if kind == "checkpoint" else {"weights": str(file)}
    tag = {"kind": "clip", "source": "ViT-B-16", "weights": "openai"}
    recipe = {"teachers": {"t": {"kind": kind, **named}, "tag": tag}, "stages": {"pretrain": {"init": None}}}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert changed_weights(tmp_path / "a", record) == []
    _write(file.parent, NEW)
    assert changed_weights(tmp_path / "a", record) == [file]


def test_a_file_older_than_the_run_is_not_read(tmp_path: Path) -> None:
    stage, record = _run(tmp_path)
    record.started = datetime.now(UTC) + timedelta(minutes=1)
    _write(tmp_path / "pretrain", NEW)
    assert changed_weights(stage, record) == []


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_finds_weights_of_an_older_run_in_their_place(how: str, tmp_path: Path) -> None:
    """``mv`` and ``cp -p`` keep the time at which the content was written."""
    stage, record = _run(tmp_path)
    before = record.started.timestamp() - 60
    older = _write(tmp_path / "older", NEW)
    os.utime(older, (before, before))
    file = tmp_path / "pretrain" / "model.safetensors"
    if how == "moved":
        older.replace(file)
    else:
        shutil.copy2(older, file)
    assert changed_weights(stage, record) == [file]


@pytest.mark.parametrize("gone", ["pretrain/model.safetensors", "finetune/recipe.yaml"])
def test_what_is_gone_is_no_finding(gone: str, tmp_path: Path) -> None:
    run = _run(tmp_path)
    _write(tmp_path / "pretrain", NEW)
    (tmp_path / gone).unlink()
    assert changed_weights(*run) == []


def test_check_and_table_name_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = _run(tmp_path / "run")
    assert "OTHER WEIGHTS" not in describe(run[0])
    assert "other weights" not in to_markdown(scaling_table([run]))
    _write(tmp_path / "run" / "pretrain", NEW)
    assert f"OTHER WEIGHTS  {tmp_path / 'run/pretrain/model.safetensors'} was made over" in describe(run[0])
    assert "| run/finetune (of other weights than run/pretrain has by now) |" in to_markdown(scaling_table([run]))
