"""What a stage does around its steps: when it evaluates, saves and captures, and what it counts as its results."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mrmae_ds.config.sections import CheckpointConfig
from mrmae_ds.training import hooks
from mrmae_ds.training.checkpoint.folder import CheckpointPolicy
from mrmae_ds.training.checkpoint.train_state import TrainState
from mrmae_ds.training.evaluation.accuracy import AccuracyEvaluator
from mrmae_ds.training.evaluation.base import Evaluator, Scores
from mrmae_ds.training.hooks import StageHooks
from mrmae_ds.training.step_sync import StepStatus, StepSync
from tests.support.jobs import finetune_config, make_plan

STEPS = 10


class FakeSaver:
    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def save(self, state: TrainState, results: dict[str, Any]) -> None:
        self.calls.append(("save", state.step))

    def poll(self, any_writing: bool) -> None:
        self.calls.append(("poll", any_writing))

    def finish(self) -> None:
        self.calls.append(("finish", None))

    @property
    def steps(self) -> list[int]:
        return [step for name, step in self.calls if name == "save"]


class Every(Evaluator):
    metrics = AccuracyEvaluator.metrics

    def run(self, engine: Any) -> Scores:
        return {"top1": 50.0, "loss": 1.5, "eval_samples": 10}


def _hooks(
    monkeypatch: pytest.MonkeyPatch, epochs: int = 5, eval_every: int = 2, evaluates: bool = True, **checkpoint: Any
) -> StageHooks:
    evaluator: Any = Every(eval_every, epochs) if evaluates else None
    config = finetune_config(epochs=epochs, eval_every_epochs=eval_every)
    job: Any = SimpleNamespace(
        stage=config,
        schedule=make_plan(config, steps_per_epoch=STEPS),
        recipe=SimpleNamespace(hash=lambda stage: f"abc {stage}"),
        stage_name="finetune",
        engine_config=SimpleNamespace(raw={"a": 1}),
        stage_dir=Path("runs/x/finetune"),
    )
    saves = CheckpointPolicy(CheckpointConfig(**checkpoint), STEPS, STEPS * epochs)
    monitor: Any = SimpleNamespace(beat=lambda doing: None)
    saver: Any = FakeSaver()
    engine: Any = SimpleNamespace(train=lambda: None)
    return StageHooks(job, engine, evaluator, None, saver, saves, StepSync(), monitor, {})


def test_it_evaluates_every_few_epochs_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = _hooks(monkeypatch, epochs=5, eval_every=2)
    evaluated = [epoch for epoch in range(1, 6) if stage.end_of_epoch(epoch, epoch * STEPS)]
    assert evaluated == [2, 4, 5]
    assert stage.end_of_epoch(2, 20) == {"top1": 50.0, "val_loss": 1.5}
    assert _hooks(monkeypatch, evaluates=False).end_of_epoch(2, 20) == {}


def test_results_hold_the_first_and_the_last_loss_and_the_newest_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = _hooks(monkeypatch, epochs=2, eval_every=1)
    for step, loss in ((1, 3.0), (10, 2.0), (20, 1.0)):
        if step % STEPS == 0:
            stage.end_of_epoch(step // STEPS, step)
        stage.log(step, {"loss": loss})
    assert stage.results == {"first_loss": 3.0, "last_loss": 1.0, "top1": 50.0, "loss": 1.5, "eval_samples": 10}


def _saved(stage: StageHooks, steps: int = 50, verdicts: dict[int, StepStatus] | None = None) -> list[int]:
    for step in range(1, steps + 1):
        stage.save(TrainState(step=step), (verdicts or {}).get(step, StepStatus()))
    return stage.saver.steps  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("checkpoint", "expected"),
    [
        ({}, [10, 20, 30, 40, 50]),
        ({"every_epochs": 3}, [30, 50]),
        ({"every_epochs": None}, [50]),
        ({"every_epochs": None, "every_steps": 15}, [15, 30, 45, 50]),
        ({"every_epochs": 2, "every_steps": 15}, [15, 20, 30, 40, 45, 50]),
        ({"every_epochs": None, "keep_every_epochs": 4}, [40, 50]),
        ({"every_epochs": None, "keep_every_steps": 25}, [25, 50]),
    ],
)
def test_it_saves_by_epochs_by_steps_and_at_the_end(
    checkpoint: dict[str, Any], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _saved(_hooks(monkeypatch, **checkpoint)) == expected


def test_it_saves_when_the_clock_says_so_and_starts_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = _hooks(monkeypatch, every_epochs=None, every_minutes=1)
    stage.boundary.last_save = 0.0
    assert _saved(stage, verdicts={7: StepStatus(save=True)}) == [7, 50]
    assert stage.boundary.last_save > 0


def test_a_signal_saves_and_waits_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = _hooks(monkeypatch, every_epochs=None)
    _saved(stage, steps=7, verdicts={7: StepStatus(signal=15)})
    assert stage.saver.calls[-2:] == [("save", 7), ("finish", None)]  # type: ignore[attr-defined]


def test_it_asks_after_what_is_written_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = _hooks(monkeypatch)
    _saved(stage, steps=2, verdicts={2: StepStatus(writing=True)})
    assert stage.saver.calls == [("poll", False), ("poll", True)]  # type: ignore[attr-defined]


def test_keeping_every_few_epochs_is_keeping_every_so_many_steps() -> None:
    plan = CheckpointPolicy(CheckpointConfig(keep_last=3, keep_every_epochs=10, keep_every_steps=7), 100, 1000)
    retention = plan.retention()
    assert (retention.keep_last, retention.keep_every) == (3, (1000, 7))


def test_a_skipped_step_is_captured_and_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(hooks, "write_capture", lambda *args, **kwargs: calls.append((args, kwargs)) or Path("c/3"))
    stage = _hooks(monkeypatch)
    state = TrainState(step=4, skipped=9, bad_in_row=2)
    stage.skipped(state, StepStatus(bad_gradient=True), [])
    (_, folder, division, step, _, micros), kwargs = calls[0]
    assert (folder, step, micros, kwargs) == (Path("runs/x/finetune"), 3, [], {"same_weights": True})
    assert (division.stage, division.seed, division.world_size, division.accumulation) == ("finetune", 3, 1, 2)
    told = capsys.readouterr().err
    assert "step 4 skipped: a gradient was not finite (9 skipped so far, 2 in a row); mrmae replay c/3" in told


def test_the_clock_is_rank_0s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks do not look at theirs; the reduction tells them."""
    boundary = StepSync(save_minutes=1 / 60)
    boundary.last_save -= 2
    ranks = {"rank": 0}
    monkeypatch.setattr("mrmae_ds.training.step_sync.dist.get_rank", lambda: ranks["rank"])
    assert boundary._time_is_up()
    ranks["rank"] = 1
    assert not boundary._time_is_up()
    ranks["rank"] = 0
    boundary.saved()
    assert not boundary._time_is_up()
    assert not StepSync()._time_is_up()
