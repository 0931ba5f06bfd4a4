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
from mrmae_ds.training.checkpoint.train_state import TrainState
from mrmae_ds.training.loop import MAX_BAD_STEPS, train
from mrmae_ds.training.meter import Meter
from mrmae_ds.training.schedule import StageSchedule
from mrmae_ds.training.step_sync import MicroBatch, StepStatus, StepSync
from mrmae_ds.training.tasks.base import MicroBatchKey
from tests.support.jobs import ALONE, FakeEngine, FakeLoader, finetune_config, make_batch, make_plan, optimizer_config

pytestmark = pytest.mark.usefixtures("alone")


class LinearTask:
    """Pulls the mean output of a linear layer to 1; not a number at the given (step, micro)."""

    def __init__(self, bad: set[tuple[int, int]] | None = None) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 1)
        self.teachers: dict[str, Any] = {}
        self.bad = bad or set()
        self.keys: list[MicroBatchKey] = []
        self.seen: list[Batch] = []
        self.steps_applied = 0

    def after_step(self) -> None:
        self.steps_applied += 1

    def losses(self, engine: Any, batch: Batch, key: MicroBatchKey) -> dict[str, Tensor]:
        self.keys.append(key)
        self.seen.append(batch)
        colors = batch.images.float().mean((2, 3)) / 255
        loss = (engine(colors) - 1).square().mean()
        if (key.step, key.index) in self.bad:
            loss = loss * float("nan")
        return {"loss": loss, "half": loss.detach() / 2}


