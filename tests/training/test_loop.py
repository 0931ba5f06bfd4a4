from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mrmae_ds.data.reader import Batch
from mrmae_ds.training.launch import Launch
from mrmae_ds.training.loop import Plan, TrainingError, train
from mrmae_ds.training.tasks import StepKey

from .builders import FakeEngine, FakeReader, finetune_config, make_batch, make_plan, optimizer_config

pytestmark = pytest.mark.usefixtures("alone")


class LinearTask:
    """Pulls the mean output of a linear layer to 1; not a number at the given (step, micro)."""

    def __init__(self, bad: set[tuple[int, int]] | None = None) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 1)
        self.teachers: dict[str, Any] = {}
        self.bad = bad or set()
        self.keys: list[StepKey] = []
        self.seen: list[Batch] = []

    def groups(self) -> list[dict[str, Any]]:
        return []

    def to(self, device: torch.device) -> None:
        pass

    def losses(self, engine: Any, batch: Batch, key: StepKey) -> dict[str, Tensor]:
        self.keys.append(key)
        self.seen.append(batch)
        colours = batch.images.float().mean((2, 3)) / 255
        loss = (engine(colours) - 1).square().mean()
        if (key.step, key.micro) in self.bad:
            loss = loss * float("nan")
        return {"loss": loss, "half": loss.detach() / 2}


