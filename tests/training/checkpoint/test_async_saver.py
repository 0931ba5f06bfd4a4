"""Checkpoints written in the background: consistent, and committed only once everything is on the disk."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from mrmae_ds.errors import CollectiveError
from mrmae_ds.training.checkpoint import async_saver as module
from mrmae_ds.training.checkpoint.async_saver import AsyncCheckpointer, copy_to_cpu
from mrmae_ds.training.checkpoint.folder import Retention, list_checkpoints
from mrmae_ds.training.checkpoint.save import Snapshot, WriteResult
from mrmae_ds.training.checkpoint.train_state import TrainState
from tests.support.engines import IDENTITY, FakeEngine

pytestmark = pytest.mark.usefixtures("alone")
OPTIM, MODEL = "zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"


class Gate:
    """Holds the writing thread until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.passed = threading.Event(), 0
        plain = module.write_shards

        def write(snapshot: Snapshot) -> WriteResult:
            assert self.open.wait(30)
            self.passed += 1
            return plain(snapshot)

        monkeypatch.setattr(module, "write_shards", write)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def _saver(stage_dir: Path, engine: FakeEngine, background: bool = True) -> tuple[AsyncCheckpointer, list[Any]]:
    commits: list[Any] = []
    saver = AsyncCheckpointer(
        engine, stage_dir, IDENTITY, Retention(2), 4, background,
        lambda folder, step, results: commits.append((folder.name, step, results)),
    )  # fmt: skip
    return saver, commits


def _names(stage_dir: Path) -> list[str]:
    return [path.name for path in list_checkpoints(stage_dir)]


def test_commits_at_once_in_the_foreground(tmp_path: Path) -> None:
    saver, commits = _saver(tmp_path, FakeEngine(), background=False)
    saver.save(TrainState(step=5), {"top1": 1.0})
    assert _names(tmp_path) == ["step_000000005"] and commits == [("step_000000005", 5, {"top1": 1.0})]
    assert not saver.writing()
    saver.poll(False)
    saver.finish()
    assert len(commits) == 1


def test_background_save_writes_the_state_at_the_time_of_the_call(tmp_path: Path, gate: Gate) -> None:
    """Weights, counters and results change while the thread writes."""
    weights = torch.zeros(3)
    state, results = TrainState(step=5, skipped=1), {"top1": 1.0}
    state.meter.add({"loss": torch.tensor(2.0)})
    saver, commits = _saver(tmp_path, FakeEngine({OPTIM: {"w": [weights]}, MODEL: {"w": weights}}))
    saver.save(state, results)
    weights += 7
    state.step, state.skipped = 6, 2
    state.meter.sums["loss"] += 1
    results["top1"] = 2.0
    assert saver.writing() and _names(tmp_path) == [] and commits == []
    gate.open.set()
    saver.finish()
    assert commits == [("step_000000005", 5, {"top1": 1.0})]
    (path,) = list_checkpoints(tmp_path)
    for name in (OPTIM, MODEL):
        saved = torch.load(path / name, weights_only=True)["w"]
        assert torch.equal(saved[0] if name == OPTIM else saved, torch.zeros(3))
    saved_state = torch.load(path / "rank_00000.pt", weights_only=True)
    assert (saved_state["step"], saved_state["skipped"], saved_state["meter"]["sums"]["loss"].item()) == (5, 1, 2.0)


def test_commits_once_no_rank_is_writing(tmp_path: Path, gate: Gate) -> None:
    saver, commits = _saver(tmp_path, FakeEngine())
    saver.save(TrainState(step=5), {})
    saver.poll(any_writing=True)
    gate.open.set()
    while saver.writing():
        pass
    saver.poll(any_writing=True)  # another rank is still writing
    assert commits == [] and _names(tmp_path) == []
    saver.poll(any_writing=False)
    assert _names(tmp_path) == ["step_000000005"]
    saver.poll(any_writing=False)
    assert len(commits) == 1


def test_waits_for_the_previous_save(tmp_path: Path, gate: Gate) -> None:
    saver, commits = _saver(tmp_path, FakeEngine())
    saver.save(TrainState(step=5), {})
    threading.Timer(0.2, gate.open.set).start()
    saver.save(TrainState(step=6), {})
    saver.finish()
    assert [name for name, _, _ in commits] == ["step_000000005", "step_000000006"] and gate.passed == 2


def test_raises_a_failure_of_the_thread_in_the_foreground(tmp_path: Path) -> None:
    class Unwritable:
        def __reduce__(self) -> Any:
            raise TypeError("cannot be pickled")

    engine = FakeEngine()
    saver, commits = _saver(tmp_path, engine)
    saver.save(TrainState(step=5), {})
    saver.finish()
    engine.shards = {OPTIM: 1, MODEL: Unwritable()}
    saver.save(TrainState(step=10), {})
    with pytest.raises(CollectiveError, match=r"after step 10 was not saved.*cannot be pickled"):
        saver.finish()
    assert _names(tmp_path) == ["step_000000005"] and len(commits) == 1
    saver.finish()


def test_copies_share_no_tensor() -> None:
    state = OrderedDict(a=torch.ones(2), b=[torch.ones(3), {"c": (torch.ones(1), 5, "text", torch.Size([2, 3]))}])
    state._metadata = {"version": 1}  # type: ignore[attr-defined]
    copy = copy_to_cpu(state)
    assert isinstance(copy, OrderedDict) and copy._metadata == {"version": 1}  # type: ignore[attr-defined]
    state["a"] += 1
    state["b"][0] += 1
    state["b"][1]["c"][0].add_(1)
    assert copy["a"].tolist() == [1, 1] and copy["b"][0].tolist() == [1, 1, 1]
    tensor, *rest = copy["b"][1]["c"]
    assert tensor.item() == 1 and rest == [5, "text", torch.Size([2, 3])]
    assert torch.ones(4)[:2].untyped_storage().nbytes() == 16
    assert copy_to_cpu(torch.ones(4)[:2]).untyped_storage().nbytes() == 8
