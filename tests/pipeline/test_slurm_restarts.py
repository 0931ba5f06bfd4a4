from __future__ import annotations

import json
from pathlib import Path

import pytest

from mrmae_ds.errors import UserError
from mrmae_ds.pipeline.slurm_restarts import begin_start, check_another, newest_step, notes_of, resume_option, stage_of
from tests.support.processes import REPOSITORY
from tests.support.records import make_record


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """The folder of a stage that has not begun."""
    return tmp_path / "run" / "pretrain"


def _save(stage: Path, step: int) -> None:
    folder = stage / "checkpoints" / f"step_{step:09d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")


def _begin(stage: Path, restart: int, job: str = "7", max_restarts: int = 50) -> int:
    return begin_start(stage, job, restart, max_restarts, REPOSITORY).step


def test_a_stages_notes_are_outside_its_folder(stage: Path) -> None:
    """Starting anew sets the stage's folder aside, and the job's starts must still be known."""
    assert _begin(stage, 0) == 0
    assert not stage.exists()
    assert stage_of(notes_of(stage)) == stage
    (line,) = notes_of(stage).with_name("pretrain.jsonl").read_text().splitlines()
    assert {key: json.loads(line)[key] for key in ("job", "restart", "step")} == {"job": "7", "restart": 0, "step": 0}
    assert len(json.loads(line)["commit"].rstrip("+")) == 12


def test_the_newest_checkpoint_is_what_was_committed(stage: Path) -> None:
    assert newest_step(stage) == 0
    _save(stage, 20)
    _save(stage, 100)
    (stage / "checkpoints" / "step_000000200").mkdir()  # no manifest: half-written
    assert newest_step(stage) == 100


def test_starts_that_get_further_may_go_on(stage: Path) -> None:
    for restart in range(6):
        assert _begin(stage, restart) == 10 * restart
        _save(stage, 10 * restart + 10)
        check_another(stage, "7", restart, 50, node_lost=False)


def test_a_second_start_without_progress_may_be_and_a_third_not(stage: Path) -> None:
    """Slurm itself starts a job again when it has lost a node, maybe before the first checkpoint."""
    _save(stage, 10)
    _begin(stage, 0)
    _begin(stage, 1)
    with pytest.raises(UserError, match="job 7: its last 2 starts got no further than step 10"):
        _begin(stage, 2)
    _begin(stage, 0, job="8")  # another job is somebody's decision
    _save(stage, 20)
    assert _begin(stage, 2) == 20


def test_only_starts_in_a_row_count(stage: Path) -> None:
    """Here a checkpoint is lost in between."""
    _save(stage, 10)
    _begin(stage, 0)
    _save(stage, 20)
    _begin(stage, 1)
    (stage / "checkpoints" / "step_000000020" / "manifest.json").unlink()
    assert (_begin(stage, 2), _begin(stage, 3)) == (10, 10)
    with pytest.raises(UserError, match="its last 2 starts"):
        _begin(stage, 4)


def test_a_job_that_stopped_where_it_began_is_not_started_again(stage: Path) -> None:
    _save(stage, 10)
    _begin(stage, 0)
    with pytest.raises(UserError, match="got no further than step 10"):
        check_another(stage, "7", 0, 50, node_lost=False)
    check_another(stage, "7", 0, 50, node_lost=True)
    _save(stage, 11)
    check_another(stage, "7", 0, 50, node_lost=False)


@pytest.mark.parametrize("node_lost", [True, False])
def test_restarts_are_counted(node_lost: bool, stage: Path) -> None:
    _begin(stage, 2, max_restarts=3)
    _save(stage, 1)
    check_another(stage, "7", 2, 3, node_lost=node_lost)
    with pytest.raises(UserError, match="started again 3 times, which is MAX_RESTARTS"):
        check_another(stage, "7", 3, 3, node_lost=node_lost)
    with pytest.raises(UserError, match="started again 3 times"):
        _begin(stage, 4, max_restarts=3)
    _begin(stage, 3, max_restarts=3)


def test_a_restarted_job_goes_on_with_what_it_began(stage: Path) -> None:
    """`--resume never` in the command means the first start, or the job would begin anew each time."""
    assert resume_option(stage, "7", 0) is None and resume_option(stage, "7", 1) is None
    stage.mkdir(parents=True)
    make_record(slurm_job="6").write(stage)
    assert resume_option(stage, "7", 1) is None  # lost before it had begun: the folder is still an older job's
    make_record(slurm_job="7").write(stage)
    assert resume_option(stage, "7", 1) == "auto"
    assert resume_option(stage, "7", 0) is None


def test_notes_that_are_not_readable(stage: Path) -> None:
    _begin(stage, 0)
    file = notes_of(stage).with_name("pretrain.jsonl")
    file.write_text(file.read_text() + '{"job": "7"')
    with pytest.raises(UserError, match=r"pretrain\.jsonl.*move it away"):
        _begin(stage, 1)
