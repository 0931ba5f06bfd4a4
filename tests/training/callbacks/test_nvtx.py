"""Ranges of the stages of a step, seen by torch.profiler and by a recorded ``torch.cuda.nvtx``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from mrmae_ds.config.sections import NvtxConfig, ProfilerConfig
from mrmae_ds.profiling.step_ranges import step_range
from mrmae_ds.training.callbacks.base import Callback
from mrmae_ds.training.callbacks.nvtx import NvtxCallback
from mrmae_ds.training.callbacks.profiler import ProfilerCallback
from mrmae_ds.training.loop import train
from tests.support.jobs import FakeLoader, make_batch, make_context, make_schedule, pretrain_config
from tests.training.tasks.test_base import KEY, OwnTeacher, Spy, _mimic, _pretrain_task
from tests.training.test_loop import LinearTask

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("alone")


def _train(callback: Callback) -> None:
    """Run four steps of two micro-batches."""
    schedule = make_schedule(pretrain_config(epochs=2), steps_per_epoch=2)
    task, loader = LinearTask(), FakeLoader([make_batch(4, side=4)] * 4)
    context = make_context(schedule=schedule, task=task, loader=loader, callbacks=[callback])
    train(context)


def test_the_profiler_shows_the_stages_of_a_step(tmp_path: Path) -> None:
    _train(ProfilerCallback(ProfilerConfig(start_step=1, num_steps=1), tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = Counter(event["name"] for event in events if event.get("cat") == "user_annotation")
    expected = {"loader": 2, "forward": 2, "backward": 2, "sync": 1, "optimizer": 1}
    assert {name: names[name] for name in expected} == expected


def test_nvtx_ranges_are_pushed_in_the_window_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    @contextmanager
    def recorded(name: str) -> Iterator[None]:
        calls.append(name)
        yield

    monkeypatch.setattr(torch.cuda.nvtx, "range", recorded)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: calls.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: calls.append("stop"))
    _train(NvtxCallback(NvtxConfig(start_step=1, num_steps=1), torch.device("cuda")))
    micro_batch = ["loader", "forward", "backward"]
    assert calls == ["start", *micro_batch, *micro_batch, "sync", "optimizer", "stop"]


def test_pretraining_separates_teachers_and_student() -> None:
    task = _pretrain_task(_mimic("sample"), OwnTeacher(torch.rand(1, 64)))
    with torch.profiler.profile() as profile:
        callback = NvtxCallback(NvtxConfig(), CPU)
        callback.start()
        task.losses(Spy(), make_batch(4), KEY)
        callback.stop()
    names = [event.name for event in profile.events() if event.name in ("teachers", "student")]
    assert names == ["teachers", "student"]


def test_nothing_is_recorded_by_default() -> None:
    with torch.profiler.profile() as profile, step_range("loader"):
        pass
    assert "loader" not in [event.name for event in profile.events()]


def test_a_window_that_never_opens_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    _train(NvtxCallback(NvtxConfig(start_step=9, num_steps=1), CPU))
    assert caplog.messages[0] == "NVTX ranges: starts at step 9, but the stage ends at step 4; nothing is recorded"