class Hooks:
    """Writes down what it is told, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.epochs: list[tuple[int, int]] = []
        self.logged: dict[int, dict[str, float]] = {}

    def end_of_epoch(self, epochs: int, step: int) -> dict[str, float]:
        self.events.append(("end_of_epoch", step))
        self.epochs.append((epochs, step))
        return {"top1": 10.0 * epochs}

    def log(self, step: int, values: dict[str, float]) -> None:
        assert step not in self.logged
        self.events.append(("log", step))
        self.logged[step] = values

    def save(self, epochs: int, step: int) -> None:
        self.events.append(("save", step))
        self.epochs.append((epochs, step))


def _run(task: LinearTask, plan: Plan, start: int = 0, log_every: int = 4) -> tuple[FakeEngine, FakeReader, Hooks]:
    engine = FakeEngine(task.model, plan.accumulation)
    batches = plan.steps_per_epoch * plan.accumulation
    reader = FakeReader([make_batch(plan.micro_batch, side=4, seed=i) for i in range(batches)])
    hooks = Hooks()
    train(engine, task, reader, plan, start, log_every, hooks)
    return engine, reader, hooks


# ---- the arithmetic of a stage


def test_steps_and_keys() -> None:
    plan = make_plan(finetune_config(epochs=3), Launch(2, 0, 4, 4))
    assert (plan.epochs, plan.total_steps) == (3, 15)
    assert plan.key(7, 1) == StepKey(seed=3, step=7, micro=1, rank=2, world_size=4, micro_batch=4)


def _formula(step: int, peak: float, floor: float, warmup: float, epochs: int, per_epoch: int) -> float:
    done = step / per_epoch
    if done < warmup:
        return peak * done / warmup
    return floor + (peak - floor) * (1 + math.cos(math.pi * (done - warmup) / (epochs - warmup))) / 2


def test_the_rate_of_every_step_follows_the_schedule() -> None:
    stage = finetune_config(epochs=4, optimizer=optimizer_config(lr=0.3, min_lr=0.02, warmup_epochs=1.5))
    plan = make_plan(stage, steps_per_epoch=7)
    rates = [plan.rate(step) for step in range(28)]
    assert rates == pytest.approx([_formula(step, 0.3, 0.02, 1.5, 4, 7) for step in range(28)], rel=1e-12)
    assert rates[0] == 0.0 and max(rates) <= 0.3


def test_a_base_rate_is_scaled_by_the_global_batch() -> None:
    optimizer = optimizer_config(lr=None, base_lr=0.1, warmup_epochs=0)
    plan = make_plan(finetune_config(batch_size=1024, optimizer=optimizer))
    assert plan.rate(0) == pytest.approx(0.4)


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
    assert [(key.step, key.micro) for key in task.keys] == [(s, m) for s in range(15) for m in range(2)]
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


def test_an_epoch_ends_with_evaluation_then_log_then_save() -> None:
    _, _, hooks = _run(LinearTask(), make_plan(), log_every=100)
    assert hooks.events[0] == ("log", 1)
    expected = [(event, step) for step in (5, 10, 15) for event in ("end_of_epoch", "log", "save")]
    assert hooks.events[1:] == expected
    assert hooks.epochs == [(1, 5), (1, 5), (2, 10), (2, 10), (3, 15), (3, 15)]
    assert [values.get("top1") for values in hooks.logged.values()] == [None, 10.0, 20.0, 30.0]


def test_the_engine_trains_again_after_an_evaluation() -> None:
    class Evaluates(Hooks):
        engine: FakeEngine

        def end_of_epoch(self, epochs: int, step: int) -> dict[str, float]:
            self.engine.eval()
            return {}

    class Watches(LinearTask):
        def losses(self, engine: Any, batch: Batch, key: StepKey) -> dict[str, Tensor]:
            assert engine.training and engine.module.training
            return super().losses(engine, batch, key)

    task, plan, hooks = Watches(), make_plan(), Evaluates()
    engine = hooks.engine = FakeEngine(task.model, plan.accumulation)
    reader = FakeReader([make_batch(4, side=4)] * 10)
    train(engine, task, reader, plan, 0, 4, hooks)
    assert False in engine.modes


def test_what_is_logged_is_the_mean_of_its_interval() -> None:
    task, plan = LinearTask(), make_plan()
    values: dict[tuple[int, int], float] = {}
    plain = task.losses

    def remembered(engine: Any, batch: Batch, key: StepKey) -> dict[str, Tensor]:
        losses = plain(engine, batch, key)
        values[key.step, key.micro] = losses["loss"].item()
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


@pytest.mark.parametrize("start", [0, 1, 5, 7, 14])
def test_a_resumed_run_goes_on_where_it_stopped(start: int) -> None:
    whole, plan = LinearTask(), make_plan()
    _run(whole, plan)
    resumed = LinearTask()
    short = make_plan()
    # Stops after `start` steps, as a killed run does, and goes on with a new engine and reader.
    engine = FakeEngine(resumed.model, plan.accumulation)
    batches = [make_batch(4, side=4, seed=i) for i in range(10)]
    for step in range(start):
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.5 * _formula(step, 0.5, 0.0, 1, 3, 5)
        for micro in range(2):
            engine.backward(resumed.losses(engine, batches[step % 5 * 2 + micro], plan.key(step, micro))["loss"])
            engine.step()
    resumed.keys.clear()
    _, reader, hooks = _run(resumed, short, start=start)
    epoch, within = divmod(start, 5)
    assert reader.asked == [(epoch, 2 * within), *((e, 0) for e in range(epoch + 1, 3))]
    assert reader.given == [(s // 5, s % 5 * 2 + m) for s in range(start, 15) for m in range(2)]
    assert resumed.keys[0] == plan.key(start, 0) and len(resumed.keys) == 2 * (15 - start)
    logged = list(hooks.logged)
    assert logged == [step for step in range(start + 1, 16) if step == 1 or step % 4 == 0 or step % 5 == 0]
    torch.testing.assert_close(resumed.model.weight, whole.model.weight, rtol=0, atol=1e-7)


def test_a_finished_run_has_nothing_to_do() -> None:
    task = LinearTask()
    _, reader, hooks = _run(task, make_plan(), start=15)
    assert (reader.asked, hooks.events, task.keys) == ([], [], [])


def test_some_batches_that_are_not_finite_are_counted_and_left_out() -> None:
    _, _, clean = _run(LinearTask(), make_plan())
    task = LinearTask(bad={(2, 0), (2, 1), (3, 1)})
    engine, _, hooks = _run(task, make_plan())
    assert hooks.logged[4]["nonfinite_batches"] == 3
    assert hooks.logged[4]["skipped_steps"] == engine.skipped_steps == 2
    assert math.isfinite(hooks.logged[4]["loss"]) and math.isfinite(hooks.logged[4]["loss/half"])
    assert hooks.logged[1] == pytest.approx(hooks.logged[1] | {"loss": clean.logged[1]["loss"]})
    assert "nonfinite_batches" not in hooks.logged[5]
    assert torch.isfinite(task.model.weight).all()


@pytest.mark.parametrize(("first_bad", "raised_at", "interval"), [(0, 5, 1), (1, 8, 3), (4, 10, 2), (5, 10, 2)])
def test_five_steps_without_a_finite_loss_end_the_training(first_bad: int, raised_at: int, interval: int) -> None:
    task = LinearTask(bad={(step, micro) for step in range(first_bad, 15) for micro in range(2)})
    engine = FakeEngine(task.model, 2)
    reader, hooks = FakeReader([make_batch(4, side=4)] * 10), Hooks()
    with pytest.raises(TrainingError, match=rf"up to step {raised_at};"):
        train(engine, task, reader, make_plan(), 0, 4, hooks)
    assert hooks.events[-1] == ("log", raised_at)
    assert hooks.logged[raised_at]["nonfinite_batches"] == 2 * interval
    assert math.isnan(hooks.logged[raised_at]["loss"])
    assert ("save", raised_at) not in hooks.events
