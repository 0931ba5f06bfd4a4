from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mrmae_ds.data.loaders.base import Batch
from mrmae_ds.distributed.launch import Launch
from mrmae_ds.distributed.signals import StopSignals
from mrmae_ds.errors import StopRequested, TrainingError
from mrmae_ds.training.callbacks.base import Callback, TrainContext
from mrmae_ds.training.checkpoint.train_state import TrainState
from mrmae_ds.training.loop import MAX_BAD_STEPS, train
from mrmae_ds.training.meter import Meter
from mrmae_ds.training.schedule import StageSchedule
from mrmae_ds.training.step_sync import StepStatus, StepSync
from mrmae_ds.training.tasks.base import MicroBatchKey
from tests.support.jobs import (
    ALONE,
    FakeEngine,
    FakeLoader,
    finetune_config,
    make_batch,
    make_schedule,
    optimizer_config,
)

pytestmark = pytest.mark.usefixtures("alone")


class LinearTask:
    """Regression of a linear layer's mean output to 1; its loss is NaN at the given (step, micro-batch)."""

    def __init__(self, bad: set[tuple[int, int]] | None = None) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 1)
        self.teachers: dict[str, Any] = {}
        self.bad = bad or set()
        self.keys: list[MicroBatchKey] = []
        self.seen: list[Batch] = []
        self.steps_applied = 0

    def after_step(self, epoch: float) -> None:
        self.steps_applied += 1

    def losses(self, engine: Any, batch: Batch, key: MicroBatchKey) -> dict[str, Tensor]:
        self.keys.append(key)
        self.seen.append(batch)
        colors = batch.images.float().mean((2, 3)) / 255
        loss = (engine(colors) - 1).square().mean()
        if (key.step, key.index) in self.bad:
            loss = loss * float("nan")
        return {"loss": loss, "half": loss.detach() / 2}


