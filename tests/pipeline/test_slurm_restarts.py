from __future__ import annotations

import json
from pathlib import Path

import pytest

from mrmae_ds.errors import UserError
from mrmae_ds.pipeline.slurm_restarts import (
    check_requeue,
    newest_step,
    record_start,
    resume_option,
    stage_dir_of,
    status_prefix,
)
from tests.support.processes import REPOSITORY
from tests.support.records import make_record


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """Folder of a stage that has not started."""
    return tmp_path / "run" / "pretrain"


def _save(stage: Path, step: int) -> None:
    folder = stage / "checkpoints" / f"step_{step:09d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")


def _start(stage: Path, restart: int, job: str = "7", max_restarts: int = 50) -> int:
    return record_start(stage, job, restart, max_restarts, REPOSITORY).step


def test_starts_are_stored_outside_the_stage_folder(stage: Path) -> None:
    """Starting over moves the stage's folder aside, and the job's starts must stay."""
    assert _start(stage, 0) == 0
    assert not stage.exists()
    assert stage_dir_of(status_prefix(stage)) == stage
    (line,) = status_prefix(stage).with_name("pretrain.jsonl").read_text().splitlines()
    assert {key: json.loads(line)[key] for key in ("job", "restart", "step")} == {"job": "7", "restart": 0, "step": 0}
    assert len(json.loads(line)["commit"].rstrip("+")) == 12


def test_newest_checkpoint_has_a_manifest(stage: Path) -> None:
    assert newest_step(stage) == 0
    _save(stage, 20)
    _save(stage, 100)
    (stage / "checkpoints" / "step_000000200").mkdir()  # no manifest: incomplete
    assert newest_step(stage) == 100


def test_starts_with_progress_are_unlimited(stage: Path) -> None:
    for restart in range(6):
        assert _start(stage, restart) == 10 * restart
        _save(stage, 10 * restart + 10)
        check_requeue(stage, "7", restart, 50, node_lost=False)


def test_third_start_without_progress_is_refused(stage: Path) -> None:
    """Slurm itself requeues a job after a node failure, possibly before the first checkpoint."""
    _save(stage, 10)
    _start(stage, 0)
    _start(stage, 1)
    with pytest.raises(UserError, match="job 7: no progress beyond step 10 in its last 2 starts"):
        _start(stage, 2)
    _start(stage, 0, job="8")  # another job is a user's decision
    _save(stage, 20)
    assert _start(stage, 2) == 20


def test_only_consecutive_starts_count(stage: Path) -> None:
    """A checkpoint is lost in between."""
    _save(stage, 10)
    _start(stage, 0)
    _save(stage, 20)
    _start(stage, 1)
    (stage / "checkpoints" / "step_000000020" / "manifest.json").unlink()
    assert (_start(stage, 2), _start(stage, 3)) == (10, 10)
    with pytest.raises(UserError, match="in its last 2 starts"):
        _start(stage, 4)


def test_job_without_progress_is_not_requeued(stage: Path) -> None:
    _save(stage, 10)
    _start(stage, 0)
    with pytest.raises(UserError, match="no progress beyond step 10"):
        check_requeue(stage, "7", 0, 50, node_lost=False)
    check_requeue(stage, "7", 0, 50, node_lost=True)
    _save(stage, 11)
    check_requeue(stage, "7", 0, 50, node_lost=False)


@pytest.mark.parametrize("node_lost", [True, False])
def test_restarts_are_limited(node_lost: bool, stage: Path) -> None:
    _start(stage, 2, max_restarts=3)
    _save(stage, 1)
    check_requeue(stage, "7", 2, 3, node_lost=node_lost)
    with pytest.raises(UserError, match=r"restarted 3 times \(MAX_RESTARTS\)"):
        check_requeue(stage, "7", 3, 3, node_lost=node_lost)
    with pytest.raises(UserError, match="restarted 3 times"):
        _start(stage, 4, max_restarts=3)
    _start(stage, 3, max_restarts=3)


def test_restarted_job_resumes_its_own_run(stage: Path) -> None:
    """`--resume never` applies to the first start only, or the job would start over each time."""
    assert resume_option(stage, "7", 0) is None and resume_option(stage, "7", 1) is None
    stage.mkdir(parents=True)
    make_record(slurm_job="6").write(stage)
    assert resume_option(stage, "7", 1) is None  # not started: the folder holds another job's run
    make_record(slurm_job="7").write(stage)
    assert resume_option(stage, "7", 1) == "auto"
    assert resume_option(stage, "7", 0) is None


def test_corrupt_start_file_is_reported(stage: Path) -> None:
    _start(stage, 0)
    file = status_prefix(stage).with_name("pretrain.jsonl")
    file.write_text(file.read_text() + '{"job": "7"')
    with pytest.raises(UserError, match=r"pretrain\.jsonl.*move it away"):
        _start(stage, 1)
