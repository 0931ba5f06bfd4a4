"""Choosing a checkpoint and resuming from it, on one rank; tests/test_faults.py has many."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mrmae_ds.errors import CollectiveError
from mrmae_ds.training.checkpoint import resume as module
from mrmae_ds.training.checkpoint.manifest import EngineLayout
from mrmae_ds.training.checkpoint.resume import layout_conflict, load_checkpoint, verify_checkpoint, verify_start
from mrmae_ds.training.checkpoint.run_dir import RunStart
from mrmae_ds.training.checkpoint.train_state import TrainState
from mrmae_ds.training.meter import Meter
from tests.support.engines import FakeEngine, save, written
from tests.support.jobs import ALONE

pytestmark = pytest.mark.usefixtures("alone")
MODEL = "mp_rank_00_model_states.pt"


def _start(*checkpoints: Path, **changes: Any) -> RunStart:
    return RunStart("resume", checkpoints, **changes)


def _names(stage_dir: Path) -> list[str]:
    return sorted(path.name for path in (stage_dir / "checkpoints").iterdir())


# ---- choosing


@pytest.mark.parametrize("action", ["fresh", "done"])
def test_without_a_checkpoint_there_is_nothing_to_verify(action: Any, tmp_path: Path) -> None:
    assert verify_start(RunStart(action), tmp_path) == RunStart(action)


def test_resumes_from_the_newest_complete_one(tmp_path: Path) -> None:
    old, new = written(tmp_path, 20), written(tmp_path, 40)
    assert verify_start(_start(new, old), tmp_path) == _start(new)
    assert _names(tmp_path) == [old.name, new.name]


@pytest.mark.parametrize("damage", ["flipped", "missing", "short", "manifest"])
def test_skips_a_damaged_checkpoint_and_sets_it_aside(damage: str, tmp_path: Path) -> None:
    old, new = written(tmp_path, 20), written(tmp_path, 40)
    assert verify_checkpoint(new) == ""
    if damage == "flipped":
        (new / MODEL).write_bytes(b"modem")
    elif damage == "missing":
        (new / MODEL).unlink()
    elif damage == "short":
        (new / MODEL).write_bytes(b"mod")
    else:
        (new / "manifest.json").write_text("{")
    assert str(new) in verify_checkpoint(new)
    start = verify_start(_start(new, old, damaged=("an earlier one",)), tmp_path)
    assert start.checkpoint == old and start.damaged[0] == "an earlier one" and str(new) in start.damaged[1]
    assert _names(tmp_path) == [f".left-{new.name}", old.name]


def test_refuses_a_fresh_start_if_none_is_complete(tmp_path: Path) -> None:
    checkpoints = written(tmp_path, 40), written(tmp_path, 20)
    for checkpoint in checkpoints:
        (checkpoint / MODEL).write_bytes(b"modem")
    with pytest.raises(CollectiveError, match=r"no complete checkpoint.*--resume never.*SHA-256"):
        verify_start(_start(*checkpoints), tmp_path)
    assert _names(tmp_path) == ["step_000000020", "step_000000040"]


def test_replaces_no_damaged_checkpoint_that_was_named(tmp_path: Path) -> None:
    old, new = written(tmp_path, 20), written(tmp_path, 40)
    (new / MODEL).write_bytes(b"modem")
    with pytest.raises(CollectiveError, match=rf"{new}.*SHA-256"):
        verify_start(_start(new, named=True), tmp_path)
    assert _names(tmp_path) == [old.name, new.name]


def test_sets_newer_ones_aside_when_an_older_one_is_named(tmp_path: Path) -> None:
    """Otherwise a start after a kill would resume the abandoned branch."""
    old, new, newest = written(tmp_path, 20), written(tmp_path, 40), written(tmp_path, 60)
    assert verify_start(_start(new, named=True), tmp_path).checkpoint == new
    assert _names(tmp_path) == [f".left-{newest.name}", old.name, new.name]


def test_leaves_another_run_alone_when_resuming_from_its_checkpoint(tmp_path: Path) -> None:
    chosen, newer = written(tmp_path / "other", 20), written(tmp_path / "other", 40)
    verify_start(_start(chosen, named=True), tmp_path / "own")
    assert _names(tmp_path / "other") == [chosen.name, newer.name]


def test_reports_ranks_that_find_different_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = written(tmp_path, 20)
    monkeypatch.setattr(module, "gather", lambda value: [value, ("fresh", [])])
    with pytest.raises(CollectiveError, match=r"rank 0 finds checkpoint step_0+20, rank 1 finds no checkpoint;.*share"):
        verify_start(_start(checkpoint), tmp_path)


def test_a_problem_on_one_rank_is_reported_by_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = written(tmp_path, 20)
    monkeypatch.setattr(module, "gather", lambda value: [value, (value[0], ["x: its content is not ..."])])
    assert verify_checkpoint(checkpoint) == "x: its content is not ..."
    monkeypatch.setattr(module, "gather", lambda value: [value, ("another id", [])])
    assert "not the same checkpoint on every node" in verify_checkpoint(checkpoint)


# ---- loading


def test_restores_counters_open_interval_and_random_states(tmp_path: Path) -> None:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    meter = Meter()
    meter.add({"loss": torch.tensor(0.1), "part": torch.tensor(3.0)})
    state = TrainState(step=12, skipped=2, bad_in_row=1, grad_norm=float("inf"), meter=meter)
    saved = FakeEngine()
    saved.module(torch.rand(5, 2))
    path = save(tmp_path, 12, engine=saved, state=state)
    expected = random.random(), np.random.random(), torch.rand(3)
    engine = FakeEngine()
    loaded, manifest = load_checkpoint(engine, path, ALONE, 4)
    assert engine.loaded == [(str(path.parent), path.name)]
    assert (random.random(), np.random.random()) == expected[:2] and torch.equal(torch.rand(3), expected[2])
    assert (loaded.step, loaded.skipped, loaded.bad_in_row, loaded.grad_norm) == (12, 2, 1, float("inf"))
    assert loaded.meter.sums == meter.sums and loaded.meter.batches == 1
    assert torch.equal(engine.module.running_mean, saved.module.running_mean)
    assert engine.module.num_batches_tracked == 1
    assert manifest.results == {"top1": 1.5}


def test_keeps_an_unknown_gradient_norm_unknown(tmp_path: Path) -> None:
    assert load_checkpoint(FakeEngine(), save(tmp_path, 5), ALONE, 4)[0].grad_norm is None


def test_reports_an_engine_that_loads_nothing(tmp_path: Path) -> None:
    with pytest.raises(CollectiveError, match="loaded nothing"):
        load_checkpoint(FakeEngine(loads=False), save(tmp_path, 5), ALONE, 4)


def test_reports_files_that_disagree_on_the_number_of_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 5)
    path = path.rename(path.with_name("step_000000006"))  # the fake engine reads the step from the name
    with pytest.raises(CollectiveError, match=r"disagree on the number of steps.*'the manifest': 5.*'DeepSpeed': 6"):
        load_checkpoint(FakeEngine(), path, ALONE, 4)


# ---- another engine config


def _layout(**changes: Any) -> EngineLayout:
    return EngineLayout(**{"world_size": 2, "zero_stage": 3, "dtype": "float32", "sub_group_size": 1000, **changes})


@pytest.mark.parametrize(
    ("changes", "word"), [({"zero_stage": 2}, "zero_optimization.stage"), ({"dtype": "bfloat16"}, "bf16.enabled")]
)
def test_rejects_another_kind_of_engine_naming_the_key(changes: dict[str, Any], word: str) -> None:
    message = layout_conflict(_layout(), _layout(**changes), Path("c"))
    assert message is not None and word in message and str(next(iter(changes.values()))) in message


def test_accepts_another_number_of_ranks(tmp_path: Path) -> None:
    assert layout_conflict(_layout(), _layout(world_size=7, sub_group_size=50), Path("c")) is None


def test_loads_the_conversion_on_another_number_of_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    path = written(tmp_path, 5, layout=_layout())
    engine = FakeEngine()
    monkeypatch.setattr(module, "convert", lambda checkpoint, manifest: Path("converted"))
    monkeypatch.setattr(module, "load_universal", lambda _, folder: calls.append(folder))
    monkeypatch.setattr(module, "load_state", lambda *_: TrainState(step=5))
    engine.global_steps = 5
    load_checkpoint(engine, path, ALONE, 4)
    assert calls == [Path("converted")] and engine.loaded == []


def test_loads_the_same_file_on_any_number_of_ranks_without_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, 5, layout=_layout(zero_stage=0, sub_group_size=0))
    monkeypatch.setattr(module, "load_state", lambda *_: TrainState(step=5))
    engine = FakeEngine(zero_stage=0)
    load_checkpoint(engine, path, ALONE, 4)
    assert len(engine.loaded) == 1