class Events(Callback):
    """Records its calls, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.epochs: list[tuple[int, int]] = []
        self.logged: dict[int, dict[str, float]] = {}
        self.bad: list[tuple[int, int, int]] = []
        self.statuses: list[StepStatus] = []
        self.starts, self.ends, self.closed = 0, 0, 0

    def on_train_start(self, context: TrainContext) -> None:
        self.starts += 1

    def on_epoch_end(self, context: TrainContext, epoch: int) -> dict[str, float]:
        self.events.append(("epoch_end", context.state.step))
        self.epochs.append((epoch, context.state.step))
        return {"top1": 10.0 * epoch}

    def on_log(self, context: TrainContext, values: dict[str, float]) -> None:
        step = context.state.step
        assert step not in self.logged
        self.events.append(("log", step))
        self.logged[step] = values

    def on_step_end(self, context: TrainContext, status: StepStatus) -> None:
        self.events.append(("step_end", context.state.step))
        self.statuses.append(status)

    def on_step_skipped(self, context: TrainContext, status: StepStatus) -> None:
        state = context.state
        assert not status.finite and len(context.step_sync.micro_batches) == 2
        self.bad.append((state.step, state.skipped, state.bad_in_row))

    def on_train_end(self, context: TrainContext) -> None:
        self.ends += 1

    def close(self) -> None:
        self.closed += 1


def _context(
    task: LinearTask,
    events: Events,
    schedule: StageSchedule | None = None,
    state: TrainState | None = None,
    log_every: int = 4,
    signals: StopSignals | None = None,
    batches: list[Batch] | None = None,
) -> TrainContext:
    schedule = schedule or make_schedule()
    loader: Any = FakeLoader(batches or [make_batch(4, side=4)] * 10)
    engine: Any = FakeEngine(task.model, schedule.accumulation)
    fake: Any = task
    return TrainContext(
        engine, fake, loader, schedule, state or TrainState(), StepSync(signals), log_every, callbacks=[events]
    )


def _run(
    task: LinearTask, schedule: StageSchedule, state: TrainState | None = None, log_every: int = 4
) -> tuple[FakeEngine, FakeLoader, Events]:
    batches = schedule.steps_per_epoch * schedule.accumulation
    data = [make_batch(schedule.micro_batch, side=4, seed=i) for i in range(batches)]
    context = _context(task, Events(), schedule, state, log_every, batches=data)
    train(context)
    (events,) = context.callbacks
    engine: Any = context.engine
    loader: Any = context.loader
    return engine, loader, events  # type: ignore[return-value]


# ---- schedule


def test_schedule_counts_steps_and_keys_each_micro_batch() -> None:
    schedule = make_schedule(finetune_config(epochs=3), Launch(2, 0, 4, 4))
    assert (schedule.epochs, schedule.total_steps) == (3, 15)
    assert schedule.key(7, 1) == MicroBatchKey(seed=3, step=7, index=1, rank=2, world_size=4, micro_batch=4)


def _formula(step: int, peak: float, floor: float, warmup: float, epochs: int, per_epoch: int) -> float:
    done = step / per_epoch
    if done < warmup:
        return peak * done / warmup
    return floor + (peak - floor) * (1 + math.cos(math.pi * (done - warmup) / (epochs - warmup))) / 2


def test_lr_of_every_step_follows_the_schedule() -> None:
    stage = finetune_config(epochs=4, optimizer=optimizer_config(lr=0.3, min_lr=0.02, warmup_epochs=1.5))
    schedule = make_schedule(stage, steps_per_epoch=7)
    rates = [schedule.lr_at_step(step) for step in range(28)]
    assert rates == pytest.approx([_formula(step, 0.3, 0.02, 1.5, 4, 7) for step in range(28)], rel=1e-12)
    assert rates[0] == 0.0 and max(rates) <= 0.3


def test_a_step_schedule_divides_the_rate_by_ten_at_its_milestones() -> None:
    optimizer = optimizer_config(lr=0.3, min_lr=0.0, warmup_epochs=1.5, schedule="step", milestones=(2, 3.5))
    schedule = make_schedule(finetune_config(epochs=5, optimizer=optimizer), steps_per_epoch=4)
    rates = [schedule.lr_at_step(step) for step in range(20)]
    expected = [0.3 * step / 6 for step in range(6)] + [0.3] * 2 + [0.03] * 6 + [0.003] * 6
    assert rates == pytest.approx(expected, rel=1e-12)


def test_base_lr_is_scaled_by_the_global_batch() -> None:
    optimizer = optimizer_config(lr=None, base_lr=0.1, warmup_epochs=0)
    schedule = make_schedule(finetune_config(batch_size=1024, optimizer=optimizer))
    assert schedule.lr_at_step(0) == pytest.approx(0.4)


# ---- the loop


def test_equals_a_plain_loop() -> None:
    task, schedule = LinearTask(), make_schedule()
    _, loader, _ = _run(task, schedule)
    torch.manual_seed(0)
    other = nn.Linear(3, 1)
    for step in range(15):
        gradients = [torch.zeros_like(p) for p in other.parameters()]
        for micro in range(2):
            batch = loader.batches[step % 5 * 2 + micro]
            loss = (other(batch.images.float().mean((2, 3)) / 255) - 1).square().mean() / 2
            for total, gradient in zip(gradients, torch.autograd.grad(loss, list(other.parameters())), strict=True):
                total += gradient
        with torch.no_grad():
            for parameter, gradient in zip(other.parameters(), gradients, strict=True):
                parameter -= 0.5 * _formula(step, 0.5, 0.0, 1, 3, 5) * gradient  # 0.5 is the group's lr_scale
    torch.testing.assert_close(task.model.weight, other.weight)
    torch.testing.assert_close(task.model.bias, other.bias)
    assert [(key.step, key.index) for key in task.keys] == [(s, m) for s in range(15) for m in range(2)]
    assert loader.asked == [(0, 0), (1, 0), (2, 0)]


def test_lr_of_a_group_is_the_schedules_times_its_scale() -> None:
    schedule = make_schedule()
    engine, _, _ = _run(LinearTask(), schedule)
    assert engine.rates == pytest.approx([0.5 * _formula(step, 0.5, 0.0, 1, 3, 5) for step in range(15)])


@pytest.mark.parametrize(
    ("log_every", "expected"),
    [
        (4, [1, 4, 5, 8, 10, 12, 15]),
        (1, list(range(1, 16))),
        (5, [1, 5, 10, 15]),
        (7, [1, 5, 7, 10, 14, 15]),
        (100, [1, 5, 10, 15]),
    ],
)
def test_logs_the_first_every_nth_and_the_last_step_of_an_epoch_once(log_every: int, expected: list[int]) -> None:
    _, _, events = _run(LinearTask(), make_schedule(), log_every=log_every)
    assert [step for event, step in events.events if event == "log"] == expected


def test_saves_a_step_before_its_evaluation_and_log_line() -> None:
    """A checkpoint then holds its steps only; an interrupted evaluation or log line is repeated after a resume."""
    _, _, events = _run(LinearTask(), make_schedule(), log_every=100)
    assert [event for event in events.events if event[0] == "step_end"] == [("step_end", step) for step in range(1, 16)]
    others = [event for event in events.events if event[0] != "step_end"]
    expected = [(event, step) for step in (5, 10, 15) for event in ("epoch_end", "log")]
    assert others == [("log", 1), *expected]
    for step in (5, 10, 15):
        at = events.events.index(("step_end", step))
        assert events.events[at + 1 : at + 3] == [("epoch_end", step), ("log", step)]
    assert events.epochs == [(1, 5), (2, 10), (3, 15)]
    assert [values.get("top1") for values in events.logged.values()] == [None, 10.0, 20.0, 30.0]


def test_the_engine_trains_again_after_an_evaluation() -> None:
    class Evaluates(Events):
        def on_epoch_end(self, context: TrainContext, epoch: int) -> dict[str, float]:
            context.engine.eval()
            return {}

    class Watches(LinearTask):
        def losses(self, engine: Any, batch: Batch, key: MicroBatchKey) -> dict[str, Tensor]:
            assert engine.training and engine.module.training
            return super().losses(engine, batch, key)

    context = _context(Watches(), Evaluates())
    train(context)
    assert False in context.engine.modes


def test_logged_losses_are_means_over_the_interval() -> None:
    task, schedule = LinearTask(), make_schedule()
    values: dict[tuple[int, int], float] = {}
    plain = task.losses

    def remembered(engine: Any, batch: Batch, key: MicroBatchKey) -> dict[str, Tensor]:
        losses = plain(engine, batch, key)
        values[key.step, key.index] = losses["loss"].item()
        return losses

    task.losses = remembered
    engine, _, events = _run(task, schedule, log_every=4)
    before = 0
    for step, logged in events.logged.items():
        interval = [value for (s, _), value in values.items() if before <= s < step]
        assert len(interval) == 2 * (step - before)
        assert logged["loss"] == pytest.approx(sum(interval) / len(interval), rel=1e-5)
        assert logged["loss/half"] == pytest.approx(logged["loss"] / 2, rel=1e-5)
        assert logged["lr"] == pytest.approx(_formula(step - 1, 0.5, 0.0, 1, 3, 5))
        assert logged["epoch"] == pytest.approx(step / 5)
        assert logged["skipped_steps"] == 0 and "nonfinite_batches" not in logged
        assert logged["images_per_s"] > 0 and 0 <= logged["data_wait"] <= 1
        before = step
    assert events.logged[15]["grad_norm"] == engine.norm


class Interrupted(Exception):
    pass


class Ends(Events):
    """Interrupts training during a step's save, as a kill would, and keeps the state that the checkpoint would hold."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.counters = at, {}

    def on_step_end(self, context: TrainContext, status: StepStatus) -> None:
        super().on_step_end(context, status)
        state = context.state
        if state.step == self.at:
            meter = Meter.restored([state.meter.state() | {"micro_batch": 4}], ALONE, 4, torch.device("cpu"))
            self.counters = {**vars(state), "meter": meter}
            raise Interrupted


