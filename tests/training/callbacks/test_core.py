"""The callbacks that every training has: evaluation, metrics, checkpoints, capture of skipped steps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mrmae_ds.config.sections import CheckpointConfig
from mrmae_ds.training.callbacks import nonfinite_capture
from mrmae_ds.training.callbacks.base import TrainContext
from mrmae_ds.training.callbacks.checkpoint import CheckpointCallback
from mrmae_ds.training.callbacks.evaluation import EvaluationCallback
from mrmae_ds.training.callbacks.metrics import MetricsCallback
from mrmae_ds.training.callbacks.nonfinite_capture import CaptureSource, NonfiniteCaptureCallback
from mrmae_ds.training.checkpoint.folder import CheckpointPolicy
from mrmae_ds.training.checkpoint.train_state import TrainState
from mrmae_ds.training.evaluation.accuracy import AccuracyEvaluator
from mrmae_ds.training.evaluation.base import Evaluator, Scores
from mrmae_ds.training.step_sync import StepStatus
from tests.support.jobs import make_context

STEPS, EPOCHS = 10, 5


class FixedEvaluator(Evaluator):
    metrics = AccuracyEvaluator.metrics

    def run(self, engine: Any) -> Scores:
        return {"top1": 50.0, "loss": 1.5, "eval_samples": 10}


class FakeCheckpointer:
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


# ---- evaluation and metrics


def test_evaluates_every_few_epochs_and_at_the_end() -> None:
    callback, context = EvaluationCallback(FixedEvaluator(2, EPOCHS)), make_context()
    assert [epoch for epoch in range(1, 6) if callback.on_epoch_end(context, epoch)] == [2, 4, 5]
    assert callback.on_epoch_end(context, 2) == {"top1": 50.0, "val_loss": 1.5}


def test_results_hold_the_first_and_the_last_loss_and_the_newest_evaluation() -> None:
    evaluation, metrics, context = EvaluationCallback(FixedEvaluator(1, 2)), MetricsCallback(None), make_context()
    for step, loss in ((1, 3.0), (10, 2.0), (20, 1.0)):
        context.state.step = step
        if step % STEPS == 0:
            evaluation.on_epoch_end(context, step // STEPS)
        metrics.on_log(context, {"loss": loss})
    assert context.results == {"first_loss": 3.0, "last_loss": 1.0, "top1": 50.0, "loss": 1.5, "eval_samples": 10}


def test_rank_0_writes_the_log_lines() -> None:
    lines: list[Any] = []
    run_logger: Any = SimpleNamespace(log=lambda step, values: lines.append((step, values)))
    context = make_context(state=TrainState(step=7))
    MetricsCallback(run_logger).on_log(context, {"loss": 2.0})
    assert lines == [(7, {"loss": 2.0})]


# ---- checkpoints


def _save(
    steps: int = STEPS * EPOCHS, statuses: dict[int, StepStatus] | None = None, **config: Any
) -> tuple[FakeCheckpointer, TrainContext]:
    checkpointer, context = FakeCheckpointer(), make_context()
    context.step_sync.last_save = 0.0
    fake: Any = checkpointer
    callback = CheckpointCallback(fake, CheckpointPolicy(CheckpointConfig(**config), STEPS, STEPS * EPOCHS))
    for step in range(1, steps + 1):
        context.state.step = step
        callback.on_step_end(context, (statuses or {}).get(step, StepStatus()))
    return checkpointer, context


@pytest.mark.parametrize(
    ("config", "expected"),
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
def test_saves_by_epochs_by_steps_and_at_the_end(config: dict[str, Any], expected: list[int]) -> None:
    assert _save(**config)[0].steps == expected


def test_saves_by_the_clock_and_restarts_it() -> None:
    checkpointer, context = _save(statuses={7: StepStatus(save=True)}, steps=9, every_epochs=None, every_minutes=1)
    assert checkpointer.steps == [7] and context.step_sync.last_save > 0


def test_a_signal_saves_and_waits_for_the_disk() -> None:
    checkpointer, _ = _save(statuses={7: StepStatus(signal=15)}, steps=7, every_epochs=None)
    assert checkpointer.calls[-2:] == [("save", 7), ("finish", None)]


def test_background_writing_is_polled_after_every_step() -> None:
    checkpointer, _ = _save(statuses={2: StepStatus(writing=True)}, steps=2)
    assert checkpointer.calls == [("poll", False), ("poll", True)]


def test_the_end_of_training_waits_for_the_disk() -> None:
    checkpointer: Any = FakeCheckpointer()
    CheckpointCallback(checkpointer, CheckpointPolicy(CheckpointConfig(), 1, 1)).on_train_end(make_context())
    assert checkpointer.calls == [("finish", None)]


def test_epoch_intervals_of_retention_are_converted_to_steps() -> None:
    policy = CheckpointPolicy(CheckpointConfig(keep_last=3, keep_every_epochs=10, keep_every_steps=7), 100, 1000)
    retention = policy.retention()
    assert (retention.keep_last, retention.keep_every) == (3, (1000, 7))


# ---- skipped steps


def test_a_skipped_step_is_captured_and_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(
        nonfinite_capture, "write_capture", lambda *args, **kwargs: calls.append((args, kwargs)) or Path("c/3")
    )
    source = CaptureSource("finetune", 3, "abc", 1, 2, 4, {"a": 1})
    callback = NonfiniteCaptureCallback(Path("runs/x/finetune"), source)
    context = make_context(state=TrainState(step=4, skipped=9, bad_in_row=2))
    callback.on_step_skipped(context, StepStatus(bad_gradient=True))
    (_, folder, given, step, _, micro_batches), kwargs = calls[0]
    assert (folder, step, micro_batches, kwargs) == (Path("runs/x/finetune"), 3, [], {"same_weights": True})
    assert given is source and context.engine.training
    message = "step 4 skipped: a gradient was not finite (9 skipped so far, 2 consecutive)"
    assert f"{message}; repeat it with mrmae replay c/3" in caplog.text