class Hooks:
    """Writes down what it is told, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.epochs: list[tuple[int, int]] = []
        self.logged: dict[int, dict[str, float]] = {}
        self.bad: list[tuple[int, int, int]] = []
        self.verdicts: list[StepStatus] = []

    def end_of_epoch(self, epochs: int, step: int) -> dict[str, float]:
        self.events.append(("end_of_epoch", step))
        self.epochs.append((epochs, step))
        return {"top1": 10.0 * epochs}

    def log(self, step: int, values: dict[str, float]) -> None:
        assert step not in self.logged
        self.events.append(("log", step))
        self.logged[step] = values

    def save(self, state: TrainState, verdict: StepStatus) -> None:
        self.events.append(("save", state.step))
        self.verdicts.append(verdict)

    def skipped(self, state: TrainState, verdict: StepStatus, micros: list[MicroBatch]) -> None:
        assert not verdict.finite and len(micros) == 2
        self.bad.append((state.step, state.skipped, state.bad_in_row))


def _run(
    task: LinearTask, plan: StageSchedule, state: TrainState | None = None, log_every: int = 4
) -> tuple[FakeEngine, FakeLoader, Hooks]:
    engine = FakeEngine(task.model, plan.accumulation)
    batches = plan.steps_per_epoch * plan.accumulation
    reader = FakeLoader([make_batch(plan.micro_batch, side=4, seed=i) for i in range(batches)])
    hooks = Hooks()
    train(engine, task, reader, plan, state or TrainState(), log_every, hooks, StepSync())
    return engine, reader, hooks


# ---- the arithmetic of a stage


def test_steps_and_keys() -> None:
    plan = make_plan(finetune_config(epochs=3), Launch(2, 0, 4, 4))
    assert (plan.epochs, plan.total_steps) == (3, 15)
    assert plan.key(7, 1) == MicroBatchKey(seed=3, step=7, index=1, rank=2, world_size=4, micro_batch=4)


def _formula(step: int, peak: float, floor: float, warmup: float, epochs: int, per_epoch: int) -> float:
    done = step / per_epoch
    if done < warmup:
        return peak * done / warmup
    return floor + (peak - floor) * (1 + math.cos(math.pi * (done - warmup) / (epochs - warmup))) / 2


def test_the_rate_of_every_step_follows_the_schedule() -> None:
    stage = finetune_config(epochs=4, optimizer=optimizer_config(lr=0.3, min_lr=0.02, warmup_epochs=1.5))
    plan = make_plan(stage, steps_per_epoch=7)
    rates = [plan.lr_at_step(step) for step in range(28)]
    assert rates == pytest.approx([_formula(step, 0.3, 0.02, 1.5, 4, 7) for step in range(28)], rel=1e-12)
    assert rates[0] == 0.0 and max(rates) <= 0.3


def test_a_base_rate_is_scaled_by_the_global_batch() -> None:
    optimizer = optimizer_config(lr=None, base_lr=0.1, warmup_epochs=0)
    plan = make_plan(finetune_config(batch_size=1024, optimizer=optimizer))
    assert plan.lr_at_step(0) == pytest.approx(0.4)


# ---- the loop


def test_it_trains_as_a_plain_loop_does() -> None:
    task, plan = LinearTask(), make_plan()
    _, reader, _ = _run(task, plan)
    torch.manual_seed(0)
    other = nn.Linear(3, 1)
    for step in range(15):
        gradients = [torch.zeros_like(p) for p in other.parameters()]
        for micro in range(2):
            batch = reader.batches[step % 5 * 2 + micro]
            loss = (other(batch.images.float().mean((2, 3)) / 255) - 1).square().mean() / 2
            for total, gradient in zip(gradients, torch.autograd.grad(loss, list(other.parameters())), strict=True):
                total += gradient
        with torch.no_grad():
            for parameter, gradient in zip(other.parameters(), gradients, strict=True):
                parameter -= 0.5 * _formula(step, 0.5, 0.0, 1, 3, 5) * gradient  # 0.5 is the group's lr_scale
    torch.testing.assert_close(task.model.weight, other.weight)
    torch.testing.assert_close(task.model.bias, other.bias)
    assert [(key.step, key.index) for key in task.keys] == [(s, m) for s in range(15) for m in range(2)]
    assert reader.asked == [(0, 0), (1, 0), (2, 0)]


def test_every_step_gets_its_own_rate_times_the_groups_scale() -> None:
    plan = make_plan()
    engine, _, _ = _run(LinearTask(), plan)
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
def test_the_first_every_nth_and_each_epochs_last_step_are_logged_once(log_every: int, expected: list[int]) -> None:
    _, _, hooks = _run(LinearTask(), make_plan(), log_every=log_every)
    assert [step for event, step in hooks.events if event == "log"] == expected


def test_a_step_is_saved_before_what_follows_it() -> None:
    """So a checkpoint's steps are done and nothing else: an evaluation or a line that a kill cuts short comes again."""
    _, _, hooks = _run(LinearTask(), make_plan(), log_every=100)
    assert [event for event in hooks.events if event[0] == "save"] == [("save", step) for step in range(1, 16)]
    others = [event for event in hooks.events if event[0] != "save"]
    expected = [(event, step) for step in (5, 10, 15) for event in ("end_of_epoch", "log")]
    assert others == [("log", 1), *expected]
    for step in (5, 10, 15):
        at = hooks.events.index(("save", step))
        assert hooks.events[at + 1 : at + 3] == [("end_of_epoch", step), ("log", step)]
    assert hooks.epochs == [(1, 5), (2, 10), (3, 15)]
    assert [values.get("top1") for values in hooks.logged.values()] == [None, 10.0, 20.0, 30.0]


def test_the_engine_trains_again_after_an_evaluation() -> None:
    class Evaluates(Hooks):
        engine: FakeEngine

        def end_of_epoch(self, epochs: int, step: int) -> dict[str, float]:
            self.engine.eval()
            return {}

    class Watches(LinearTask):
        def losses(self, engine: Any, batch: Batch, key: MicroBatchKey) -> dict[str, Tensor]:
            assert engine.training and engine.module.training
            return super().losses(engine, batch, key)

    task, plan, hooks = Watches(), make_plan(), Evaluates()
    engine = hooks.engine = FakeEngine(task.model, plan.accumulation)
    reader = FakeLoader([make_batch(4, side=4)] * 10)
    train(engine, task, reader, plan, TrainState(), 4, hooks, StepSync())
    assert False in engine.modes