@pytest.mark.parametrize("start", [1, 4, 5, 7, 10, 14, 15])
def test_resumed_run_equals_an_uninterrupted_one(start: int) -> None:
    """Steps, learning rates, keys, log lines, evaluations and weights of both parts equal those of the whole run."""
    whole, schedule = LinearTask(), make_schedule()
    _, _, clean = _run(whole, schedule)
    task, ends = LinearTask(), Ends(start)
    batches = [make_batch(4, side=4, seed=i) for i in range(10)]
    with pytest.raises(Interrupted):
        train(_context(task, ends, schedule, batches=batches))
    task.keys.clear()
    _, loader, events = _run(task, schedule, TrainState(**ends.counters))
    epoch, within = divmod(start, 5)
    asked = [(epoch, 2 * within), *((e, 0) for e in range(epoch + 1, 3))] if start < 15 else []
    assert loader.asked == asked
    assert loader.given == [(s // 5, s % 5 * 2 + m) for s in range(start, 15) for m in range(2)]
    assert [(key.step, key.index) for key in task.keys] == [(s, m) for s in range(start, 15) for m in range(2)]
    assert torch.equal(task.model.weight, whole.model.weight) and torch.equal(task.model.bias, whole.model.bias)
    assert {step for step in ends.logged if step in events.logged} == set()
    together = {**ends.logged, **events.logged}
    assert together.keys() == clean.logged.keys()
    for step, line in clean.logged.items():
        for name in line.keys() - {"images_per_s", "data_wait"}:
            assert together[step][name] == line[name], (step, name)
    evaluated = [event for event in [*ends.events, *events.events] if event[0] == "epoch_end"]
    assert evaluated == [("epoch_end", step) for step in (5, 10, 15)]


# ---- non-finite steps


def test_nonfinite_steps_are_skipped_counted_and_reported() -> None:
    """One non-finite micro-batch skips its whole step; weights and the other losses are those of a run without it."""
    _, _, clean = _run(LinearTask(), make_schedule())
    task = LinearTask(bad={(2, 0), (2, 1), (3, 1), (6, 0)})
    _, _, events = _run(task, make_schedule())
    assert events.bad == [(3, 1, 1), (4, 2, 2), (7, 3, 1)]
    assert events.logged[4]["nonfinite_batches"] == 3
    assert [events.logged[step]["skipped_steps"] for step in (1, 4, 5, 8, 15)] == [0, 2, 2, 3, 3]
    assert math.isfinite(events.logged[4]["loss"]) and math.isfinite(events.logged[4]["loss/half"])
    assert events.logged[1] == pytest.approx(events.logged[1] | {"loss": clean.logged[1]["loss"]})
    assert "nonfinite_batches" not in events.logged[5]
    assert torch.isfinite(task.model.weight).all()


def test_a_skipped_step_changes_no_weight() -> None:
    class Watches(Events):
        def on_step_end(self, context: TrainContext, status: StepStatus) -> None:
            weights[context.state.step] = task.model.weight.detach().clone()

    weights: dict[int, Tensor] = {}
    task = LinearTask(bad={(4, 0)})
    train(_context(task, Watches(), batches=[make_batch(4, side=4, seed=i) for i in range(10)]))
    assert torch.equal(weights[5], weights[4])
    assert not torch.equal(weights[6], weights[5])


def test_step_rejected_by_the_engine_counts_as_skipped() -> None:
    """A finite gradient whose square overflows is rejected by DeepSpeed without a message."""
    events = Events()
    context = _context(LinearTask(), events)
    engine: Any = context.engine
    engine.was_step_applied = lambda: len(engine.rates) != 3
    train(context)
    assert events.bad == [(3, 1, 1)]


@pytest.mark.parametrize("first_bad", [0, 1, 4, 7])
def test_five_consecutive_nonfinite_steps_end_training(first_bad: int) -> None:
    task = LinearTask(bad={(step, step % 2) for step in range(first_bad, 15)})
    events = Events()
    end = first_bad + MAX_BAD_STEPS
    with pytest.raises(TrainingError, match=rf"last {MAX_BAD_STEPS} steps, up to step {end};"):
        train(_context(task, events))
    assert events.bad[-1] == (end, MAX_BAD_STEPS, MAX_BAD_STEPS)
    assert events.events[-1] == ("log", end) and events.logged[end]["skipped_steps"] == MAX_BAD_STEPS
    assert ("step_end", end) not in events.events


def test_finite_step_resets_the_count_of_consecutive_skips() -> None:
    bad = {(step, 0) for step in range(15) if step % MAX_BAD_STEPS}
    _, _, events = _run(LinearTask(bad=bad), make_schedule())
    assert max(row for _, _, row in events.bad) == MAX_BAD_STEPS - 1
    assert events.logged[15]["skipped_steps"] == len(bad)


def test_count_of_consecutive_skips_survives_a_restart() -> None:
    task = LinearTask(bad={(step, 0) for step in range(7, 15)})
    with pytest.raises(TrainingError, match="up to step 9"):
        _run(task, make_schedule(), TrainState(step=7, skipped=3, bad_in_row=3, meter=Meter(batches=0)), log_every=100)


# ---- signals


class Asks(Events):
    """Receives a signal while a step is saved, that is, between two steps."""

    def __init__(self, signals: StopSignals, at: int) -> None:
        super().__init__()
        self.signals, self.at = signals, at

    def on_step_end(self, context: TrainContext, status: StepStatus) -> None:
        super().on_step_end(context, status)
        if context.state.step == self.at:
            self.signals.received = 15


@pytest.mark.parametrize("at", [1, 6, 13])
def test_signal_ends_training_after_saving_the_next_step(at: int) -> None:
    task, signals = LinearTask(), StopSignals()
    events = Asks(signals, at)
    with pytest.raises(StopRequested, match=rf"SIGTERM after step {at + 1};"):
        train(_context(task, events, signals=signals))
    assert events.events[-1] == ("step_end", at + 1)
    assert events.statuses[-1].signal == 15 and not events.statuses[-2].signal


def test_signal_during_the_last_step_does_not_interrupt() -> None:
    task, signals = LinearTask(), StopSignals()
    events = Asks(signals, 14)
    train(_context(task, events, signals=signals))
    assert events.events[-1] == ("log", 15)


# ---- callbacks


def test_a_callback_is_started_ended_and_closed_once() -> None:
    _, _, events = _run(LinearTask(), make_schedule())
    assert (events.starts, events.ends, events.closed) == (1, 1, 1)


def test_a_callback_is_closed_but_not_ended_after_an_error() -> None:
    events = Ends(3)
    with pytest.raises(Interrupted):
        train(_context(LinearTask(), events))
    assert (events.starts, events.ends, events.closed) == (1, 0, 1)


def test_the_task_is_informed_of_applied_steps_only() -> None:
    task = LinearTask(bad={(4, 0), (7, 1)})
    _run(task, make_schedule())
    assert task.steps_applied == 13