def test_what_is_logged_is_the_mean_of_its_interval() -> None:
    task, plan = LinearTask(), make_plan()
    values: dict[tuple[int, int], float] = {}
    plain = task.losses

    def remembered(engine: Any, batch: Batch, key: MicroBatchKey) -> dict[str, Tensor]:
        losses = plain(engine, batch, key)
        values[key.step, key.index] = losses["loss"].item()
        return losses

    task.losses = remembered
    engine, _, hooks = _run(task, plan, log_every=4)
    before = 0
    for step, logged in hooks.logged.items():
        interval = [value for (s, _), value in values.items() if before <= s < step]
        assert len(interval) == 2 * (step - before)
        assert logged["loss"] == pytest.approx(sum(interval) / len(interval), rel=1e-5)
        assert logged["loss/half"] == pytest.approx(logged["loss"] / 2, rel=1e-5)
        assert logged["lr"] == pytest.approx(_formula(step - 1, 0.5, 0.0, 1, 3, 5))
        assert logged["epoch"] == pytest.approx(step / 5)
        assert logged["skipped_steps"] == 0 and "nonfinite_batches" not in logged
        assert logged["images_per_s"] > 0 and 0 <= logged["data_wait"] <= 1
        before = step
    assert hooks.logged[15]["grad_norm"] == engine.norm


class Interrupted(Exception):
    pass


class Ends(Hooks):
    """Ends the process in a step's save, as a kill would, and remembers what the checkpoint would hold."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.counters = at, {}

    def save(self, state: TrainState, verdict: StepStatus) -> None:
        super().save(state, verdict)
        if state.step == self.at:
            meter = Meter.restored([state.meter.state() | {"micro_batch": 4}], ALONE, 4, torch.device("cpu"))
            self.counters = {**vars(state), "meter": meter}
            raise Interrupted


@pytest.mark.parametrize("start", [1, 4, 5, 7, 10, 14, 15])
def test_a_resumed_run_goes_on_where_it_stopped(start: int) -> None:
    """Steps, rates, keys, lines, evaluations and weights: with those before the end they are the whole run's."""
    whole, plan = LinearTask(), make_plan()
    _, _, clean = _run(whole, plan)
    task, ends = LinearTask(), Ends(start)
    batches = [make_batch(4, side=4, seed=i) for i in range(10)]
    with pytest.raises(Interrupted):
        train(FakeEngine(task.model, 2), task, FakeLoader(batches), plan, TrainState(), 4, ends, StepSync())
    task.keys.clear()
    _, reader, hooks = _run(task, plan, TrainState(**ends.counters))
    epoch, within = divmod(start, 5)
    asked = [(epoch, 2 * within), *((e, 0) for e in range(epoch + 1, 3))] if start < 15 else []
    assert reader.asked == asked
    assert reader.given == [(s // 5, s % 5 * 2 + m) for s in range(start, 15) for m in range(2)]
    assert [(key.step, key.index) for key in task.keys] == [(s, m) for s in range(start, 15) for m in range(2)]
    assert torch.equal(task.model.weight, whole.model.weight) and torch.equal(task.model.bias, whole.model.bias)
    assert {step for step in ends.logged if step in hooks.logged} == set()
    together = {**ends.logged, **hooks.logged}
    assert together.keys() == clean.logged.keys()
    for step, line in clean.logged.items():
        for name in line.keys() - {"images_per_s", "data_wait"}:
            assert together[step][name] == line[name], (step, name)
    evaluated = [event for event in [*ends.events, *hooks.events] if event[0] == "end_of_epoch"]
    assert evaluated == [("end_of_epoch", step) for step in (5, 10, 15)]


# ---- what is not finite


def test_steps_that_are_not_finite_are_skipped_counted_and_told() -> None:
    """One bad micro-batch makes its step a bad one; weights and the other losses are as if it had not been."""
    _, _, clean = _run(LinearTask(), make_plan())
    task = LinearTask(bad={(2, 0), (2, 1), (3, 1), (6, 0)})
    _, _, hooks = _run(task, make_plan())
    assert hooks.bad == [(3, 1, 1), (4, 2, 2), (7, 3, 1)]
    assert hooks.logged[4]["nonfinite_batches"] == 3
    assert [hooks.logged[step]["skipped_steps"] for step in (1, 4, 5, 8, 15)] == [0, 2, 2, 3, 3]
    assert math.isfinite(hooks.logged[4]["loss"]) and math.isfinite(hooks.logged[4]["loss/half"])
    assert hooks.logged[1] == pytest.approx(hooks.logged[1] | {"loss": clean.logged[1]["loss"]})
    assert "nonfinite_batches" not in hooks.logged[5]
    assert torch.isfinite(task.model.weight).all()


def test_a_skipped_step_changes_no_weight() -> None:
    class Watches(Hooks):
        def save(self, state: TrainState, verdict: StepStatus) -> None:
            weights[state.step] = task.model.weight.detach().clone()

    weights: dict[int, Tensor] = {}
    task, plan = LinearTask(bad={(4, 0)}), make_plan()
    engine, reader = FakeEngine(task.model, 2), FakeLoader([make_batch(4, side=4, seed=i) for i in range(10)])
    train(engine, task, reader, plan, TrainState(), 4, Watches(), StepSync())
    assert torch.equal(weights[5], weights[4])
    assert not torch.equal(weights[6], weights[5])


def test_a_step_that_the_engine_itself_does_not_take_is_a_skipped_one() -> None:
    """A gradient whose square overflows is finite for us and not for DeepSpeed, which says nothing."""
    task, plan, hooks = LinearTask(), make_plan(), Hooks()
    engine, reader = FakeEngine(task.model, 2), FakeLoader([make_batch(4, side=4)] * 10)
    engine.was_step_applied = lambda: len(engine.rates) != 3
    train(engine, task, reader, plan, TrainState(), 4, hooks, StepSync())
    assert hooks.bad == [(3, 1, 1)]


@pytest.mark.parametrize("first_bad", [0, 1, 4, 7])
def test_five_bad_steps_in_a_row_end_the_training(first_bad: int) -> None:
    task = LinearTask(bad={(step, step % 2) for step in range(first_bad, 15)})
    engine, reader, hooks = FakeEngine(task.model, 2), FakeLoader([make_batch(4, side=4)] * 10), Hooks()
    end = first_bad + MAX_BAD_STEPS
    with pytest.raises(TrainingError, match=rf"last {MAX_BAD_STEPS} steps, up to step {end};"):
        train(engine, task, reader, make_plan(), TrainState(), 4, hooks, StepSync())
    assert hooks.bad[-1] == (end, MAX_BAD_STEPS, MAX_BAD_STEPS)
    assert hooks.events[-1] == ("log", end) and hooks.logged[end]["skipped_steps"] == MAX_BAD_STEPS
    assert ("save", end) not in hooks.events


def test_a_good_step_between_them_lets_it_go_on() -> None:
    bad = {(step, 0) for step in range(15) if step % MAX_BAD_STEPS}
    _, _, hooks = _run(LinearTask(bad=bad), make_plan())
    assert max(row for _, _, row in hooks.bad) == MAX_BAD_STEPS - 1
    assert hooks.logged[15]["skipped_steps"] == len(bad)


def test_the_row_goes_on_over_a_restart() -> None:
    task = LinearTask(bad={(step, 0) for step in range(7, 15)})
    with pytest.raises(TrainingError, match="up to step 9"):
        _run(task, make_plan(), TrainState(step=7, skipped=3, bad_in_row=3, meter=Meter(batches=0)), log_every=100)


# ---- being asked to stop


class Asks(Hooks):
    """Receives a signal while a step is saved, which is between two steps."""

    def __init__(self, signals: StopSignals, at: int) -> None:
        super().__init__()
        self.signals, self.at = signals, at

    def save(self, state: TrainState, verdict: StepStatus) -> None:
        super().save(state, verdict)
        if state.step == self.at:
            self.signals.received = 15


@pytest.mark.parametrize("at", [1, 6, 13])
def test_a_signal_ends_the_training_after_the_next_steps_save(at: int) -> None:
    task, signals = LinearTask(), StopSignals()
    hooks = Asks(signals, at)
    engine, reader = FakeEngine(task.model, 2), FakeLoader([make_batch(4, side=4)] * 10)
    with pytest.raises(StopRequested, match=rf"SIGTERM after step {at + 1};"):
        train(engine, task, reader, make_plan(), TrainState(), 4, hooks, StepSync(signals))
    assert hooks.events[-1] == ("save", at + 1)
    assert hooks.verdicts[-1].signal == 15 and not hooks.verdicts[-2].signal


def test_a_signal_in_the_last_step_lets_the_stage_finish() -> None:
    task, signals = LinearTask(), StopSignals()
    engine, reader = FakeEngine(task.model, 2), FakeLoader([make_batch(4, side=4)] * 10)
    hooks = Asks(signals, 14)
    train(engine, task, reader, make_plan(), TrainState(), 4, hooks, StepSync(signals))
    assert hooks.events[-1] == ("log", 15)
